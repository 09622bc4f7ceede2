"""The scored run: complete rows stand before anything that could stop it."""

from pathlib import Path

from kernel.competition import Competition
from kernel.faults import one_line
from kernel.files import write_text
from kernel.logs import log
from kernel.mounts import find_sample
from kernel.options import Options
from kernel.rows import csv_line, line_without_mask, read_lines
from kernel.submission import Submission
from kernel.task import read_sample


def _write_described(sample: Path, competition: Competition, options: Options) -> None:
    layout, pairs = read_sample(sample, competition, options.layout)
    Submission(options.output, layout, pairs).save()


def _write_blanked(sample: Path, competition: Competition, options: Options) -> None:
    with read_lines(sample) as lines:
        header = next(lines, [])
        rows = [line_without_mask(cells, header, competition) for cells in lines]
    write_text(options.output, "".join([csv_line(header), *rows]))


def _write_copy(sample: Path, _: Competition, options: Options) -> None:
    write_text(options.output, sample.read_text(encoding="utf-8", errors="surrogateescape"))


def write_empty_rows(options: Options, competition: Competition) -> bool:
    """Write the sample's rows with empty masks; return whether they stand at the output.

    They are those of the description; where it does not fit the sample, the sample's own lines
    without their masks; where it is no csv, a copy of it.
    """
    try:
        sample = options.sample or find_sample(options.input, competition)[0]
    except Exception as error:  # the run may find its rows elsewhere
        log.warning("no rows to write before the run: %s", one_line(error))
        return False
    for write in (_write_described, _write_blanked, _write_copy):
        try:
            write(sample, competition, options)
            return True
        except Exception as error:  # the next needs less of the sample
            log.warning("%s", one_line(error))
    return False

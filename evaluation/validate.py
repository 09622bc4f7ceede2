"""Checks a submission against the sample that it answers; exit code 1 where Kaggle refuses it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kernel.command import new_parser, run_command
from kernel.image_folders import one_folder
from kernel.logs import log
from kernel.rle import is_empty_mark
from kernel.rows import read_rows
from kernel.shipped import add_competition_option, find_competition
from kernel.task import instances_fault, read_sample
from kernel.validator import check_submission

EXAMPLE = "  python evaluation/validate.py submission.csv --sample sample_submission.csv"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    parser.add_argument("submission", type=Path)
    parser.add_argument("--sample", type=Path, required=True, help="the competition's own, mounted")
    parser.add_argument("--images", type=Path, help="their folder, where sizes differ")
    add_competition_option(parser)
    return parser.parse_args(arguments)


def validate(args: argparse.Namespace) -> int:
    """Print the findings; return 1 where Kaggle would refuse the submission.

    Raises:
        OSError: the submission is no file that can be read, of which nothing is said.
    """
    competition = find_competition(args.competition)
    with args.submission.open("rb"):
        pass
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images}: no such folder of images")
    rows = read_rows(args.sample, competition).rows
    if fault := instances_fault(args.sample, rows, competition):
        raise ValueError(fault)
    mark = next((rle for *_, rle in rows if rle and is_empty_mark(rle)), None)
    if mark:
        log.warning(
            "%s: %r has no pixel, and the description's `empty` is %r: correct it if the sample "
            "writes empty masks so",
            args.sample,
            mark,
            competition.empty,
        )
    layout, pairs = read_sample(args.sample, competition)
    images, columns = args.images and one_folder(args.images, competition), layout.columns
    if images and pairs and not any((images / name).exists() for name, _ in pairs):
        raise ValueError(
            f"--images {args.images}: has none of the sample's images, such as {pairs[0][0]!r}; "
            "name the folder that they are in"
        )
    findings = check_submission(args.submission, columns, pairs, competition, images)
    print("\n".join(findings.lines()))
    return 1 if findings.errors else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: validate(parse_args(arguments)))


if __name__ == "__main__":
    main()

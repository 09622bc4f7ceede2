"""Packs trained checkpoints into a Kaggle dataset and an offline submission kernel.

With --fit it writes a kernel that fits such checkpoints on Kaggle.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kernel.command import run_command
from kernel.manifest import MANIFEST, load_manifest
from kernel.shipped import add_competition_option, find_competition
from packing.bundle import build
from packing.fit_kernel import build_fit
from packing.metadata import find_owner
from packing.new_competition import write_description
from packing.paths import MEMBERS, NOTEBOOK, OUT, WEIGHTS
from packing.summary import print_fit_next, print_next, print_table

HOURS = 11.5  # of fitting, unless --hours says otherwise
USAGE = f"""\
python build_kernel.py --owner NAME [--weights weights] [--out dist] [--openvino] [--notebook]
       python build_kernel.py --fit --owner NAME [--hours {HOURS}] [--resume] [--members LIST]
       python build_kernel.py --new-competition SAMPLE.CSV --images DIR --out mine.json"""
BUNDLE = "a bundle"
OPTIONS = {  # what each purpose reads beside --out and --owner
    BUNDLE: ("--weights", "--openvino", "--notebook", "--competition"),
    "--fit": ("--fit", "--hours", "--resume", "--members"),
    "--new-competition": ("--new-competition", "--images"),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__)
    add = parser.add_argument
    add("--weights", type=Path, help=f"{MANIFEST}'s folder (default: the project's weights)")
    add("--out", type=Path, default=OUT, help="becomes OUT/dataset, OUT/kernel")
    about = "your Kaggle name (default: KAGGLE_USERNAME, or the name in the kaggle client's files)"
    add("--owner", help=about)
    about = "also pack OpenVINO and the members as it reads them: for kernels without a GPU"
    add("--openvino", action="store_true", help=about)
    add("--notebook", action="store_true", help=f"the kernel as {NOTEBOOK} instead of a script")
    add_competition_option(parser)
    new = parser.add_argument_group("a new competition").add_argument
    about = "propose its description from a sample submission; write it to --out, a .json file"
    new("--new-competition", type=Path, metavar="SAMPLE.CSV", help=about)
    new("--images", type=Path, metavar="DIR", help="some of the sample's images")
    fit = parser.add_argument_group("the fit on Kaggle").add_argument
    about = "write OUT/fit instead: a kernel that fits the members on Kaggle's two GPUs"
    fit("--fit", action="store_true", help=about)
    about = f"of fitting, all sessions together (default {HOURS}, one session's)"
    fit("--hours", type=float, help=about)
    fit("--resume", action="store_true", help="go on from the output of its last run on Kaggle")
    about = "the list of members (default: training/members.txt)"
    fit("--members", type=Path, help=about)
    return parser.parse_args(arguments)


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that what is to be built does not read."""
    chosen = "--new-competition" if args.new_competition else "--fit" if args.fit else BUNDLE
    for purpose, options in OPTIONS.items():
        values = {each: vars(args)[each[2:].replace("-", "_")] for each in options}
        given = [each for each, value in values.items() if value is not None and value is not False]
        if given and purpose != chosen:
            needs = "" if purpose in (BUNDLE, given[0]) else f"needs {purpose}; "
            raise ValueError(f"{given[0]}: {needs}leave it out with {chosen}")


def describe(args: argparse.Namespace) -> int:
    """Write the description that a sample suggests; print what it could not see."""
    if not args.images or args.out.suffix != ".json":
        raise ValueError("--new-competition needs --images DIR and --out mine.json")
    proposal = write_description(args.new_competition, args.images, args.out)
    print(f"{args.out}: correct what the sample and its images do not show:")
    print("\n".join(f"  {line}" for line in proposal.unsure))
    return 0


def run(args: argparse.Namespace) -> int:
    """Build the bundle or the fit kernel; print what it holds and what comes next."""
    check_options(args)
    if args.new_competition:
        return describe(args)
    owner = args.owner or find_owner()
    if args.fit:
        hours = HOURS if args.hours is None else args.hours
        kernel = build_fit(args.out, owner, args.members or MEMBERS, hours, args.resume)
        print_fit_next(args.out, kernel, hours, args.members)
        return 0
    competition = find_competition(args.competition) if args.competition else None
    weights = args.weights or WEIGHTS
    metadata, packed = build(weights, args.out, owner, args.openvino, args.notebook, competition)
    print_table(weights, packed)
    print_next(args.out, metadata, load_manifest(args.out / "dataset").competition.slug)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: run(parse_args(arguments)))


if __name__ == "__main__":
    main()

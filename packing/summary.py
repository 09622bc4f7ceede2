"""What a build prints: a table of its members, and the commands that come next."""

import shlex
from pathlib import Path
from typing import Any

from kernel.competition import SEVERSTAL
from packing.members import PackedMember
from packing.metadata import PLACEHOLDER, Metadata
from packing.paths import OUT

ROW = "{:<20} {:<24} {:<12} {:>11} {:>7} {:>11}"


def print_table(folder: Path, packed: list[PackedMember]) -> None:
    """Print one line a member of the folder of weights, and the totals."""
    print(f"The members of {folder}:")
    print(ROW.format("member", "encoder", "decoder", "parameters", "MB", "GFLOP/pass"))
    for each in packed:
        model = each.spec.model
        names = each.spec.name, model["encoder_name"], model["arch"]
        print(ROW.format(*names, *_numbers([each])))
        for note in each.notes:
            print(f"  {note}")
    print(ROW.format("total", "", "", *_numbers(packed)))
    print("A pass is one image through one member; a multiply-add counts as 2.")


def _numbers(packed: list[PackedMember]) -> tuple[str, str, str]:
    """Parameters, megabytes and GFLOP of members together."""
    parameters = sum(each.n_parameters for each in packed)
    megabytes = sum(each.n_bytes for each in packed) / 1e6
    gflop = sum(sum(each.spec.flops) for each in packed) / 1e9
    return f"{parameters:,}", f"{megabytes:.1f}", f"{gflop:.1f}"


def print_fit_next(out: Path, metadata: dict[str, Any], hours: float, members: Path | None) -> None:
    """Print the commands that fit on Kaggle, fetch what was fitted, and go on."""
    owner = str(metadata["id"]).split("/")[0]
    place = f"--owner {owner}" + (f" --out {shlex.quote(str(out))}" if out != OUT else "")
    _print_owner(owner)
    print(f"  kaggle kernels push -p {shlex.quote(str(out / 'fit'))}")
    print(f"and when it has run (kaggle kernels status {metadata['id']}):")
    print(f"  kaggle kernels output {metadata['id']} -p fitted -o")
    print(f"  python build_kernel.py --weights fitted {place}")
    again = f"--fit --resume --hours {hours:g} {place}"
    again += f" --members {shlex.quote(str(members))}" if members else ""
    print(f"Members that are not finished go on: build with {again}, and push again.")


def _print_owner(owner: str) -> None:
    if owner == PLACEHOLDER:
        print(
            f"\nThe owner is still {PLACEHOLDER}: build again with --owner NAME before uploading."
        )
    print(f"\nNext, for {owner}:")


def print_next(out: Path, metadata: Metadata, slug: str) -> None:
    """Print the commands that upload and submit the bundle to the competition `slug`."""
    kernel = metadata.kernel
    _print_owner(metadata.owner)
    bundle = "" if out == OUT else f" --bundle {shlex.quote(str(out))}"
    print(f"  python evaluation/dry_run.py{bundle}")
    print("and when that says Ready for Kaggle:")
    print(f"  kaggle datasets create -p {shlex.quote(str(out / 'dataset'))}")
    print(f"  kaggle datasets status {metadata.dataset['id']}")
    print("and when that says ready (before, the kernel gets no members, or the last version's):")
    print(f"  kaggle kernels push -p {shlex.quote(str(out / 'kernel'))}")
    print("once: it prints a number, the VERSION. It runs on Kaggle until this says complete:")
    print(f"  kaggle kernels status {kernel['id']}")
    print("and then:")
    print(
        f"  kaggle competitions submit {slug} -k {kernel['id']}"
        " -v VERSION -f submission.csv -m first"
    )
    if slug != SEVERSTAL.slug:
        print(
            f"or, where it takes files: kaggle kernels output {kernel['id']} -p out -o, then kaggle"
            f" competitions submit {slug} -f out/submission.csv -m first"
        )
    later = f"kaggle datasets version -p {shlex.quote(str(out / 'dataset'))} -m MESSAGE"
    print(f"Later versions: {later}, then the same from its status on.")

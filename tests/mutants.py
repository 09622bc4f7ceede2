"""Mutation testing of the kernel: a seeded sample of mutmut's mutants, and which lived.

    python tests/mutants.py --sample 160

`make mutants`. All of them would take hours. A mutant is a change of one step of the code; where no
test fails with it, it survives, and the tests have a gap or the step makes no difference. mutmut's
mutants live in the process of the tests: those of `ELSEWHERE` run in none, or only write help.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

FOUND = Path("mutants/kernel")  # a .meta a module
KILLED = {1, 3, 24, -24, 36}  # mutmut's exit codes of a test that failed, and of one without an end
# What runs only in processes of their own, on a GPU or in OpenVINO; and the texts of --help.
ELSEWHERE = (
    r"\.x(ǁ(OpenVino|Reference)ǁ.*|_(start_worker|start_log|parse_options|device_usable"
    r"|load_openvino|load_checked_openvino|load_openvino_members|_join_halves|openvino_files|_share"
    r"|entry_of|reference_file|write_reference|read_reference|logits_of))__mutmut"
)


def mutmut(*names: str) -> None:
    """Run these mutants; the first time, make all of them and learn which tests reach them."""
    fewer = os.environ | {"MACHINES": "40", "FUZZ": "60"}  # for every mutant, so not so many
    subprocess.run([sys.executable, "-m", "mutmut", "run", *names], check=True, env=fewer)


def main() -> None:
    """Draw, run and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # mutmut copies the manifest there, and makes no folder for it
    Path("mutants", "weights").mkdir(parents=True, exist_ok=True)
    mutmut("kernel.rows.x_csv_line__mutmut_1")
    names = [name for name in read_codes() if not re.search(ELSEWHERE, name)]
    drawn = random.Random(args.seed).sample(sorted(names), min(args.sample, len(names)))
    mutmut(*drawn)
    codes = read_codes()
    killed = sum(codes[name] in KILLED for name in drawn)
    print(f"\n{killed} of {len(drawn)} killed, {killed / len(drawn):.1%}; of {len(names)} in all")
    survived = sorted(name for name in drawn if codes[name] not in KILLED)
    for function, count in Counter(re.sub(r"__mutmut_\d+$", "", s) for s in survived).most_common():
        print(f"   {count} {function}")
    for name in survived:
        subprocess.run([sys.executable, "-m", "mutmut", "show", name], check=False)


def read_codes() -> dict[str, int | None]:
    """Return every mutant's exit code, None for one that did not run."""
    codes: dict[str, int | None] = {}
    for path in FOUND.glob("*.meta"):
        codes |= json.loads(path.read_text())["exit_code_by_key"]
    return codes


if __name__ == "__main__":
    main()

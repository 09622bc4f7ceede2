"""The report on the terminal: verdict, seconds, the scored run, Dice; then the ablation."""

from collections.abc import Iterable
from typing import Any

from evaluation.page import figure
from evaluation.report import PassWork, Report, sum_by

MARKS = {True: "ok", False: "NO", None: "–"}


def _table(heads: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Columns two spaces apart, the first to the left and the others to the right."""
    table = [tuple(heads.split("|")), *rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _answer_lines(report: Report) -> list[str]:
    """The verdict, then what it is made of."""
    clean, kaggle, here = report.clean, report.kaggle, report.here
    checks = [f"   {MARKS[check.ok]:<4}{check.words}" for check in clean.checks]
    machine = kaggle.machine.removeprefix("Kaggle's ")
    return [
        f"== {report.verdict}",
        "\n".join([f"   The run was {'clean' if clean.ok else 'NOT clean'}", *checks]),
        f"   On Kaggle's {machine}, {kaggle.how}\n"
        f"   {MARKS[kaggle.fits and (kaggle.sure or None)]:<4}{kaggle.words}",
        f"   On this machine, projected\n   {MARKS[here.fits or None]:<4}{here.words}",
    ]


def _pass_table(passes: Iterable[PassWork], key: str) -> str:
    rows = (
        (name, f"{row['encoders']:.0f}", f"{row['encoder_s']:.2f}",
         f"{row['decoders']:.0f}", f"{row['decoder_s']:.2f}")
        for name, row in sum_by(passes, key).items()
    )  # fmt: skip
    return _table(f"{key}|encoders|seconds|decoders|seconds", rows)


def _run_lines(report: Report) -> list[str]:
    """Where the seconds of the run went."""
    run, passes = report.run, report.passes
    stages = ((row.stage, f"{row.seconds:.2f}", f"{row.share:.1%}") for row in report.stages)
    return [
        _table("stage|seconds|share", stages),
        _pass_table(passes, "member"),
        _pass_table(passes, "flip"),
        f"   {run.strips_per_s:.2f} strips/s on {run.device}, {run.workers} process(es);"
        f" {run.non_empty_masks:,} non-empty masks; {run.share_of_full_work:.0%} of the full work"
        f" ran; {run.peak_bytes / 1e9:.2f} GB of memory in one process,"
        f" {run.gpu_bytes / 1e9:.2f} GB of a GPU's",
    ]


def _scored_run_lines(report: Report) -> list[str]:
    """The scored run on Kaggle's machines, and on this one with less to do."""
    machines = (
        (each.machine, f"{each.seconds:,.0f}", each.how,
         "every pass" if each.fits else "drops passes")
        for each in report.machines
    )  # fmt: skip
    drops = ((row.without, f"{row.saves_s:,.0f}", f"{row.total_s:,.0f}") for row in report.drops)
    lines = [
        _table("the scored run on Kaggle|seconds||", machines),
        _table("here, without|saves s|leaves s", drops),
    ]
    if report.drop_to_fit:
        names = ", then ".join(report.drop_to_fit)
        lines.append(f"   To run the other passes in time here, drop {names}.")
    return lines


def _dice_line(dice: dict[str, Any], drawn: bool) -> str:
    """The Dice over all pairs, over those with a defect and of each class."""
    named, whose = dice["per_class"].items(), " of drawn strips" if drawn else ""
    classes = "".join(f", class {label} {figure(value)}" for label, value in named)
    return (
        f"   Dice{whose} {figure(dice['dice'])} over all pairs, {figure(dice['dice_non_empty'])} "
        f"over those with a defect{classes}; {figure(dice['clean_left_empty'], '.1%')} of the "
        "clean strips left empty"
    )


def ablation_table(ablation: dict[str, Any]) -> str:
    """Return the ablation's variants for the terminal."""
    rows = [
        (
            found["name"],
            *(figure(found[key], ".4f") for key in ("dice", "dice_non_empty", "clean_left_empty")),
            f"{found['strip_s']:.3f}",
            *(figure(found["best"][key], ".4f") for key in ("dice", "dice_non_empty")),
            f"{found['best']['threshold']:g}",
            str(found["best"]["min_area"]),
            "← proposed" if found["name"] == ablation["proposed"] else "",
        )
        for found in ablation["variants"]
    ]
    heads = f"of {ablation['strips']} strips|Dice|non-empty|clean|s/strip"
    return _table(f"{heads}|at best|non-empty|threshold|min_area|", rows)


def as_lines(report: Report) -> str:
    """Return the report for the terminal, the verdict first, without its ablation."""
    parts = [*_answer_lines(report), *_run_lines(report), *_scored_run_lines(report)]
    if report.dice:
        parts.append(_dice_line(report.dice, report.drawn))
    return "\n\n".join(parts)

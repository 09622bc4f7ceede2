"""What the cluster costs: its figures from times that are known, and one small run of stubs."""

import json
import mmap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT, exit_code, run_script

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")


@pytest.mark.parametrize(
    ("times", "workers", "warm_up", "seconds"),
    [
        ([10.0, 12.0, 14.0, 16.0], 1, 1, 1.0),
        ([10.0, 10.5, 12.0, 12.5], 2, 1, 0.5),
        ([10.0, 18.0, 22.0, 24.0], 1, 2, 1.5),
    ],
)
def test_a_strips_seconds_begin_when_every_worker_is_warm(
    times: list[float], workers: int, warm_up: int, seconds: float
) -> None:
    from cluster_overhead import strip_seconds

    assert strip_seconds(times, workers, per_part=2, warm_up=warm_up) == seconds


def test_a_few_images_go_through_stub_members_and_are_a_line_of_the_table(tmp_path: Path) -> None:
    words = ["million", "--images", 120, "--images-per-part", 12, "--out", tmp_path]
    ended = run_script(ROOT / "bench" / "cluster_overhead.py", *words)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "cluster.json").read_text())["million"]
    assert (found["images"], found["per_part"]) == (120, 12)
    assert found["images_per_s"] > 0
    table = (tmp_path / "cluster.md").read_text()
    assert "| 120 small images, stub members, 12 a part |" in table
    assert "| one worker ÷" not in table  # was not asked for


@pytest.mark.parametrize(
    ("part", "threads", "what"), [("kernel", None, ""), ("thread", 1, ", one thread each")]
)
def test_a_race_gives_the_ratio_of_the_medians_and_a_line_of_the_table(
    part: str, threads: int | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cluster_overhead

    kernel, worker = [2.0, 9.0, 2.5], [5.0, 4.0, 6.0]
    asked = set()
    for name, seconds in (("time_kernel", iter(kernel)), ("time_workers", iter(worker))):

        def timed(*_: Path, seconds: Iterator[float] = seconds, **given: int) -> dict[str, float]:
            asked.add(given.get("threads", given.get("cpus")))
            return {"strip_s": next(seconds), "before_s": 1.0}

        monkeypatch.setattr(cluster_overhead, name, timed)
    words = [part, "--rounds", "3", "--strips", "32", "--out", str(tmp_path)]
    assert exit_code(cluster_overhead.main, *words) == 0
    assert asked == {threads}
    found = json.loads((tmp_path / "cluster.json").read_text())[part]
    assert found["ratio"] == 5.0 / 2.5
    assert found["rounds"] == {"one worker": worker, "kernel": kernel}
    line = f"| one worker ÷ the plain kernel{what}, seconds a strip | 5.00 ÷ 2.50 = 2.00 |"
    assert line in (tmp_path / "cluster.md").read_text().splitlines()


@pytest.mark.parametrize("strips", ["16", "24", "40"])
def test_strips_of_which_none_would_count_are_refused_in_one_line(
    strips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cluster_overhead

    words = ["kernel", "--strips", strips, "--out", str(tmp_path)]
    assert exit_code(cluster_overhead.main, *words) == 2
    assert f"--strips {strips}: expected a multiple of 16 above 16" in capsys.readouterr().err


def test_of_two_kernels_beside_each_other_a_strip_takes_half_its_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cluster_overhead

    taken = iter([{"strip_s": 3.0, "before_s": 1.0}, {"strip_s": 5.0, "before_s": 2.0}])
    monkeypatch.setattr(cluster_overhead, "time_kernel", lambda *_: next(taken))
    found = cluster_overhead.time_kernels(tmp_path, tmp_path, tmp_path, count=2)
    assert found == {"strip_s": 2.0, "before_s": 2.0}


def test_private_memory_is_that_of_this_process_and_those_below_it() -> None:
    from cluster_overhead import private_mb

    before, size = private_mb()["driver"], 80_000_000
    # Not from the heap, which may have kept as much that is free.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        assert 70 < private_mb()["driver"] - before < 120

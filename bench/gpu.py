"""What a CUDA machine makes of the kernel: its tests there, a race, images a second by batch size.

    python bench/gpu.py

Unattended, in under 9 minutes; what there is no time for is left out and named. Without the shipped
checkpoints the same networks get seeded random weights: a pass takes as long, but the early exit
saves what such members let it. Writes gpu.json beside this file and prints a table.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from strips import draw_strip
from torch import Tensor, nn

from kernel.batch_limits import GPU_BATCH_SIZE
from kernel.command import new_parser, run_command
from kernel.competition import IMAGE_SIZE
from kernel.device import is_out_of_memory, pick_device
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.files import write_json
from kernel.images import Image, Size, Strip
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest, MemberSpec, load_manifest, manifest_entries
from kernel.members import Member, build_network, load_member
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from packing.members import flops_of

HERE = Path(__file__).parent
ROOT = HERE.parent
BUDGET_S = 480.0  # sections begin no later
BATCHES = (1, 2, 4, 8, 16, 32)
COMPILER = "inductor"  # torch.compile's
TESTS = ("tests/kernel/test_gpu.py", "tests/kernel/test_fake_gpu.py")

# --- the members ----------------------------------------------------------------------------------


def _weights_of(spec: MemberSpec, folder: Path) -> dict[str, Tensor]:
    """A member's checkpoint, or seeded random weights where it is not there."""
    path = folder / spec.file
    if path.is_file():
        return load_file(path)
    torch.manual_seed(0)
    return {key: value.clone() for key, value in build_network(spec.model).state_dict().items()}


def write_bundle(weights: Path, folder: Path) -> tuple[Manifest, bool]:
    """Write the members of the folder `weights` as a bundle; whether all have their checkpoint."""
    manifest, specs = load_manifest(weights), list[MemberSpec]()
    for spec in manifest.members:
        save_file(_weights_of(spec, weights), folder / spec.file)
        flops = flops_of(spec, manifest.image_size or IMAGE_SIZE)
        specs.append(replace(spec, sha256="", flops=flops))
    bundle = replace(manifest, members=specs)
    write_json(folder / MANIFEST, manifest_entries(bundle))
    return bundle, all((weights / spec.file).is_file() for spec in specs)


# --- the clock ------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Return when the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least seconds of some runs; the first, which compiles and tries, does not count."""
    taken = list[float]()
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def matrix_rate(device: torch.device, side: int = 8192) -> float:
    """FLOP/s of a product of two matrices: fp16 on a GPU, else fp32."""
    gpu = device.type == "cuda"
    side = side if gpu else side // 8
    a = torch.rand(side, side, device=device, dtype=torch.float16 if gpu else torch.float32)
    return 2.0 * side * side * side / seconds_of(lambda: a @ a, device)


# --- sections -------------------------------------------------------------------------------------


def sweep_batches(
    ensemble: Ensemble, peak: float, size: Size, batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Every member once, in one piece: images/s, share of the peak and memory by batch size."""
    device, rows = ensemble.device, {}
    flip = ensemble.manifest.flips[0]
    passes = [i for i, each in enumerate(ensemble.passes) if each.flip == flip]
    flops = sum(sum(ensemble.passes[i].flops) for i in passes)
    for batch in batches:
        images = torch.rand(batch, 1, *size, device=device)

        def run(images: Tensor = images) -> None:
            for pass_id in passes:
                ensemble.run_pass(pass_id, images, size)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds = seconds_of(run, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        rows[str(batch)] = {
            "images_a_second": batch / seconds,
            "share_of_peak": batch * flops / seconds / peak,
            "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        }
    return rows


def eager_half(member: Member, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A member as public kernels run it: fp32 weights, cast on every call."""

    def run(images: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            return member(images)

    return run


def race_members(
    bundle: Path, ensemble: Ensemble, size: Size, batch: int
) -> dict[str, dict[str, float]]:
    """Seconds of one batch through each member: ours, and eager in fp16 as public kernels run."""
    device, rows = ensemble.device, {}
    images = torch.rand(batch, 1, *size, device=device)
    for spec in ensemble.manifest.members:
        ours = ensemble.members[spec.name]
        eager = eager_half(load_member(bundle, spec, device), device)
        rows[spec.name] = {
            "ours_s": seconds_of(lambda ours=ours: ours(images), device),  # type: ignore[misc]
            "eager_s": seconds_of(lambda eager=eager: eager(images), device),  # type: ignore[misc]
        }
    return rows


def race_compiler(
    bundle: Path, ensemble: Ensemble, size: Size, batch: int
) -> dict[str, dict[str, float]]:
    """The smallest member through torch.compile, which takes minutes for a large one."""
    device = ensemble.device
    spec = min(ensemble.manifest.members, key=lambda spec: sum(spec.flops))
    member = load_member(bundle, spec, device)
    network: nn.Module = member.encoder.network.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        network = network.half()
    compiled = torch.compile(network, backend=COMPILER)
    dtype = next(network.parameters()).dtype
    images = torch.rand(batch, member.encoder.mean.shape[1], *size, device=device, dtype=dtype)
    images, grey = images.to(memory_format=torch.channels_last), images[:, :1].float()
    ours = ensemble.members[spec.name]
    return {
        spec.name: {
            "ours_s": seconds_of(lambda: ours(grey), device),
            "compiled_s": seconds_of(lambda: compiled(images), device),
        }
    }


def run_strips(ensemble: Ensemble, images: Sequence[Image], batch: int) -> dict[str, Any]:
    """Whole strips through the scheduler, with and without the early exit."""
    found: dict[bool, dict[str, Any]] = {}
    rows: dict[str, Any] = {}
    for early_exit in (True, False):
        scheduler = Scheduler(ensemble, batch, early_exit)
        strips = [Strip(str(index), image) for index, image in enumerate(images)]
        list(scheduler.predict_strips(strips[:batch], batch))  # warm
        start = time.perf_counter()
        states = list(scheduler.predict_strips(strips, len(strips)))
        seconds = time.perf_counter() - start
        faults = [state.fault for state in states if state.fault]
        if faults:
            raise RuntimeError(faults[0])
        found[early_exit] = {state.strip.name: state.masks for state in states}
        rows["early exit" if early_exit else "every pass"] = {
            "strips_a_second": len(strips) / seconds,
            "share_of_flops": float(np.mean([scheduler.work(state).share for state in states])),
        }
    changed = [np.mean(found[True][name] != found[False][name]) for name in found[True]]
    return rows | {"pixels_that_differ": float(np.mean(changed))}


def run_tests() -> dict[str, Any]:
    """The suite's tests of the GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return {"exit_code": done.returncode, "last_lines": done.stdout.splitlines()[-8:]}


# --- all of them ----------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """The machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": str(device), "name": name, "torch": torch.__version__}


def measure(args: argparse.Namespace) -> int:
    """Run every section that there is time for; write what was found after each."""
    start, device = time.monotonic(), torch.device(args.device) if args.device else pick_device()
    if device.type != "cuda" and not args.device:
        raise ValueError("no CUDA device works here; --device cpu runs the same on the CPU")
    results: dict[str, Any] = describe(device)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch)
        manifest, shipped = write_bundle(args.weights, bundle)
        size = manifest.image_size or IMAGE_SIZE
        drawn = [draw_strip(index, size) for index in range(min(args.strips, 8))]
        images = [drawn[index % len(drawn)] for index in range(args.strips)]
        ensemble = load_ensemble(bundle, manifest, device, Stages(), image=images[0])
        results |= {"weights": "shipped" if shipped else "random", "batch": args.batch}
        results["matrix_flops_a_second"] = peak = matrix_rate(device)
        sections: dict[str, Callable[[], Any]] = {
            "tests": run_tests,  # before the sweep, after which PyTorch keeps all memory
            "strips": lambda: run_strips(ensemble, images, args.batch),
            "members": lambda: race_members(bundle, ensemble, size, args.batch),
            "batches": lambda: sweep_batches(ensemble, peak, size, args.batches),
            "compiler": lambda: race_compiler(bundle, ensemble, size, args.batch),
        }
        for name, section in sections.items():
            results[name] = run_section(name, section, start + args.budget_s - time.monotonic())
            results["seconds"] = time.monotonic() - start
            write_json(args.out, results)
    print(table(results))
    return 0


def run_section(name: str, section: Callable[[], Any], left_s: float) -> Any:
    """What a section finds; why it found nothing, where time is up or it fails."""
    if left_s <= 0:
        return {"left_out": "no time was left"}
    log.info("%s: %.0f s are left", name, left_s)
    try:
        return section()
    except Exception as error:  # the other sections are worth having
        log.warning("%s fails: %r", name, error)
        return {"left_out": repr(error)}


def table(results: dict[str, Any]) -> str:
    """The results for a reader."""
    lines = [
        f"{results['name']} ({results['device']}), PyTorch {results['torch']}, "
        f"{results['weights']} weights, {results['matrix_flops_a_second'] / 1e12:.1f} TFLOP/s "
        f"in a matrix product, {results['seconds']:.0f} s in all.",
    ]
    for section in ("tests", "strips", "members", "batches", "compiler"):
        lines += ["", f"{section}:"]
        rows = results[section]
        lines += [f"  {name}: {_in_words(value)}" for name, value in rows.items()]
    return "\n".join(lines)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.4g}" for name, number in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=ROOT / "weights", help="folder of ensemble.json")
    add("--device", choices=("cpu", "cuda"), help="default: the CUDA device that works")
    add("--batch", type=int, default=GPU_BATCH_SIZE, help="strips at a time, for all but the sweep")
    add("--batches", type=int, nargs="+", default=BATCHES, help="of the sweep")
    add("--strips", type=int, default=64)
    add("--budget-s", type=float, default=BUDGET_S, help="no section begins later")
    add("--out", type=Path, default=HERE / "gpu.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: measure(parse_args(arguments)))


if __name__ == "__main__":
    main()

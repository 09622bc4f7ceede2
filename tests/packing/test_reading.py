"""Files: read by what they hold without running their code, or named for what they are."""

import bz2
import datetime
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_network, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from packing.checkpoints import read_checkpoint
from packing.reading import weights_file

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return random_network(tiny_model(), seed=7)


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class Bomb:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "it ran")


def write_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


BOMBS: dict[str, tuple[Callable[[object, Path], object], Callable[[Path], object]]] = {
    "torch.save's zip": (torch.save, lambda path: torch.load(path, weights_only=False)),
    "torch.save's old layout": (
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda path: torch.load(path, weights_only=False),
    ),
    "a plain pickle": (write_pickle, lambda path: pickle.loads(path.read_bytes())),
}


@pytest.mark.parametrize("form", BOMBS)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    form: str, network: nn.Module, tmp_path: Path
) -> None:
    write, unpickle = BOMBS[form]
    path, mark = tmp_path / "bomb.pth", tmp_path / "ran"
    write({"state_dict": dict(network.state_dict()), "callbacks": Bomb(mark)}, path)
    with pytest.raises(ValueError, match=r"bomb\.pth: refused.*could run code.*state_dict\(\)"):
        read_checkpoint(path)
    assert not mark.exists()
    unpickle(path)  # the bomb is live: only the reader kept it from going off
    assert mark.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": Path("x")}, protocol=2))
    with pytest.raises(
        ValueError,
        match=r"plain\.pkl: a pickle that torch\.save did not write: .*save the weights alone",
    ):
        read_checkpoint(tmp_path / "plain.pkl")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_cut_file_is_named(name: str, network: nn.Module, tmp_path: Path) -> None:
    whole, path = tmp_path / f"whole{Path(name).suffix}", tmp_path / name
    (torch.save if path.suffix == ".pth" else save_file)(network.state_dict(), whole)
    path.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=rf"{name}: no checkpoint that can be read"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth: no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pth")


# --- what a file is -------------------------------------------------------------------------------


def raw_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"encoder.w": torch.ones(2)}, buffer)
    return buffer.getvalue()


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, raw_checkpoint())
    return buffer.getvalue()


def tar_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        header = tarfile.TarInfo(name)
        header.size = len(raw_checkpoint())
        archive.addfile(header, io.BytesIO(raw_checkpoint()))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
OTHERS: dict[str, tuple[bytes, str]] = {
    "a git LFS pointer": (POINTER, "a git LFS pointer, not the file: run git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html></html>", "a web page.*download it once more"),
    "a web page after blanks": (b"\xef\xbb\xbf\r\n <html>", "a web page.*download it once more"),
    "an API's answer": (b'{"message": "Not Found"}', 'a text that begins \'{"message"'),
    "gzip": (gzip.compress(raw_checkpoint()), "compressed by gzip: unpack it"),
    "bzip2": (bz2.compress(raw_checkpoint()), "compressed by bzip2: unpack it"),
    "xz": (lzma.compress(raw_checkpoint()), "compressed by xz: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(90), "compressed by zstd: unpack it"),
    "a zip of a checkpoint": (zip_of("best.pth"), r"a zip of best\.pth: unpack it"),
    "a zip of arrays": (zip_of("a.npy"), r"a zip of a\.npy, which is no file of PyTorch: .*save"),
    "Keras": (zip_of("model.weights.h5"), r"a zip of model\.weights\.h5, which is no file of Py"),
    "nothing": (b"", "an empty file: copy it once more"),
    "blanks": (b" \r\n", "an empty file: copy it once more"),
    "half a checkpoint": (
        raw_checkpoint()[:300],
        "no checkpoint that can be read: [^.]*central directory; copy it once more$",
    ),
    "a tar": (tar_of("best.pth"), "a tar archive: unpack it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), r"HDF5, as Keras saves: .*state_dict\(\)"),
    "ONNX": (b"\x08\x0a\x12\x07pytorch\x1a\x032.1" * 9, r"no file of torch\.save .*state_dict\(\)"),
    "zeros": (bytes(5000), "zeros where a checkpoint begins: the copy failed"),
    "a few zeros": (bytes(20), "no file of torch.save"),
    "one byte": (b"\x80", "no checkpoint that can be read"),
    "a damaged pickle": (b"\x80\x02}q\x00X\xff", "no checkpoint that can be read"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    content, words = OTHERS[kind]
    path = tmp_path / f"member{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"member\{suffix}: {words}") as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # PyTorch calls TorchScript deprecated
def test_a_torchscript_program_is_named_and_its_remedy_gives_the_weights(
    network: Any, tmp_path: Path
) -> None:
    path = tmp_path / "member.pt"
    with torch.no_grad():
        torch.jit.trace(network, torch.rand(1, 1, 64, 96)).save(path)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"a TorchScript program: torch\.save\(torch\.jit\.load\("):
        read_checkpoint(path)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "again.pt")  # type: ignore[no-untyped-call]
    found = read_checkpoint(tmp_path / "again.pt").weights
    expected = network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items() if key in found)
    assert {key for key in expected if key not in found} <= {
        key for key in expected if key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_file_of_another_protocol_is_named_as_that(
    protocol: int, zipped: bool, network: nn.Module, tmp_path: Path
) -> None:
    options: Any = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"state_dict": network.state_dict()}, tmp_path / "member.pt", **options)
    words = r"saved with another pickle_protocol than .*, or damaged; .*, save the weights alone"
    with pytest.raises(ValueError, match=words) as error:
        read_checkpoint(tmp_path / "member.pt")
    assert "could run code" not in str(error.value)


def test_a_pickle_that_runs_code_does_not_run_in_another_protocol(
    network: nn.Module, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    tree = {"state_dict": dict(network.state_dict()), "callbacks": Bomb(mark)}
    torch.save(tree, tmp_path / "bomb.pth", pickle_protocol=4)
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        read_checkpoint(tmp_path / "bomb.pth")
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("beside", "words"),
    [
        (np.random.default_rng(0), r"no plain state_dict, .*\(numpy\.random\._pickle\."),
        (datetime.date(2026, 12, 1), r"no plain state_dict, .*\(datetime\.date\)"),
        (os.system, r"no plain state_dict, .*\((posix|nt)\.system\)"),  # a module of PyTorch's list
        (nn.Conv2d(1, 1, 1), r"a whole network, pickled, .*\(torch\.nn\.modules\.conv\.Conv2d\)"),
    ],
)
def test_what_the_safe_reader_refuses_is_named(
    beside: object, words: str, zipped: bool, network: nn.Module, tmp_path: Path
) -> None:
    tree = {"state_dict": network.state_dict(), "score": np.float32(0.5), "beside": beside}
    torch.save(tree, tmp_path / "member.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"refused, it is {words}"):
        read_checkpoint(tmp_path / "member.pt")


@pytest.mark.parametrize("place", ["alone", "under a key"])
def test_a_whole_network_is_named_as_one(place: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(network if place == "alone" else {"model": network}, tmp_path / "member.pt")
    words = r"a whole network, pickled.*\(segmentation_models_pytorch.*network\.state_dict\(\)"
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "member.pt")


def test_pytorchs_advice_to_run_code_is_never_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("Re-running `torch.load` with `weights_only` set to `False` will ...")

    (tmp_path / "member.pt").write_bytes(raw_checkpoint())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match="no checkpoint that can be read; copy") as error:
        read_checkpoint(tmp_path / "member.pt")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", ["member.pth", "member.bin", "member"])
def test_safetensors_are_read_under_any_name(name: str, network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / name)
    assert_same(read_checkpoint(tmp_path / name).weights, network.state_dict())


def test_a_checkpoint_of_torch_is_read_under_safetensors_name(
    network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), tmp_path / "member.safetensors")
    found = read_checkpoint(tmp_path / "member.safetensors").weights
    assert found.keys() == network.state_dict().keys()


def test_a_folder_of_old_save_pretrained_is_read(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    found = read_checkpoint(tmp_path)
    assert found.path == tmp_path / "pytorch_model.bin"
    assert found.weights.keys() == network.state_dict().keys()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert weights_file(tmp_path) == tmp_path / "model.safetensors"


def test_arrays_and_paths_beside_the_weights_are_read(network: nn.Module, tmp_path: Path) -> None:
    beside = {"rng": np.random.get_state(), "scores": np.ones((2, 3), np.float32), "out": tmp_path}
    torch.save({"model": network.state_dict()} | beside, tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert_same(found.weights, network.state_dict())
    assert found.notes == ["left out: rng.1 (1 tensor), scores (1 tensor)"]


def test_weights_that_are_arrays_of_numpy_are_read(network: nn.Module, tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in network.state_dict().items()}
    torch.save(arrays, tmp_path / "member.pt")
    assert_same(read_checkpoint(tmp_path / "member.pt").weights, network.state_dict())


def test_a_checkpoint_that_was_unpacked_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(raw_checkpoint())) as archive:
        archive.extractall(tmp_path)
    [folder] = tmp_path.iterdir()
    with pytest.raises(ValueError, match=rf"{folder}: a checkpoint that was unpacked: copy the"):
        read_checkpoint(folder)


@pytest.mark.parametrize("left", ["all", "the index", "the files"])
@pytest.mark.parametrize("name", ["model{}.safetensors", "pytorch_model{}.bin"])
def test_weights_in_several_files_are_named(name: str, left: str, tmp_path: Path) -> None:
    if left != "the files":
        (tmp_path / f"{name.format('')}.index.json").touch()
    if left != "the index":
        for part in ("-00001-of-00002", "-00002-of-00002"):
            (tmp_path / name.format(part)).touch()
    with pytest.raises(ValueError, match=rf"{tmp_path}: weights in several files; save them in"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"00002\..*: weights in several files; save them in one"):
        read_checkpoint(tmp_path / name.format("-00001-of-00002"))
    with pytest.raises(ValueError, match=r"other\.pt: no such checkpoint"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "fpn-00010-of-00100.safetensors"]
)
def test_the_only_file_of_one_is_read(name: str, network: nn.Module, tmp_path: Path) -> None:
    """Nor is one of step 10 of 100 a part."""
    save_file(network.state_dict(), tmp_path / name)
    found = read_checkpoint(tmp_path / name)
    assert_same(found.weights, network.state_dict())


@pytest.mark.parametrize("name", ["member", "member.pt", "membre.pth", "folder"])
def test_a_missing_file_is_named_with_the_one_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "member.pth", tmp_path / "folder" / "best.ckpt"):
        path.touch()
    there = "best.ckpt" if name == "folder" else "member.pth"
    with pytest.raises(ValueError, match=rf"no such checkpoint; beside it: {there}; .*`file`"):
        read_checkpoint(tmp_path / name)

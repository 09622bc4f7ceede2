"""One member into the bundle: fp16, the trial run, and the count of its FLOPs."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, DPT, SMALL, random_network, tiny_entry, tiny_model, write_manifest
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.members import Member, load_member, split_network
from packing import members
from packing.members import PackedMember, check_probabilities, count_flops, pack_member, to_half
from packing.sources import read_sources

PATH = Path("m.pt")


def test_weights_beyond_fp16_are_refused_and_the_edge_is_kept() -> None:
    edge = {"a": torch.tensor([65504.0, -65504.0]), "n": torch.tensor(70_000)}
    half = to_half(edge, PATH)
    assert half["a"].dtype == torch.float16 and half["n"].item() == 70_000
    with pytest.raises(ValueError, match=r"m\.pt: a reaches 7e\+04, above fp16's 65504"):
        to_half({"a": torch.tensor([70_000.0])}, PATH)


def test_statistics_of_batch_norm_that_fp16_cannot_hold_stay_in_fp32(tmp_path: Path) -> None:
    network = random_network(tiny_model(), seed=3)
    weights = network.state_dict()
    name = next(key for key in weights if key.endswith("running_var"))
    weights[name][0] = 1e6
    save_file(weights, tmp_path / "a.safetensors")
    packed = pack(tmp_path, tiny_entry("a", tiny_model()))
    member = load_member(tmp_path / "dataset", packed.spec, CPU)
    assert member.encoder.network.state_dict()[name][0] == 1e6
    halves = load_file(tmp_path / "dataset" / packed.spec.file)
    assert [key for key, value in halves.items() if value.dtype == torch.float32] == [name]


def test_batch_norm_without_running_statistics_is_refused(tmp_path: Path) -> None:
    norm = {"type": "batchnorm", "track_running_stats": False}
    model = tiny_model() | {"decoder_use_norm": norm}
    save_file(random_network(model, seed=3).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: decoder.* without running statistics"):
        pack(tmp_path, tiny_entry("a", model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"m\.pt: a holds NaN or infinite"):
        to_half({"a": torch.tensor([1.0, value])}, PATH)


def test_weights_that_share_memory_are_copied() -> None:
    flat = torch.arange(4.0).half()
    half = to_half({"a": flat[:2], "b": flat[2:], "n": torch.tensor(3)}, PATH)
    assert half["a"].untyped_storage().data_ptr() != half["b"].untyped_storage().data_ptr()
    assert half["b"].tolist() == [2, 3]


def stub_member(decode: Any, stride: int = 1, size: tuple[int, int] | None = None) -> Member:
    spec = MemberSpec("a", "a.safetensors", {}, [0.0], [1.0], image_size=size)
    return Member(spec, lambda images: (images,), decode, stride)


MANIFEST = Manifest([], image_size=SMALL)


def test_a_network_that_gives_nan_or_another_shape_is_refused() -> None:
    member = stub_member(lambda images: images.expand(-1, 4, -1, -1) / 0 * 0)
    with pytest.raises(ValueError, match=r"m\.pt: gives NaN"):
        check_probabilities(member, MANIFEST, PATH)
    with pytest.raises(ValueError, match=r"\(1, 4, 64, 96\), expected \(1, 3, 64, 96\)"):
        check_probabilities(member, replace(MANIFEST, classes=3), PATH)


def test_the_trial_image_is_padded_to_the_members_stride() -> None:
    def decode(images: Tensor) -> Tensor:
        assert images.shape == (1, 1, 70, 98)
        return images.expand(-1, 4, -1, -1)

    check_probabilities(stub_member(decode, stride=14), MANIFEST, PATH)


def test_a_network_that_fails_on_the_manifests_size_is_refused_in_words() -> None:
    def decode(images: Tensor) -> Tensor:
        if images.shape[-2:] == SMALL:
            raise RuntimeError("size 7 must match size 8")
        return images.expand(-1, 4, -1, -1)

    words = r"m\.pt: fails on an image of 64×96: size 7 must match size 8; correct model"
    with pytest.raises(ValueError, match=words):
        check_probabilities(stub_member(decode), MANIFEST, PATH)
    check_probabilities(stub_member(decode), replace(MANIFEST, image_size=(256, 1600)), PATH)


def test_the_trial_image_has_the_members_own_size() -> None:
    def decode(images: Tensor) -> Tensor:
        assert images.shape == (1, 1, 32, 160)
        return images.expand(-1, 4, -1, -1)

    check_probabilities(stub_member(decode, size=(32, 160)), MANIFEST, PATH)


@pytest.mark.parametrize(
    "error", [KeyError("a\nb"), AssertionError(), IndexError("no\nsuch"), ZeroDivisionError("0")]
)
def test_whatever_a_trial_raises_is_one_line(error: Exception) -> None:
    def decode(images: Tensor) -> Tensor:
        raise error

    with pytest.raises(ValueError, match=r"m\.pt: fails on an image of 64×96: ") as refused:
        check_probabilities(stub_member(decode), MANIFEST, PATH)
    assert "\n" not in str(refused.value) and ": ;" not in str(refused.value)


def save_member(folder: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    network = random_network(model, seed=3)
    save_file(network.state_dict(), folder / "a.safetensors")
    return tiny_entry("a", model) | changes


def pack(folder: Path, entry: dict[str, Any], **changes: Any) -> PackedMember:
    write_manifest(folder, [entry], **changes)
    manifest, [source] = read_sources(folder)
    (folder / "dataset").mkdir()
    return pack_member(source, manifest.members[0], manifest, folder / "dataset", False)


def test_flops_are_of_the_members_own_size(tmp_path: Path) -> None:
    own = save_member(tmp_path, tiny_model(), image_size=[128, 96])
    packed = pack(tmp_path, own)
    plain = load_member(tmp_path / "dataset", packed.spec, CPU)
    assert packed.spec.flops == count_flops(plain, (128, 96))
    plain = load_member(tmp_path / "dataset", packed.spec, CPU)
    assert packed.spec.flops[1] == 2 * count_flops(plain, SMALL)[1]


def test_a_network_in_one_piece_is_packed_as_the_kernel_reads_it(tmp_path: Path) -> None:
    packed = pack(tmp_path, save_member(tmp_path, DPT))
    assert packed.spec.flops[0] > 1e6 and packed.spec.flops[1] == 1
    write_manifest(tmp_path, [asdict(packed.spec)])
    assert load_manifest(tmp_path).members == [packed.spec]


def test_a_network_that_takes_its_own_size_only_is_tried_on_that(tmp_path: Path) -> None:
    model = tiny_model("PAN", presence=False)  # which fails on 64×96
    with pytest.raises(ValueError, match=r"member a: .*fails on an image of 64×96: .*correct"):
        pack(tmp_path, save_member(tmp_path, model))
    shutil.rmtree(tmp_path / "dataset")
    packed = pack(tmp_path, save_member(tmp_path, model, image_size=[128, 256]))
    assert packed.spec.image_size == (128, 256)


@pytest.mark.parametrize("step", ["pack_openvino", "count_flops"])
def test_whatever_a_later_step_raises_is_one_line_with_the_member(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no\nsuch operation")

    entry = save_member(tmp_path, tiny_model())
    write_manifest(tmp_path, [entry])
    manifest, [source] = read_sources(tmp_path)
    monkeypatch.setattr(members, step, fail)
    with pytest.raises(ValueError, match=r"member a: .*a\.safetensors: .*: no such operation; "):
        pack_member(source, manifest.members[0], manifest, tmp_path, True)


def test_what_came_with_the_weights_is_held_against_the_manifest(tmp_path: Path) -> None:
    model = tiny_model()
    entry = save_member(tmp_path, model)
    header = {"member": json.dumps(entry | {"model": model | {"decoder_channels": [8] * 5}})}
    save_file(random_network(model, 3).state_dict(), tmp_path / "a.safetensors", header)
    with pytest.raises(
        ValueError, match=r"member a: model's decoder_channels is .*header.model says"
    ):
        pack(tmp_path, entry)
    shutil.rmtree(tmp_path / "dataset")
    weights = random_network(model, 3).state_dict() | {"pixel_mean": torch.tensor([0.9])}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"member a: .*pixel_mean is \[0\.9\], the manifest's mean"
    ):
        pack(tmp_path, entry)
    shutil.rmtree(tmp_path / "dataset")
    weights = {f"net.{key}": value for key, value in random_network(model, 3).state_dict().items()}
    save_file(weights | {"stem.weight": torch.ones(1, 1, 1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"member a: .*a\.safetensors: stem\.weight, as"):
        pack(tmp_path, entry)


def test_what_came_with_the_weights_may_be_of_the_images_16_bits(tmp_path: Path) -> None:
    (tmp_path / "competition.json").write_text('{"slug": "mine", "bits": 16}')
    entry = save_member(tmp_path, tiny_model())
    said = {"mean": torch.tensor(entry["mean"]) * 65_535}
    save_file(random_network(tiny_model(), 3).state_dict() | said, tmp_path / "a.safetensors")
    assert pack(tmp_path, entry, competition="mine").notes == ["left out: mean (1 tensor)"]


def test_an_efficientnet_whose_smp_nothing_tells_is_asked_about(tmp_path: Path) -> None:
    model = {"arch": "FPN", "encoder_name": "efficientnet-b1", "in_channels": 1, "classes": 4}
    weights = random_network(model, 3).state_dict()

    def notes_of(name: str, **changes: Any) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        entry = tiny_entry("a", model)
        packed = entry | {"efficientnet_pytorch": "0.6.3"} if name == "packed" else entry
        header = {"member": json.dumps(packed)} if name in ("of train.py", "packed") else None
        save_file(weights, folder / "a.safetensors", header)
        if name == "pretrained":
            saved = {"_model_class": "FPN", **model}
            (folder / "config.json").write_text(json.dumps(saved))
        return pack(folder, entry | changes, image_size=[32, 200]).notes

    [note] = notes_of("plain")
    assert note.startswith("efficientnet-b1: trained with SMP before 0.3? ")
    assert '"efficientnet_pytorch": "0.6.3"' in note
    with pytest.raises(ValueError, match=r"efficientnet_pytorch is '', .*header says '0\.6\.3'"):
        notes_of("packed")  # a bundle's own member, whose entry was written anew
    assert notes_of("said", efficientnet_pytorch="0.6.3") == []
    assert notes_of("of train.py") == notes_of("pretrained") == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("images", [1, 3])
def test_three_channels_that_get_one_grey_are_noted(
    images: int, channels: int, tmp_path: Path
) -> None:
    (tmp_path / "competition.json").write_text(json.dumps({"slug": "mine", "channels": images}))
    entry = save_member(tmp_path, tiny_model(channels=channels))
    notes = pack(tmp_path, entry, competition="mine").notes
    assert [note.startswith("its three channels get the same grey") for note in notes] == (
        [True] if (images, channels) == (1, 3) else []
    )


@pytest.mark.parametrize(
    ("bits", "mean", "noted"), [(16, [0.0], True), (16, [0.3], False), (8, [0.0], False)]
)
def test_an_image_divided_by_its_own_maximum_is_asked_about_where_it_has_16_bits(
    bits: int, mean: list[float], noted: bool, tmp_path: Path
) -> None:
    (tmp_path / "competition.json").write_text(json.dumps({"slug": "mine", "bits": bits}))
    entry = save_member(tmp_path, tiny_model(), mean=mean, std=[1])
    notes = pack(tmp_path, entry, competition="mine").notes
    assert ["divided by their own maximum" in note for note in notes] == [True] * noted


@pytest.mark.parametrize(
    ("slug", "size", "own", "noted"),
    [
        ("mine", [64, 104], None, "[64, 104]"),  # a crop of a strip
        ("mine", [64, 400], None, ""),
        ("mine", [62, 400], None, ""),  # rounded to a stride
        ("mine", [64, 400], [64, 104], "[64, 104]"),
        ("mine", [64, 104], [64, 400], ""),
        ("mine", None, None, ""),
        ("undescribed", [64, 104], None, ""),
    ],
)
def test_a_size_of_other_proportions_than_the_images_is_noted(
    slug: str, size: list[int] | None, own: list[int] | None, noted: str, tmp_path: Path
) -> None:
    if slug == "mine":
        described = {"slug": slug, "image_size": [128, 800]}
        (tmp_path / "competition.json").write_text(json.dumps(described))
    entry = save_member(tmp_path, tiny_model(), image_size=own)
    notes = pack(tmp_path, entry, image_size=size, competition=slug).notes
    words = f"images of 128×800 are squeezed to image_size {noted}: "
    assert [note.startswith(words) for note in notes] == [True] * bool(noted)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 5, kernel_size=3, padding=1, bias=False)
        object.__setattr__(self.encoder, "output_stride", 32)  # as SMP's encoders have it

    def forward(self, images: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(images)
        return encoded


def test_a_multiply_add_counts_as_two_flops() -> None:
    spec = MemberSpec("a", "a.safetensors", {}, [0.0] * 3, [1.0] * 3)
    member = split_network(Stem(), spec, CPU)
    assert count_flops(member, SMALL) == [2 * (3 * 3 * 3) * 5 * 64 * 96, 1]
    assert count_flops(member, (60, 90)) == count_flops(member, SMALL)  # padded to 32

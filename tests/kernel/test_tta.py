"""Flips: each turns the image and turns the answer back, through a stub that knows where it is."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import CPU, draw_image, predict_masks
from oracle import Grey, Probabilities, assert_crosses, assert_masks
from torch import nn

from kernel.ensemble import Ensemble
from kernel.images import size_of
from kernel.manifest import Manifest, MemberSpec
from kernel.members import split_network
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import FLIPS, Pass, list_passes


class Ramp(nn.Module):
    """A stub that knows where it is: logits are grey times a number that no two places share."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(output_stride=stride)

    @staticmethod
    def weights(size: tuple[int, int]) -> npt.NDArray[np.float64]:
        return np.linspace(-6, 6, size[0] * size[1]).reshape(size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ramp = torch.from_numpy(self.weights((images.shape[-2], images.shape[-1]))).to(images)
        return torch.cat([images * ramp, images * ramp**2 - 1], dim=1)


def ramp_ensemble(flips: tuple[str, ...], stride: int = 1) -> Ensemble:
    spec = MemberSpec("ramp", "ramp", {"classes": 2, "in_channels": 1}, [0.0], [1.0])
    stub = split_network(Ramp(stride), spec, CPU)
    manifest = Manifest([spec], classes=2, flips=flips)
    return Ensemble(manifest, [stub], CPU, Stages())


def only_pass(ensemble: Ensemble, image: Grey) -> Probabilities:
    """(classes, H, W) of the one pass of an ensemble."""
    assert len(ensemble.passes) == 1
    with torch.inference_mode():
        encoded = ensemble.run_encoder(0, ensemble.prepare(image))
        return ensemble.run_decoder(0, encoded, size_of(image))[0].numpy()


TURNS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "none": lambda a: a,
    "horizontal": np.fliplr,  # numpy's own names
    "vertical": np.flipud,
    "both": lambda a: np.flipud(np.fliplr(a)),
}


def ramp_by_hand(image: Grey, flip: str) -> Probabilities:
    """(2, H, W): turn, ask the stub, turn back."""
    turn = TURNS[flip]
    turned = turn(image / 255)
    ramp = Ramp.weights((turned.shape[0], turned.shape[1]))
    logits = (turned * ramp, turned * ramp**2 - 1)
    return np.stack([turn(1 / (1 + np.exp(-values))) for values in logits])


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flip_turns_the_image_and_turns_the_answer_back(flip: str) -> None:
    image, ensemble = draw_image(7, (6, 10)), ramp_ensemble((flip,))
    assert ensemble.passes[0].flip == flip
    np.testing.assert_allclose(only_pass(ensemble, image), ramp_by_hand(image, flip), atol=1e-5)


def test_no_two_flips_of_the_stub_agree() -> None:
    image = draw_image(7, (6, 10))
    answers = [ramp_by_hand(image, flip) for flip in FLIPS]
    for index, answer in enumerate(answers):
        for other in answers[index + 1 :]:
            assert np.abs(answer - other).max() > 0.1
            assert ((answer > 0.55) != (other > 0.55)).any()


def test_the_mean_runs_over_every_flip() -> None:
    image = draw_image(7, (6, 10))
    mean = np.mean([ramp_by_hand(image, flip) for flip in FLIPS], axis=0)
    assert_crosses(mean, 0.55)
    scheduler = Scheduler(ramp_ensemble(tuple(FLIPS)))
    assert_masks(predict_masks(scheduler, [image])[0], mean, 0.55)


def test_an_image_is_padded_with_its_own_border_and_cut_back() -> None:
    image = draw_image(8, (6, 10))
    found = only_pass(ramp_ensemble(("both",), stride=8), image)
    padded = np.pad(image, ((0, 2), (0, 6)), mode="edge")
    expected = ramp_by_hand(padded, "both")[:, :6, :10]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_passes_are_listed_member_by_member_and_named_by_both() -> None:
    passes = list_passes([("a", [1, 2]), ("b", [3, 4])], ["none", "vertical"])
    assert [str(each) for each in passes] == ["a/none", "a/vertical", "b/none", "b/vertical"]
    assert passes[3] == Pass("b", "vertical", (3, 4))

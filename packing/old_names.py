"""Other names of a network's layers → SMP's today: those of 2019, of a bare encoder or head.

Those of SMP 0.0.x are checked against SMP 0.0.3 itself: the same weights give the same logits,
those of an `efficientnet-b…` encoder where the member's `efficientnet_pytorch` says how it was
padded. Encoders `timm-…` of later versions, today's `tu-…`, have a bare encoder's names; what else
those versions renamed (gernet's stages, DeepLabV3's decoder) SMP's own `load_state_dict` renames.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

HEAD = "segmentation_head.0.weight"


def _unet(name: str) -> str:
    name = re.sub(
        r"layer(\d)\.block\.(\d)\.block",
        lambda found: f"blocks.{int(found[1]) - 1}.conv{int(found[2]) + 1}",
        name,
    )
    name = re.sub(r"center\.block\.(\d)\.block", r"center.\1", name)
    return re.sub(
        r"layer(\d)\.(attention\d)",
        lambda found: f"blocks.{int(found[1]) - 1}.{found[2]}.attention",
        name,
    )


def _linknet(name: str) -> str:
    return re.sub(
        r"layer(\d)\.block\.(\d)\.block",
        lambda found: f"blocks.{int(found[1]) - 1}.block.{found[2]}",
        name,
    )


def _fpn(name: str) -> str:
    name = re.sub(r"^decoder\.conv1\.", "decoder.p5.", name)
    return re.sub(r"\.s([2-5])\.", lambda found: f".seg_blocks.{5 - int(found[1])}.", name)


def _pspnet(name: str) -> str:
    name = re.sub(r"stages\.(\d)\.pool\.1\.block", r"blocks.\1.pool.1", name)
    return re.sub(r"^decoder\.conv\.block\.", "decoder.conv.", name)


DECODERS = {  # a name that only this decoder of SMP 0.0.x has → what became of its names
    "decoder.layer1.block.2.block.0.weight": _linknet,
    "decoder.layer1.block.1.block.0.weight": _unet,
    "decoder.s5.block.0.block.0.weight": _fpn,
    "decoder.psp.stages.0.pool.1.block.0.weight": _pspnet,
}


def rename_old(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of SMP 0.0.x under today's names; others as they are.

    Raises:
        ValueError: the network has layers that today's SMP has not.
    """
    for name in weights:
        if name.startswith("decoder.fpn_stages."):
            raise ValueError(
                f"{name}: the UPerNet of SMP 0.4, whose layers are not those of today's; train it "
                "again with today's, or leave the member out"
            )
    renames = [rename for mark, rename in DECODERS.items() if mark in weights]
    if not renames:
        return dict(weights)
    for name, tensor in weights.items():
        if name.endswith(".sSE.0.weight") and len(tensor) > 1:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}: the scse attention of SMP 0.0.x (2019), with a "
                "gate for each channel where today's has one for all, so that no model of today's "
                "SMP is this network; train it again with today's, or leave the member out"
            )
    renamed = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    for name, tensor in weights.items():
        if name.startswith("decoder.final_conv."):
            renamed[name.replace("decoder.final_conv", "segmentation_head.0")] = tensor
        elif name.startswith("decoder."):
            renamed[renames[0](name)] = tensor
    return renamed


BARE = {  # where SMP has a part → where it is in a network that was put together by hand
    "encoder.model.": "encoder.",  # timm's own, of SMP's tu-
    "segmentation_head.0.": "segmentation_head.",  # a convolution
}


def rename_bare(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return weights of a bare timm encoder, or of a convolution as head, under SMP's names.

    Others as they are, and all where the encoder is not that of `network`, which is SMP's.

    Raises:
        ValueError: the head is a convolution, and SMP's enlarges its output too.
    """
    wanted = network.state_dict()
    bare = {
        name.replace(inner, outer, 1): name
        for inner, outer in BARE.items()
        for name in wanted
        if name.startswith(inner)
    }
    renamed = {bare.get(name, name): tensor for name, tensor in weights.items()}
    fits = all(
        name in renamed or name.endswith("num_batches_tracked")
        for name in wanted
        if name.startswith("encoder.")
    )
    if not fits or len(renamed) < len(weights):
        return dict(weights)
    if HEAD in renamed.keys() - weights.keys():
        _check_size_stays(network)
    return renamed


def _check_size_stays(network: nn.Module) -> None:
    """Raise ValueError where SMP's head enlarges its output: how another does no tensor tells."""
    head = network.get_submodule("segmentation_head")
    if any(isinstance(each, nn.Upsample) for each in head.modules()):
        raise ValueError(
            f"segmentation_head.weight: a convolution alone, where SMP's {type(network).__name__} "
            "enlarges its output too, bilinear with corners aligned; if this network does the "
            "same, save the head as segmentation_head.0.weight and segmentation_head.0.bias, "
            "otherwise train it with SMP's head, or leave the member out"
        )


def widen_head(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Put a 1×1 convolution, as ended SMP 0.0.x's Unet, into today's 3×3: the same output."""
    if HEAD in weights and HEAD in wanted:
        head, sides = weights[HEAD], wanted[HEAD].shape[2:]
        if head.shape[2:] == (1, 1) and sides == (3, 3):
            weights[HEAD] = nn.functional.pad(head, (1, 1, 1, 1))

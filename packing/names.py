"""The words in names of tensors and options: what is training's alone, what normalises images."""

import re

# Words of what only training needs.
TRAINING = {"loss", "losses", "criterion", "metric", "metrics", "optimizer", "optimizers"}


def words_of(name: str) -> set[str]:
    """The words of a dotted, underscored or camel-cased name, in small letters."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def normalisation_of(name: str) -> str:
    """Return "mean" or "std" where a tensor's name says that it normalises images, else ""."""
    words = words_of(name.rpartition(".")[2])
    if "running" in words or words_of(name) & TRAINING:
        return ""
    return next((kind for kind in ("mean", "std") if words & {kind, f"{kind}s"}), "")


# Words of a configuration's key beside mean and std, and of where a number may stand for all
# channels; a score's mean, or the std of noise, has others.
IMAGES = {"image", "images", "img", "pixel", "pixels", "input", "norm", "normalize", "normalise",
          "normalizer", "normalization", "normalisation", "data", "dataset"}  # fmt: skip
PLACES = IMAGES | {"hyper", "parameters", "params", "hparams", "config", "cfg", "args", "header",
                   "preprocessing", "transform", "transforms", "content", "member",
                   "json"}  # fmt: skip


def said_of_images(name: str) -> str:
    """Return "mean" or "std" where a configuration's key is that of images, else ""."""
    kind = normalisation_of(name)
    return kind if words_of(name.rpartition(".")[2]) - {kind, f"{kind}s"} <= IMAGES else ""

"""Loading a bundle for a measurement: its members as they run here, checked as a run's are."""

from collections.abc import Sequence
from pathlib import Path

from kernel.device import pick_device
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import first_image
from kernel.manifest import Manifest
from kernel.stages import Stages


def load_for_images(
    bundle: Path, manifest: Manifest, folder: Path, names: Sequence[str]
) -> Ensemble:
    """Load a bundle's members, their engines checked on the first image that can be read.

    Raises:
        ValueError: as `load_ensemble`.
    """
    image = first_image(folder, names, manifest.competition)
    return load_ensemble(bundle, manifest, pick_device(), Stages(), image)

"""Images: a file → grey pixels → the tensor that every network reads."""

import functools
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor, nn

from kernel.device import to_device
from kernel.jpeg import check_jpeg
from kernel.logs import log

Image = npt.NDArray[np.uint8]  # grey, (H, W), 0-255
Mask = npt.NDArray[np.bool_]  # (H, W)
Size = tuple[int, int]  # (H, W)

ORIENTATION = 0x112  # EXIF's and TIFF's tag
MAX_PIXELS = 50_000_000  # 122 strips' worth; a larger image would take the run's memory


def read_image(path: Path) -> Image:
    """Read one image as grey, (H, W), uint8, 0-255, whatever colours the file has.

    The pixels are those that the file stores: EXIF orientation would turn them away from the masks.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: as `decode_image`.
    """
    return decode_image(path.read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> Image:
    """Decode a file's bytes as `read_image` does; `name` is for the error.

    Raises:
        ValueError: the bytes are no image, a damaged or too large one, or of another depth.
    """
    try:
        _check_header(data)
        flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:
            raise ValueError(f"{len(data)} bytes that OpenCV does not decode")
        _check_whole(data)
        return _to_8_bits(pixels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_header(data: bytes) -> None:
    """Refuse what is better not decoded: no image, or one of more than `MAX_PIXELS`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, which is judged here
            header = PIL.Image.open(io.BytesIO(data))
            width, height = header.size
            turned = header.format == "TIFF" and header.getexif().get(ORIENTATION, 1) != 1
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a header that is none
        raise ValueError(f"{len(data)} bytes that are no image") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, at most {MAX_PIXELS:,} are decoded")
    if turned:  # OpenCV turns these whatever it is told
        raise ValueError("a TIFF that is to be shown turned; save it as its masks lie")


def _check_whole(data: bytes) -> None:
    """Refuse a file with data missing: OpenCV fills it up, and a network may see anything there."""
    if data.startswith(b"\xff\xd8"):
        check_jpeg(data)
        return
    try:
        PIL.Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error


def _to_8_bits(pixels: npt.NDArray[Any]) -> Image:
    """Scale 16 bits to 8 by the depth that the values need: 10, 12, 14 or 16 bits.

    Cameras store 10 to 14 bits in 16, and few say so in the file.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype != np.uint16:
        raise ValueError(f"pixels are {pixels.dtype}, expected 8 or 16 bits")
    highest = int(pixels.max())
    bits = next(bits for bits in (10, 12, 14, 16) if highest < 2**bits)
    _log_depth(bits)
    return (pixels >> (bits - 8)).astype(np.uint8)


@functools.cache
def _log_depth(bits: int) -> None:  # once, not for every image
    if bits < 16:
        log.warning("16-bit images without a value above %d: read as %d bits", 2**bits - 1, bits)


# --- strips ---------------------------------------------------------------------------------------


def size_of(image: Image) -> Size:
    """(H, W) of an image."""
    return image.shape[0], image.shape[1]


@dataclass(frozen=True)
class Strip:
    """A decoded image, or the reason why there is none."""

    name: str
    image: Image | None
    fault: str = ""


def decode_strip(folder: Path, name: str) -> Strip:
    """Read one image; a bad one costs its own rows, never the run."""
    try:
        return Strip(name, read_image(folder / name))
    except Exception as error:  # one bad strip must not cost the submission
        return Strip(name, None, str(error))


def image_to_tensor(image: Image, device: torch.device | str = "cpu") -> Tensor:
    """An image (H, W), uint8 → (1, 1, H, W), float32 in [0, 1], on `device`."""
    return to_device(torch.from_numpy(image)[None, None], torch.device(device)) / 255


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, 1, H, W) with the last row and column repeated up to the next multiple."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return nn.functional.pad(images, padding, mode="replicate") if any(padding) else images

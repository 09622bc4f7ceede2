"""Images: a file → pixels, grey or RGB → the tensor that every network reads."""

import contextlib
import io
import threading
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor, nn

from kernel.competition import Competition
from kernel.files import retried
from kernel.jpeg import check_height, check_jpeg
from kernel.logs import log

Image = npt.NDArray[np.uint8 | np.uint16]  # grey (H, W) or RGB (H, W, 3), all values of the type
Mask = npt.NDArray[np.bool_]  # (H, W)
Size = tuple[int, int]  # (H, W)

JPEG = b"\xff\xd8"  # its first bytes
ORIENTATION = 0x112  # EXIF's and TIFF's tag
BITS, PLANES, ALPHA = 258, 284, 338  # TIFF's: bits a sample, 2 where each colour lies apart, …
STRAIGHT = 2  # … and its colours are not multiplied by it
MAX_PIXELS = 50_000_000  # 122 strips' worth; a larger image would take the run's memory


def size_of(image: npt.NDArray[Any]) -> Size:
    """(H, W) of an image."""
    return image.shape[0], image.shape[1]


# --- colour and depth, as a competition says ------------------------------------------------------

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")  # of Pillow
LOOKED_AT = 8  # images, before a run
_LOGGED = set[str]()  # kinds of images that were named already


def _log_other(name: str, what: str, said: str, instead: str) -> None:
    """Log, once a kind, an image of another colour or depth than the description says."""
    if what not in _LOGGED:
        _LOGGED.add(what)
        told = "%s is %s, its competition.json says %s: correct it; %s"
        log.warning(told, name, what, said, instead)


def _to_bits(pixels: npt.NDArray[Any], bits: int, name: str) -> Image:
    """Scale to the competition's depth; 16 bits to 8 are refused.

    Cameras store 10 to 14 bits in 16, and few say so in the file: what is white is not known.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels are {pixels.dtype}, expected 8 or 16 bits")
    if bits == 8 * pixels.dtype.itemsize:
        return pixels
    if bits == 8:
        raise ValueError('of 16 bits, its competition.json says bits 8: write "bits": 16 there')
    _log_other(name, "of 8 bits", "bits 16", "its white stays white")
    return pixels.astype(np.uint16) * 257


def is_coloured(pixels: npt.NDArray[Any]) -> bool:
    """Whether pixels as a file stores them have colours, more than a JPEG's noise."""
    noise = 8 * np.iinfo(pixels.dtype).max // 255
    return pixels.ndim == 3 and bool((np.ptp(pixels[..., :3].astype(int), axis=2) > noise).any())


def check_kinds(folder: Path, names: Sequence[str], competition: Competition) -> None:
    """Look at some images of a folder before a run; those that cannot be read are left to it.

    Raises:
        ValueError: one is of another colour or depth than the competition's; names it.
    """
    for name in names[:: max(len(names) // LOOKED_AT, 1)]:
        with contextlib.suppress(OSError):
            fault = _kind_fault((folder / name).read_bytes(), competition)
            if fault:
                raise ValueError(
                    f"{folder / name}: {fault}: correct it there, or save the images so"
                )


def _kind_fault(data: bytes, competition: Competition) -> str:
    """How an image is of another kind than a competition's; nothing where it is as said."""
    try:
        mode = check_header(data)
    except ValueError:
        return ""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return ""
    says, bits = f"{competition.slug}'s competition.json says", 8 * pixels.dtype.itemsize
    if pixels.dtype not in (np.uint8, np.uint16):
        return f"of {pixels.dtype}, {says} bits {competition.bits}"
    if competition.channels == 1 and is_coloured(pixels):
        return f"in colour, {says} channels 1"
    if competition.channels == 3 and mode in GREY_MODES:
        return f"grey, {says} channels 3"
    return "" if bits == competition.bits else f"of {bits} bits, {says} bits {competition.bits}"


# --- files ----------------------------------------------------------------------------------------


def read_image(path: Path, competition: Competition, known_whole: bool = False) -> Image:
    """Read one image as the competition has them, whatever colours and depth the file has.

    Grey (H, W) or RGB (H, W, 3), uint8 or uint16. The pixels are those that the file stores: EXIF
    orientation would turn them away from the masks. A file that is `known_whole` is not looked
    through for missing data, which decodes it again.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: as `decode_image`.
    """
    return decode_image(path.read_bytes(), str(path), competition, known_whole)


def decode_image(
    data: bytes, name: str, competition: Competition, known_whole: bool = False
) -> Image:
    """Decode a file's bytes as `read_image` does; `name` is for the error.

    Raises:
        ValueError: the bytes are no image, a damaged or too large one, or of a greater depth.
    """
    try:
        colour = competition.channels == 3
        mode = check_header(data)
        flags = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
        flags |= cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:
            raise ValueError(f"{len(data)} bytes that OpenCV does not decode")
        if not known_whole:
            _check_whole(data, colour)
        if data.startswith(JPEG) and competition.image_size not in (None, size_of(pixels)):
            check_height(data)
        if mode == "RGBA" and pixels.dtype == np.uint8:
            pixels = _without_alpha(data, pixels)
        if colour and mode in GREY_MODES:
            _log_other(name, "grey", "channels 3", "its grey stands for each")
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if colour else pixels
        return _to_bits(pixels, competition.bits, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_header(data: bytes) -> str:
    """Refuse what is better not decoded, no image or one of over `MAX_PIXELS`; return its mode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, which is judged here
            header = PIL.Image.open(io.BytesIO(data))
            width, height = header.size
            tags = header.getexif() if header.format == "TIFF" else {}
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a header that is none
        raise ValueError(f"{len(data)} bytes that are no image") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, at most {MAX_PIXELS:,} are decoded")
    if tags.get(ORIENTATION, 1) != 1:  # OpenCV turns these whatever it is told
        raise ValueError("a TIFF that is to be shown turned; save it as its masks lie")
    if tags.get(PLANES) == 2 and header.mode[:3] == "RGB" and np.max(tags.get(BITS, 8)) > 8:
        raise ValueError("a TIFF of 16 bits whose colours lie apart, misread; save it as PNG")
    return header.mode


def _without_alpha(data: bytes, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What a TIFF with 8-bit alpha stores; OpenCV, of the same shape, multiplies it by that."""
    image = PIL.Image.open(io.BytesIO(data))
    if image.format != "TIFF" or image.getexif().get(ALPHA) != STRAIGHT:
        return pixels
    code = cv2.COLOR_RGBA2GRAY if pixels.ndim == 2 else cv2.COLOR_RGBA2BGR
    return cv2.cvtColor(np.asarray(image), code)


def _check_whole(data: bytes, colour: bool) -> None:
    """Refuse a file with data missing: OpenCV fills it up, and a network may see anything there."""
    if data.startswith(JPEG):
        check_jpeg(data, colour)
        return
    try:
        PIL.Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error


# --- strips ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A decoded image, or the reason why there is none."""

    name: str
    image: Image | None
    fault: str = ""


DECODERS = threading.Semaphore(2)  # at once: a large image takes ten times its size of memory


def read_strip(folder: Path, name: str, competition: Competition) -> Strip:
    """Read one image; a bad one costs its own rows, never the run."""
    path = folder / name
    try:
        data = retried(path.read_bytes)()  # may hang: no other waits for it
        with DECODERS:
            return Strip(name, decode_image(data, str(path), competition))
    except Exception as error:  # one bad strip must not cost the submission
        return Strip(name, None, str(error) or repr(error))  # MemoryError says nothing


def first_image(strips: Iterable[Strip]) -> Image | None:
    """Return the image of the first strip that could be read: engines are checked on it."""
    return next((strip.image for strip in strips if strip.image is not None), None)


def planes_of(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An image (H, W) or (H, W, 3) as its channels' planes, (1, H, W) or (3, H, W)."""
    return image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


def image_to_tensor(image: Image, device: torch.device | str = "cpu") -> Tensor:
    """An image, grey or RGB, 8 or 16 bits → (1, channels, H, W), float32 in [0, 1], on `device`."""
    white = np.iinfo(image.dtype).max
    planes = planes_of(image)
    if image.dtype == np.uint16:
        planes = planes.astype(np.int32)  # PyTorch's uint16 has few operations
    return torch.from_numpy(planes)[None].to(device) / white


def resize_images(images: Tensor, size: Size) -> Tensor:
    """Images, or probabilities, (B, channels, H, W) in another size (H, W), bilinear."""
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, channels, H, W) with the last row and column repeated up to the next multiple."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return nn.functional.pad(images, padding, mode="replicate") if any(padding) else images

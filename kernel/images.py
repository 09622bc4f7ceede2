"""Images and masks: decoding, which a bad file cannot stop, and run-length code."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

Image = npt.NDArray[np.uint8]  # grey, (H, W), 0-255
Mask = npt.NDArray[np.bool_]  # (H, W)

MOST_PIXELS = 50_000_000  # 122 strips' worth; a larger image would take the run's memory


def check_header(path: Path, data: bytes) -> None:
    """Refuses what is better not decoded; ValueError for no image, a huge one, a JPEG cut off.

    OpenCV fills up a JPEG that breaks off with grey, in which a network may see anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, which is judged here
            width, height = PIL.Image.open(io.BytesIO(data)).size
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a header that is none
        raise ValueError(f"{path}: {len(data)} bytes that are no image") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"{path}: {width}×{height} pixels, at most {MOST_PIXELS:,} are decoded")
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:]:
        raise ValueError(f"{path}: a JPEG that breaks off after {len(data)} bytes")


def read_image(path: Path) -> Image:
    """One image as grey, (H, W), uint8, 0-255, whatever colours the file has.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: its bytes are no image, not a whole one or too large a one.
    """
    data = path.read_bytes()
    check_header(path, data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError(f"{path}: {len(data)} bytes that OpenCV does not decode")
    return image.astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Strip:
    """A decoded image, or the reason why there is none."""

    name: str
    image: Image | None
    fault: str = ""


def decode_strip(folder: Path, name: str) -> Strip:
    """Reads one image; a bad one costs its own rows, never the run."""
    try:
        return Strip(name, read_image(folder / name))
    except Exception as error:  # one bad strip must not cost the submission
        return Strip(name, None, str(error))


def encode_rle(mask: Mask) -> str:
    """Run-length code of a mask (H, W): `start length` pairs, empty for an empty mask.

    Column-major and 1-indexed, as the competition's evaluation page asks.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return ""
    first, height = int(columns[0]), mask.shape[0]
    part = mask[:, first : int(columns[-1]) + 1]  # a defect is narrow, a strip is wide
    pixels = np.zeros(part.size + 2, np.int8)  # one off pixel at each end closes every run
    pixels[1:-1] = part.T.ravel()
    edges = np.flatnonzero(np.diff(pixels)) + 1 + first * height
    edges[1::2] -= edges[::2]  # ends become lengths
    return " ".join(map(str, edges.tolist()))

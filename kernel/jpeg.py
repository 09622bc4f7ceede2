"""Whether a JPEG's data are all there: decoders fill up what is missing, and say nothing.

Terms and numbers are those of ITU T.81, annex B.
"""

import io
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import PIL.Image

MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # ends entropy-coded data
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
END_OF_IMAGE, START_OF_SCAN, RESTART_INTERVAL = 0xD9, 0xDA, 0xDD
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
# Lossless, hierarchical, arithmetic: 0xC4, 0xC8 and 0xCC are no frames.
OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}
ALL_COEFFICIENTS = 2**64 - 1  # a bit each
DAMAGED = "a JPEG whose data end before its last pixel: damaged or cut"


def check_jpeg(data: bytes, colour: bool) -> None:
    """Raise ValueError for a JPEG that breaks off, or whose data end before its last pixel.

    A decoder that runs out of data makes zeros of what is missing. Bytes that are put after each
    piece of data are skipped by one that is done, and change the picture of one that is not.
    """
    longer, start, (_, ends) = bytearray(), 0, walk_markers(data)
    for end in ends:
        longer += data[start:end] + b"\x5a" * 64
        start = end
    longer += data[start:]
    try:
        same = np.array_equal(_decode(data, colour), _decode(bytes(longer), colour))
    except (OSError, SyntaxError):
        same = False
    if not same:
        raise ValueError(DAMAGED)


def _decode(data: bytes, colour: bool) -> npt.NDArray[np.uint8]:
    picture = PIL.Image.open(io.BytesIO(data))
    if not colour:
        picture.draft("L", picture.size)  # half the time
    return np.asarray(picture)


def check_height(data: bytes) -> None:
    """Raise ValueError for a JPEG whose data go on below the last row that its header gives.

    With a header that gives more rows a decoder that is out of data makes them of one value, but
    for the first rows of units, which it may smooth.
    """
    frame, _ = walk_markers(data)
    unit = 8 * max(vertical for _, vertical in frame.sampling.values())
    end = -(-frame.height // unit) * unit  # of the last unit, which the header's last row is in
    taller = min(end + 6 * unit, 2**16 - 1).to_bytes(2)
    try:
        picture = _decode(data[: frame.height_at] + taller + data[frame.height_at + 2 :], False)
    except (OSError, SyntaxError):
        return
    below = picture.reshape(len(picture), frame.width, -1)[end + 3 * unit :]
    if (below != below[:, :1]).any():
        raise ValueError(
            f"a JPEG whose header gives {frame.height} rows and whose data have more: damaged"
        )


@dataclass
class Frame:
    """What a JPEG's headers say of its scans."""

    width: int = 0
    height: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)  # component → (H, V)
    missing: dict[int, int] = field(default_factory=dict)  # → coefficients that no scan completes
    height_at: int = 0  # where the file has its two bytes
    interval: int = 0  # minimum coded units between restart markers; 0: there are none

    def read_header(self, segment: bytes) -> None:
        """Read a frame header (B.2.2)."""
        self.height, self.width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
        parts = [segment[6 + 3 * index : 9 + 3 * index] for index in range(segment[5])]
        self.sampling = {part[0]: (part[1] // 16, part[1] % 16) for part in parts}
        self.missing = dict.fromkeys(self.sampling, ALL_COEFFICIENTS)

    def read_scan_header(self, segment: bytes) -> int:
        """Read a scan header (B.2.3); return in how many pieces its data come."""
        components = segment[1 : 1 + 2 * segment[0] : 2]
        first, last, depth = segment[-3], segment[-2], segment[-1]
        if depth % 16 == 0:  # the coefficients' last bits
            for component in components:
                self.missing[component] &= ~(2 ** (last + 1) - 2**first)
        if not self.interval:
            return 1
        widest = max(horizontal for horizontal, _ in self.sampling.values())
        highest = max(vertical for _, vertical in self.sampling.values())
        # several components are interleaved in units of the widest; one alone comes block by block
        blocks = self.sampling[components[0]] if len(components) == 1 else (1, 1)
        across = -(-self.width * blocks[0] // (8 * widest))
        down = -(-self.height * blocks[1] // (8 * highest))
        return -(-across * down // self.interval)


def walk_markers(data: bytes) -> tuple[Frame, list[int]]:
    """Walk a JPEG's markers; return its headers, and where each piece of its data ends.

    A piece ends at a restart marker or with its scan. What follows the end marker is padding.

    Raises:
        ValueError: the file ends before the end marker, pieces or scans are missing, or it is of
            another kind than baseline and progressive.
    """
    position, frame, ends = 2, Frame(), list[int]()
    while marker := MARKER.search(data, position):
        kind, position = marker[1][0], marker.end()
        if kind == END_OF_IMAGE:
            if not ends or any(frame.missing.values()):
                raise ValueError(DAMAGED)
            return frame, ends
        segment = data[position + 2 : position + int.from_bytes(data[position : position + 2])]
        position += len(segment) + 2
        try:
            if kind in OTHER_FRAMES:
                raise ValueError(
                    f"a JPEG of another kind than baseline and progressive (frame {kind:X}); "
                    "save it as one of these"
                )
            if kind in FRAMES:
                frame.read_header(segment)
                frame.height_at = position - len(segment) + 1
            if kind == RESTART_INTERVAL:
                frame.interval = int.from_bytes(segment)
            if kind == START_OF_SCAN:
                pieces = frame.read_scan_header(segment)
                end = MARKER.search(data, position)
                scan = range(position, end.start() if end else len(data))
                ends += _piece_ends(data, scan, pieces)
                position = scan.stop
        except (IndexError, KeyError, ZeroDivisionError) as error:  # a segment that is too short
            raise ValueError(DAMAGED) from error
    raise ValueError(f"a JPEG that breaks off after {len(data)} bytes")


def _piece_ends(data: bytes, scan: range, pieces: int) -> list[int]:
    """Where the pieces of one scan end; its restart markers count from 0 to 7, again and again."""
    restarts = list(RESTART.finditer(data, scan.start, scan.stop))
    in_order = all(each[1][0] == 0xD0 + number % 8 for number, each in enumerate(restarts))
    if not in_order or len(restarts) != pieces - 1:
        raise ValueError(DAMAGED)
    return [*(each.start() for each in restarts), scan.stop]

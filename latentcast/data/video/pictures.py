"""Videos that are kept as one picture a frame, in numbered files."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .folder import PICTURE_SUFFIXES, visible
from .reader import CHUNK, MOST_PIXELS, VideoAwayError, VideoError, fit_pieces, is_away

NUMBER = re.compile(r"(\d+)(?:[_-]\d+x\d+)?$")  # in a name without suffix; a size may follow, as in image-007_64x64.png
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's with 8 bits a channel or fewer


def frame_number(name: str) -> int | None:
    """The number at the end of a picture's name, before the suffix and a size ("007_64x64.png" is 7, as SVG names KTH's
    frames); None if it is no picture or has no number."""
    stem, dot, suffix = name.rpartition(".")
    digits = NUMBER.search(stem)
    return int(digits[1]) if digits and dot + suffix.lower() in PICTURE_SUFFIXES else None


def is_sequence(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is a video: two numbered pictures at least (one is a cover)."""
    return sum(frame_number(name) is not None for name in names) > 1


def numbered_pictures(folder: str | Path) -> list[Path]:
    """The numbered pictures of a folder as paths in the order of their numbers, which must be evenly spaced.

    Raises:
        VideoError: no numbered picture, two with one number, or one that is missing between the others.
        VideoAwayError: the folder cannot be read at the moment.
    """
    found = {}
    try:
        names = visible(folder)[1]
    except OSError as error:
        raise VideoAwayError(f"{folder}: cannot be read at the moment ({error.strerror})") from None
    for name in names:
        number = frame_number(name)
        if number in found:
            raise VideoError(f"{folder}: two pictures have number {number}: {found[number].name} and {name}")
        if number is not None:
            found[number] = folder / name
    if not found:
        raise VideoError(f"{folder}: no numbered pictures; expected {', '.join(PICTURE_SUFFIXES)}")
    numbers = sorted(found)
    step = min((later - earlier for earlier, later in pairwise(numbers)), default=1)
    for expected, number in zip(range(numbers[0], numbers[-1] + 1, step), numbers):
        if number != expected:
            before = found[expected - step]
            start, end = NUMBER.search(before.stem).span(1)
            missing = f"{before.stem[:start]}{expected:0{end - start}d}{before.name[end:]}"
            raise VideoError(f"{folder}: expected {missing} after {before.name}, found {found[number].name}")
    return [found[number] for number in numbers]


def read_pictures(
    paths: Iterable[str | Path],
    size: int | Sequence[int] | None = None,
    resample: str = "bilinear",
    chunk: int = CHUNK,
    crop: str = "center",
) -> Iterator[UInt8[Tensor, "_ 3 H W"]]:
    """Read pictures of one video, all of one size, in pieces, as ``iter_clip`` does for video files.

    Args:
        paths: of the pictures; png, jpg or whatever Pillow opens, 8 bits a channel.
        size, resample, crop: as for ``read_clip``.
        chunk: frames a piece; the last piece may be shorter.
    Yields:
        (<= chunk, 3, H, W) uint8 tensors, RGB.
    Raises:
        VideoError: a picture is missing, damaged or of another size than the first.
    """
    return fit_pieces(_arrays(paths), size, resample, chunk, crop=crop)


def _arrays(paths):
    first = None
    for path in paths:
        array = _array(path)
        first = first or (path.name, array.shape)
        if array.shape != first[1]:
            (height, width, _), found = first[1], array.shape
            raise VideoError(
                f"{path}: expected {height} x {width} pixels (H x W) as in {first[0]}, found {found[0]} x {found[1]}"
            )
        yield array


def _array(path):
    """One picture -> (H, W, 3) uint8 array, turned and flipped as its EXIF says."""
    try:
        # Pillow's words on large pictures, for which our limit is lower, and on damaged EXIF.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            if (n := picture.width * picture.height) > MOST_PIXELS:
                raise VideoError(f"{path}: expected at most {MOST_PIXELS} pixels, found {n}")
            picture.load()
            with contextlib.suppress(Exception):  # whatever damaged EXIF leads Pillow to: the pixels are whole
                ImageOps.exif_transpose(picture, in_place=True)
            mode, array = picture.mode, np.array(picture.convert("RGB"))
    except UnidentifiedImageError:
        raise VideoError(f"{path}: not a picture") from None
    except VideoError:
        raise
    # Pillow's, of damaged files; MemoryError too, of a chunk that is said to have gigabytes.
    except (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        kind = VideoAwayError if is_away(error) else VideoError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise kind(f"{path}: not a readable picture ({reason})") from None
    if mode not in MODES:
        raise VideoError(f"{path}: expected a picture of 8 bits a channel, found mode {mode}")
    return array

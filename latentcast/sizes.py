"""Sizes of frames in pixels: a whole number stands for a square, ``[height, width]`` for any shape."""

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from .schemas import short

LONGEST = 65536  # pixels


def is_whole(value, least=float("-inf")):
    """Whether ``value`` is a whole number (False and True are not) of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def as_size(size, name="frame_size"):
    """A size in its one form: an int for a square, else a list [height, width].

    Raises:
        ValueError: it is neither a whole number above 0 nor two of them, or a huge one; begins with ``name``.
    """
    found = [size, size] if not isinstance(size, Sequence) or isinstance(size, str) else list(size)
    if len(found) != 2 or not all(is_whole(side, 1) and side <= LONGEST for side in found):
        where = f"{name}: " if name else ""
        raise ValueError(f"{where}expected pixels, a whole number from 1 on or [height, width], found {short(size)}")
    height, width = map(int, found)
    return height if height == width else [height, width]


Side = Annotated[int, Field(ge=1, le=LONGEST)]  # in files; see schemas.py
Size = Annotated[Any, AfterValidator(lambda found: as_size(found, ""))]  # in files; see schemas.py


def as_square(size, name, what):
    """A size that must be square -> int; ``what``: whose frames these are, for the error."""
    size = as_size(size, name)
    if not isinstance(size, int):
        raise ValueError(f"{name}: {what} are square, found {size}")
    return size


def sides(size):
    """(height, width) of a size."""
    size = as_size(size)
    return (size, size) if isinstance(size, int) else tuple(size)


def size_text(size):
    """A size in words: "64", or "96 x 64" (H x W)."""
    return " x ".join(map(str, [size] if isinstance(size, int) else size))


def nearest_multiples(height, width, stride, least=1, positions=1):
    """The nearest height and width that are multiples of ``stride``, of ``least`` times it at least, and of so many
    positions of ``stride`` x ``stride`` at least (1 or 2)."""
    high, wide = (max(least, (2 * side + stride) // (2 * stride)) for side in (height, width))
    return stride * high, stride * max(wide, -(-positions // high))


def check_stride(height, width, stride, name="the stride"):
    """Refuse frames that a tokenizer's network cannot divide into positions of ``stride`` x ``stride`` pixels."""
    if height % stride or width % stride:
        nearest = size_text(nearest_multiples(height, width, stride))
        raise ValueError(
            f"height, width: expected multiples of {name} {stride}, found {height}, {width}; the nearest are {nearest}"
        )


def nearest_fit(latent_spec, stride, positions=1):
    """In words, the nearest grid to a ``latent_spec``'s by ``nearest_multiples``, and the frames that have it."""
    grid = nearest_multiples(latent_spec["height"], latent_spec["width"], stride, positions=positions)
    if latent_spec["kind"] == "pixels":
        return f"the nearest that fits is {size_text(grid)}"
    names = ("height", "width")
    frames = [side * latent_spec[f"frame_{name}"] // latent_spec[name] for side, name in zip(grid, names)]
    return f"the nearest that fits is {size_text(grid)}, of frames of {size_text(frames)}"


def nearest_divisors(counts, wanted):
    """For each of some counts the divisor that is nearest to what is wanted, a list; the smaller of two."""
    return [
        min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: abs(d - one))
        if isinstance(one, int | float)
        else 1
        for count, one in zip(counts, wanted)
    ]

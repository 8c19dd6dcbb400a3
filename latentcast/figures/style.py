"""The look that all figures share, colours, fonts and colour scales, and ``Drawing``, what each of them is."""

import functools
import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont

from ..files import printable, replacing

PALETTE = ("#3b6fb6", "#e07b39", "#3a9d5d", "#8063b0", "#c8443b", "#3aa6b9", "#d57fb0", "#8c6d53", "#a3a13a", "#6f7782")
INK, FADED, FAINT = "#1f2430", "#5d6470", "#dfe2e7"  # of words, of words beside them, of lines that help the eye
CONTEXT = "#33a84d"  # what is given, in charts
AMOUNT = ("#f4f8fd", "#c4daee", "#6aaed6", "#2170b5", "#08306b", "#03132e")  # none to much
SIGNED = ("#134a8e", "#5b9fd0", "#f5f5f5", "#ef8a62", "#a5142c")  # below, none, above
CHANGED, SAME = (253, 231, 37), (38, 43, 56)  # of a change mask: yellow where a code is another
BAD = (255, 0, 220), (70, 0, 60)  # the two colours of the hatch over what is not finite
FONT = 12  # pixels


@functools.cache
def font(size=FONT, bold=False):
    """The font of charts, for pictures: matplotlib brings it along, so that none need be installed."""
    found = importlib.util.find_spec("matplotlib")
    try:
        folder = Path(found.origin).parent / "mpl-data/fonts/ttf"
        return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' * bold}.ttf"), size)
    except (AttributeError, ImportError, OSError):
        pass
    try:
        return ImageFont.load_default(size)
    except ImportError:  # a Pillow without FreeType has a font of one size
        return ImageFont.load_default()


def colour_of(number):
    """Of the ``number``-th line or bar."""
    return PALETTE[number % len(PALETTE)]


def rgb(colour):
    """ "#rrggbb" -> (r, g, b)"""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def in_frames(colour):
    """ "#rrggbb" -> as frames have it, in [-1, 1]"""
    return tuple(value / 127.5 - 1 for value in rgb(colour))


@functools.cache
def colour_table(colours, n=256):
    """(n, 3) uint8, evenly from the first of ``colours`` to the last."""
    stops = np.array([rgb(colour) for colour in colours], dtype=np.float64)
    places = np.linspace(0, len(stops) - 1, n)
    return np.stack([np.interp(places, range(len(stops)), channel) for channel in stops.T], -1).round().astype(np.uint8)


@functools.cache
def code_colours(size):
    """(size, 3) uint8: indexed colour, neighbours far apart in hue; a code has its colour in any codebook."""
    index = np.arange(size)
    hue, saturation = index * 0.61803398875 % 1, np.array([0.62, 0.9, 0.42])[index % 3]
    value = np.array([0.95, 0.72, 0.5, 0.86])[index % 4]
    sector = (hue[:, None] * 6 + np.array([5, 3, 1])) % 6
    shade = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (255 * value[:, None] * (1 - saturation[:, None] * shade)).round().astype(np.uint8)


@dataclass(frozen=True)
class Scale:
    """How numbers become colours.

    Attributes:
        label: what they are, with their unit. low, high: the ends; what lies beyond has the colour of the end.
        colours: from low to high.
    """

    label: str
    low: float
    high: float
    colours: tuple = AMOUNT

    @classmethod
    def of(cls, label, *arrays, signed=False, share=1.0):
        """One that fits the finite numbers of ``arrays``: from 0, or of ``signed`` ones as far below it as above.

        Args:
            share: of the numbers that lie within the ends, so that a few need not make all others pale.
        """
        sizes = np.abs(np.concatenate([as_array(array).reshape(-1) for array in arrays] or [np.zeros(1)]))
        sizes = sizes[np.isfinite(sizes)]
        high = float(np.quantile(sizes, share)) if sizes.size else 0.0
        high = high or float(sizes.max(initial=0)) or 1.0  # a constant 0 has a scale, too
        return cls(label, -high if signed else 0.0, high, SIGNED if signed else AMOUNT)

    def paint(self, values):
        """Numbers (..., H, W) -> (..., H, W, 3) uint8; a hatch where they are not finite."""
        values = as_array(values)
        bad = ~np.isfinite(values)
        share = (np.where(bad, self.low, values) - self.low) / (self.high - self.low)
        painted = colour_table(self.colours)[(share.clip(0, 1) * 255).round().astype(np.int64)]
        return hatched(painted, bad)


def hatched(pictures, bad):
    """Mark places (..., H, W) of (..., H, W, 3) uint8 as not finite."""
    if bad.any():
        odd = np.add.outer(np.arange(bad.shape[-2]), np.arange(bad.shape[-1])) % 2
        pictures = np.where(bad[..., None], np.array(BAD, np.uint8)[odd], pictures)
    return pictures


def as_array(values):
    """A tensor on any device, of any type, or whatever NumPy takes -> float64 array, or int64 of whole numbers."""
    if torch.is_tensor(values):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values.long()).numpy()
    values = np.asarray(values)
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def not_finite(*arrays):
    """A sentence about numbers that are not finite, " 3 of 500 values ..."; empty where there are none.

    Args:
        arrays: tensors or arrays, or None.
    """
    tensors = [torch.as_tensor(array) for array in arrays if array is not None]
    total = sum(tensor.numel() for tensor in tensors)
    n_bad = sum(int((~tensor.isfinite()).sum()) for tensor in tensors if tensor.is_floating_point())
    verb = "is" if n_bad == 1 else "are"
    return f" {n_bad:,} of {total:,} values {verb} NaN or infinite (magenta)." if n_bad else ""


def plain(numbers):
    """Numbers of NumPy as JSON has them."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in numbers.items()}


@dataclass(frozen=True)
class Drawing:
    """What every function that draws a figure returns.

    Attributes:
        name: of the figure, "code_maps" say; what files and logged pictures are called by.
        caption: what it shows and how to read it, one or two sentences; with what is not finite about it.
        picture: a PIL image, RGB.
        frames: (T, 3, H, W) uint8 of those that also move, else None. fps: their rate.
        numbers: name -> number, those that the figure says.
        chart: matplotlib's Figure, of those that it drew.
    """

    name: str
    caption: str
    picture: Image.Image
    frames: torch.Tensor | None = None
    fps: float | None = None
    numbers: dict = field(default_factory=dict)
    chart: object = None

    def png(self):
        """The picture as the bytes of a PNG file, which has the caption as its ``Description``."""
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("Description", printable(self.caption))
        file = io.BytesIO()
        self.picture.save(file, format="PNG", pnginfo=text)
        return file.getvalue()

    def save(self, path):
        """Write the picture as PNG -> path. (``data.video.writer.write_drawing`` writes frames as well.)"""
        with replacing(path) as temporary:
            temporary.write_bytes(self.png())
        return path


def stacked(*pictures):
    """PIL images above each other, at their left edges -> one, on white."""
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas

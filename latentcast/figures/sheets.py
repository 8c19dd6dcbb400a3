"""Laying frames and maps out beside each other, with words: sheets, and videos side by side."""

import functools
import logging
import textwrap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ..files import printable
from .style import FADED, FONT, INK, Scale, colour_table, font, hatched

logger = logging.getLogger("latentcast")

GAP = 2  # pixels between pictures
GROUP_GAP = 10  # above a row that begins a group
BORDER = 2  # pixels of a coloured frame
GIVEN, PREDICTED, TRUE = (-0.6, 0.5, -0.4), (1.0, 0.2, -0.8), (0.6, 0.6, 0.6)  # its colours, in [-1, 1]
LEGEND = "green: given, orange: predicted, grey: true; frame 0 is the last given one"
TRUTH = "truth"  # name of its row
LINE = 18  # pixels: height of a line of text
SMALL, NOTE = 10, 14  # pixels: of notes below pictures, and the height of a line of them
LONGEST_NAME = 24  # characters of a row's name
SHOWN = 96  # pixels that small frames are enlarged to, about; much larger ones are shrunk to twice as many
NARROWEST = 520  # pixels: of a sheet that has a caption


class Row(NamedTuple):
    """One row of a sheet.

    name: beside it, of one line or two. frames: (N, C, H, W), float in [-1, 1] or uint8. notes: a text below each of
    them, or none. begins: whether it begins a group, by some space above.
    """

    name: str
    frames: torch.Tensor
    notes: tuple = ()
    begins: bool = False


def contact_sheet(rows, scale=1, value=1.0):
    """Tile a grid of frames.

    Args:
        rows: (R, N, C, H, W) in [-1, 1], R rows of N frames.
        scale: whole-number enlargement, nearest neighbour.
        value: grey level of the separators.
    Returns:
        (C, R * scale * H + gaps, N * scale * W + gaps), with a 2-pixel separator between frames.
    """
    return torch.cat(_spaced([torch.cat(_spaced(list(enlarge(row, scale)), 2, value), 2) for row in rows], 1, value), 1)


def side_by_side(videos, scale=1, value=1.0, columns=None):
    """Put videos beside each other.

    Args:
        videos: a list of (T, C, H, W) in [-1, 1], or one tensor (N, T, C, H, W); or uint8 with a ``value`` of theirs.
        scale, value: as in ``contact_sheet``.
        columns: go on in another row after so many videos; the last row is filled up with ``value``. None: one row.
    Returns:
        (T, C, rows * scale * H + gaps, columns * scale * W + gaps), with a 2-pixel separator between videos.
    """
    columns = columns or len(videos)
    blank = torch.full_like(videos[0], value)
    videos = [*videos, *[blank] * (-len(videos) % columns)]
    rows = [videos[start : start + columns] for start in range(0, len(videos), columns)]
    return torch.cat(
        _spaced([torch.cat(_spaced([enlarge(v, scale) for v in row], 3, value), 3) for row in rows], 2, value), 2
    )


def grid_size(n, height, width, scale=1, columns=None):
    """(height, width) in pixels of what ``side_by_side`` makes of ``n`` videos."""
    columns = columns or n
    return tuple(count * (scale * side + GAP) - GAP for count, side in ((-(-n // columns), height), (columns, width)))


def enlarge(frames, scale):
    """(N, C, H, W) -> (N, C, scale * H, scale * W), nearest neighbour."""
    return frames if scale == 1 else F.interpolate(frames, scale_factor=scale, mode="nearest")


def scale_for(height, shown=SHOWN):
    """By what frames of that height are enlarged, so that they can be looked at."""
    return max(1, round(shown / height))


def fitted(frames, shown=SHOWN):
    """Frames (N, C, H, W), of any type, as large as they are looked at best, -> uint8 RGB (N, 3, H', W')."""
    frames, height = _uint8(frames), frames.shape[2]
    if height <= 2 * shown:
        return enlarge(frames, scale_for(height, shown))
    size = (2 * shown, max(1, round(2 * shown * frames.shape[3] / height)))
    return F.interpolate(frames.float(), size, mode="area").round().to(torch.uint8)


def as_tiles(maps, size):
    """Small maps (N, h, w, 3) uint8 arrays -> (N, 3, *size) uint8 tensor, each cell as large as any, about."""
    tiles = torch.from_numpy(np.ascontiguousarray(maps)).movedim(-1, 1)
    return F.interpolate(tiles, size, mode="nearest-exact")


def picked(n, most, keep=None):
    """Which of ``n`` frames a sheet with room for ``most`` shows: the first, the last, and even steps between; and
    frame ``keep``, in the place of the nearest."""
    places = torch.linspace(0, n - 1, min(n, most)).round().long()
    if keep is not None and len(places) > 2 and 0 < keep < n - 1:
        places[1 + (places[1:-1] - keep).abs().argmin()] = keep
    return places


def bordered(frames, colour):
    """(T, C, H, W) in [-1, 1] or uint8 -> (T, 3, H + 2 * BORDER, W + 2 * BORDER) uint8, in a coloured frame."""
    height, width = (size + 2 * BORDER for size in frames.shape[2:])
    canvas = _uint8(torch.tensor(colour).view(1, 3, 1, 1)).repeat(len(frames), 1, height, width)
    canvas[:, :, BORDER:-BORDER, BORDER:-BORDER] = _uint8(frames)
    return canvas


def rows_of(context, truth, futures):
    """What is shown of one context: the true continuation, if it is known, and each predicted one, in coloured frames.

    Args:
        context: (n, C, H, W) in [-1, 1]. truth: (T, C, H, W) or None. futures: (S, T, C, H, W).
    Returns:
        name -> (n + T, 3, H + 2 * BORDER, W + 2 * BORDER) uint8.
    """
    given = bordered(context, GIVEN)
    rows = {} if truth is None else {TRUTH: torch.cat([given, bordered(truth, TRUE)])}
    return rows | {f"sample {s}": torch.cat([given, bordered(f, PREDICTED)]) for s, f in enumerate(futures, start=1)}


def frame_names(n_context, n_frames, fps=None):
    """The frames of a clip as titles and columns call them: 0 is the last given one; with ``fps`` in seconds too."""
    numbers = range(1 - n_context, 1 + n_frames)
    return [f"{number:+d}" + (f" ({number / fps:+.2f} s)" if fps else "") if number else "0" for number in numbers]


def labelled_sheet(rows, columns=(), title="", scale=1, caption="", legend=()):
    """A contact sheet with the names of its rows, something over its columns and a title.

    Args:
        rows: list of Row, or of (name, frames).
        columns: a text for each of the N; where they do not fit, every second or third is shown.
        title: a line over all. scale: see ``contact_sheet``.
        caption: words below the title, in as many lines as they take.
        legend: what stands below all: (colour in [-1, 1], text), and Scales.
    Returns:
        (3, H', W') uint8, on white.
    """
    rows = [Row(*row) for row in rows]
    names = ["\n".join(cut_name(line) for line in row.name.split("\n")) for row in rows]
    height, width = (scale * side for side in rows[0].frames.shape[2:])
    left = max(_width(name) for name in names) + 2 * GAP if any(names) else 0
    tops, bottom = [], 0  # of the rows
    for i, row in enumerate(rows):
        tops.append(bottom + (i > 0) * (GROUP_GAP if row.begins else GAP))
        bottom = tops[-1] + height + NOTE * any(row.notes)
    across = max(len(row.frames) for row in rows) * (width + GAP) - GAP
    size = max(left + across, _width(title, bold=True) + 2 * GAP)
    if caption or legend:
        size = max(size, NARROWEST)
    words = wrapped(caption, size - 2 * GAP)
    keys, keys_height = _placed(legend, size)
    top = LINE * (bool(title) + len(words) + bool(columns))
    canvas = Image.new("RGB", (size, top + bottom + keys_height), "white")
    draw = ImageDraw.Draw(canvas)
    _write(draw, title, GAP, LINE / 2, bold=True)
    for i, line in enumerate(words, start=bool(title)):
        _write(draw, line, GAP, (i + 0.5) * LINE, FADED)
    every = -(-max((_width(text) + 2 * GAP for text in columns), default=1) // (width + GAP))
    for i, text in enumerate(columns):
        if i % every == 0:
            _write(draw, text, left + i * (width + GAP) + (width - _width(text)) / 2, top - LINE / 2)
    notes = [note for row in rows for note in row.notes]
    every = -(-max((_width(note, SMALL) + 2 * GAP for note in notes), default=1) // (width + GAP))
    for row, name, place in zip(rows, names, tops):
        _write(draw, name, GAP, top + place + height / 2, second=FADED)
        for i, frame in enumerate(enlarge(_uint8(row.frames), scale)):
            x = left + i * (width + GAP)
            canvas.paste(Image.fromarray(frame.movedim(0, -1).numpy()), (x, top + place))
            if row.notes and i % every == 0:
                note = row.notes[i]
                _write(draw, note, x + (width - _width(note, SMALL)) / 2, top + place + height + NOTE / 2, FADED, SMALL)
    for key, x, y in keys:
        _draw_key(canvas, draw, key, x, top + bottom + y)
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0)


BAR, SQUARE, BETWEEN = 120, 11, 18  # pixels of a legend's colour bar and square, and between its entries


def _placed(legend, width):
    """Entries of a legend in lines of ``width`` pixels -> [(entry, x, y)], their height."""
    placed, x, y = [], GAP, LINE
    for key in legend:
        size = _key_width(key)
        if x > GAP and x + size > width:
            x, y = GAP, y + LINE
        placed.append((key, x, y))
        x += size + BETWEEN
    return placed, y + LINE if placed else 0


def _key_width(key):
    if isinstance(key, Scale):
        return sum(_width(text) + 4 for text in _ends(key)) + BAR + 4 + _width(key.label)
    return SQUARE + 4 + _width(key[1])


def _ends(scale):
    return [f"{value:.3g}" for value in (scale.low, scale.high)]


def _draw_key(canvas, draw, key, x, y):
    """An entry of a legend, vertically centred at ``y``."""
    if isinstance(key, Scale):
        low, high = _ends(key)
        _write(draw, low, x, y, FADED)
        x += _width(low) + 4
        bar = np.broadcast_to(colour_table(key.colours, BAR)[None], (SQUARE, BAR, 3))
        canvas.paste(Image.fromarray(np.ascontiguousarray(bar)), (x, y - SQUARE // 2))
        draw.rectangle((x, y - SQUARE // 2, x + BAR, y - SQUARE // 2 + SQUARE), outline=FADED)
        _write(draw, high, x + BAR + 4, y, FADED)
        _write(draw, key.label, x + BAR + 8 + _width(high), y)
        return
    colour, text = key
    if colour == "hatch":
        square = hatched(np.zeros((SQUARE, SQUARE, 3), np.uint8), np.ones((SQUARE, SQUARE), bool))
        canvas.paste(Image.fromarray(square), (x, y - SQUARE // 2))
    else:
        filled = tuple(round((value + 1) * 127.5) for value in colour)
        draw.rectangle((x, y - SQUARE // 2, x + SQUARE - 1, y - SQUARE // 2 + SQUARE - 1), filled, FADED)
    _write(draw, text, x + SQUARE + 4, y)


def labelled_videos(videos, titles, scale=1, columns=None):
    """Videos beside each other, each under its name and all under a title that follows the frames.

    Args:
        videos: list of (name, (T, C, H, W) float in [-1, 1] or uint8).
        titles: T texts. scale, columns: see ``side_by_side``.
    Returns:
        (T, 3, H', W') uint8, on white.
    """
    cells = []
    for name, frames in videos:
        frames = enlarge(_uint8(frames), scale)
        line = _line(cut_name(name), frames.shape[3]).expand(len(frames), -1, -1, -1)
        cells.append(torch.cat([line, frames], 2))
    video = side_by_side(cells, 1, 255, columns)
    return torch.cat([torch.stack([_line(title, video.shape[3]) for title in titles]), video], 2)


def labelled_size(n, height, width, scale=1, columns=None):
    """(height, width) in pixels of what ``labelled_videos`` makes of ``n`` videos."""
    height, width = grid_size(n, scale * height + LINE, scale * width, 1, columns)
    return LINE + height, width


def cut_name(name, longest=LONGEST_NAME):
    """The beginning of a text that is too long to stand beside a row, and its end."""
    return name if len(name) <= longest else f"{name[: longest // 2]}...{name[len(name) - longest // 2 + 3 :]}"


def fitting(text, width):
    """``text``, cut where it is wider than ``width`` pixels."""
    longest = len(text)
    while longest > 6 and _width(cut_name(text, longest)) > width:
        longest -= 1
    return cut_name(text, longest)


def shown_channels(frames, axis=-3):
    """What pictures show of frames whose C, at ``axis`` of a tensor or array, is neither 1 nor 3: of two channels the
    first, as grey, and of more the first three, as RGB; the log says so once. Others as they are."""
    n_channels = frames.shape[axis]
    if n_channels in (1, 3):
        return frames
    n_shown = 3 if n_channels > 3 else 1
    _say_shown(n_channels, n_shown)
    index = [slice(None)] * frames.ndim
    index[axis] = slice(n_shown)
    return frames[tuple(index)]


@functools.cache
def _say_shown(n_channels, n_shown):
    what = "the first, as grey" if n_shown == 1 else "the first three, as RGB"
    logger.info("pictures show of %d channels %s", n_channels, what)


def _uint8(frames):
    """(N, C, H, W), float in [-1, 1] or uint8 -> (N, 3, H, W) uint8 on the CPU, hatched where it is not finite."""
    frames = shown_channels(frames.detach().cpu())
    if frames.dtype == torch.uint8:
        return frames.expand(-1, 3, -1, -1)
    bad = ~frames.isfinite().all(1)
    levels = ((frames.float().nan_to_num(0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    if bad.any():
        levels = torch.from_numpy(hatched(levels.movedim(1, -1).numpy(), bad.numpy())).movedim(-1, 1)
    return levels


def wrapped(text, width):
    """Lines of at most ``width`` pixels, about."""
    text = printable(text)
    letters = int(0.94 * width * len(text) / max(font().getlength(text), 1))
    return textwrap.wrap(text, max(20, letters))


def _width(text, size=FONT, bold=False):
    return max(int(np.ceil(font(size, bold).getlength(line))) for line in _lines(text))


def _lines(text):
    """Names of files may hold anything; a font takes text."""
    return [printable(line) for line in text.split("\n")]


def _write(draw, text, x, y, colour=INK, size=FONT, bold=False, second=None):
    """Write lines of text to the right of ``x``, vertically centred at ``y``; ``second``: the colour of all but one."""
    lines = _lines(text)
    for i, line in enumerate(lines):
        centre = y + (i - (len(lines) - 1) / 2) * (size + 3)
        place = (round(x), round(centre - size * 0.6))
        draw.text(place, line, second if second and i else colour, font(size, bold))


def _line(text, width):
    """A line of text in the middle of (3, LINE, width) uint8, white; cut where it is too long."""
    canvas, text = Image.new("RGB", (width, LINE), "white"), fitting(text, width)
    _write(ImageDraw.Draw(canvas), text, max(0, (width - _width(text)) / 2), LINE / 2)
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0)


def _spaced(pictures, axis, value):
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = pictures[0].new_full(shape, value)
    return [part for picture in pictures for part in (gap, picture)][1:]

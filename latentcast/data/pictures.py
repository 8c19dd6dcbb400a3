"""Laying frames out beside each other, with words, for previews and contact sheets."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..files import printable

GAP = 2  # pixels between pictures
BORDER = 2  # pixels of a coloured frame
GIVEN, PREDICTED, TRUE = (-0.6, 0.5, -0.4), (1.0, 0.2, -0.8), (0.6, 0.6, 0.6)  # its colours, in [-1, 1]
LEGEND = "green: given, orange: predicted, grey: true; frame 0 is the last given one"
TRUTH = "truth"  # name of its row
FONT = 12  # pixels
LINE = 18  # pixels: height of a line of text
LONGEST_NAME = 24  # characters of a row's name
SHOWN = 96  # pixels that small frames are enlarged to, about


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


def bordered(frames, colour):
    """(T, C, H, W) in [-1, 1] -> (T, 3, H + 2 * BORDER, W + 2 * BORDER) uint8, in a coloured frame."""
    height, width = (size + 2 * BORDER for size in frames.shape[2:])
    canvas = torch.tensor(colour).view(1, 3, 1, 1).repeat(len(frames), 1, height, width)
    canvas[:, :, BORDER:-BORDER, BORDER:-BORDER] = frames
    return ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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


def labelled_sheet(rows, columns=(), title="", scale=1):
    """A contact sheet with the names of its rows, something over its columns and a title.

    Args:
        rows: list of (name, (N, C, H, W) float in [-1, 1] or uint8); a name may have two lines.
        columns: a text for each of the N; where they do not fit, every second or third is shown.
        title: a line over all. scale: see ``contact_sheet``.
    Returns:
        (3, H', W') uint8, on white.
    """
    sheet = contact_sheet([_uint8(frames) for _, frames in rows], scale, 255)
    names = ["\n".join(cut_name(line) for line in name.split("\n")) for name, _ in rows]
    height, width = (scale * side + GAP for side in rows[0][1].shape[2:])
    left = max(_width(name) for name in names) + 2 * GAP if any(names) else 0
    top = LINE * (bool(title) + bool(columns))
    size = (max(left + sheet.shape[2], _width(title) + 2 * GAP), top + max(sheet.shape[1], 1))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(Image.fromarray(sheet.movedim(0, -1).numpy()), (left, top))
    draw = ImageDraw.Draw(canvas)
    _write(draw, title, GAP, LINE / 2)
    every = -(-max((_width(text) + 2 * GAP for text in columns), default=1) // width)
    for i, text in enumerate(columns):
        if i % every == 0:
            _write(draw, text, left + i * width + (width - _width(text)) / 2, top - LINE / 2)
    for i, name in enumerate(names):
        _write(draw, name, GAP, top + i * height + height / 2)
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0)


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


def _uint8(frames):
    if frames.dtype != torch.uint8:
        frames = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.expand(-1, 3, -1, -1).cpu()


@functools.cache
def _font():
    try:
        return ImageFont.load_default(FONT)
    except ImportError:  # a Pillow without FreeType has a font of one size
        return ImageFont.load_default()


def _width(text):
    return max(int(np.ceil(_font().getlength(line))) for line in _lines(text))


def _lines(text):
    """Names of files may hold anything; a font takes text."""
    return [printable(line) for line in text.split("\n")]


def _write(draw, text, x, y):
    """Write lines of text to the right of ``x``, vertically centred at ``y``."""
    lines = _lines(text)
    for i, line in enumerate(lines):
        centre = y + (i - (len(lines) - 1) / 2) * (FONT + 3)
        draw.text((round(x), round(centre - FONT * 0.7)), line, "black", _font())


def _line(text, width):
    """A line of text in the middle of (3, LINE, width) uint8, white; at its left edge where it is too long."""
    canvas = Image.new("RGB", (width, LINE), "white")
    _write(ImageDraw.Draw(canvas), text, max(0, (width - _width(text)) / 2), LINE / 2)
    return torch.from_numpy(np.array(canvas)).movedim(-1, 0)


def _spaced(pictures, axis, value):
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = pictures[0].new_full(shape, value)
    return [part for picture in pictures for part in (gap, picture)][1:]

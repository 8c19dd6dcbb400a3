"""Laying frames out beside each other, for previews and contact sheets."""

import torch
import torch.nn.functional as F

GAP = 2  # pixels between pictures


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


def _spaced(pictures, axis, value):
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = pictures[0].new_full(shape, value)
    return [part for picture in pictures for part in (gap, picture)][1:]

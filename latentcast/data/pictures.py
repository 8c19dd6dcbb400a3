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


def side_by_side(videos, scale=1, value=1.0):
    """Put videos beside each other.

    Args:
        videos: a list of (T, C, H, W) in [-1, 1], or one tensor (N, T, C, H, W).
        scale, value: as in ``contact_sheet``.
    Returns:
        (T, C, scale * H, N * scale * W + gaps), with a 2-pixel separator between videos.
    """
    return torch.cat(_spaced([enlarge(video, scale) for video in videos], 3, value), 3)


def enlarge(frames, scale):
    """(N, C, H, W) -> (N, C, scale * H, scale * W), nearest neighbour."""
    return frames if scale == 1 else F.interpolate(frames, scale_factor=scale, mode="nearest")


def _spaced(pictures, axis, value):
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = pictures[0].new_full(shape, value)
    return [part for picture in pictures for part in (gap, picture)][1:]

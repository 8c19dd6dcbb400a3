"""Predictions that need no model: what any model must beat."""

import torch


def copy_last_frame(context, n_frames):
    """Repeat the last context frame: (B, T, C, H, W) -> (B, n_frames, C, H, W)."""
    return context[:, -1:].expand(-1, n_frames, -1, -1, -1)


def blank_frame(context, n_frames):
    """All black, -1: (B, T, C, H, W) -> (B, n_frames, C, H, W)."""
    return torch.full_like(context[:, :1], -1).expand(-1, n_frames, -1, -1, -1)


def mean_context(context, n_frames):
    """Repeat the mean of the context frames: (B, T, C, H, W) -> (B, n_frames, C, H, W)."""
    return context.mean(1, keepdim=True).expand(-1, n_frames, -1, -1, -1)


BASELINES = {"copy_last_frame": copy_last_frame, "blank_frame": blank_frame, "mean_context": mean_context}

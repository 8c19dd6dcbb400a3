"""Predictions that need no model: what any model must beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from latentcast.shapes import Frames


def copy_last_frame(context: Frames, n_frames: int) -> Float[Tensor, "B {n_frames} C H W"]:
    """Repeat the last context frame."""
    return context[:, -1:].expand(-1, n_frames, -1, -1, -1)


def blank_frame(context: Frames, n_frames: int) -> Float[Tensor, "B {n_frames} C H W"]:
    """All black, -1."""
    return torch.full_like(context[:, :1], -1).expand(-1, n_frames, -1, -1, -1)


def mean_context(context: Frames, n_frames: int) -> Float[Tensor, "B {n_frames} C H W"]:
    """Repeat the mean of the context frames."""
    return context.mean(1, keepdim=True).expand(-1, n_frames, -1, -1, -1)


BASELINES = {"copy_last_frame": copy_last_frame, "blank_frame": blank_frame, "mean_context": mean_context}

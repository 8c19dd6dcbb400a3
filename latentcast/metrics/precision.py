"""Arithmetic of the metric networks."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Compute in true float32: no autocast, and no TF32 in convolutions, whose 10 bits would show in a metric."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        cudnn = torch.backends.cudnn
        if device.type == "cuda" and hasattr(cudnn, "conv"):  # since torch 2.9, which dislikes the older setting
            stack.callback(setattr, cudnn.conv, "fp32_precision", cudnn.conv.fp32_precision)
            cudnn.conv.fp32_precision = "ieee"
        elif device.type == "cuda":
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        yield

"""Scaled dot-product attention, as fast as the device allows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LONGEST_FP32 = 256  # positions


def attention(
    query: Float[Tensor, "*heads q e"],
    key: Float[Tensor, "*heads k e"],
    value: Float[Tensor, "*heads k v"],
    **options: Tensor | float | bool,
) -> Float[Tensor, "*heads q v"]:
    """``F.scaled_dot_product_attention``, with its options."""
    trained_in_bf16 = query.dtype == torch.bfloat16 and query.requires_grad
    if query.device.type == "cpu" and trained_in_bf16 and query.shape[-2] <= LONGEST_FP32:
        # Over short sequences the fused backward of bf16 takes 2 to 8 times as long as that of fp32 there (torch 2.13).
        with torch.autocast("cpu", enabled=False):
            parts = (part.float() for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts, **options).to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, **options)

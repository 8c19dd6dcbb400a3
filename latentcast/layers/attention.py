"""Scaled dot-product attention, as fast as the device allows."""

import torch
import torch.nn.functional as F

LONGEST_FP32 = 256  # positions


def attention(query, key, value, **options):
    """``F.scaled_dot_product_attention`` of (..., n, e), with its options -> (..., n, e)."""
    trained_in_bf16 = query.dtype == torch.bfloat16 and query.requires_grad
    if query.device.type == "cpu" and trained_in_bf16 and query.shape[-2] <= LONGEST_FP32:
        # Over short sequences the fused backward of bf16 takes 2 to 8 times as long as that of fp32 there (torch 2.13).
        with torch.autocast("cpu", enabled=False):
            parts = (part.float() for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts, **options).to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, **options)

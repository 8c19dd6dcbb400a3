"""Scaled dot-product attention, as fast as the device allows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MOST_PAIRS, MOST_CAUSAL_PAIRS = 2**20, 2**16  # of queries and keys; of causal pairs the half is for nothing


def attention(
    query: Float[Tensor, "*heads q e"],
    key: Float[Tensor, "*heads k e"],
    value: Float[Tensor, "*heads k v"],
    bias: Float[Tensor, "*#heads q k"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "*heads q v"]:
    """``F.scaled_dot_product_attention``, with these of its options; the bias is added to the logits."""
    trained_in_bf16 = value.dtype == torch.bfloat16 and query.requires_grad
    if value.device.type == "cpu" and trained_in_bf16:
        n_pairs = query.shape[-2] * key.shape[-2]
        if n_pairs <= (MOST_CAUSAL_PAIRS if is_causal else MOST_PAIRS):
            # The fused backward in bf16 takes 1.2 to 4 times as long as three plain steps there (torch 2.13).
            with torch.autocast("cpu", enabled=False):
                return plain_attention(query.to(value.dtype), key.to(value.dtype), value, bias, scale, is_causal)
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale, is_causal=is_causal)


def plain_attention(
    query: Float[Tensor, "*heads q e"],
    key: Float[Tensor, "*heads k e"],
    value: Float[Tensor, "*heads k v"],
    bias: Float[Tensor, "*#heads q k"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "*heads q v"]:
    """The same in plain steps, without the fused kernel: faster for few queries, too."""
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1) @ value

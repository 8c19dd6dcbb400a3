"""Attention as it is trained in bfloat16 on a CPU, against the closed form in float64."""

import math

import pytest
import torch

from latentcast.layers import attention as module


@pytest.mark.parametrize("most", [2**20, 0], ids=["unfused", "fused"])
@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"is_causal": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_is_the_closed_form(monkeypatch, most, options, dtype):
    monkeypatch.setattr(module, "MOST_PAIRS", most)
    monkeypatch.setattr(module, "MOST_CAUSAL_PAIRS", most)
    torch.manual_seed(0)
    n_keys = 5 if options.get("is_causal") else 7
    parts = [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (5, n_keys, n_keys)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    logits = exact[0] @ exact[1].transpose(2, 3) * options.get("scale", 1 / math.sqrt(8))
    if options.get("is_causal"):
        logits = logits.masked_fill(torch.arange(5)[:, None] < torch.arange(5), -torch.inf)
    if options.get("bias"):
        bias = torch.randn(1, 3, 5, n_keys, dtype=dtype)
        bias[..., 1, 2] = -torch.inf
        options = {"bias": bias.requires_grad_()}
        parts.append(bias)
        exact.append(bias.detach().double().requires_grad_())
        logits = logits + exact[3]
    expected = logits.softmax(-1) @ exact[2]
    found = module.attention(*parts[:3], **options)
    assert found.dtype == dtype
    close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected.to(dtype), **close)
    gradient = torch.randn_like(expected)
    found.backward(gradient.to(dtype))
    expected.backward(gradient)
    for part, other in zip(parts, exact):
        torch.testing.assert_close(part.grad, other.grad.to(dtype), **close)


def test_rotated_queries_in_float32_are_taken_along():
    """As under autocast: the products are bfloat16's, and so is what comes out."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = module.attention(query, key, value.bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad.dtype == torch.float32 and query.grad.abs().sum() > 0

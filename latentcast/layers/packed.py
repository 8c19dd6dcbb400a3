"""Weights laid out as a CPU's bfloat16 products read them, for as long as a model samples."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def packed_linears(*modules: nn.Module, rows: int = 1) -> Iterator[None]:
    """Inside the block, linear layers with bfloat16 weights on a CPU multiply by weights that oneDNN has laid out once.

    It otherwise does that in each call, which takes as long as the product where rows are few: a step of the video
    transformer's sampler is bound by reading weights. The weights are those at the beginning of the block, and are
    held twice. All other layers are left as they are.

    Args:
        modules: whose linear layers to pack; rows: how many a call has, about.
    """
    found = []
    for layer in _layers(modules):
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        layer.forward = partial(_linear, weight, layer.bias)
        found.append(layer)
    try:
        yield
    finally:
        for layer in found:
            vars(layer).pop("forward", None)


def can_pack() -> bool:
    """Whether this PyTorch and this CPU have such products."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _layers(modules):
    """Those to pack: none of a compiled module, none quantised, sharded, or of a sampler that is at work already."""
    inner = [each for module in modules for each in module.modules()]
    compiled = any(each._compiled_call_impl is not None for each in inner)
    if compiled or torch.is_grad_enabled() or not can_pack():
        return
    for layer in inner:
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and "forward" not in vars(layer):
            if layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu":
                yield layer


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

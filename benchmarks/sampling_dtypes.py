"""Sampling with fp32 weights against bf16 ones, as ``--dtype`` of the tools has them. See ``sampling.py``."""

from common import compare, say  # isort: skip  (sets the thread policy before torch loads)

import torch
from gpu_day import PRIORS, build, clip_of

from latentcast.cli import computes_bfloat16

DENOISING = {"stdiff": 4, "rvd": 4}  # steps, of the many that are alike


def dtypes():
    """The first frame of one future of every prior at its paper's size, of RVD and STDiff with four denoising steps.

    ``NAME_bf16``: seconds with fp32 weights over seconds with bf16 weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not computes_bfloat16(device):
        say(f"dtypes: this {device} does not compute in bfloat16")
    ratios = {}
    for name, case in PRIORS.items():
        steps = {"n_steps": DENOISING[name]} if name in DENOISING else {}
        samplers = []
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name, device, tiny=False, dtype=dtype)
            context = clip_of(model, 1, case.frames[0])
            context = context if model.accepts == "codes" else context.to(dtype)
            samplers.append(lambda model=model, context=context, steps=steps: model.sample(context, 1, **steps))
        ratio, slow, fast = compare(*samplers, device, rounds=3)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        say(f"{name}, {size:.1f}M parameters: {slow:.3f} s in fp32, {fast:.3f} s in bf16: {ratio:.2f} times as fast")
        ratios[f"{name}_bf16"] = ratio
    return ratios

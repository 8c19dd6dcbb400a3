"""Sampling with compiled steps (``compile`` of the priors that draw code by code) against the same without. See
``sampling.py``."""

from common import compare, say  # isort: skip  (sets the thread policy before torch loads)

import time
from functools import partial

import torch
from gpu_day import build, clip_of

from latentcast.config import instantiate, load_config

SMALL = ("small/lvt", "small/st_pixelcnn")


def compiled():
    """The first frame of one future of LVT and ST-PixelCNN, at their papers' sizes and of the small experiments.

    ``NAME_compiled``: seconds without over seconds with; the time of compiling is told beside it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: build(name, device, tiny=False) for name in ("lvt", "st_pixelcnn")}
    models |= {name.replace("/", "_"): small(name).to(device).eval() for name in SMALL}
    ratios = {}
    for name, model in models.items():
        context = clip_of(model, 1, 5)
        samplers = [partial(model.sample, context, 1, compile=compile) for compile in (False, True)]
        began = time.perf_counter()
        samplers[1]()
        first = time.perf_counter() - began
        ratio, slow, fast = compare(*samplers, device, rounds=5)
        say(f"{name}: {slow:.3f} s, compiled {fast:.3f} s: {ratio:.2f} times as fast; the first time {first:.0f} s")
        ratios[f"{name}_compiled"] = ratio
    return ratios


def small(experiment):
    """The prior of an experiment, untrained."""
    config = load_config(experiment, tool="train_prior")
    torch.manual_seed(0)
    return instantiate(config.prior, latent_spec=instantiate(config.tokenizer).latent_spec)

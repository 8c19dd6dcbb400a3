"""What a frame costs to encode and to keep, and a clip to train on, for docs/scaling.md.

python benchmarks/scaling.py [--only encoding,training,storage]

Seconds are of this process on one core (CPU time, so that other work on the machine counts less), after a first call;
operations those that torch counts, convolutions and matrix products but not LSTMs; a GPU's time follows from its rate.
"""

from common import counted_flops, say  # isort: skip  (sets the thread policy before torch loads)

import argparse
import json
import runpy
import time
from pathlib import Path

import torch
from gpu_day import PRIORS, build, clip_of, training_step

from latentcast.data.store.latent_cache import _itemsize, _layout

TOKENIZERS = ("vqvae", "sliced_vqvae", "hr_vqvae", "fsq", "kl_vae", "diffusers_tiny")
SIZE, N_FRAMES = 64, 16


def tokenizers():
    for name, make in runpy.run_path(str(Path(__file__).with_name("tokenizers.py")))["TOKENIZERS"].items():
        if name in TOKENIZERS:
            torch.manual_seed(0)
            sized = {} if name.startswith("diffusers") else {"in_channels": 3}
            yield name, make(height=SIZE, width=SIZE, **sized).eval()


def cost(function):
    """-> (billions of operations, CPU seconds of one core)"""
    flops, began = counted_flops(function), time.process_time()
    function()
    return flops / 1e9, time.process_time() - began


def encoding():
    """A frame through every tokenizer at its default size."""
    frames = torch.rand(1, N_FRAMES, 3, SIZE, SIZE) * 2 - 1
    for name, model in tokenizers():
        with torch.no_grad():
            flops, seconds = cost(lambda model=model: model.encode(frames))
        yield name, {"GFLOP_a_frame": flops / N_FRAMES, "frames_a_core_second": N_FRAMES / seconds}


def training():
    """A clip's share of a training step of every prior at its paper's size: forward, backward, clipping, AdamW."""
    for name, case in PRIORS.items():
        n_context, _, n_frames = case.frames
        model = build(name, "cpu", False)
        flops, seconds = cost(training_step(model, clip_of(model, 1, n_frames), n_context, mode="fp32"))
        size = sum(p.numel() for p in model.parameters()) / 1e6
        yield name, {"frames": n_frames, "GFLOP_a_clip": flops, "core_seconds_a_clip": seconds, "M_parameters": size}


def storage():
    """Bytes of a frame in a prepared set, and in a cache of every kind."""
    yield "prepared", {"grey": SIZE**2, "RGB": 3 * SIZE**2}
    for name, model in tokenizers():
        kinds = {}
        for store, there in {"codes": model.is_discrete, "latents": True, "posterior": model.has_posterior}.items():
            for dtype in ("float32", "bfloat16")[: there * (1 if store == "codes" else 2)]:
                _, stored, shape = _layout(model.latent_spec, store, dtype)
                kinds[f"{store} {stored}"] = torch.Size(shape).numel() * _itemsize(stored)
        yield name, kinds


PARTS = {"storage": storage, "encoding": encoding, "training": training}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help=f"comma-separated parts to run, of: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    found = {}
    for part in (parser.parse_args().only or ",".join(PARTS)).split(","):
        found[part] = {}
        for name, figures in PARTS[part]():
            found[part][name] = {key: float(f"{value:.3g}") for key, value in figures.items()}
            say(f"{part} {name} {found[part][name]}")
    print(json.dumps(found))

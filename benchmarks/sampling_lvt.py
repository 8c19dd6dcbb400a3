"""Sampling of the Latent Video Transformer: with its caches against without. See ``sampling.py``."""

from common import compare, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast import VideoTransformer
from latentcast.priors.video_transformer import ATTENTION_FORMS, FullStepper

LVT_SPEC = {"kind": "discrete", "channels": 256, "height": 16, "width": 16, "codebook_sizes": [512] * 4}


def lvt():
    """The Latent Video Transformer at the paper's size: 5 priming + 11 predicted frames of 16 x 16 x 4 codes."""
    torch.manual_seed(0)
    model = VideoTransformer(LVT_SPEC | {"scaling_factor": 1.0}).eval()
    say(f"lvt: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, single-frame subscaling, fp32")
    ratios = lvt_ratios(model, "cpu")
    if torch.cuda.is_available():
        say("lvt on the GPU, bf16:")
        model = model.to("cuda", torch.bfloat16)
        ratios |= {f"{name}_gpu": ratio for name, ratio in lvt_ratios(model, "cuda", measured=64).items()}
        time = lvt_cached(model, 64, "cuda")
        say(f"  batch 64: {time:.2f} s, {64 / time:.2f} videos/s, {64 * 11 / time:.1f} frames/s")
    return ratios


def attention():
    """The paper's three forms of attention (Table 7), at its size: the first frame of one future, untrained.

    ``attention_NAME``: seconds with queries and keys over seconds with this form.
    """
    device, ratios = "cuda" if torch.cuda.is_available() else "cpu", {}
    context = torch.randint(512, (1, 5, 16, 16, 4), device=device)

    def sampler(form):
        torch.manual_seed(0)
        model = VideoTransformer(LVT_SPEC | {"scaling_factor": 1.0}, attention=form).to(device).eval()
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        return size, lambda: model.sample(context, 1)

    first, *others = ATTENTION_FORMS
    size, whole = sampler(first)
    for form in others:
        smaller, cheaper = sampler(form)
        ratio, slow, fast = compare(whole, cheaper, device, rounds=3)
        say(f"{first} ({size:.2f}M): {slow:.3f} s; {form} ({smaller:.2f}M): {fast:.3f} s: {ratio:.2f} times as fast")
        ratios[f"attention_{form}"] = ratio
    return ratios


@torch.no_grad()
def lvt_ratios(model, device, measured=4):
    """Seconds a video without the cache over seconds a video with it.

    Both are held against the uncached sampler one video at a time, as published; ``_same_batch`` against the uncached
    sampler with 16 samples at once.
    """
    uncached, cached = {}, {}
    for n in (1, 16):
        cached[n] = lvt_cached(model, n, device) / n
        step, encode = lvt_uncached(model, n, device, measured)
        uncached[n] = 11 * (encode + 256 * step) / n
        say(
            f"  {n:2d} sample(s): cached {cached[n]:.2f} s a video (measured whole); uncached {uncached[n]:.0f} s a "
            f"video (extrapolated from {measured} of 2816 positions, {step * 1e3:.0f} ms each)"
        )
    return {
        "lvt_cached_b1": uncached[1] / cached[1],
        "lvt_cached_b16": uncached[1] / cached[16],
        "lvt_cached_b16_same_batch": uncached[16] / cached[16],
    }


def lvt_cached(model, n_samples, device):
    """Seconds of ``n_samples`` futures of one context."""
    context = torch.randint(512, (1, 5, 16, 16, 4), device=device)
    if device == "cuda":  # the first call sets the libraries up
        model.sample(context, 11, num_samples=n_samples)
    return seconds(lambda: model.sample(context, 11, num_samples=n_samples), device)


def lvt_uncached(model, n_samples, device, measured):
    """Seconds of one position without the cache, and of encoding one slice."""
    rows = torch.randint(512, (n_samples, 16 * 16 * 16, 4), device=device) + model.first_row
    slice_ids = torch.full((n_samples,), 8, device=device)
    memory = model._encode(rows, slice_ids)
    encode = seconds(lambda: model._encode(rows, slice_ids), device)
    stepper = FullStepper(model, n_samples, {"temperature": 1.0, "top_k": None, "top_p": None})
    stepper.start_slice(memory, rows[:, model.slice_pixels[8]], 0, torch.rand(256, n_samples, 4, device=device))
    stepper.step(0)
    positions = iter(range(1, measured + 1))
    return seconds(lambda: stepper.step(next(positions)), device, repeat=measured), encode

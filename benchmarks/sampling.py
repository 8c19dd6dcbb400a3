"""Sampling speed: each prior's fast sampler against the slow form of the same model, in one run.

    python benchmarks/sampling.py [--only lvt]

The slow side is extrapolated from a measured slice of it, and labelled so.
"""

from common import run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast import VideoTransformer
from latentcast.priors.video_transformer import FullStepper

LVT_SPEC = {"kind": "discrete", "channels": 256, "height": 16, "width": 16, "codebook_sizes": [512] * 4}


def lvt():
    """The Latent Video Transformer at the paper's size: 5 priming + 11 predicted frames of 16 x 16 x 4 codes."""
    torch.manual_seed(0)
    model = VideoTransformer(LVT_SPEC | {"scaling_factor": 1.0}).eval()
    say(f"lvt: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, single-frame subscaling, fp32")
    ratios = {f"lvt_cached_b{n}": lvt_ratio(model, n, "cpu") for n in (1, 16)}
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
        say("lvt on the GPU, bf16:")
        ratios |= {f"lvt_cached_b{n}_gpu": lvt_ratio(model, n, "cuda", measured=64) for n in (1, 16)}
        context = torch.randint(512, (64, 5, 16, 16, 4), device="cuda")
        time = seconds(lambda: model.sample(context, 11), "cuda")
        say(f"  batch 64: {time:.2f} s, {64 / time:.2f} videos/s, {64 * 11 / time:.1f} frames/s")
    return ratios


@torch.no_grad()
def lvt_ratio(model, n_samples, device, measured=4):
    """Uncached seconds over cached seconds for ``n_samples`` futures of one context."""
    context = torch.randint(512, (1, 5, 16, 16, 4), device=device)
    sample = lambda: model.sample(context, 11, num_samples=n_samples)  # noqa: E731
    if device == "cuda":
        sample()
    cached = seconds(sample, device)

    rows = torch.randint(512, (n_samples, 16 * 16 * 16, 4), device=device) + model.first_row
    slice_ids = torch.full((n_samples,), 8, device=device)
    encode = seconds(lambda: model._encode(rows, slice_ids), device, repeat=2)
    memory = model._encode(rows, slice_ids)
    choose = {"temperature": 1.0, "top_k": None, "top_p": None}
    stepper = FullStepper(model, memory, choose)
    own = rows[:, model.slice_pixels[8]]
    stepper.start_slice(memory, own, 0, torch.rand(256, n_samples, 4, device=device))
    stepper.step(0)
    positions = iter(range(1, measured + 1))
    step = seconds(lambda: stepper.step(next(positions)), device, repeat=measured)
    uncached = 11 * (encode + 256 * step)
    say(
        f"  {n_samples:2d} sample(s) of 11 frames: cached {cached:.1f} s ({cached / n_samples:.2f} s a video), whole; "
        f"uncached {uncached:.0f} s (extrapolated from {measured} of 2816 positions, {step * 1e3:.0f} ms each); "
        f"{uncached / cached:.1f}x"
    )
    return uncached / cached


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"lvt": lvt})

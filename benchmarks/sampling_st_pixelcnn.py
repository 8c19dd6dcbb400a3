"""Sampling of ST-PixelCNN: through its caches against the whole network for every code. See ``sampling.py``."""

from common import say, seconds  # isort: skip  (sets the thread policy before torch loads)

import math

import torch

from latentcast import instantiate, load_config
from latentcast.priors.st_pixelcnn import UncachedLevel


def st_pixelcnn():
    """S-HR-VQVAE on Moving-MNIST at the size of its experiment, untrained: 10 -> 10 frames of 16 x 16 x 3 codes.

    Ratios of seconds a video: ``st_pixelcnn_cached``, one video at a time on both sides; ``_b16``, 16 samples at once
    with caches against one at a time without; ``_b16_same_batch``, 16 at once on both sides; ``_full``, one at a time,
    with full in the place of factorised attention.
    """
    torch.manual_seed(0)
    config = load_config("shrvqvae_moving_mnist", tool="train_prior")
    spec = instantiate(config.tokenizer).latent_spec

    def build(**options):
        model = instantiate(config.prior, latent_spec=spec, **options).eval()
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"st_pixelcnn: {millions:.1f}M parameters, attention {model.config.attention}")
        return model

    model = build()
    ratios = measure(model, "cpu")
    if torch.cuda.is_available():
        ratios |= {f"{name}_gpu": ratio for name, ratio in measure(model.to("cuda", torch.bfloat16), "cuda").items()}
    ratios["st_pixelcnn_cached_full"] = measure(build(attention="full"), "cpu", batches=(1,))["st_pixelcnn_cached"]
    return ratios


@torch.no_grad()
def measure(model, device, batches=(1, 16)):
    """The ratios of one model on one device."""
    cached, full = {}, {}
    for n in batches:
        cached[n] = cached_seconds(model, n, device) / n
        full[n], measured, n_codes = full_seconds(model, n, device)
        full[n] /= n
        say(
            f"  {device}, {model.dtype}, {n:2d} sample(s): cached {cached[n]:.2f} s a video (measured whole); "
            f"without caches {full[n]:.0f} s a video (extrapolated from {measured} of {n_codes} codes)"
        )
    ratios = {"st_pixelcnn_cached": full[1] / cached[1]}
    if 16 in batches:
        ratios["st_pixelcnn_cached_b16"] = full[1] / cached[16]
        ratios["st_pixelcnn_cached_b16_same_batch"] = full[16] / cached[16]
    return ratios


def cached_seconds(model, n_samples, device):
    """Seconds of ``n_samples`` futures of one context."""
    context = random_codes(model, 1, 10, device)
    model.sample(context, 1, num_samples=n_samples)  # libraries set themselves up
    return seconds(lambda: model.sample(context, 10, num_samples=n_samples), device)


def full_seconds(model, n_samples, device):
    """Seconds of ``n_samples`` futures without caches, measured on one code of each level; how many codes; of how many.

    They are codes of the fifth predicted frame: the network runs over 15 frames, where the mean is 15.5.
    """
    rows = random_codes(model, n_samples, 15, device) + model.first_row
    window, frame = rows[:, :14], rows[:, 14:].clone()
    uniform = torch.rand(n_samples, device=device)
    choose = {"temperature": 1.0, "top_k": None, "top_p": None}
    levels = [UncachedLevel(model, i, n_samples, choose) for i in range(len(model.codebook_sizes))]
    for level in levels:
        level.start_frame(window, frame, None)
    levels[0].fill(8, 8, uniform)
    each = [seconds(lambda level=level: level.fill(8, 8, uniform), device) for level in levels]
    positions = 10 * math.prod(model.grid[1:])
    return sum(each) * positions, len(levels), positions * len(levels)


def random_codes(model, batch, frames, device):
    sizes = torch.tensor(model.codebook_sizes)
    return (torch.rand(batch, frames, *model.grid[-2:], len(sizes)) * sizes).long().to(device)

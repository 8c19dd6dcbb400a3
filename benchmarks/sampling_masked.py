"""Masked decoding against drawing the same codes one by one. See ``sampling.py``."""

from common import say  # isort: skip  (sets the thread policy before torch loads)

import math

import torch
from sampling_st_pixelcnn import cached_seconds

from latentcast import MaskedTransformer, instantiate, load_config


def masked():
    """S-HR-VQVAE's codes of Moving-MNIST, untrained: 10 -> 10 frames of 16 x 16 x 3 codes, by MaskedTransformer at its
    default size and by ST-PixelCNN at that of the experiment, through its caches.

    ``masked_calls_vs_pixelcnn``: network calls of ST-PixelCNN, one a code, over those of MaskedTransformer, one a step
    and one to remember a frame. ``masked_time_vs_pixelcnn``: seconds of one future over seconds of one; ``_b16``, of 16
    at once.
    """
    torch.manual_seed(0)
    config = load_config("shrvqvae_moving_mnist", tool="train_prior")
    spec = instantiate(config.tokenizer).latent_spec
    pixelcnn = instantiate(config.prior, latent_spec=spec).eval()
    model = MaskedTransformer(spec, n_frames=20).eval()
    for name, each in (("ST-PixelCNN", pixelcnn), ("MaskedTransformer", model)):
        say(f"{name}: {sum(p.numel() for p in each.parameters()) / 1e6:.1f}M parameters")
    n_steps = model.sampler_options()["n_steps"].default
    calls = math.prod(model.grid) * model.n_levels, n_steps + 1
    ratios = {"masked_calls_vs_pixelcnn": calls[0] / calls[1]}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        models = [each.to(device) for each in (pixelcnn, model)]
        for n in (1, 16):
            slow, fast = (cached_seconds(each, n, device) / n for each in models)
            say(f"  {device}, {n:2d} sample(s): ST-PixelCNN {slow:.2f} s a future, MaskedTransformer {fast:.2f} s")
            name = "masked_time_vs_pixelcnn" + ("" if n == 1 else "_b16") + ("" if device == "cpu" else "_gpu")
            ratios[name] = slow / fast
    return ratios

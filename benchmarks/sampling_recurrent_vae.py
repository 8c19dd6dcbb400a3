"""Sampling of the recurrent VAE: 100 futures of one context in one batch against one at a time. See ``sampling.py``."""

from common import say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast import PixelTokenizer, RecurrentVAE

N_CONTEXT = N_FRAMES = 10
MODELS = {"": ("dcgan", "none"), "_aligned": ("dcgan", "paper")}  # part of the ratio's name -> network and aligner


def recurrent_vae():
    """SVG-LP, and HAF-SVG-1 (``_aligned``), with DCGAN-64: 100 samples of 10 -> 10 frames, all measured whole.

    Ratios are one at a time, by the same model, over one batch. One at a time means as the published code does it: for
    each sample the past is encoded again, frame by frame. ``_encoded_once``: over the past encoded once, the samples
    still one at a time.
    """
    ratios = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for suffix, (network, aligner) in MODELS.items():
            torch.manual_seed(0)
            spec = PixelTokenizer(1, 64, 64).latent_spec
            model = RecurrentVAE(spec, network=network, aligner=aligner, group_dim=10).eval().to(device)
            time = recurrent_vae_seconds(model, 100)
            size = sum(p.numel() for p in model.parameters()) / 1e6
            say(
                f"recurrent_vae, {network}, aligner {aligner}, {size:.2f}M parameters, {device}: 100 samples in one "
                f"batch {time['batched']:.2f} s; one at a time {time['one_at_a_time']:.1f} s, with the past encoded "
                f"once {time['encoded_once']:.1f} s"
            )
            name = f"recurrent_vae_batched_100{suffix}" + "_gpu" * (device == "cuda")
            ratios[name] = time["one_at_a_time"] / time["batched"]
            ratios[f"{name}_encoded_once"] = time["encoded_once"] / time["batched"]
    return ratios


def recurrent_vae_seconds(model, n_samples):
    """Seconds of ``n_samples`` futures of one context: name of the way -> seconds."""
    spec, device = model.config.latent_spec, model.device
    context = torch.rand(1, N_CONTEXT, spec["channels"], spec["height"], spec["width"], device=device) * 2 - 1

    def sample(n, **options):
        return model.sample(context, N_FRAMES, num_samples=n, **options)

    def one_at_a_time():
        for _ in range(n_samples):
            sample(1, sample_batch=1)

    for warm_up in (n_samples, 1):
        sample(warm_up, sample_batch=warm_up)
    return {
        "batched": seconds(lambda: sample(n_samples), device),
        "one_at_a_time": seconds(one_at_a_time, device),
        "encoded_once": seconds(lambda: sample(n_samples, sample_batch=1), device),
    }

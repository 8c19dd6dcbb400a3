"""RVD's part of sampling.py: what a frame's steps share computed once, and few of them, against 1600 ancestral ones."""

from common import compare, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast import PixelTokenizer, ResidualDiffusion
from latentcast.priors.denoising import make_scheduler

N_CONTEXT, N_FRAMES, N_STEPS = 4, 16, 1600  # the paper's test protocol and diffusion steps


def rvd():
    """Residual Video Diffusion at the paper's size: one future of 16 frames of 64 x 64 x 3 after 4."""
    torch.manual_seed(0)
    model = ResidualDiffusion(PixelTokenizer(3, 64, 64, levels=None).latent_spec).eval()
    say(f"rvd: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, 64 x 64 x 3, fp32")
    ratios = rvd_ratios(model, "cpu")
    if torch.cuda.is_available():
        say("rvd on the GPU, bf16:")
        model = model.to("cuda", torch.bfloat16)
        ratios |= {f"{name}_gpu": ratio for name, ratio in rvd_ratios(model, "cuda").items()}
    return ratios


@torch.no_grad()
def rvd_ratios(model, device, measured=20):
    """``rvd_step_cached``: seconds of a U-Net step that computes the context's part over one that is given it.

    ``rvd_end_to_end``: seconds of 1600 steps of DDPM a frame with the context's part computed at every step, as
    published, over seconds of the default sampler, which is measured whole. A model that was not trained takes the same
    time.
    """
    context = torch.rand(1, N_CONTEXT, 3, 64, 64, device=device, dtype=model.dtype) * 2 - 1
    y, n = torch.randn_like(context[:, 0]), torch.tensor([N_STEPS // 2], device=device)
    memory = model.observe(context[:, 0])
    states, network = memory.rows("context"), model.denoiser
    given = network.conditions(states)

    def read():
        model.predict_frame(model.observe(context[:, 1], memory=memory))

    read()
    ratio, recomputed, cached = compare(
        lambda: network(y, n, network.conditions(states)), lambda: network(y, n, given), device, rounds=measured
    )
    say(
        f"  a step: context's part given {cached * 1e3:.1f} ms, recomputed {recomputed * 1e3:.1f} ms (medians of "
        f"{measured}, in turns)"
    )

    scheduler = make_scheduler("ddpm", model.schedule)
    noise = torch.randn_like(y)
    update = seconds(lambda: scheduler.step(noise, N_STEPS // 2, noise), device, repeat=measured)
    reading = seconds(read, device, repeat=3)
    published = (N_CONTEXT + N_FRAMES) * reading + N_FRAMES * N_STEPS * (recomputed + update)
    ours = seconds(lambda: model.sample(context, N_FRAMES), device)
    say(
        f"  {N_FRAMES} frames: default sampler {ours:.1f} s (measured whole); {N_STEPS} steps of DDPM a frame "
        f"{published:.0f} s (extrapolated from {measured} steps of {(recomputed + update) * 1e3:.1f} ms)"
    )
    return {"rvd_step_cached": ratio, "rvd_end_to_end": published / ours}

"""STDiff's part of sampling.py: SPADE maps once a frame and few steps, against the published sampler."""

from common import compare, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast import SDEDiffusion
from latentcast.priors.denoising import make_scheduler

RGB64 = {"kind": "pixels", "channels": 3, "height": 64, "width": 64, "codebook_sizes": [], "scaling_factor": 1.0}
RGB64 |= {"frame_channels": 3, "frame_height": 64, "frame_width": 64}
N_FRAMES, N_SAMPLES, REFERENCE_STEPS = 10, 10, 100


def stdiff():
    """STDiff at the paper's size: futures of 10 frames of 64 x 64 x 3 after 5."""
    torch.manual_seed(0)
    model = SDEDiffusion(RGB64).eval()
    say(f"stdiff: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, 64 x 64 x 3, fp32")
    ratios = stdiff_ratios(model, "cpu")
    if torch.cuda.is_available():
        say("stdiff on the GPU, bf16:")
        model = model.to("cuda", torch.bfloat16)
        ratios |= {f"{name}_gpu": ratio for name, ratio in stdiff_ratios(model, "cuda", measured=25).items()}
    return ratios


@torch.no_grad()
def stdiff_ratios(model, device, measured=9):
    """``stdiff_step_cached``: seconds of a U-Net step that computes the maps over one that is given them.

    Of the 10 samples that the paper's protocol draws of a clip, in one batch. ``stdiff_step_cached_single``: of one
    sample.

    ``stdiff_end_to_end``: seconds of 100 steps of DDPM a frame with the maps computed at every step, as published, over
    seconds of the default sampler, which is measured whole; for one sample. A model that was not trained takes the same
    time.
    """
    context = torch.rand(1, 5, 3, 64, 64, device=device, dtype=model.dtype) * 2 - 1
    times = torch.arange(1.0, N_FRAMES + 1)[None]

    def motion():
        return model.motion_sde(model.encode_motion(context), times, [(0,)])[:, 0].to(model.dtype)

    feature = motion()
    ratio, _ = compare_steps(model, feature, N_SAMPLES, device, measured)
    single_ratio, recomputed = compare_steps(model, feature, 1, device, measured)

    scheduler = make_scheduler("ddpm", model.schedule)
    noise = torch.randn(1, 3, 64, 64, device=device)
    update = seconds(lambda: scheduler.step(noise, 500, noise), device, repeat=measured)
    moving = seconds(motion, device)
    published = moving + N_FRAMES * REFERENCE_STEPS * (recomputed + update)
    ours = seconds(lambda: model.sample(context, N_FRAMES), device)
    say(
        f"  {N_FRAMES} frames: default sampler {ours:.1f} s (measured whole); {REFERENCE_STEPS} steps of DDPM a frame "
        f"with the maps recomputed {published:.0f} s (extrapolated from {measured} steps of "
        f"{REFERENCE_STEPS * N_FRAMES}; motion {moving:.2f} s)"
    )
    return {
        "stdiff_step_cached": ratio,
        "stdiff_step_cached_single": single_ratio,
        "stdiff_end_to_end": published / ours,
    }


def compare_steps(model, feature, n_samples, device, rounds):
    """Of a step of a batch of samples -> (its time with the maps computed over that with them given, the former)."""
    x = torch.randn(n_samples, 6, 64, 64, device=device, dtype=model.dtype)
    t = torch.full((n_samples,), 500, device=device)
    feature = feature.expand(n_samples, -1, -1, -1).contiguous()
    maps = model.unet.maps(feature)
    ratio, recomputed, cached = compare(
        lambda: model.unet(x, t, feature), lambda: model.unet(x, t, feature, maps), device, rounds
    )
    say(
        f"  a step, batch of {n_samples}: maps given {cached * 1e3:.0f} ms, recomputed {recomputed * 1e3:.0f} ms, "
        f"{ratio:.2f}x (medians of {rounds}, in turns)"
    )
    return ratio, recomputed

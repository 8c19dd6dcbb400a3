"""FlowTransformer's part of sampling.py: eight steps a frame with a cached past, against STDiff's default sampler."""

from common import compare, say  # isort: skip  (sets the thread policy before torch loads)

import torch
from sampling_stdiff import RGB64

from latentcast import FlowTransformer, SDEDiffusion

N_FRAMES = 2


@torch.no_grad()
def flow():
    """``flow_time_vs_stdiff``: seconds of a future of frames of 64 x 64 x 3 after 5 at n_steps=8, over those of
    SDEDiffusion's default sampler, both at their default sizes. Models that were not trained take the same time."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [FlowTransformer(RGB64, n_frames=15).eval().to(device), SDEDiffusion(RGB64).eval().to(device)]
    context = torch.rand(1, 5, 3, 64, 64, device=device) * 2 - 1
    ratio, ours, theirs = compare(
        lambda: models[0].sample(context, N_FRAMES, n_steps=8),
        lambda: models[1].sample(context, N_FRAMES),
        device,
        rounds=3,
    )
    sizes = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M" for model in models]
    say(
        f"flow: {N_FRAMES} frames of 64 x 64 x 3 on {device}: FlowTransformer ({sizes[0]} parameters, 8 steps) "
        f"{ours:.2f} s, SDEDiffusion ({sizes[1]}) {theirs:.2f} s, {ratio:.3f} of the time (medians of 3, in turns)"
    )
    return {"flow_time_vs_stdiff": ratio}

"""Rollouts of ten times the trained length: finite, in range, and no memory but that of what is returned."""

import gc

import pytest
import torch
from tiny import Bar, random_clip, tiny_prior

TRAINED = 4  # frames of the clips that the tiny priors are for
LONG = 10 * TRAINED
MEASURED = 12  # times during a rollout
CALM = 20.0  # latents; far more than any tokenizer's are
MOST = 1.5  # times the frames that are returned: these, what they are joined from, and noise drawn beforehand
PRIORS = [
    "video_transformer",
    "video_transformer_spatial",
    "st_pixelcnn",
    "masked_transformer",
    "recurrent_vae",
    "recurrent_vae_latents",
    "sde_diffusion",
    "ode_diffusion_latents",
    "residual_diffusion",
    "residual_diffusion_latents",
    "flow_transformer",
    "flow_transformer_latents",
]


class LiveBytes(Bar):
    """A progress bar that looks at how much tensors made since it was made hold, at ``MEASURED`` of its steps."""

    def __init__(self):
        gc.collect()
        gc.freeze()  # what there is already is not looked at
        self.peak, self.next = 0, 0

    def update(self, n=1):
        super().update(n)
        if self.done >= self.next:
            self.next = self.done + self.total / MEASURED
            self.measure()

    def measure(self):
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(storages.values()))


def rollout(prior, n_frames):
    """-> samples, the most bytes that tensors held meanwhile"""
    context = random_clip(prior, 2, max(2, prior.min_context))
    steps = {name: 2 for name in prior.sampler_options() if name == "n_steps"}
    live = LiveBytes()
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            futures = prior.sample(context, n_frames, generator=generator, progress=live, **steps)
    finally:
        gc.unfreeze()
    return futures, live.peak


@pytest.mark.parametrize("name", PRIORS)
def test_ten_times_the_trained_length_neither_explodes_nor_grows_in_memory(name):
    prior = tiny_prior(name)
    rollout(prior, TRAINED)  # what is made once
    (short, less), (long, more) = rollout(prior, LONG), rollout(prior, LONG + LONG // 2)
    assert short.shape[:3] == (2, 1, LONG) and long.isfinite().all()
    if prior.accepts == "codes":
        sizes = torch.tensor(prior.config.latent_spec["codebook_sizes"])
        assert (long >= 0).all() and (long < sizes).all()
    else:
        assert long.abs().max() <= (1 if prior.accepts == "pixels" else CALM)
    n_bytes = long.element_size() * (long.numel() - short.numel())  # of the frames that one has more
    assert 0 < more - less <= MOST * n_bytes, f"{(more - less) / n_bytes:.1f} times what is returned"

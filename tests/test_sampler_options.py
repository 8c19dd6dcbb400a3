"""Sampler options of every prior: what makes no sense is one line that names the option, and nothing else happens."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import TINY_PRIORS, TOLD_PRIORS, random_clip, tiny_prior, told_prior

from latentcast import VideoPredictionPipeline
from latentcast.priors.sampling import draw

# The first instance of every class; one that may be told something, to be guided.
CLASSES = {type(tiny_prior(name)).__name__: name for name in reversed(TINY_PRIORS)}


def instance(name):
    return told_prior(name) if name in TOLD_PRIORS else tiny_prior(name)


ABSURD = [
    *(0, -1, 1, 1.5, 2.0, float("nan"), float("inf"), -float("inf"), 1e-300, -1e-300, 1e300, 10**400, 2**70),
    *(True, False, "", "x", "1", b"1", 1j, None, (), [], [1, 2], [[1], [1, 2]], ["x"], [None], {}, {1: 2}, {"a": []}),
    *({1: "x"}, {1: float("nan")}, {1: 10**400}, {0: 0}, {2**70: 1}, {None: 1}, {1: None}, {1: [[1], [1, 2]]}),
    *(object(), len, DDIMScheduler, FlowMatchEulerDiscreteScheduler(), slice(3), {1, 2}),
    *(np.array([[1, 2], [3, 4]]), np.float32("nan"), np.int64(2), torch.zeros(2, 3), torch.tensor(float("nan"))),
]


def fits(prior, future, shape):
    """Whether a future is one that the prior may give."""
    if future.shape != (1, 1, 2, *shape):
        return False
    if prior.accepts == "codes":
        sizes = torch.tensor(prior.config.latent_spec["codebook_sizes"])
        return bool(((future >= 0) & (future < sizes)).all())
    return bool(future.isfinite().all())


@pytest.mark.parametrize(
    "name, option", [(name, option) for name in CLASSES.values() for option in instance(name).sampler_options()]
)
def test_absurd_values_are_refused_by_name_or_taken(name, option):
    prior = instance(name)
    clip = random_clip(prior, batch=1, n_frames=2)
    steps = {"n_steps": 2} if "n_steps" in prior.sampler_options() else {}
    refused = 0
    for value in ABSURD:
        try:
            future = prior.sample(clip, 2, generator=torch.Generator().manual_seed(0), **steps | {option: value})
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{option}: "), (value, message)
            assert "expected" in message and "found" in message and "\n" not in message and len(message) < 300
            refused += 1
        else:
            assert fits(prior, future, clip.shape[2:]), (value, future)
    assert refused > len(ABSURD) / 2


def beyond(option):
    """Values on both sides of each end of an option's range -> (values within, values outside)."""
    step = 1 if option.kind is int else 1e-3
    within = [end for end in (option.least, option.most) if end is not None]
    outside = [end + side * step for end, side in ((option.least, -1), (option.most, 1)) if end is not None]
    if option.above is not None:
        within, outside = [*within, option.above + 0.5], [*outside, option.above]
    if option.choices:
        within, outside = [*option.choices], ["no such choice"]
    return within + [True, False] * (option.kind is bool), outside + [2] * (option.kind is bool)


@pytest.mark.parametrize("name", CLASSES.values())
def test_options_have_the_kind_and_the_range_that_the_sampler_keeps(name):
    """What lies at the ends is taken, what lies beyond is refused; all options have ranges, but for lists and dicts."""
    prior = instance(name)
    options, clip = prior.sampler_options(), random_clip(prior, batch=2, n_frames=2)
    steps = {"n_steps": 2} if "n_steps" in options else {}

    def sample(**given):
        return prior.sample(clip, 2, generator=torch.Generator().manual_seed(0), **steps | given)[:1]

    assert sorted(options) == [*options]
    for option_name, option in options.items():
        within, outside = beyond(option)
        assert bool(within and outside) is (option.kind is not None), option_name
        assert option.default is None or option.kind is type(option.default) or option.kind is float
        for value in within:
            if value != getattr(prior.config, "n_diffusion_steps", None):  # too many to be made here
                assert fits(prior, sample(**{option_name: value}), clip.shape[2:]), (option_name, value)
        for value in outside:
            with pytest.raises(ValueError, match=f"^{option_name}: expected "):
                sample(**{option_name: value})


@pytest.mark.parametrize(
    "value", ["x", {}, [[1], [1, 2]], [None], 10**400, [10**400], [float("nan")], [1e300], [0], [1e9]]
)
def test_frame_times_of_a_pipeline(value):
    pipe = VideoPredictionPipeline(tiny_prior("sde_diffusion"))
    context = random_clip(pipe.prior, batch=1, n_frames=2)
    with pytest.raises(ValueError, match=r"^frame_times: expected .* found ") as caught:
        pipe(context, frame_times=value, n_steps=2)
    assert "\n" not in str(caught.value)


def test_the_least_of_each_draws_the_most_likely_code():
    torch.manual_seed(0)
    logits, uniform = torch.randn(50, 9), torch.rand(50)
    likeliest = logits.argmax(-1)
    assert not torch.equal(draw(logits, uniform), likeliest)
    for options in ({"temperature": 1e-300}, {"temperature": 1e-40}, {"top_p": 1e-300}, {"top_p": 1e-46}, {"top_k": 1}):
        assert torch.equal(draw(logits, uniform, **options), likeliest), options
    large = logits * 1e30  # as far apart as a broken model's
    assert torch.equal(draw(large, uniform, temperature=1e-20), likeliest)
    uniformly = torch.bincount(draw(logits[:1].expand(5000, -1), torch.rand(5000), temperature=1e300), minlength=9)
    assert (uniformly > 400).all()


def test_what_was_told_nothing_is_not_guided():
    prior = tiny_prior("residual_diffusion")
    assert "guidance_scale" not in prior.sampler_options()
    for scale in (0.0, 2.0):
        with pytest.raises(ValueError, match=f"^guidance_scale: expected 1 for .* without conditions, found {scale}"):
            prior.sample(random_clip(prior, batch=1, n_frames=2), 1, n_steps=2, guidance_scale=scale)

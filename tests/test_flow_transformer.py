"""FlowTransformer: conventions of the path, the past and its cache, guidance, starts and patches."""

import diffusers
import pytest
import torch
from tiny import Bar, random_clip, random_conditions, small_flow, told_prior

from latentcast import FlowTransformer, PixelTokenizer
from latentcast.config import MisfitError
from latentcast.priors.flow_matching import SCHEDULERS, follow, interpolate, make_scheduler

PIXELS8 = PixelTokenizer(1, 8, 8, levels=None).latent_spec


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(prior):
    """With weights that are far from what they begin with, so that everything matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior.eval()


@pytest.fixture(params=["continuous_pixel", "kl_vae"])
def prior(request):
    return lively(small_flow(request.param, patch=2))


# ---------------------------------------------------------------------------------------------------------- the path


def gaussian_velocity(mean, std):
    """E[e - x | x_s] of data N(mean, std^2), in closed form."""

    def velocity(x, s):
        variance = (1 - s) ** 2 * std**2 + s**2
        return -mean + (s - (1 - s) * std**2) / variance * (x - (1 - s) * mean)

    return velocity


@pytest.mark.parametrize("name, n_steps", [("euler", 100), ("heun", 40)])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_exact_velocity_of_a_gaussian_leads_to_its_mean_and_variance(name, n_steps, shift):
    noise = torch.randn(20_000, generator=generator())
    x = follow(gaussian_velocity(0.7, 0.3), noise, make_scheduler(name, n_steps, shift=shift))
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.3, rel=0.05)
    half = interpolate(0.7 + 0.3 * torch.randn(20_000, generator=generator(1)), noise, torch.tensor(0.5))
    x = follow(gaussian_velocity(0.7, 0.3), half, make_scheduler(name, n_steps, 0.5))  # from the middle of the path
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.3, rel=0.05)


def test_the_path_and_its_times_are_those_of_diffusers():
    x, noise = torch.randn(2, 5, generator=generator()), torch.randn(2, 5, generator=generator(1))
    ours = make_scheduler("euler", 4, shift=2.0)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    scaled = theirs.scale_noise(x, theirs.timesteps[2:3], noise)
    torch.testing.assert_close(scaled, interpolate(x, noise, theirs.sigmas[2]))
    # The same times where Heun's have them, each but the first and the last twice.
    heun = make_scheduler("heun", 4, shift=2.0)
    assert torch.equal(heun.sigmas, ours.sigmas[[0, 1, 1, 2, 2, 3, 3, 4]])
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(4)
    theirs = [theirs.sigmas.tolist(), theirs.timesteps.tolist()]
    assert [len(each) for each in theirs] == [len(heun.sigmas), len(heun.timesteps)]
    # With the velocity of the path to x every scheduler ends at x.
    for name in SCHEDULERS:
        found = follow(lambda x_s, s: (x_s - x) / s, noise, make_scheduler(name, 3))
        torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


def test_a_component_keeps_its_class_and_options():
    component = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=4.0, use_dynamic_shifting=True)
    made = make_scheduler(component, 2)
    assert made is not component and made.config.num_train_timesteps == 500
    torch.testing.assert_close(made.sigmas, torch.tensor([1.0, 0.8, 0.0]))
    assert make_scheduler(component, 2, shift=1.0).sigmas[1] == 0.5
    made = make_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(shift=4.0), 2)
    torch.testing.assert_close(made.sigmas, torch.tensor([1.0, 0.8, 0.8, 0.0]))
    seen = []
    follow(lambda x, s: seen.append(s) or x, torch.ones(1, 1), make_scheduler(component, 2))
    assert seen == pytest.approx([1.0, 0.8])  # the network is told s, however a scheduler counts
    for wrong in (diffusers.DDIMScheduler(), "ddim", None):
        with pytest.raises(ValueError, match="scheduler: expected one of euler, heun, or one for flow matching"):
            make_scheduler(wrong, 2)


def test_a_stochastic_scheduler_is_seeded(prior):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    context = random_clip(prior, n_frames=2)
    one, same = (prior.sample(context, 2, n_steps=3, scheduler=scheduler, generator=generator()) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(one, same)
    assert not torch.equal(one, prior.sample(context, 2, n_steps=3, generator=generator()))


@pytest.mark.parametrize("kind", ["sample", "velocity"])
def test_either_prediction_is_trained_towards_the_velocity(kind):
    """Where the last layer says the frame itself, or its velocity, the loss is none."""
    prior = small_flow(prediction_type=kind, patch=2, past_noise=0.0)
    clip, seen = random_clip(prior), {}

    class Oracle(torch.nn.Module):
        def forward(self, features):
            x = clip[:, 2:] if kind == "sample" else (seen["noisy"] - clip[:, 2:]) / seen["s"]
            x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim((-4, -2), (-5, -4))
            return x.flatten(-3).flatten(-3, -2)

    velocity = prior.velocity

    def spied(features, vectors, noisy, s):
        seen.update(noisy=noisy, s=s)
        return velocity(features, vectors, noisy, s)

    prior.velocity, prior.to_patch = spied, Oracle()
    assert prior(clip, 2).loss < 1e-9
    assert (seen["s"] > 0).all() and (seen["s"] < 1).all() and len(seen["s"].unique()) == 4  # a time for each frame


def test_times_are_logit_normal():
    prior = small_flow(time_mean=0.8, time_std=0.5)
    logits = prior._draw_times((20_000,), generator()).logit()
    assert logits.mean().item() == pytest.approx(0.8, abs=0.02) and logits.std().item() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- the past


def test_nothing_leaks_from_the_future():
    """Of each frame's prediction the gradient reaches the frames before it, and its own noised form, alone."""
    prior = lively(small_flow(patch=2))
    clean, noisy = (torch.randn(1, 3, 1, 4, 6, generator=generator(i)).requires_grad_() for i in (1, 2))
    vectors = prior._both_vectors(torch.zeros(1, 1), None, 1)
    vectors = [each.expand(-1, 3, -1) for each in vectors]
    features = prior.trunk(prior.embed(clean), prior.embed(noisy), *vectors)
    for i in range(3):  # frames 1, 2, 3 of a clip of four, of which the clean ones are 0, 1, 2
        prior.zero_grad()
        clean.grad = noisy.grad = None
        features[:, i].square().sum().backward(retain_graph=True)
        assert [bool(frame.any()) for frame in clean.grad[0]] == [j <= i for j in range(3)]
        assert [bool(frame.any()) for frame in noisy.grad[0]] == [j == i for j in range(3)]


def test_training_and_sampling_predict_the_same(prior):
    """The velocity of the last frame of a clip, in the pass of training and after a cached past."""
    clip = random_clip(prior, n_frames=4)
    s, noise = 0.3, torch.randn(clip[:, :1].shape, generator=generator())
    noisy = interpolate(clip[:, 3:], noise, s)
    of_clean, of_target = prior._both_vectors(torch.zeros(2, 1), None, 3)
    of_target = of_target + prior.time_vectors(torch.full((2, 1), s))
    features = prior.trunk(prior.embed(clip[:, :3]), prior.embed(noisy), of_clean.expand(-1, 3, -1), of_target)
    expected, found = prior.velocity(features, of_target, noisy, torch.tensor(s)), []
    predict = prior.velocity

    def spied(features, vectors, x, s):
        found.append(predict(features, vectors, x, s))
        return found[-1]

    prior.velocity = spied
    # A start in the middle of the path, from noise that leads there.
    prior._rand = lambda *args: (noisy - 0.7 * clip[:, 2:3])[:, 0] / 0.3
    prior.sample(clip[:, :3], 1, n_steps=1, start="previous", start_time=s)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("options", [{}, {"told_noise": 0.05, "scheduler": "heun"}])
def test_cached_frames_equal_uncached(guided, options):
    """Also past the trained length, where the past is forgotten frame by frame."""
    prior = lively(told_prior("flow_transformer_latents"))
    context, told = random_clip(prior, n_frames=3), random_conditions(n_frames=9)
    if guided:
        options = options | {"guidance_scale": 1.5, "history_guidance_scale": 1.5}
    settings = {"conditions": told, "num_samples": 2, "n_steps": 2} | options
    cached = prior.sample(context, 6, generator=generator(), **settings)
    torch.testing.assert_close(
        prior.sample(context, 6, generator=generator(), use_cache=False, **settings), cached, atol=1e-3, rtol=1e-3
    )


def test_losses_in_eval_mode_compare(prior):
    clip = random_clip(prior)
    with torch.no_grad():
        first = prior(clip, 2).loss
        torch.manual_seed(9)
        assert torch.equal(prior(clip, 2).loss, first) and torch.equal(prior(clip, 2).logs["flow_loss"], first)
        prior.eval_seed = 1
        assert not torch.equal(prior(clip, 2).loss, first)
        prior.train()
        assert not torch.equal(prior(clip, 2).loss, prior(clip, 2).loss)


@pytest.mark.parametrize("past_dropout", [0.0, 0.4])
def test_the_past_is_noised_as_it_is_told(past_dropout):
    """A little, and for a share of clips altogether."""
    prior = small_flow(patch=2, past_noise=0.2, past_dropout=past_dropout).train()
    clip, seen = torch.full((400, 3, 1, 4, 6), 0.5), {}
    both_vectors, embed = prior._both_vectors, prior.embed
    prior._both_vectors = lambda level, *rest: seen.update(level=level) or both_vectors(level, *rest)
    prior.embed = lambda x: seen.setdefault("past", x) is None or embed(x)
    with torch.no_grad():
        prior(clip, 2)
        level, past = seen["level"][:, 0], seen["past"]
        assert past.flatten(1).mean(1).sub(0.5 * (1 - level)).abs().max() < 0.8
        assert torch.allclose(past.flatten(1).std(1), level, atol=0.05, rtol=0.4)
        share = (level == 1).float().mean().item()
        assert abs(share - past_dropout) < 0.08 and level[level < 1].max() < 0.2 and level.min() < 0.02
        seen.clear()
        prior.eval()(clip, 2)
        assert seen["level"].max() < 0.2


# ------------------------------------------------------------------------------------------------------- the sampler


def test_history_guidance_goes_from_no_past_to_the_past_and_beyond(prior):
    one, other = (random_clip(prior, n_frames=2, seed=seed) for seed in (0, 1))

    def sample(context, **options):
        return prior.sample(context, 1, n_steps=2, generator=generator(), **options).float()

    def difference(scale):
        options = {"history_guidance_scale": scale}
        return (sample(one, **options) - sample(other, **options)).abs().mean().item()

    assert difference(0.0) < 1e-5 < difference(1.0)  # nothing of the context is left
    # Where the velocity is followed in one step, the frame moves in proportion.
    prior.in_range = lambda x: x
    still = {"n_steps": 1, "generator": None}
    noise = torch.randn(one[:, 0].shape, generator=generator())
    prior._rand = lambda shape, *rest: noise.expand(shape) if len(shape) == 4 else torch.ones(shape)
    none, full, beyond = (prior.sample(one, 1, history_guidance_scale=w, **still) for w in (0.0, 1.0, 3.0))
    torch.testing.assert_close(beyond - none, 3 * (full - none), atol=1e-3, rtol=1e-3)


def test_both_guidances_add_up():
    prior = lively(told_prior("flow_transformer_latents"))
    context, told = random_clip(prior, n_frames=2), random_conditions(n_frames=3)
    noise = torch.randn(context[:, 0].shape, generator=generator())
    prior._rand = lambda shape, *rest: noise.expand(shape) if len(shape) == 4 else torch.ones(shape)

    def sample(w=1.0, v=1.0):
        settings = {"conditions": told, "guidance_scale": w, "history_guidance_scale": v, "n_steps": 1}
        return prior.sample(context, 1, **settings)

    plain = sample()
    together = sample(2.0, 3.0) - plain
    torch.testing.assert_close(together, sample(2.0) + sample(1.0, 3.0) - 2 * plain, atol=1e-3, rtol=1e-3)
    assert (sample(2.0) - plain).abs().max() > 1e-3 and (sample(1.0, 3.0) - plain).abs().max() > 1e-3


def test_what_always_had_a_past_is_not_guided_by_it():
    prior = small_flow(patch=2, past_dropout=0.0)
    assert "history_guidance_scale" not in prior.sampler_options()
    with pytest.raises(ValueError, match=r"history_guidance_scale: expected 1 for .* without past_dropout, found 2.0"):
        prior.sample(random_clip(prior, n_frames=2), 1, history_guidance_scale=2.0)


def test_a_start_at_the_previous_frame_keeps_the_more_the_later_it_is():
    """Of a prior that says 0 everywhere, one short step is left of what a sample begins with."""
    prior = small_flow(patch=2, prediction_type="velocity").eval()
    torch.nn.init.zeros_(prior.to_patch.weight)
    context = random_clip(prior, batch=4, n_frames=2)
    noise = prior.sample(context, 1, generator=generator())[:, 0, 0]
    far, near = (
        prior.sample(context, 1, start="previous", start_time=s, generator=generator())[:, 0, 0] for s in (1.0, 0.1)
    )
    assert torch.equal(far, noise) and (near - context[:, -1]).abs().mean() < 0.2 < (far - context[:, -1]).abs().mean()
    # The second frame begins at the first.
    two = prior.sample(context, 2, start="previous", start_time=0.1, generator=generator())[:, 0]
    assert (two[:, 1] - two[:, 0]).abs().mean() < 0.2


def test_told_noise_is_added_to_predicted_frames_alone(prior):
    context = random_clip(prior, n_frames=2)
    settings = {"n_steps": 2, "start": "previous"}
    plain, noisy = (
        prior.sample(context, 3, generator=generator(), told_noise=level, **settings) for level in (0.0, 0.1)
    )
    assert torch.equal(plain[:, :, 0], noisy[:, :, 0]) and not torch.equal(plain[:, :, 1], noisy[:, :, 1])


def test_each_prediction_is_a_step_of_the_bar(prior):
    context, bars = random_clip(prior, n_frames=2), {}
    for scheduler in SCHEDULERS:
        bars[scheduler] = Bar()
        prior.sample(context, 2, n_steps=3, scheduler=scheduler, progress=bars[scheduler])
        assert bars[scheduler].done == bars[scheduler].total
    assert [bar.total for bar in bars.values()] == [2 * (3 + 1), 2 * (5 + 1)]


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("patch", [1, 2, [4, 2], [1, 8], [8, 8]])
def test_patches_are_of_neighbours_and_come_back(patch):
    prior = FlowTransformer(PIXELS8 | {"channels": 3}, patch=patch, dim=8, n_layers=1, n_heads=1, head_dim=4)
    p, q = prior.patch
    assert prior.grid == (8 // p, 8 // q)
    x = torch.randn(2, 3, 3, 8, 8, generator=generator())
    prior.from_patch = torch.nn.Identity()
    prior.places.data = torch.zeros(1)
    tokens = prior.embed(x)
    theirs = torch.nn.functional.unfold(x.flatten(0, 1), (p, q), stride=(p, q)).transpose(1, 2)
    torch.testing.assert_close(tokens, theirs.unflatten(0, (2, 3)))
    d = tokens.shape[-1]
    prior.to_patch, vectors = torch.nn.Identity(), torch.zeros(2, 3, d)
    prior.modulate = torch.nn.Sequential(torch.nn.Linear(d, 2 * d))
    torch.nn.init.zeros_(prior.modulate[0].weight), torch.nn.init.zeros_(prior.modulate[0].bias)
    velocity = prior.velocity(tokens, vectors, torch.zeros_like(x), torch.ones(()))
    torch.testing.assert_close(velocity, -x)  # of what the network says is the frame, at s = 1


def test_patches_that_do_not_fit_are_refused_with_the_nearest():
    spec = PIXELS8 | {"height": 9, "width": 10}
    with pytest.raises(MisfitError, match=r"expected divisors of 9 x 10 .* found \[4, 4\]; the nearest are \[3, 5\]"):
        FlowTransformer(spec, patch=4)
    for wrong in (0, 1.5, "2", [2], [2, 2, 2], True, [0, 1]):
        with pytest.raises(ValueError, match=r"^patch: expected a whole number of at least 1, or two of them, found"):
            FlowTransformer(spec, patch=wrong)
    small = {"dim": 8, "n_layers": 1, "n_heads": 1, "head_dim": 4}
    for size, most, patch in ((64, 256, (4, 4)), (16, 256, (1, 1)), (16, 100, (2, 2)), (7, 10, (7, 7)), (1, 1, (1, 1))):
        spec = PIXELS8 | {"height": size, "width": size}
        assert FlowTransformer(spec, max_positions=most, **small).patch == patch


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prediction_type": "epsilon"}, "prediction_type: expected one of sample, velocity, found 'epsilon'"),
        ({"time_std": 0}, "time_std: expected a number from 0.01 to 10, found 0"),
        ({"time_mean": "x"}, "time_mean: expected a number from -10 to 10, found 'x'"),
        ({"past_noise": 1}, "past_noise: expected at least 0 and below 1, found 1"),
        ({"past_dropout": -0.1}, "past_dropout: expected at least 0 and below 1, found -0.1"),
        ({"n_frames": 1}, "n_frames: expected a whole number of at least 2, found 1"),
        ({"max_positions": 0}, "max_positions: expected a whole number of at least 1, found 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        small_flow(**options)


def test_clips_longer_than_the_model_sees_are_refused(prior):
    with pytest.raises(ValueError, match=r"clip: expected at most 4 frames \(n_frames\), found 5"):
        prior(random_clip(prior, n_frames=5), 2)

"""What every prior promises, whatever its kind."""

import pytest
import torch
from tiny import TINY_PRIORS, Bar, random_clip, tiny_prior

from latentcast import Prior, load_model


@pytest.fixture(params=TINY_PRIORS)
def prior(request):
    return tiny_prior(request.param)


def sample(prior, context, n_frames, seed=0, **options):
    options = {name: 4 for name in prior.sampler_options() if name == "n_steps"} | options  # denoising steps
    return prior.sample(context, n_frames, generator=torch.Generator().manual_seed(seed), **options)


def loss_of(prior, clip):
    """The loss in eval mode; of a prior that draws noise, the mean over the same few draws each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(prior.eval()(clip, prior.min_context).loss.item() for _ in range(8)) / 8


def test_loss_is_a_scalar_and_reaches_every_parameter(prior):
    prior.train()
    output = prior(random_clip(prior), prior.min_context)
    parameters = {name: p for name, p in prior.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), 1e-3)
    # Random parts of a clip: every part of the model gets its turn. Steps: layers behind one that starts at zero learn
    # once it has moved.
    for _ in range(20):
        prior(random_clip(prior), prior.min_context).loss.backward()
        optimizer.step()
    assert output.loss.ndim == 0 and torch.isfinite(output.loss)
    assert all(torch.is_tensor(value) and not value.requires_grad for value in output.logs.values())
    silent = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    # A table that nothing can look at on this small grid stays at zero; everything else must learn.
    assert not [name for name in silent if "relative.tables" not in name], silent


def test_learns_a_fixed_clip(prior):
    torch.manual_seed(0)
    prior.train()
    clip = random_clip(prior)
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    before = loss_of(prior, clip)
    for step in range(60):
        with torch.random.fork_rng():
            if step % 10 == 9 and loss_of(prior, clip) < 0.5 * before:
                return
        optimizer.zero_grad()
        prior.train()(clip, prior.min_context).loss.backward()
        optimizer.step()
    assert loss_of(prior, clip) < 0.5 * before


@pytest.mark.parametrize("n_context, n_frames", [(1, 3), (2, 1), (3, 6), (6, 2)])
def test_any_context_and_any_horizon(prior, n_context, n_frames):
    context = random_clip(prior, n_frames=max(n_context, prior.min_context))
    kept = context.clone()
    future = sample(prior, context, n_frames, num_samples=2)
    assert future.shape == (2, 2, n_frames, *context.shape[2:]) and future.dtype == context.dtype
    assert future.isfinite().all()
    assert prior.accepts != "pixels" or future.abs().max() <= 1
    assert torch.equal(context, kept)


def test_seeded_samples_are_reproducible_and_differ_otherwise(prior):
    context = random_clip(prior, n_frames=prior.min_context)
    first = sample(prior, context, 4, num_samples=2, seed=3)
    assert torch.equal(first, sample(prior, context, 4, num_samples=2, seed=3))
    assert torch.equal(first, sample(prior, context, 4, num_samples=2, seed=4)) == prior.deterministic
    assert torch.equal(first[:, 0], first[:, 1]) == prior.deterministic


def test_the_context_matters(prior):
    torch.manual_seed(1)
    std = 0.5 if prior.accepts == "codes" else 0.2  # frames that are black or white all over look alike
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=std)
    one, other = (random_clip(prior, n_frames=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(sample(prior, one, 3), sample(prior, other, 3))


def test_saved_and_loaded_it_samples_the_same(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(prior) and dict(loaded.config.latent_spec) == dict(prior.config.latent_spec)
    context = random_clip(prior, n_frames=2)
    assert torch.equal(sample(prior, context, 3), sample(loaded, context, 3))


def test_likelihood_is_that_of_the_future_only(prior):
    clip = random_clip(prior)
    if type(prior).log_prob is Prior.log_prob:
        with pytest.raises(NotImplementedError, match=type(prior).__name__):
            prior.log_prob(clip, prior.min_context)
        return
    with torch.no_grad():
        given_few, given_three = prior.log_prob(clip, prior.min_context), prior.log_prob(clip, 3)
    assert given_few.shape == (2,) and not torch.equal(given_few, given_three)
    if prior.accepts == "codes":  # probabilities; a density may be above 1
        assert (given_few < given_three).all() and (given_three < 0).all()


def test_progress_counts_to_its_total(prior):
    bar = Bar()
    sample(prior, random_clip(prior, n_frames=2), 7, progress=bar)
    assert bar.done == bar.total > 0


def test_bad_context_is_refused(prior):
    clip = random_clip(prior)
    for call in (lambda: prior(clip, 4), lambda: prior(clip, 0), lambda: sample(prior, clip[:, :0], 2)):
        with pytest.raises(ValueError, match="n_context") as caught:
            call()
        assert "\n" not in str(caught.value)

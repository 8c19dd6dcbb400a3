"""SVG-LP and HAF-SVG: published sizes, the loss and the sampler step by step, control of z, what is logged."""

import copy
import itertools
import logging
import weakref

import pytest
import torch
from tiny import CODES_SPEC, TINY_PRIORS, random_clip, random_conditions, small_recurrent_vae, tiny_prior, told_prior
from tiny_experiment import call_tool
from torch import nn
from torch.distributions import Normal, kl_divergence

from latentcast import PixelTokenizer, RecurrentVAE, VideoPredictionPipeline, instantiate, load_config
from latentcast.layers.aligner import FeatureAligner
from latentcast.layers.latent_cnn import LatentDecoder, LatentEncoder
from latentcast.layers.lstm import GaussianGroups
from latentcast.priors.recurrent_vae import kl_gaussians, shared
from latentcast.training.callbacks import sample_diversity
from latentcast.training.metrics_file import read_metrics

FRAMES = PixelTokenizer(1, 8, 16, levels=None).latent_spec
FORMS = {
    "svg_lp": {"aligner": "none"},
    "svg_fp": {"aligner": "none", "fixed_prior": True},
    "svg_deterministic": {"aligner": "none", "n_groups": 0},
    "haf_svg_1": {},
    "haf_svg_3": {"n_groups": 3, "kl_reduction": "mean"},
    "encoder_value": {"n_groups": 2, "aligner": "encoder_value", "network": "vgg"},
    "latents": {"n_groups": 2},
    "last_frame_skip": {"last_frame_skip": True},
}


def build(form="haf_svg_3", **options):
    """A small model whose weights and BatchNorm statistics are far from where they start, in eval mode."""
    torch.manual_seed(0)
    spec = CODES_SPEC if form == "latents" else FRAMES
    model = small_recurrent_vae(spec, **FORMS[form], **options).train()
    for name, parameter in model.named_parameters():
        if "lstm" in name or parameter.ndim == 1:
            continue
        nn.init.normal_(parameter, std=0.3)
    for _ in range(3):
        model(random_clip(model, batch=4), 2)
    return model.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network, channels, group_dim, published", [("dcgan", 1, 10, 12.6e6), ("vgg", 3, 64, 22.8e6)])
def test_svg_lp_has_its_published_size(network, channels, group_dim, published):
    spec = PixelTokenizer(channels, 64, 64).latent_spec
    model = RecurrentVAE(spec, network=network, aligner="none", group_dim=group_dim)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.005)


def test_haf_svg_has_the_papers_parts():
    model = RecurrentVAE(PixelTokenizer(1, 64, 64).latent_spec, n_groups=4)
    assert model.encoder.__class__.__name__ == "DCGANEncoder"
    assert [type(join) for join in model.joins] == [FeatureAligner] * 4
    assert model.decoder.joined == [2] * 4  # 3 C channels
    assert (model.predictor.recurrent.lstm.num_layers, model.predictor.recurrent.lstm.hidden_size) == (2, 256)
    assert model.predictor.recurrent.embed.in_features == 128 + 4 * 16 and model.predictor.out.out_features == 128
    for groups in (model.posterior, model.prior):
        lstms = [group.lstm for group in groups.recurrent]
        assert [(lstm.num_layers, lstm.hidden_size) for lstm in lstms] == [(1, 256)] * 4
        assert [group.embed.in_features for group in groups.recurrent] == [128, 128 + 16, 128 + 32, 128 + 48]


@pytest.mark.parametrize(
    "limit, joined", [(1024, [1, 2, 2, 2]), (None, [2, 2, 2, 2]), (4096, [2, 2, 2, 2]), (255, [1, 1, 1, 2])]
)
def test_levels_that_are_aligned(limit, joined):
    spec = PixelTokenizer(3, 64, 64).latent_spec
    sizes = {"hidden_channels": 2, "dim": 4, "cells": 4}
    model = RecurrentVAE(spec, network="vgg", aligner_max_positions=limit, **sizes)
    assert [join.joined for join in model.joins] == model.decoder.joined == joined


# The loss, step by step -----------------------------------------------------------------------------------------------


def cells_of(recurrent):
    """An EmbeddedLSTM as SVG has it: an embedding and LSTMCells, a time step at a time -> function(x) -> output."""
    cells, states = [], {}
    for layer in range(recurrent.lstm.num_layers):
        cell = nn.LSTMCell(recurrent.lstm.input_size, recurrent.lstm.hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(cell, name, getattr(recurrent.lstm, f"{name}_l{layer}"))
        cells.append(cell)

    def step(x):
        x = recurrent.embed(x)
        for i, cell in enumerate(cells):
            states[i] = cell(x, states.get(i))
            x = states[i][0]
        return x

    return step


class StepByStep:
    """The model as published code runs it: a frame at a time, with the full decoder; the independent form."""

    def __init__(self, model):
        self.model = model
        self.posterior = [cells_of(group) for group in model.posterior.recurrent]
        learned = isinstance(model.prior, GaussianGroups)
        self.prior = [cells_of(group) for group in model.prior.recurrent] if learned else None
        self.predictor = cells_of(model.predictor.recurrent)

    def moments(self, groups, networks, h, before):
        """Equation 4 of one group: mean and log-variance given h and the groups before it."""
        j = len(before)
        return groups.moments[j](networks[j](torch.cat([h, *before], 1))).chunk(2, 1)

    def posterior_moments(self, h, before):
        return self.moments(self.model.posterior, self.posterior, h, before)

    def prior_moments(self, h, before):
        if self.prior is None:
            return torch.zeros(2, len(h), self.model.config.group_dim)
        return self.moments(self.model.prior, self.prior, h, before)

    def predict(self, h, z, features):
        g = self.model.predictor.out(self.predictor(torch.cat([h, *z], 1))).tanh()
        joins = self.model.joins
        return self.model.decoder(g, features, lambda i, own, f: joins[i](own, joins[i].memory(f)))


def loss_step_by_step(model, clip, n_context, noise):
    """noise: (B, T - 1, d) of each group -> loss, MSE a frame, nats a frame of each number of z."""
    steps, config = StepByStep(model), model.config
    encoded = [model.encoder(frame) for frame in clip.unbind(1)]
    mse, kl = [], []
    for t in range(1, clip.shape[1]):
        h, target = encoded[t - 1][0], encoded[t][0]
        features = encoded[t - 1 if config.last_frame_skip else min(t, n_context) - 1][1]
        z = []
        for eps in noise:
            mean, logvar = steps.posterior_moments(target, z)
            prior_mean, prior_logvar = steps.prior_moments(h, z)
            q, p = Normal(mean, (logvar / 2).exp()), Normal(prior_mean, (prior_logvar / 2).exp())
            kl.append(kl_divergence(q, p))
            z.append(q.loc + q.scale * eps[:, t - 1])
        predicted = steps.predict(h, z, features)
        if model.accepts == "pixels":
            mse.append(((predicted + 1) / 2 - (clip[:, t] + 1) / 2).square().mean())
        else:
            mse.append((predicted - clip[:, t]).square().mean())
    loss = sum(mse)
    if kl:
        kl = torch.stack(kl).unflatten(0, (len(mse), -1))  # (T - 1, G, B, d)
        per_frame = kl.sum((1, 3)) if config.kl_reduction == "sum" else kl.mean((1, 3))
        loss = loss + config.beta * per_frame.mean(1).sum()
        kl = kl.mean((0, 2)).flatten()
    return loss, sum(mse) / len(mse), kl


@pytest.mark.parametrize("n_context", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_loss_is_that_of_the_model_run_step_by_step(form, n_context):
    model = build(form, beta=0.7)
    clip = random_clip(model, batch=3, n_frames=5)
    torch.manual_seed(1)
    output = model(clip, n_context)
    torch.manual_seed(1)
    noise = [torch.randn(3, 4, model.config.group_dim) for _ in range(model.config.n_groups)]
    loss, mse, kl = loss_step_by_step(model, clip, n_context, noise)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logs["mse"], mse, rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for found, expected in zip(torch.autograd.grad(output.loss, parameters), torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)

    if not model.config.n_groups:
        assert output.logs.keys() == {"mse"}
        return
    torch.testing.assert_close(output.logs["kl"], kl.sum(), rtol=1e-4, atol=1e-6)
    for j, group in enumerate(kl.split(model.config.group_dim), start=1):
        torch.testing.assert_close(output.logs[f"kl_group_{j}"], group.sum(), rtol=1e-4, atol=1e-6)
        assert output.logs[f"active_units_group_{j}"] == (group >= 0.01).sum()
    assert output.logs["active_units"] == (kl >= 0.01).sum()


def test_kl_is_torch_distributions():
    torch.manual_seed(0)
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 50)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(prior_mean, (prior_logvar / 2).exp()))
    torch.testing.assert_close(kl_gaussians(mean, logvar, prior_mean, prior_logvar), expected)
    assert kl_gaussians(mean.bfloat16(), logvar, mean.bfloat16(), logvar).dtype == torch.float32


def test_each_group_sees_the_past_and_the_groups_before_it():
    torch.manual_seed(0)
    groups = GaussianGroups(5, n_groups=3, group_dim=2, cells=7)
    h = torch.randn(2, 4, 5, requires_grad=True)
    z = torch.randn(2, 4, 6, requires_grad=True)
    _, mean, logvar, _ = groups(h, z.split(2, -1))
    for moment in (mean, logvar):
        for j in range(3):
            for t in range(4):
                to_h, to_z = torch.autograd.grad(moment[0, t, 2 * j : 2 * j + 2].sum(), [h, z], retain_graph=True)
                assert to_h[0, : t + 1].any(-1).all() and not to_h[0, t + 1 :].any()
                seen = to_z[0].unflatten(-1, (3, 2)).any(-1)  # (time, group)
                assert seen[: t + 1, :j].all() and not seen[t + 1 :].any() and not seen[:, j:].any()
                assert not to_h[1].any() and not to_z[1].any()


def test_the_prior_of_a_frame_sees_only_the_frames_before_it():
    model = build("haf_svg_1")
    seen = {}
    for name in ("prior", "posterior"):
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output[1]})
        )
    clip = random_clip(model, n_frames=5).requires_grad_()
    model(clip, 2)
    for t in range(1, 5):
        reached = {
            name: torch.autograd.grad(mean[0, t - 1].sum(), clip, retain_graph=True)[0][0].flatten(1).any(1)
            for name, mean in seen.items()
        }
        assert reached["prior"].tolist() == [i < t for i in range(5)]
        assert reached["posterior"].tolist() == [0 < i <= t for i in range(5)]


def test_lstms_know_what_led_to_their_frame_and_nothing_of_later_ones():
    model = told_prior("recurrent_vae")
    seen, clip, told = {}, random_clip(model, n_frames=5), random_conditions(n_frames=5)
    for name in ("prior", "posterior", "predictor"):
        pick = 0 if name == "predictor" else 1
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name, pick=pick: seen.update({name: output[pick]})
        )
    told["state"].requires_grad_()
    model(clip, 2, told)
    for t in range(1, 5):
        for name, output in seen.items():
            (gradient,) = torch.autograd.grad(output[0, t - 1].sum(), told["state"], retain_graph=True)
            assert gradient[0].any(1).tolist() == [0 < i <= t for i in range(5)], name
            assert not gradient[1].any()


def test_a_reconstruction_knows_the_conditions_of_context_and_future():
    model = told_prior("recurrent_vae_latents")
    clip, told = random_clip(model), random_conditions()
    settings = [{"generator": seeded(), "conditions": conditions} for conditions in (told, told, None)]
    one, again, nothing = (model.reconstruct(clip, 2, **each) for each in settings)
    assert torch.equal(one, again) and not torch.equal(one, nothing)
    kl, others = (model.explain(clip, 2, generator=seeded(), conditions=each)["kl"] for each in (told, None))
    assert kl.shape == others.shape and not torch.equal(kl, others)
    model.train()  # what training leaves out, sampling does not
    model.conditioner.dropout = 0.9
    assert torch.equal(model.reconstruct(clip, 2, generator=seeded(), conditions=told), one)


def test_what_says_nothing_is_not_active():
    model = build("haf_svg_3", beta=1.0)
    for groups in (model.posterior, model.prior):
        for moments in groups.moments:
            nn.init.zeros_(moments.weight)
            nn.init.zeros_(moments.bias)
    model.posterior.moments[1].bias.data[0] = 0.6  # KL 0.6^2 / 2 of one number of nine
    output = model(random_clip(model), 2)
    logs = {name: round(value.item(), 6) for name, value in output.logs.items() if name != "mse"}
    kl = {"kl": 0.18, "kl_group_1": 0.0, "kl_group_2": 0.18, "kl_group_3": 0.0}
    active = {"active_units_group_1": 0, "active_units_group_2": 1, "active_units_group_3": 0, "active_units": 1}
    assert logs == kl | active
    mse = output.logs["mse"].item()
    assert output.loss.item() == pytest.approx(3 * (mse + 0.18 / 9), rel=1e-5)  # "mean": of nine numbers
    model.register_to_config(kl_reduction="sum")
    torch.manual_seed(0)
    output = model(random_clip(model), 2)
    assert output.loss.item() == pytest.approx(3 * (output.logs["mse"].item() + 0.18), rel=1e-5)


# Sampling -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_step_by_step(model, context, n_frames, num_samples, generator):
    """One sample at a time, the past encoded for each; only the order of the random numbers is the sampler's."""
    B, n_context = context.shape[:2]
    z_dim = model.config.n_groups * model.config.group_dim
    rows = B * num_samples if z_dim else B
    noise = [torch.randn(rows, z_dim, generator=generator) for _ in range(n_context - 1 + n_frames)]
    futures = []
    for row in range(rows):
        frames = [*context[row // (rows // B)][:, None]]
        steps = StepByStep(model)
        for t in range(1, n_context + n_frames):
            h = model.encoder(frames[t - 1])[0]
            z = []
            for eps in noise[t - 1][row, None].split(model.config.group_dim, 1) if z_dim else []:
                moments = steps.prior_moments(h, z)  # also in the context: its LSTM must have seen it
                if t < n_context:
                    moments = steps.posterior_moments(model.encoder(frames[t])[0], z)
                mean, logvar = moments
                z.append(mean + (logvar / 2).exp() * eps)
            if t < n_context:
                steps.predictor(torch.cat([h, *z], 1))
            else:
                skip = frames[-1 if model.config.last_frame_skip else n_context - 1]
                frames.append(steps.predict(h, z, model.encoder(skip)[1]))
        futures.append(torch.cat(frames[n_context:]))
    return torch.stack(futures).unflatten(0, (B, -1))


@pytest.mark.parametrize("n_context", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_samples_are_those_of_the_model_run_step_by_step(form, n_context):
    model = build(form)
    context = random_clip(model, n_frames=n_context)
    sampled = model.sample(context, 4, num_samples=3, generator=seeded())
    expected = sample_step_by_step(model, context, 4, 3, seeded())
    torch.testing.assert_close(sampled, expected.expand_as(sampled), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sampled[0], sampled[1], atol=1e-2)


@pytest.mark.parametrize("form", ["haf_svg_3", "encoder_value"])
def test_samples_do_not_depend_on_the_chunks_and_encode_the_context_once(form):
    model = build(form)
    context = random_clip(model, batch=3, n_frames=4)
    whole = model.sample(context, 5, num_samples=4, generator=seeded())
    for sample_batch in (1, 5, 12, 100):
        seen = []
        hook = model.encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))  # noqa: B023
        sampled = model.sample(context, 5, num_samples=4, generator=seeded(), sample_batch=sample_batch)
        hook.remove()
        torch.testing.assert_close(sampled, whole, rtol=1e-4, atol=1e-4)
        assert sum(seen) == 3 * 4 + 12 * 4  # the context, and all predicted frames but the last
        assert max(seen) <= sample_batch


def test_the_decoder_is_bounded_too():
    model = build()
    seen = []
    model.decoder.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    model.sample(random_clip(model, n_frames=2), 2, num_samples=5, sample_batch=4)
    assert seen == [4, 4, 4, 4, 2, 2]


def test_a_longer_future_begins_like_a_shorter_one():
    model = build()
    context = random_clip(model, n_frames=2)
    short, long = (model.sample(context, n, num_samples=2, generator=seeded()) for n in (3, 40))
    torch.testing.assert_close(long[:, :, :3], short, rtol=1e-4, atol=1e-4)
    assert long.isfinite().all()


@pytest.mark.parametrize("form", ["svg_lp", "encoder_value"])
def test_batchnorm_samples_with_running_statistics_in_training_mode_too(form):
    model = build(form)
    context = random_clip(model, n_frames=2)
    expected = model.sample(context, 3, generator=seeded())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert torch.equal(model.sample(context, 3, generator=seeded()), expected)
    assert torch.equal(
        model.reconstruct(context, 1, generator=seeded()), model.eval().reconstruct(context, 1, generator=seeded())
    )
    assert model.train().encoder.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_batchnorm_samples_with_the_batchs_statistics_by_option():
    model = build("svg_deterministic")
    context = random_clip(model, batch=5, n_frames=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampled = model.sample(context, 2, batch_statistics=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not torch.allclose(sampled, model.sample(context, 2), atol=1e-2)

    as_published = copy.deepcopy(model).train()
    h, features = as_published.encoder(context[:, 0])
    predicted, _ = as_published.predictor(h[:, None])
    expected = as_published.decoder(predicted[:, 0], features)
    torch.testing.assert_close(sampled[:, 0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixed_prior", [False, True])
def test_the_deterministic_form_has_one_future(fixed_prior):
    model = build("svg_deterministic", fixed_prior=fixed_prior)
    context = random_clip(model, n_frames=2)
    seen = []
    model.decoder.head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    sampled = model.sample(context, 2, num_samples=3)
    assert sampled.shape == (2, 3, 2, 1, 8, 16) and seen == [2, 2]
    assert torch.equal(sampled[:, 0], sampled[:, 2]) and torch.equal(sampled, model.sample(context, 2, num_samples=3))
    assert model.infer(context) == {}


# Control of z ---------------------------------------------------------------------------------------------------------


def test_fixed_groups_take_their_values_and_leave_the_draws_of_the_others():
    """SVG-FP's prior is the noise itself, so each group's draws are known."""
    model = build("haf_svg_3", fixed_prior=True)
    context = random_clip(model, n_frames=1)
    free = model.sample(context, 4, generator=seeded())
    generator = seeded()
    noise = torch.stack([torch.randn(2, 9, generator=generator) for _ in range(4)], 1)  # (B, n_frames, Z)
    drawn = {j + 1: noise[..., 3 * j : 3 * j + 3] for j in range(3)}
    for groups in ([1], [2, 3], [1, 2, 3]):
        fixed = model.sample(context, 4, generator=seeded(), z_groups={j: drawn[j] for j in groups})
        torch.testing.assert_close(fixed, free, rtol=1e-4, atol=1e-4)
    # All fixed: nothing is left to chance.
    first, other = (model.sample(context, 4, generator=seeded(s), z_groups={1: 0, 2: 0.5, 3: -1}) for s in (0, 1))
    assert torch.equal(first, other) and not torch.allclose(first, free, atol=1e-3)
    # A group at 0 changes the future, and what follows in z is drawn given it.
    assert not torch.allclose(model.sample(context, 4, generator=seeded(), z_groups={2: 0}), free, atol=1e-3)


def test_a_group_is_fixed_by_a_number_or_by_numbers():
    model = build("haf_svg_3")
    context = random_clip(model, n_frames=2)
    values = torch.randn(3)
    sampled = [
        model.sample(context, 4, num_samples=2, generator=seeded(), z_groups=z_groups)
        for z_groups in (
            {2: values.tolist()},
            {"2": values},
            {2: values.expand(4, 3)},
            {2: values.expand(2, 4, 3)},
        )
    ]
    assert all(torch.equal(sampled[0], other) for other in sampled[1:])
    one, other = (model.sample(context, 4, generator=seeded(), z_groups={2: x}) for x in (0, [0.0, 0.0, 0.0]))
    assert torch.equal(one, other) and not torch.allclose(one[:, 0], sampled[0][:, 0], atol=1e-3)
    by_time = torch.randn(4, 3)
    late = by_time.clone()
    late[2:] += 1
    one, other = (model.sample(context, 4, generator=seeded(), z_groups={2: x}) for x in (by_time, late))
    assert torch.equal(one[:, :, :2], other[:, :, :2]) and not torch.allclose(one[:, :, 2:], other[:, :, 2:], atol=1e-3)


def test_posterior_draws_are_those_that_the_loss_decodes():
    model = build("haf_svg_3")
    clip = random_clip(model, n_frames=5)
    z = model.infer(clip, generator=seeded())
    assert {j: tuple(group.shape) for j, group in z.items()} == {j: (2, 4, 3) for j in (1, 2, 3)}
    steps, noise = StepByStep(model), torch.randn(2, 4, 9, generator=seeded())
    for t in range(4):
        found = []
        for j in range(3):
            mean, logvar = steps.posterior_moments(model.encoder(clip[:, t + 1])[0], found)
            found.append(mean + (logvar / 2).exp() * noise[:, t, 3 * j : 3 * j + 3])
            torch.testing.assert_close(z[j + 1][:, t], found[j], rtol=1e-4, atol=1e-5)
    generator = seeded()
    z = model.infer(clip, generator=generator)
    future = {j: group[:, 1:] for j, group in z.items()}
    expected = model.sample(clip[:, :2], 3, generator=generator, z_groups=future)[:, 0]
    assert torch.equal(model.reconstruct(clip, 2, generator=seeded()), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"z_groups": {4: 0}}, "z_groups: expected groups 1 to 3, found 4"),
        ({"z_groups": {0: 0}}, "z_groups: expected groups 1 to 3, found 0"),
        ({"z_groups": {1: [0.0, 1.0]}}, r"z_groups: group 1: expected a number or .* = \(2, 3, 3\), found \(2,\)"),
        ({"z_groups": {1: torch.zeros(2, 3)}}, r"z_groups: group 1: .*found \(2, 3\)"),
        ({"z_groups": {1: "x"}}, "z_groups: group 1: expected a number or numbers, found 'x'"),
        ({"z_groups": {1: [[0.0], [1.0, 2.0]]}}, "z_groups: group 1: expected a number or numbers, found"),
        ({"z_groups": 1}, "z_groups: expected a mapping from groups to values, like {1: 0}, found 1"),
        ({"sample_batch": 0}, "sample_batch: expected a whole number of at least 1, found 0"),
        ({"num_samples": 0}, "num_samples: expected a whole number of at least 1, found 0"),
    ],
)
def test_bad_sampler_options(options, message):
    model = build("haf_svg_3")
    with pytest.raises(ValueError, match=message) as caught:
        model.sample(random_clip(model, n_frames=1), 3, **options)
    assert "\n" not in str(caught.value)


def test_a_rollout_advances_all_chunks_and_leaves_the_model_as_it_is():
    """Frame by frame the same as at once, whatever the chunks; between two frames the model trains as before."""
    model = build("haf_svg_3").train()
    context, values = random_clip(model, batch=3, n_frames=3), torch.randn(3, 1, 3)
    for options in ({"sample_batch": 5}, {"sample_batch": 4, "batch_statistics": True}):
        expected = model.sample(
            context, 4, num_samples=4, generator=seeded(), z_groups={1: 0, 3: values.expand(-1, 4, -1)}, **options
        )
        rollout = model.rollout(context, num_samples=4, generator=seeded(), z_groups={1: 0, 3: values}, **options)
        for t in range(4):
            assert torch.equal(rollout.step(), expected[:, :, t])
            assert all(module.training for module in model.modules())
            assert all(norm.track_running_stats for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    with pytest.raises(ValueError, match=r"z_groups: group 1: expected .* = \(3, 1, 3\), found \(4, 3\)"):
        model.rollout(context, z_groups={1: torch.zeros(4, 3)})


def test_items_that_iterators_share_are_not_kept():
    made, kept = itertools.count(), []
    one, two = shared((torch.tensor(i) for i in made), 2)
    for i in range(5):
        items = next(one), next(two)
        assert [item.item() for item in items] == [i, i]
        kept.append(weakref.ref(items[0]))
    del items
    assert not any(ref() is not None for ref in kept)
    assert [next(two).item() for _ in range(3)] == [next(one).item() for _ in range(3)] == [5, 6, 7]


def test_no_groups_to_fix():
    model = build("svg_deterministic")
    with pytest.raises(ValueError, match="expected groups none: the model has no z, found 1"):
        model.sample(random_clip(model, n_frames=1), 3, z_groups={1: 0})


# Spaces and precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"network": "resnet"}, "network: expected one of dcgan, vgg, latent, found 'resnet'"),
        ({"aligner": "decoder"}, "aligner: expected one of none, paper, encoder_value, found 'decoder'"),
        ({"kl_reduction": "total"}, "kl_reduction: expected one of sum, mean, found 'total'"),
        ({"n_groups": -1}, "n_groups: expected a whole number of at least 0, found -1"),
        ({"group_dim": 0}, "group_dim: expected a whole number of at least 1, found 0"),
        ({"beta": -1.0}, "beta: expected at least 0, found -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecurrentVAE(FRAMES, **arguments)


@pytest.mark.parametrize("name", ["recurrent_vae", "recurrent_vae_latents"])
def test_clips_of_another_space_are_refused(name):
    prior = tiny_prior(name)
    shape = tuple(random_clip(prior).shape[2:])
    wrong = torch.zeros(2, 4, *shape[::-1])
    for call in (lambda: prior(wrong, 2), lambda: prior.sample(wrong, 2), lambda: prior.infer(wrong)):
        with pytest.raises(ValueError, match=r"^(clip|context): expected"):
            call()


@pytest.mark.parametrize(
    "tokenizer, accepts, network",
    [
        ("pixel", "pixels", "DCGANEncoder"),
        ("vqvae", "latents", "LatentEncoder"),
        ("kl_vae", "latents", "LatentEncoder"),
        ("dcgan", "latents", "LatentEncoder"),
    ],
)
def test_any_tokenizer_by_config_alone(tmp_path, tokenizer, accepts, network):
    (tmp_path / "any.yaml").write_text(
        f"defaults: {{tokenizer: {tokenizer}, prior: recurrent_vae}}\nframe_size: 32\nchannels: 1"
    )
    overrides = ["prior.hidden_channels=4", "prior.dim=8", "prior.cells=8", "prior.n_groups=2"]
    config = load_config(tmp_path / "any.yaml", overrides)
    prior = instantiate(config.prior, latent_spec=instantiate(config.tokenizer).latent_spec)
    assert prior.accepts == accepts and type(prior.encoder).__name__ == network
    clip = random_clip(prior, n_frames=3)
    prior(clip, 1).loss.backward()
    assert prior.sample(clip[:, :1], 2).shape == clip[:, None, :2].shape


@pytest.mark.parametrize("height, width", [(1, 1), (4, 2), (16, 16), (7, 9), (1, 8), (12, 20)])
def test_latent_networks_fit_any_size(height, width):
    encoder = LatentEncoder(3, height, width, dim=5, hidden_channels=2)
    decoder = LatentDecoder(3, height, width, dim=5, hidden_channels=2, joined=1)
    h, features = encoder(torch.randn(4, 3, height, width))
    assert h.shape == (4, 5) and h.abs().max() <= 1
    assert [tuple(f.shape[1:]) for f in features] == encoder.level_shapes == decoder.level_shapes
    assert encoder.level_shapes[0] == (2, height, width)
    out = decoder(h, features)
    assert out.shape == (4, 3, height, width)
    out.square().sum().backward()
    for module in (encoder, decoder):
        assert [name for name, p in module.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", ["recurrent_vae", "svg_lp_vgg", "recurrent_vae_latents"])
def test_half_precision(name):
    prior, lstms = tiny_prior(name).train(), []
    for module in prior.modules():
        if isinstance(module, nn.LSTM):
            module.register_forward_hook(lambda lstm, _, output: lstms.append(output[0].dtype))
    clip = random_clip(prior)
    torch.manual_seed(0)
    expected = prior.eval()(clip, 2)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = prior(clip, 2)
        sampled = prior.sample(clip[:, :2], 3, generator=seeded())
    assert set(lstms) == {torch.float32}
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and sampled.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    torch.testing.assert_close(sampled, prior.sample(clip[:, :2], 3, generator=seeded()), rtol=0.1, atol=0.1)
    half = prior.to(torch.bfloat16)
    sampled = half.sample(clip[:, :2].bfloat16(), 3, generator=seeded())
    assert sampled.dtype == torch.bfloat16 and sampled.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in TINY_PRIORS if name.startswith(("recurrent", "svg"))])
def test_cuda_samples_as_the_cpu_does(name):
    prior = tiny_prior(name)
    clip = random_clip(prior, n_frames=3)
    expected = prior.sample(clip, 3, num_samples=2, generator=seeded())
    prior.cuda()
    sampled = prior.sample(clip.cuda(), 3, num_samples=2, generator=seeded(), sample_batch=3)
    torch.testing.assert_close(sampled.cpu(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        prior.train()(clip.cuda(), 2).loss.backward()


# Learning, and the tools ----------------------------------------------------------------------------------------------


def test_z_learns_what_the_past_cannot_say():
    """A bar that steps up or down at random: the posterior tells where it goes, the prior draws both."""

    def clips(n):
        steps = torch.randint(0, 2, (n, 5), generator=generator) * 2 - 1
        rows = (steps.cumsum(1) + 4) % 8
        frames = torch.full((n, 5, 8, 8), -1.0)
        return frames.scatter(2, rows[:, :, None, None].expand(-1, -1, -1, 8), 1.0)[:, :, None]

    torch.manual_seed(0)
    generator = seeded()
    spec = PixelTokenizer(1, 8, 8, levels=None).latent_spec
    model = RecurrentVAE(spec, dim=16, hidden_channels=8, n_groups=2, group_dim=2, cells=32, beta=1e-3).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(clips(16), 2).loss.backward()
        optimizer.step()
    model.eval()
    clip = clips(32)
    logs = model(clip, 2).logs
    assert logs["kl"] > 0.4 and logs["active_units"] >= 1  # a step is one bit, 0.69 nats
    error = (model.reconstruct(clip, 2, generator=seeded()) - clip[:, 2:]).square().mean()
    samples = model.sample(clip[:, :2], 3, num_samples=16, generator=seeded())
    errors = (samples - clip[:, None, 2:]).square().mean((2, 3, 4, 5))
    assert error < 0.5 * errors.mean()  # one future against the true one: most bars are elsewhere
    assert errors.min(1).values.mean() < 0.7 * errors.mean()  # and they differ


def test_a_pipeline_without_tokenizer_saves_loads_and_takes_the_options(tmp_path):
    pipe = VideoPredictionPipeline(build("haf_svg_3"))
    frames = random_clip(pipe.prior, n_frames=2)
    pipe.save_pretrained(tmp_path)
    loaded = VideoPredictionPipeline.from_pretrained(tmp_path)
    options = {"n_frames": 3, "num_samples": 2, "z_groups": {1: 0}, "sample_batch": 3}
    futures = [one(frames, generator=seeded(), **options).frames for one in (pipe, loaded)]
    assert futures[0].shape == (2, 2, 3, 1, 8, 16)
    torch.testing.assert_close(*futures, rtol=1e-5, atol=1e-5)


SMALL = ["dim=8", "hidden_channels=4", "n_groups=2", "group_dim=3", "cells=8"]
PIXELS = ["tokenizer=pixel", "frame_size=32", "prior=recurrent_vae", *(f"prior.{option}" for option in SMALL)]


def test_training_logs_groups_and_diversity_and_warns_of_collapse(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "latentcast"):
        figures = call_tool("train_prior", tmp_path, *PIXELS)
    assert {"loss", "mse", "kl", "kl_group_2", "active_units", "active_units_group_1"} <= figures["val"].keys()
    rows = read_metrics(tmp_path / "run/metrics/prior.csv")
    names = {name for _, name, _ in rows}
    assert {"train/kl_group_1", "train/active_units_group_2", "val/kl_group_1", "preview/sample_std"} <= names
    assert ("preview/ilpips" in names) != ("no iLPIPS of the preview" in caplog.text)
    # Four steps are too few for z to mean anything.
    assert figures["val"]["active_units_group_1"] == 0
    assert "posterior collapse: no unit of latent group 1 of RecurrentVAE is active" in caplog.text

    caplog.clear()
    free = ["prior.beta=0", "optimizer.lr=0.03", "ema_decay=0", "trainer.max_steps=30", "overwrite=true"]
    figures = call_tool("train_prior", tmp_path, *PIXELS, *free)
    assert figures["val"]["active_units_group_1"] > 0
    assert "of latent group 1" not in "".join(line for line in caplog.messages if "(step 15)" in line)


def test_diversity_of_samples():
    samples = torch.zeros(2, 2, 3, 1, 4, 4)
    samples[:, 0], samples[:, 1] = 0.5, -0.5  # [0, 1]: 0.75 and 0.25
    assert sample_diversity(samples) == {"sample_std": pytest.approx(0.5**0.5 / 2)}
    assert sample_diversity(samples[:, :1].expand(-1, 3, -1, -1, -1, -1))["sample_std"] == 0


def test_benchmark_at_tiny_size(benchmark_module):
    """One at a time, the past is encoded frame by frame, and for every sample."""
    sampling = benchmark_module("sampling_recurrent_vae")
    N_CONTEXT, N_FRAMES = sampling.N_CONTEXT, sampling.N_FRAMES
    model, batches = build("svg_lp"), []
    model.encoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    time = sampling.recurrent_vae_seconds(model, 3)
    assert time.keys() == {"batched", "one_at_a_time", "encoded_once"} and min(time.values()) > 0
    own = [1] * (N_FRAMES - 1)
    measured = [N_CONTEXT - 1, 1, *[3] * len(own)] + 3 * [*[1] * N_CONTEXT, *own] + [*[1] * N_CONTEXT, *3 * own]
    assert batches[-len(measured) :] == measured

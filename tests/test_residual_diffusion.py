"""Residual video diffusion: sizes, equations, gradients, and its samplers against Algorithm 1 written out."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DEISMultistepScheduler
from diffusers.optimization import get_scheduler
from test_denoising import oracle
from tiny import (
    SMALL_RESIDUAL_DIFFUSION,
    TINY_TOKENIZERS,
    random_conditions,
    random_frames,
    small_residual_diffusion,
    tiny_tokenizer,
    told_prior,
)

from latentcast import PixelTokenizer, ResidualDiffusion, VideoPredictionPipeline, instantiate, load_config
from latentcast.config import to_container
from latentcast.layers.conv_gru import ConvGRUCell
from latentcast.layers.linear_attention import LinearAttention
from latentcast.layers.residual_unet import ResBlock
from latentcast.priors.denoising import SCHEDULERS, denoise, make_scheduler

LARGE = {
    "width": 64,
    "denoising_multipliers": [1, 1, 2, 2, 4, 4],
    "transform_multipliers": [1, 2, 3, 4],
}  # Table 3, 128 x 128


def tiny(tokenizer="continuous_pixel", **options):
    torch.manual_seed(0)
    return small_residual_diffusion(tokenizer, **options).eval()


def random_pixels(batch=2, n_frames=4, seed=0):
    return random_frames(TINY_TOKENIZERS["continuous_pixel"](), batch, n_frames, seed)


def sample(model, context, n_frames, seed=0, **options):
    return model.sample(context, n_frames, generator=torch.Generator().manual_seed(seed), **options)


def memories(model, clip):
    """What the model holds after each frame of a clip, read one by one."""
    memory, held = None, []
    for frame in clip.unbind(1):
        memory = model.observe(frame, memory=memory)
        held.append(memory)
    return held


class counted:
    """Counts the calls of a module."""

    def __init__(self, module):
        self.calls = 0
        module.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


# Sizes --------------------------------------------------------------------------------------------------------------


def parameters_in_millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_it_has_the_papers_size():
    model = ResidualDiffusion(PixelTokenizer(3, 64, 64, levels=None).latent_spec)
    assert parameters_in_millions(model) == pytest.approx(37.6, rel=0.03)
    assert parameters_in_millions(model.context) == pytest.approx(13.75, rel=0.001)
    assert parameters_in_millions(model.transform) == pytest.approx(5.12, rel=0.03)
    assert parameters_in_millions(model.denoiser) == pytest.approx(18.74, rel=0.03)
    assert model.denoiser.time.linear_1.weight.shape == (192, 48)
    assert model.denoiser.time.linear_2.weight.shape == (48, 192)
    attention = model.denoiser.down[0].attention
    assert attention.n_heads == 4 and attention.to_out.in_channels == 4 * 16


def test_levels_of_both_resolutions_are_those_of_table_3():
    for size, options, deepest, mu_deepest in ((64, {}, (384, 8), (192, 8)), (128, LARGE, (256, 4), (256, 16))):
        model = ResidualDiffusion(PixelTokenizer(3, size, size, levels=None).latent_spec, **options).to("meta")
        frames = torch.empty(2, 3, size, size, device="meta")
        memory = model.observe(frames)
        assert memory.rows("context")[-1].shape == (2, deepest[0], deepest[1], deepest[1])
        assert memory.rows("transform")[-1].shape == (2, mu_deepest[0], mu_deepest[1], mu_deepest[1])
        assert model.predict_frame(memory)[0].shape == frames.shape
        steps = torch.empty(2, dtype=torch.int64, device="meta")
        assert model.denoiser(frames, steps, model.denoiser.conditions(memory.rows("context"))).shape == frames.shape


def test_the_ablation_has_no_transform_network():
    model = tiny(residual=False)
    memory = model.observe(random_pixels()[:, 0])
    mu, sigma = model.predict_frame(memory)
    assert model.transform is None and mu.shape == random_pixels()[:, 0].shape and not mu.any() and sigma == 1
    assert set(memory.states) == {"context"}


def test_linear_attention_is_attention_with_separable_weights():
    torch.manual_seed(0)
    attention = LinearAttention(8, n_heads=2, head_dim=3)
    x = torch.randn(2, 8, 3, 5)
    query, key, value = attention.to_qkv(F.group_norm(x, 1, attention.norm.weight, attention.norm.bias)).split(6, 1)
    heads = []
    for h in range(2):
        q, k, v = (part[:, 3 * h : 3 * h + 3].flatten(2).transpose(1, 2) for part in (query, key, value))
        weights = q.softmax(2) @ k.softmax(1).transpose(1, 2)  # of every position for every position
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 15))
        heads.append((weights @ v).transpose(1, 2).unflatten(2, (3, 5)))
    torch.testing.assert_close(attention(x), x + attention.to_out(torch.cat(heads, 1)))


def test_a_condition_is_a_concatenated_context():
    torch.manual_seed(0)
    split, joined = ResBlock(8, 16, context_channels=5), ResBlock(13, 16)
    with torch.no_grad():
        joined.load_state_dict(
            {k: v for k, v in split.state_dict().items() if "context" not in k}
            | {"conv1.weight": torch.cat([split.conv1.weight, split.context_conv.weight], 1)}
            | {"shortcut.weight": torch.cat([split.shortcut.weight, split.context_shortcut.weight], 1)}
        )
    x, context = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 4, 6)
    expected = joined(torch.cat([x, context], 1))
    torch.testing.assert_close(split(x, condition=split.condition(context)), expected)


# Equations ----------------------------------------------------------------------------------------------------------


def test_the_schedule_is_nichol_and_dhariwals_cosine():
    steps = torch.arange(1601, dtype=torch.float64) / 1600
    f = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    torch.testing.assert_close(tiny().alpha_bars.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-9)
    theirs = DDPMScheduler(1600, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.equal(tiny().to(torch.bfloat16).alpha_bars, theirs)


@pytest.mark.parametrize("n", [1599, 800, 1, 0])
def test_a_step_of_the_ancestral_sampler_is_that_of_algorithm_1(n):
    """Its mean is Eq. 16's, which is Eq. 13's at the clean residual; its deviation is the posterior's."""
    model = tiny()
    scheduler = make_scheduler("ddpm", model.schedule)
    scheduler.set_timesteps(1600)
    assert scheduler.timesteps.tolist() == list(range(1599, -1, -1))
    alpha_bar = scheduler.alphas_cumprod.double()
    now, before = alpha_bar[n], alpha_bar[n - 1] if n else torch.tensor(1.0, dtype=torch.float64)
    beta = 1 - now / before
    y_n, epsilon = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (y_n - beta / (1 - now).sqrt() * epsilon) / (1 - beta).sqrt()
    y_0 = (y_n - (1 - now).sqrt() * epsilon) / now.sqrt()
    of_clean = before.sqrt() * beta * y_0 + (1 - beta).sqrt() * (1 - before) * y_n
    torch.testing.assert_close(of_clean / (1 - now), mean, rtol=1e-4, atol=1e-4)

    z = torch.randn(y_n.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = mean + ((1 - before) / (1 - now) * beta).sqrt() * z
    found = scheduler.step(epsilon, n, y_n, generator=torch.Generator().manual_seed(1)).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("noise_loss", ["l2", "l1"])
@pytest.mark.parametrize("n_context", [1, 2, 3])
def test_the_loss_is_algorithm_1_frame_by_frame(noise_loss, residual, n_context):
    model = tiny(noise_loss=noise_loss, residual=residual, sigma=1.7)
    clip = random_pixels(n_frames=5)
    n_predicted = clip.shape[1] - n_context
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(1600, (1, 2), generator=generator)[0]  # one for each clip
    epsilon = torch.randn(n_predicted, *clip.shape[:1], *clip.shape[2:], generator=generator)
    total = 0
    with torch.no_grad():
        for t in range(n_context, 5):
            memory = memories(model, clip[:, :t])[-1]
            mu, sigma = model.predict_frame(memory)
            assert sigma == (1.7 if residual else 1.0)
            y_0 = (clip[:, t] - mu) / sigma
            alpha_bar = model.alpha_bars[n].view(2, 1, 1, 1)
            y_n = alpha_bar.sqrt() * y_0 + (1 - alpha_bar).sqrt() * epsilon[t - n_context]
            found = model.denoiser(y_n, n, model.denoiser.conditions(memory.rows("context")))
            error = (found - epsilon[t - n_context]).abs()
            total += (error if noise_loss == "l1" else error**2).mean()
        output = model(clip, n_context)
    torch.testing.assert_close(output.loss, total / n_predicted, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.loss, model(clip, n_context).loss)  # in eval mode the same noise again


def test_mu_is_supervised_directly_by_option():
    clip = random_pixels()
    plain, supervised = tiny()(clip, 2), tiny(mu_weight=0.25)(clip, 2)
    torch.testing.assert_close(supervised.loss, plain.loss + 0.25 * plain.logs["mu_error"])
    mu = torch.stack([tiny().predict_frame(memory)[0] for memory in memories(tiny(), clip)[1:3]], 1)
    torch.testing.assert_close(plain.logs["mu_error"], F.mse_loss(mu, clip[:, 2:]).detach())


def test_with_an_anchor_mu_begins_as_the_last_frame():
    model, clip = tiny(anchor="last_frame"), random_pixels()
    for frame, memory in zip(clip.unbind(1), memories(model, clip)):
        torch.testing.assert_close(model.predict_frame(memory)[0], frame)
    torch.testing.assert_close(model.predict_mean(clip, 3), clip[:, -1:].expand(-1, 3, -1, -1, -1))


def test_without_a_transform_mu_is_the_anchor_and_what_moves_is_drawn(tmp_path):
    model, clip = tiny(anchor="last_frame", transform_multipliers=None, sigma="auto"), random_pixels()
    assert not [name for name, _ in model.named_parameters() if name.startswith("transform")]
    output = model.train()(clip, 2)
    assert [*output.logs] == ["noise_loss"]  # that of mu would always be the same
    torch.testing.assert_close(model._sigma, F.mse_loss(clip[:, 1:-1], clip[:, 2:]).sqrt())
    model.save_pretrained(tmp_path)
    loaded = ResidualDiffusion.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_mean(clip, 3), clip[:, -1:].expand(-1, 3, -1, -1, -1))
    future = loaded.sample(clip, 2, n_steps=3, generator=torch.Generator().manual_seed(0))[:, 0]
    assert not torch.equal(future[:, 0], clip[:, -1]) and future.isfinite().all()


def test_a_detached_mu_learns_from_its_own_error_alone():
    clip = random_pixels()
    model = tiny(mu_weight=1.0, detach_mu=True)
    output = model(clip, 2)
    found = torch.autograd.grad(output.loss, model.transform.to_mu.weight)[0]
    mus = torch.stack([model.predict_frame(memory)[0] for memory in memories(model, clip)[1:-1]], 1)
    wanted = torch.autograd.grad(F.mse_loss(mus, clip[:, 2:]), model.transform.to_mu.weight)[0]
    torch.testing.assert_close(found, wanted)
    model = tiny(mu_weight=1.0)
    both = torch.autograd.grad(model(clip, 2).loss, model.transform.to_mu.weight)[0]
    assert not torch.allclose(both, wanted)


def test_an_automatic_sigma_follows_the_residual_and_is_saved_as_a_number(tmp_path):
    model = tiny(sigma="auto").train()
    spreads = []
    for seed in range(3):
        clip = random_pixels(seed=seed)
        with torch.no_grad():
            mus = torch.stack([model.predict_frame(memory)[0] for memory in memories(model, clip)[1:-1]], 1)
        spreads.append((clip[:, 2:] - mus).square().mean())
        model(clip, 2)
    wanted = spreads[0]
    for spread in spreads[1:]:
        wanted = 0.98 * wanted + 0.02 * spread
    torch.testing.assert_close(model.residual_rms, wanted.sqrt())

    before = model.eval().residual_rms.clone()
    model(clip, 2)
    assert model.residual_rms == before  # validation does not move it
    model.save_pretrained(tmp_path)
    assert model.config.sigma == "auto"
    again = ResidualDiffusion.from_pretrained(tmp_path)
    assert again.config.sigma == pytest.approx(before.item())
    context, options = clip[:1, :2], {"n_steps": 3}
    torch.testing.assert_close(sample(again, context, 2, **options), sample(model, context, 2, **options))


def test_a_bound_in_sigmas_is_that_many_of_them():
    clip = random_pixels(1, 2)
    wide, narrow = tiny(sigma=0.01), tiny(sigma=0.01, residual_bound_sigmas=3)
    narrow.load_state_dict(wide.state_dict())
    mu = wide.predict_mean(clip, 1)
    assert (sample(wide, clip, 1)[:, 0] - mu).abs().max() > 0.0301  # its bound is two hundred sigmas
    assert (sample(narrow, clip, 1)[:, 0] - mu).abs().max() <= 0.0301


def test_the_mean_of_a_rollout_is_mu_frame_by_frame():
    model, clip = tiny(), random_pixels()
    memory, wanted = memories(model, clip)[-1], []
    for _ in range(3):
        wanted.append(model.predict_frame(memory)[0].clamp(-1, 1))
        memory = model.observe(wanted[-1], memory=memory)
    torch.testing.assert_close(model.predict_mean(clip, 3), torch.stack(wanted, 1))
    assert tiny(residual=False).predict_mean is None


def test_a_diffusion_step_is_shared_by_the_frames_of_a_clip_or_not():
    torch.manual_seed(0)
    shared, single = (tiny(shared_step=shared)._draw_steps(400, 40, None).view(40, 400) for shared in (True, False))
    assert (shared == shared[0]).all() and len(shared[0].unique()) > 30
    assert len(single[:, 0].unique()) > 30
    for n in (shared, single):
        assert n.min() < 100 and n.max() > 1500 and n.min() >= 0 and n.max() < 1600


def test_gradients_through_mu_are_those_of_finite_differences():
    """The noise loss reaches mu through y_n, which the denoiser sees: Eq. 9 is minimised over phi too."""
    model = tiny().double()
    clip = random_pixels().double()
    parameters = list(model.transform.parameters())
    gradients = torch.autograd.grad(model(clip, 2).loss, parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    generator = torch.Generator().manual_seed(0)
    for chosen in (range(len(parameters)), *([i] for i in range(0, len(parameters), 5))):
        move = {i: torch.randn(parameters[i].shape, generator=generator, dtype=torch.float64) for i in chosen}
        expected = sum((gradients[i] * v).sum() for i, v in move.items()).item()
        losses = []
        for step in (1e-6, -2e-6, 1e-6):  # there, to the other side, back
            with torch.no_grad():
                for i, v in move.items():
                    parameters[i] += step * v
                losses.append(model(clip, 2).loss.item())
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_nothing_of_the_future_reaches_the_past():
    model = tiny()
    clip = random_pixels(n_frames=5).requires_grad_()
    frames = clip.transpose(0, 1).flatten(0, 1)
    memory = model.observe(frames, 5)
    mu = model.predict_frame(memory)[0]
    steps = torch.full((len(frames),), 700)
    noise = model.denoiser(torch.randn_like(frames), steps, model.denoiser.conditions(memory.rows("context")))
    for output in (mu, noise):
        for t in range(5):
            (gradient,) = torch.autograd.grad(output.unflatten(0, (5, 2))[t].sum(), clip, retain_graph=True)
            reached = gradient.flatten(2).abs().amax((0, 2)) > 0
            assert reached.tolist() == [True] * (t + 1) + [False] * (4 - t)


def test_what_leads_to_a_frame_reaches_it_and_no_earlier_one():
    """Vectors stand beside the frame before the one that they lead to."""
    model = told_prior("residual_diffusion")
    frames = random_pixels(n_frames=5).transpose(0, 1).flatten(0, 1)
    vectors = torch.randn(len(frames), model.config.width, requires_grad=True)
    memory = model.observe(frames, 5, vectors=vectors)
    noise = model.denoiser(frames, torch.full((len(frames),), 700), model.denoiser.conditions(memory.rows("context")))
    for output in (model.predict_frame(memory)[0], noise):
        for t in range(5):
            (gradient,) = torch.autograd.grad(output.unflatten(0, (5, 2))[t, 0].sum(), vectors, retain_graph=True)
            reached = gradient.unflatten(0, (5, 2)).any(-1)
            assert reached[:, 0].tolist() == [i <= t for i in range(5)] and not reached[:, 1].any()


@pytest.mark.parametrize(
    "options", [{}, {"anchor": "last_frame", "transform_multipliers": None}, {"residual": False}, {"sigma": "auto"}]
)
def test_every_form_is_told_what_leads_to_the_frames_it_predicts(options):
    """The last action of a clip leads to its last frame; what led to the first leads to none that is predicted."""
    model = told_prior("residual_diffusion", **options)
    clip, told = random_pixels(), random_conditions()
    told["state"].requires_grad_()
    (gradient,) = torch.autograd.grad(model(clip, 2, told).loss, told["state"])
    assert gradient.any(-1).tolist() == [[False, True, True, True]] * 2
    future = [sample(model, clip[:, :2], 2, n_steps=2, conditions=each) for each in (told, None)]
    assert not torch.equal(*future)


def test_a_guided_frame_moves_as_a_whole():
    """mu and raw scale are guided as the noise is; a memory holds told rows, then the same untold."""
    model = told_prior("residual_diffusion_latents", anchor="last_frame")
    for layer in (model.transform.to_mu, model.transform.to_scale):
        torch.nn.init.normal_(layer.weight)
    frames, told = torch.randn(2, 3, 4, 8), torch.randn(2, model.config.width)
    nothing = model.conditioner.null.expand(2, -1)
    own = [model.observe(frames, vectors=vectors) for vectors in (told, nothing)]
    both = model.observe(frames.repeat(2, 1, 1, 1), vectors=torch.cat([told, nothing]))
    (mu, sigma), (mu_0, sigma_0) = (model.predict_frame(memory) for memory in own)
    for scale in (0.0, 2.5, 1e3):
        found, spread = model.predict_frame(both, scale)
        torch.testing.assert_close(found, mu_0 + scale * (mu - mu_0), rtol=1e-4, atol=1e-3)
        assert ((spread > 0) & (spread <= model.config.sigma)).all()
    torch.testing.assert_close(model.predict_frame(both, 0.0)[1], sigma_0)
    assert not torch.allclose(sigma, sigma_0)


def test_mean_and_explanation_are_told_and_guided():
    model, clip, told = told_prior("residual_diffusion"), random_pixels(), random_conditions()
    mean = model.predict_mean(clip[:, :2], 2, told)
    assert torch.equal(mean, model.predict_mean(clip[:, :2], 2, conditions=told))
    assert not torch.equal(mean, model.predict_mean(clip[:, :2], 2))
    given = {"n_steps": 2, "conditions": told}
    for scale in (1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        found = model.explain(clip, 2, generator=generator, guidance_scale=scale, **given)
        future = sample(model, clip[:, :2], 2, guidance_scale=scale, **given)[:, 0]
        assert torch.equal(found["future"], future)
        means = model._means(clip[:, :2], 2, 1, model._told(told, 2, 4), scale)[:, 0]
        torch.testing.assert_close(found["mu"][:, 0], means)
        assert torch.allclose(model.in_range(means), mean[:, 0]) == (scale == 1)
    model.train()  # what training leaves out, sampling does not
    model.conditioner.dropout = 0.9
    assert torch.equal(model.predict_mean(clip[:, :2], 2, told), mean)
    assert torch.equal(sample(model, clip[:, :2], 2, guidance_scale=3.0, **given)[:, 0], future)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_rollout_in_chunks_is_that_of_sample(guidance_scale):
    model, told = told_prior("residual_diffusion_latents"), random_conditions(batch=3, n_frames=5)
    context = torch.randn(3, 2, 3, 4, 8)
    options = {"num_samples": 3, "sample_batch": 4, "n_steps": 3, "guidance_scale": guidance_scale}
    expected = sample(model, context, 3, conditions=told, **options)
    known = {name: value if name == "label" else value[:, :2] for name, value in told.items()}
    generator = torch.Generator().manual_seed(0)
    rollout = model.rollout(context, generator=generator, conditions=known, **options)
    for t in range(3):
        frame = rollout.step({name: told[name][:, 2 + t] for name in ("action", "state")})
        assert torch.equal(frame, expected[:, :, t])


def test_checkpointing_takes_conditions():
    clip, told, gradients = random_pixels(), random_conditions(), []
    for checkpointing in (False, True):
        model = told_prior("residual_diffusion", gradient_checkpointing=checkpointing)
        parameters = [p for name, p in model.named_parameters() if name != "condition_embedding.null"]
        gradients.append(torch.autograd.grad(model(clip, 2, told).loss, parameters))
    torch.testing.assert_close(*gradients)


def test_the_learned_scale_is_the_spread_of_the_residual():
    """It is fitted by the Gaussian likelihood of the residual, which reaches nothing but the scale's own layer."""
    model = tiny(learned_sigma=True)
    clip = random_pixels(batch=8)
    head = list(model.transform.to_scale.parameters())

    def residual_and_scale():
        parts = [model.predict_frame(memory) for memory in memories(model, clip)[1:3]]
        mu, sigma = (torch.stack(part, 1) for part in zip(*parts))
        return clip[:, 2:] - mu.detach(), sigma

    residual, sigma = residual_and_scale()
    nll = (sigma.log() + (residual / sigma).square() / 2).mean()
    torch.testing.assert_close(torch.autograd.grad(model(clip, 2).loss, head), torch.autograd.grad(nll, head))
    others = [p for name, p in model.named_parameters() if "to_scale" not in name]
    nll = (residual_and_scale()[1]).log().mean()
    assert set(torch.autograd.grad(nll, others, allow_unused=True)) == {None}

    optimizer = torch.optim.Adam(head, 0.2)
    for _ in range(30):
        for parameter, gradient in zip(head, torch.autograd.grad(model(clip, 2).loss, head)):
            parameter.grad = gradient
        optimizer.step()
    residual, sigma = residual_and_scale()
    assert ((sigma > 0.02) & (sigma < 2)).all() and sigma.std() > 0
    assert (residual / sigma).square().mean().item() == pytest.approx(1, rel=0.1)


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"learned_sigma": True}])
def test_ancestral_sampling_is_algorithm_1(options):
    n_steps = 12
    model = tiny(n_diffusion_steps=n_steps, **options)
    with torch.no_grad():
        for parameter in model.denoiser.to_noise.parameters():  # far from the data: clamping matters
            parameter.mul_(5)
    context = random_pixels(n_frames=3)
    found = sample(model, context, 3, scheduler="ddpm", n_steps=n_steps)

    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    noises = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw():
        return torch.cat([torch.randn(1, *context.shape[2:], generator=noise) for noise in noises])

    alpha_bar = model.alpha_bars
    n_clamped = 0
    frames = context
    with torch.no_grad():
        for _ in range(3):
            memory = memories(model, frames)[-1]
            mu, sigma = model.predict_frame(memory)
            bound = (1.0 if "residual" in options else 2.0) / sigma
            y = draw()
            for n in reversed(range(n_steps)):
                now, before = alpha_bar[n], alpha_bar[n - 1] if n else torch.tensor(1.0)
                beta = 1 - now / before
                conditions = model.denoiser.conditions(memory.rows("context"))
                epsilon = model.denoiser(y, torch.full((2,), n), conditions)
                y_0 = (y - (1 - now).sqrt() * epsilon) / now.sqrt()
                n_clamped += (y_0.abs() > bound).sum()
                y_0 = y_0.clamp(-bound, bound) if isinstance(bound, float) else torch.clamp(y_0, -bound, bound)
                epsilon = (y - now.sqrt() * y_0) / (1 - now).sqrt()
                y = (y - beta / (1 - now).sqrt() * epsilon) / (1 - beta).sqrt()
                if n:
                    y = y + ((1 - before) / (1 - now) * beta).sqrt() * draw()
            frames = torch.cat([frames, (mu + sigma * y).clamp(-1, 1)[:, None]], 1)
    assert n_clamped > 0
    torch.testing.assert_close(found[:, 0], frames[:, 3:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"scheduler": "ddpm", "n_steps": 40}])
def test_what_the_denoising_steps_share_is_computed_once_with_the_same_bits(options):
    model = tiny(n_diffusion_steps=40)
    context = random_pixels(n_frames=3)
    reference = sample(model, context, 2, num_samples=2, use_cache=False, **options)
    n_steps = options.get("n_steps", 25)
    halves = [counted(level.block2.context_conv) for level in model.denoiser.down]
    read, predicted = counted(model.context.levels[0].gru), counted(model.transform.to_mu)
    assert torch.equal(sample(model, context, 2, num_samples=2, **options), reference)
    assert [half.calls for half in halves] == [2, 2]
    assert predicted.calls == 2 and read.calls == 3 + 1  # three frames of context, and the first predicted one
    sample(model, context, 2, num_samples=2, use_cache=False, **options)
    assert [half.calls for half in halves] == [2 + 2 * n_steps] * 2


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, DEISMultistepScheduler()])
def test_every_scheduler_works_on_the_same_model(scheduler):
    model, context = tiny(), random_pixels(n_frames=2)
    n_steps = 6
    future = sample(model, context, 2, scheduler=scheduler, n_steps=n_steps)
    assert future.isfinite().all() and future.abs().max() <= 1
    assert torch.equal(future, sample(model, context, 2, scheduler=scheduler, n_steps=n_steps))
    assert not torch.equal(future, sample(model, context, 2, scheduler=scheduler, n_steps=n_steps, seed=1))


def test_the_default_sampler_keeps_the_spread_of_narrow_residuals():
    """Residuals are a few percent of sigma: even steps in time are too coarse for them."""
    model = tiny()
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    default = {name: option.default for name, option in inspect.signature(model.sample).parameters.items()}
    spread = {}
    for name in (default["scheduler"], "dpmsolver++"):
        scheduler = make_scheduler(name, model.schedule)
        predict = oracle(scheduler, mean=0.01, std=0.03, kind="epsilon")
        generator = torch.Generator().manual_seed(1)
        spread[name] = denoise(predict, noise, scheduler, default["n_steps"], generator, clamp=1.0).std().item()
    assert spread[default["scheduler"]] == pytest.approx(0.03, rel=0.05)
    assert spread["dpmsolver++"] < 0.015


@pytest.mark.parametrize("options", [{"n_steps": 5}, {"scheduler": "ddpm", "n_steps": 5}])
def test_a_future_does_not_depend_on_its_neighbours(options):
    model, context = tiny(), random_pixels(n_frames=2)
    together = sample(model, context, 3, num_samples=3, **options)
    in_chunks = sample(model, context, 3, num_samples=3, sample_batch=2, **options)
    alone = sample(model, context[:1], 3, num_samples=3, **options)
    torch.testing.assert_close(in_chunks, together, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone, together[:1], rtol=1e-3, atol=1e-3)
    assert (together[:, 0] - together[:, 1]).abs().max() > 0.01


def test_predicted_residuals_are_bounded_and_latents_are_not_clamped():
    model = tiny("kl_vae", residual_bound=0.3)
    with torch.no_grad():
        model.transform.to_mu.bias.fill_(4.0)
    context = torch.randn(2, 2, 3, 4, 8)
    options = {"scheduler": "ddim", "n_steps": 5}
    future = sample(model, context, 1, **options)[:, 0, 0]
    mu = model.predict_frame(memories(model, context)[-1])[0]
    assert (future - mu).abs().max() <= 0.3 + 1e-5 and future.min() > 2
    model.register_to_config(residual_bound=None)
    assert (sample(model, context, 1, **options)[:, 0, 0] - mu).abs().max() > 0.3


# Use ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sliced_vqvae", "kl_vae", "pixel", "continuous_pixel", "diffusers_tiny"])
def test_it_predicts_over_any_tokenizer(name):
    tokenizer = tiny_tokenizer(name)
    model = tiny(name, denoising_multipliers=[1], transform_multipliers=[1, 1] if name == "sliced_vqvae" else [1])
    assert model.accepts == ("pixels" if "pixel" in name else "latents")
    pipeline = VideoPredictionPipeline(model, None if model.accepts == "pixels" else tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    frames = random_frames(tokenizer, n_frames=2)
    futures = pipeline(frames, n_frames=2, num_samples=2, n_steps=2).frames
    assert futures.shape == (2, 2, 2, *frames.shape[2:]) and futures.abs().max() <= 1


def moving_bars(n_clips, n_frames, generator):
    """A bright column that moves one pixel a frame on 8 x 8, to the left or to the right, and round the edge."""
    start = torch.randint(8, (n_clips, 1), generator=generator)
    way = torch.randint(2, (n_clips, 1), generator=generator) * 2 - 1
    place = (start + way * torch.arange(n_frames)) % 8
    return (F.one_hot(place, 8)[:, :, None, None].expand(-1, -1, 1, 8, -1) * 1.6 - 0.8).float()


def test_it_learns_to_predict_motion():
    torch.manual_seed(0)
    spec = PixelTokenizer(1, 8, 8, levels=None).latent_spec
    model = ResidualDiffusion(spec, **SMALL_RESIDUAL_DIFFUSION, mu_weight=1.0, shared_step=False)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(90):
        optimizer.zero_grad()
        model(moving_bars(8, 5, generator), 2).loss.backward()
        optimizer.step()
    clips = moving_bars(16, 6, generator)
    copied = F.mse_loss(clips[:, 1:2].expand(-1, 4, -1, -1, -1), clips[:, 2:]).item()
    for options in ({}, {"scheduler": "ddim", "n_steps": 50}):
        future = sample(model.eval(), clips[:, :2], 4, **options)[:, 0]
        assert F.mse_loss(future, clips[:, 2:]).item() < 0.5 * copied


def test_checkpointing_changes_nothing_but_the_memory():
    clip, kept, gradients = random_pixels(), {}, {}
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing)
        n_kept = 0

        def count(tensor):
            nonlocal n_kept
            n_kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(clip, 2).loss
        kept[checkpointing] = n_kept
        gradients[checkpointing] = torch.autograd.grad(loss, list(model.parameters()))
    assert kept[True] < 0.5 * kept[False]
    for plain, recomputed in zip(gradients[False], gradients[True]):
        torch.testing.assert_close(plain, recomputed)
    model.disable_gradient_checkpointing()  # as in diffusers
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_it_trains_and_samples_in_bf16(weights):
    model = tiny(learned_sigma=True, mu_weight=1.0).to(weights)
    clip = random_pixels().to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        loss = model(clip, 2).loss
        future = sample(model, clip, 2, n_steps=3)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and future.dtype == weights
    exact = tiny(learned_sigma=True, mu_weight=1.0)(clip.float(), 2).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_gru_keeps_its_state_precise_under_autocast():
    """On CUDA a normalisation gives it fp32 where convolutions give bf16."""
    cell, x = ConvGRUCell(8, 8), torch.randn(1, 8, 4, 4)
    exact = cell(x, cell(x))
    with torch.autocast("cpu", torch.bfloat16):
        state = cell(x, cell(x))
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, exact, rtol=0.05, atol=0.02)


@pytest.mark.gpu
def test_cuda_samples_are_those_of_the_cpu():
    model, context = tiny(), random_pixels(n_frames=2)
    expected = sample(model, context, 2, num_samples=2, n_steps=5)
    found = sample(model.cuda(), context.cuda(), 2, num_samples=2, n_steps=5)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        model(context.cuda(), 1).loss.backward()


def test_the_learning_rate_falls_as_in_the_paper():
    config = load_config("rvd_kth", tool="train_prior")
    assert (config.clip_length, config.n_context, config.batch_size) == (8, 2, 8)
    assert load_config("rvd_cityscapes", tool="train_prior").batch_size == 4
    optimizer = instantiate(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.Adam)
    steps = config.trainer.max_steps
    rate = get_scheduler(optimizer=optimizer, num_training_steps=steps, **to_container(config.lr_scheduler)).lr_lambdas[
        0
    ]
    found = [config.optimizer.lr * rate(step) for step in (0, 499_999, 500_000, steps - 1)]
    assert steps == 1_000_000 and found == pytest.approx([5e-5, 5e-5, 2e-5, 2e-5])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tiny(width=12), "width: expected a multiple of 8, found 12"),
        (
            lambda: tiny(denoising_multipliers=[1, 2, 2]),
            "denoising_multipliers: 3 of them need multiples of 4 in height and width",
        ),
        (
            lambda: tiny(transform_multipliers=[1, 2, 2]),
            "transform_multipliers: 3 of them need multiples of 4 in height",
        ),
        (lambda: tiny(transform_multipliers=[]), "transform_multipliers: expected whole numbers"),
        (lambda: tiny(transform_multipliers=None), "transform_multipliers: expected a list, or an anchor"),
        (
            lambda: tiny(transform_multipliers=None, anchor="last_frame", mu_weight=1),
            "mu_weight: expected none without transform_multipliers, found 1",
        ),
        (lambda: tiny(noise_loss="huber"), "noise_loss: expected l1 or l2"),
        (lambda: tiny(sigma=0.0), "sigma: expected a positive number"),
        (lambda: tiny(sigma="small"), "sigma: expected a positive number, found 'small'"),
        (lambda: tiny(anchor="first_frame"), "anchor: expected None or last_frame, found 'first_frame'"),
        (lambda: tiny(residual=False, anchor="last_frame"), "anchor: expected none without a residual"),
        (lambda: tiny(residual=False, sigma="auto"), "sigma: expected none without a residual, found 'auto'"),
        (lambda: tiny(detach_mu=True), "detach_mu: expected a mu_weight"),
        (lambda: tiny(residual_bound=1, residual_bound_sigmas=5), "residual_bound_sigmas: expected null beside"),
        (lambda: tiny(mu_weight=-1), "mu_weight: expected at least 0, found -1"),
        (lambda: tiny(residual=False, mu_weight=1), "mu_weight: expected none without a residual, found 1"),
        (lambda: tiny(residual=False, learned_sigma=True), "learned_sigma: expected none without a residual"),
        (lambda: tiny()(random_pixels() * 2, 1), r"clip: expected values in \[-1, 1\]"),
        (lambda: tiny()(random_pixels()[..., :-2], 1), "clip: expected W = 6"),
        (lambda: tiny("kl_vae")(torch.randn(1, 3, 3, 4, 4), 1), "clip: expected shape"),
        (lambda: tiny().sample(random_pixels(), 0), "n_frames: expected a whole number of at least 1"),
        (
            lambda: tiny().sample(random_pixels(), 1, sample_batch=0),
            "sample_batch: expected a whole number",
        ),
        (lambda: tiny().sample(random_pixels(), 1, n_steps=1601), "n_steps: expected 1 to 1600"),
        (lambda: tiny().sample(random_pixels(), 1, scheduler="ddmp"), "scheduler: expected one of"),
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

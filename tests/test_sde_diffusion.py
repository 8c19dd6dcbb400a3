"""STDiff: its parts against other implementations, Algorithm 1, continuous time, seeds, and how it fails."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from tiny import TINY_TOKENIZERS, random_clip, random_frames, small_sde_diffusion
from torch import nn

from latentcast import PixelTokenizer, SDEDiffusion, VideoPredictionPipeline, load_config, load_model
from latentcast.config import to_container
from latentcast.layers.spade_unet import Spade, SpadeResnetBlock, SpadeUNet
from latentcast.priors.denoising import SCHEDULERS

RGB64 = PixelTokenizer(3, 64, 64, levels=None).latent_spec


@pytest.fixture
def make():
    """A tiny prior whose motion moves: what starts at zero is set going."""

    def build(tokenizer="continuous_pixel", **options):
        torch.manual_seed(0)
        prior = small_sde_diffusion(tokenizer, **options)
        for name, parameter in prior.motion_sde.named_parameters():
            nn.init.normal_(parameter, std=0.3 if name.endswith("weight") else 0.1)
        return prior.eval()

    return build


def record(module, outputs=True):
    """What goes into a module (its positional arguments), or comes out of it, at every call from now on."""
    seen = []
    if outputs:
        module.register_forward_hook(lambda _, arguments, output: seen.append(output))
    else:
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    return seen


def sample(prior, context, n_frames=2, seed=0, n_steps=3, **options):
    return prior.sample(context, n_frames, generator=torch.Generator().manual_seed(seed), n_steps=n_steps, **options)


# Size and parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion, millions", [("sde", 204.28), ("ode", 201.91)])
def test_it_has_the_papers_number_of_parameters(motion, millions):
    with torch.device("meta"):
        model = SDEDiffusion(RGB64, motion=motion)
        unet = SpadeUNet(6, 3, 256, (64, 64), (128, 256, 256, 512, 512))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
    spades = [module for module in unet.modules() if isinstance(module, Spade)]
    assert len(spades) == 27 and all(isinstance(m, SpadeResnetBlock) for b in unet._blocks() for m in b.resnets)
    assert sum(p.numel() for m in spades for p in m.parameters()) / 1e6 == pytest.approx(75.2, rel=1e-3)


def test_spade_is_its_formula():
    torch.manual_seed(0)
    spade = Spade(3, 5)
    x, condition = torch.randn(2, 3, 8, 4), torch.randn(2, 5, 4, 2)
    hidden = F.conv2d(
        condition.repeat_interleave(2, 2).repeat_interleave(2, 3), spade.shared.weight, spade.shared.bias, padding=1
    ).relu()
    maps = F.conv2d(hidden, spade.to_maps.weight, spade.to_maps.bias, padding=1)
    normal = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(spade(x, *spade.maps(condition, (8, 4))), normal * (1 + maps[:, :3]) + maps[:, 3:])


def test_the_unet_is_diffusers_own_with_spade_behind_every_first_convolution():
    """With maps that do not depend on the position SPADE is an affine instance normalisation: diffusers has that."""
    torch.manual_seed(0)
    ours = SpadeUNet(4, 2, 5, (16, 8), (8, 16, 16), n_blocks=2, attention_from=1, head_dim=8, norm_groups=4)
    theirs = copy.deepcopy(ours.unet)
    for our_block, block in zip(ours._blocks(), [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]):
        for index, wrapper in enumerate(our_block.resnets):
            nn.init.zeros_(wrapper.spade.to_maps.weight)
            nn.init.normal_(wrapper.spade.to_maps.bias)
            resnet = copy.deepcopy(wrapper.resnet)
            norm = nn.InstanceNorm2d(resnet.out_channels, affine=True)
            gamma, beta = wrapper.spade.to_maps.bias.detach().chunk(2)
            norm.weight.data, norm.bias.data = 1 + gamma, beta
            resnet.conv1 = nn.Sequential(resnet.conv1, norm)
            # The time embedding goes in behind conv1, so behind the normalisation.
            block.resnets[index] = resnet
    x, t, feature = torch.randn(3, 4, 16, 8), torch.tensor([0, 10, 999]), torch.randn(3, 5, 4, 2)
    torch.testing.assert_close(ours(x, t, feature), theirs(x, t).sample)
    moved = ours(x, t + 5, feature)
    assert not torch.allclose(moved, ours(x, t, feature), atol=1e-3)  # the time is not normalised away


def test_motion_comes_from_the_difference_images_alone(make):
    prior = make("kl_vae")
    clip = random_clip(prior, n_frames=4)
    state = torch.zeros(2, 8, 2, 4)
    for before, after in zip(clip.unbind(1)[:-1], clip.unbind(1)[1:]):  # Algorithm 1, lines 2-6
        feature = prior.motion_encoder[0](after - before).relu()
        feature = prior.motion_encoder[3](F.max_pool2d(feature, 2)).relu()
        state = prior.gru(feature, state)
    with torch.no_grad():
        found = prior.encode_motion(clip)
        torch.testing.assert_close(found, state.detach())
        torch.testing.assert_close(prior.encode_motion(clip + 3), found)
        assert not torch.allclose(prior.encode_motion(clip.flip(1)), found, atol=1e-3)


@pytest.mark.parametrize("output, expected", [("linear", 1.0), ("tanh", torch.tensor(1.0).tanh()), ("softplus", None)])
def test_sigma_goes_through_what_the_option_says(output, expected):
    torch.manual_seed(0)
    prior = small_sde_diffusion(diffusion_output=output)
    m = torch.randn(2, 8, 2, 4)
    sigma, drift = prior.motion_sde.diffusion(m), prior.motion_sde.drift(m)
    assert (drift == 0).all()
    # An untrained SDE is the identity, but for the noise that a posterior needs: a tenth.
    torch.testing.assert_close(
        sigma, torch.full_like(sigma, 0.0 if output != "softplus" else 0.0965), atol=1e-3, rtol=0
    )
    nn.init.ones_(prior.motion_sde.diffusion[6].bias)
    if expected is not None:
        torch.testing.assert_close(prior.motion_sde.diffusion(m), torch.full_like(sigma, float(expected)))
    nn.init.constant_(prior.motion_sde.diffusion[6].bias, -100)
    if output == "softplus":
        assert (prior.motion_sde.diffusion(m) >= 1e-3).all()


def test_models_saved_before_the_newer_options_are_what_they_were(make, tmp_path):
    """Their configs have no such keys: sigma stays linear, and there is no posterior."""
    prior = make()
    prior.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("diffusion_output", "motion_kl_weight", "n_heads"):
        config.pop(name)
    path.write_text(json.dumps(config))
    clip = random_clip(prior)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(clip, 2).loss, prior(clip, 2).loss)
    assert loaded.motion_sde.diffusion(torch.full((1, 8, 2, 4), 9.0)).abs().max() > 1  # which tanh would not let be


def test_the_widths_at_128_pixels_are_those_of_the_published_code():
    config = load_config("stdiff_kitti").prior
    options = {name: value for name, value in to_container(config).items() if name != "_target_"}
    with torch.device("meta"):
        model = SDEDiffusion(PixelTokenizer(3, 128, 128, levels=None).latent_spec, **options)
    assert [m.out_channels for m in model.motion_encoder if isinstance(m, nn.Conv2d)] == [32, 64, 128, 256]
    heads = {
        (module.inner_dim, module.inner_dim // module.heads)
        for module in model.unet.modules()
        if isinstance(module, Attention)
    }
    assert heads == {(768, 192), (1024, 256)}
    assert config.diffusion_output == "tanh"
    for name, batch_size, flip in (
        *(("bair", 6, "both"), ("kth", 4, "both"), ("kitti", 2, "both")),
        *(("smmnist", 10, None), ("cityscapes", 1, None)),
    ):
        trained = load_config(f"stdiff_{name}", tool="train_prior")
        assert (trained.batch_size, trained.data.flip) == (batch_size, flip)
        assert trained.optimizer.weight_decay == 1e-6
        horizon = (load_config(f"stdiff_{name}", tool="evaluate").evaluation.sampler or {}).get("horizon")
        assert horizon == (10 if name in ("bair", "kth", "cityscapes") else None)


def test_heads_may_be_counted_instead_of_measured():
    torch.manual_seed(0)
    wide = SpadeUNet(4, 2, 5, (8, 8), (8, 16), n_blocks=1, attention_from=1, head_dim=4, norm_groups=4)
    counted = SpadeUNet(4, 2, 5, (8, 8), (8, 16), n_blocks=1, attention_from=1, norm_groups=4, n_heads=4)
    theirs = UNet2DModel(  # diffusers' own way to count: by the width of a head
        in_channels=4,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    counted.load_state_dict(wide.state_dict())
    x, t, feature = torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.randn(2, 5, 4, 4)
    assert torch.equal(wide(x, t, feature), counted(x, t, feature))
    attention, other = wide.unet.mid_block.attentions[0], theirs.mid_block.attentions[0]
    other.load_state_dict(attention.state_dict())
    h = torch.randn(2, 16, 4, 4)
    assert other.heads == attention.heads == 4 and torch.equal(other(h), attention(h))


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("previous_frame", ["sampled", "immediate"])
def test_training_draws_sorted_subsets_and_goes_on_from_the_right_frame(make, previous_frame):
    prior = make("kl_vae", n_sampled_frames=3, previous_frame=previous_frame).train()
    clip = torch.zeros(64, 8, *random_clip(prior).shape[2:]) + 100 * torch.arange(8).view(1, 8, 1, 1, 1)
    times, inputs = record(prior.motion_sde, outputs=False), record(prior.unet, outputs=False)
    prior(clip, 3)
    (_, steps, seeds), (x, t, _) = times[0], inputs[0]
    assert steps.shape == (64, 3) and seeds is None and (steps.diff() > 0).all()
    assert set(steps.flatten().tolist()) == {1, 2, 3, 4, 5} and len(steps.unique(dim=0)) == 10  # 5 choose 3
    noisy, previous = x.chunk(2, 1)
    before = steps - 1
    if previous_frame == "sampled":
        before = torch.cat([torch.zeros(64, 1, dtype=torch.long), steps[:, :-1]], 1)
    assert torch.equal(previous, (100.0 * (2 + before)).flatten()[:, None, None, None].expand_as(previous))
    alpha_bar = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02).alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = (noisy - alpha_bar.sqrt() * 100 * (2 + steps).flatten()[:, None, None, None]) / (1 - alpha_bar).sqrt()
    assert noise.mean().abs() < 0.05 and (noise.std() - 1).abs() < 0.05  # so the frame to denoise is the one at t_i
    assert len(t.unique()) > 100 and t.min() >= 0 and t.max() < 1000  # a time for every frame


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("loss, gamma", [("l2", None), ("l1", None), ("l2", 5.0)])
def test_the_loss_is_that_of_diffusers_training(make, kind, loss, gamma):
    prior = make(prediction_type=kind, loss=loss, min_snr_gamma=gamma)
    clip = random_clip(prior, n_frames=5)
    inputs, outputs = record(prior.unet, outputs=False), record(prior.unet)
    with torch.no_grad():
        found = prior(clip, 2)
    t = inputs[0][1]
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_0 = clip[:, 2:].flatten(0, 1)
    noise = (inputs[0][0][:, :1] - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x_0, noise, t), "sample": x_0}[kind]
    snr = alpha_bar / (1 - alpha_bar)
    weight = torch.ones_like(snr)
    if gamma:
        weight = snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    error = outputs[0] - target
    expected = weight * (error.abs() if loss == "l1" else error**2)
    torch.testing.assert_close(found.loss, expected.mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.logs["mse"], error.square().mean(), rtol=1e-3, atol=1e-4)


def test_validation_is_the_same_at_every_call_and_covers_every_frame(make):
    prior = make(n_sampled_frames=1)
    clip = random_clip(prior, n_frames=6)
    times = record(prior.motion_sde, outputs=False)
    with torch.no_grad():
        first = prior(clip, 2).loss
        torch.manual_seed(9)
        assert torch.equal(prior(clip, 2).loss, first)
        assert times[0][1].tolist() == [[1, 2, 3, 4]] * 2
        assert not torch.equal(prior.train()(clip, 2).loss, first)


def test_a_frame_is_predicted_from_nothing_that_comes_after_it(make):
    prior = make()
    clip = random_clip(prior, n_frames=6).requires_grad_()
    outputs = record(prior.unet)
    prior(clip, 3)
    predicted = outputs[0].unflatten(0, (2, 3))
    for index in range(3):
        (gradient,) = torch.autograd.grad(predicted[:, index].square().sum(), clip, retain_graph=True)
        reaches = gradient.abs().amax((0, 2, 3, 4)) > 0
        expected = [frame <= 2 or frame in (2 + index, 3 + index) for frame in range(6)]  # context, previous, own noisy
        assert reaches.tolist() == expected


LATENT_SDE = {"diffusion_output": "softplus", "motion_kl_weight": 1.0}


def test_a_posterior_sees_the_future_and_pays_for_it(make):
    torch.manual_seed(0)
    fresh = small_sde_diffusion(**LATENT_SDE)
    clip = random_clip(fresh, n_frames=6)
    assert fresh(clip, 2).logs["motion_kl"] == 0  # before training it is the prior
    prior = make(**LATENT_SDE)
    for parameter in prior.motion_posterior.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = record(prior.unet, outputs=False)
    output = prior(clip, 2)
    other = clip.clone()
    other[:, 5] *= -1  # the last frame
    changed = prior(other, 2)
    assert output.logs["motion_kl"] > 0 and output.logs["motion_kl"] != changed.logs["motion_kl"]
    one, two = (features[i][2].unflatten(0, (2, 4)) for i in range(2))
    assert not torch.allclose(one[:, 0], two[:, 0], atol=1e-4)  # already the first predicted frame's motion knows it
    # The weight is what it says, a number of the predicted frames at a time.
    prior.register_to_config(motion_kl_weight=0.0)
    n_numbers = clip[:, 2:].numel()
    expected = output.loss - output.logs["motion_kl"] * 2 / n_numbers
    torch.testing.assert_close(prior(clip, 2).loss, expected, rtol=1e-4, atol=1e-4)
    # Sampling knows nothing of the future and is that of the motion alone.
    for parameter in prior.motion_posterior.parameters():
        nn.init.zeros_(parameter)
    before = sample(prior, clip[:, :2])
    assert torch.equal(before, sample(prior, other[:, :2]))


def test_only_a_posterior_gives_sigma_a_reason(make):
    """The divergence is inversely proportional to sigma squared: of two losses the heavier pulls sigma up."""
    pulls = {}
    for weight in (0.0, 1e3):
        prior = make(**LATENT_SDE | {"motion_kl_weight": weight})
        for parameter in prior.motion_posterior.parameters():
            nn.init.normal_(parameter, std=0.3)
        output = prior(random_clip(prior), 2)
        (pulls[weight],) = torch.autograd.grad(output.loss, prior.motion_sde.diffusion[6].bias)
    assert pulls[1e3].mean() < -10 * pulls[0.0].abs().mean()


def test_gradients_of_a_posterior_reach_what_reads_the_future_also_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        prior = small_sde_diffusion(**LATENT_SDE, gradient_checkpointing=checkpointing).train()
        for parameter in [*prior.motion_sde.parameters(), *prior.motion_posterior.parameters()]:
            nn.init.normal_(parameter, std=0.3)
        prior(random_clip(prior, n_frames=5), 2).loss.backward()
        gradients.append({name: p.grad for name, p in prior.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for name, g in gradients[0].items() if "motion_posterior" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_loaded_model_has_the_same_loss(make, tmp_path):
    prior = make(betas="cosine")
    prior.save_pretrained(tmp_path)
    clip = random_clip(prior)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(clip, 2).loss, prior(clip, 2).loss)


@pytest.mark.parametrize("motion", ["sde", "ode"])
def test_gradient_checkpointing_changes_no_gradient(make, motion):
    prior = make(motion=motion, dt=0.5)
    clip = random_clip(prior, n_frames=4)

    def gradients(model):
        torch.manual_seed(3)
        model.train()(clip, 2).loss.backward()
        return [p.grad for p in model.parameters()]

    by_option = make(motion=motion, dt=0.5, gradient_checkpointing=True)
    assert by_option.is_gradient_checkpointing and not prior.is_gradient_checkpointing
    calls = record(by_option.motion_sde.drift[0])
    for ours, theirs in zip(gradients(prior), gradients(by_option)):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) >= 2 * 4  # forward, and again backward
    prior.enable_gradient_checkpointing()
    assert prior.motion_sde.gradient_checkpointing and prior.is_gradient_checkpointing


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_through_the_adjoint(make, autocast, gradient_checkpointing):
    prior = make(adjoint=True, gradient_checkpointing=gradient_checkpointing).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = prior(random_clip(prior), 2).loss
    loss.backward()  # outside of autocast, as Lightning does
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in prior.parameters())


def test_it_trains_and_samples_in_bf16(make):
    prior = make()
    clip = random_clip(prior)
    expected = prior(clip, 2).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = prior(clip, 2).loss
        found.backward()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in prior.parameters())
    found = prior.to(torch.bfloat16)(clip, 2).loss  # a clip of another dtype than the weights
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    half = sample(prior.to(torch.bfloat16), clip[:, :2].bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_half_precision_keeps_the_least_noise(make):
    prior = make().to(torch.bfloat16)
    seen = record(prior.unet, outputs=False)
    prior.alpha_bars = prior.alpha_bars[:1].expand(1000)  # all times alike the first, whose sigma is .01
    clip = random_clip(prior).bfloat16()
    prior(clip, 2)
    x_0, x_l = clip[:, 2:].flatten(0, 1).float(), seen[0][0][:, : clip.shape[2]].float()
    assert (x_l - x_0).square().mean().sqrt() > 0.007


# Sampling -----------------------------------------------------------------------------------------------------------


def test_the_spade_maps_are_computed_once_a_frame_with_the_same_bits(make):
    prior = make()
    context = random_clip(prior, n_frames=3)
    spades = [module for module in prior.unet.modules() if isinstance(module, Spade)]
    calls = record(spades[0].shared)
    cached = sample(prior, context, 4, num_samples=2, n_steps=5)
    assert len(calls) == 4
    assert torch.equal(cached, sample(prior, context, 4, num_samples=2, n_steps=5, use_cache=False))
    assert len(calls) == 4 + 4 * 5


def test_each_frame_is_made_from_the_one_before_at_its_own_time(make):
    prior = make("kl_vae")
    context = random_clip(prior, n_frames=3)
    inputs, motion = record(prior.unet, outputs=False), record(prior.motion_sde)
    future = sample(prior, context, 3, num_samples=2, n_steps=2, frame_times=[0.5, 2.0, 2.25])
    assert len(inputs) == 3 * 2
    previous = context[:, -1].repeat_interleave(2, 0)
    for frame in range(3):
        x, _, feature, _ = inputs[2 * frame]
        torch.testing.assert_close(x[:, 3:], previous)
        assert torch.equal(feature, motion[0][:, frame])
        previous = future[:, :, frame].flatten(0, 1)


@pytest.mark.parametrize("motion", ["sde", "ode"])
@pytest.mark.parametrize("scheduler", ["sde-dpmsolver++", "dpmsolver++", "ddpm"])
def test_videos_sampled_together_are_those_sampled_alone(make, motion, scheduler):
    """Every sample has its own seeds: neither the batch nor its order nor the number of samples matters."""
    prior = make(motion=motion)
    context = random_clip(prior, batch=3, n_frames=3)
    options = {"scheduler": scheduler, "n_steps": 4}
    together = sample(prior, context, num_samples=3, motion_seed=[7, 8, 9], image_seed=[4, 5, 4], **options)
    for index, (motion_seed, image_seed) in enumerate(zip((7, 8, 9), (4, 5, 4))):
        alone = sample(
            prior, context[index : index + 1], num_samples=2, motion_seed=motion_seed, image_seed=image_seed, **options
        )
        torch.testing.assert_close(alone[0], together[index, :2], rtol=1e-3, atol=1e-4)
    assert (together[:, 0] - together[:, 1]).abs().mean() > 1e-2


def test_one_seed_gives_each_context_and_sample_its_own_numbers(make):
    prior = make()
    context = random_clip(prior, batch=1, n_frames=3).expand(2, -1, -1, -1, -1)
    motion = record(prior.motion_sde)
    future = sample(prior, context, num_samples=2, motion_seed=3, image_seed=3).flatten(0, 1)
    for values in (motion[0], future):
        for one in range(4):
            assert all((values[one] - values[other]).abs().mean() > 1e-3 for other in range(one))


def test_motion_and_images_have_seeds_of_their_own(make):
    prior = make()
    context = random_clip(prior, n_frames=3)
    motion = record(prior.motion_sde)
    first = sample(prior, context, motion_seed=1, image_seed=1)
    other_image = sample(prior, context, motion_seed=1, image_seed=2)
    other_motion = sample(prior, context, motion_seed=2, image_seed=1)
    again = sample(prior, context, motion_seed=1, image_seed=1, seed=99)
    assert torch.equal(first, again)
    assert torch.equal(motion[0], motion[1]) and not torch.equal(motion[0], motion[2])
    assert not torch.equal(first, other_image) and not torch.equal(first, other_motion)


def test_the_ode_has_one_motion_and_the_sde_one_for_each_sample(make):
    for kind, paths in (("ode", 1), ("sde", 3)):
        prior = make(motion=kind)
        motion = record(prior.motion_sde)
        future = sample(prior, random_clip(prior, batch=1, n_frames=3), num_samples=3)
        assert len(motion[0].unique(dim=0)) == paths
        assert len(future[0].unique(dim=0)) == 3


@pytest.mark.parametrize("motion", ["sde", "ode"])
def test_the_motion_at_a_time_does_not_depend_on_the_other_times(make, motion):
    prior = make(motion=motion)
    context = random_clip(prior, n_frames=3)
    features = record(prior.motion_sde)
    for n_frames, options in ((2, {}), (4, {"fps_multiplier": 2}), (3, {"frame_times": [0.1, 1, 2]})):
        sample(prior, context, n_frames, motion_seed=5, n_steps=1, **options)
    whole, double, given = features
    assert torch.equal(double[:, 1::2], whole) and torch.equal(given[:, 1:], whole)
    assert not torch.equal(double[:, 0], whole[:, 0])


def test_frame_times_may_differ_between_contexts(make):
    prior = make()
    context = random_clip(prior, n_frames=3)
    features = record(prior.motion_sde)
    sample(prior, context, 2, motion_seed=5, frame_times=torch.tensor([[0.5, 1.0], [1.0, 3.0]]), num_samples=2)
    sample(prior, context, 4, motion_seed=5, frame_times=[0.5, 1, 2, 3], num_samples=2)
    some, all_times = features
    assert torch.equal(some[:2], all_times[:2, :2]) and torch.equal(some[2:], all_times[2:, [1, 3]])


def test_whole_times_are_the_default(make):
    prior = make()
    context = random_clip(prior, n_frames=3)
    expected = sample(prior, context, 3)
    assert torch.equal(sample(prior, context, 3, frame_times=[1, 2, 3]), expected)
    assert torch.equal(sample(prior, context, 3, frame_times=torch.tensor([[1, 2, 3]] * 2)), expected)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, DDIMScheduler(beta_schedule="linear", clip_sample=False)])
def test_every_scheduler_samples(make, scheduler):
    prior, over_latents = make(), make("kl_vae")
    frames = sample(prior, random_clip(prior, n_frames=2), scheduler=scheduler)
    assert frames.abs().max() <= 1 and frames.isfinite().all() and frames.std() > 0.05
    with torch.no_grad():
        for parameter in over_latents.unet.unet.conv_out.parameters():
            parameter.mul_(3)
    latents = sample(over_latents, random_clip(over_latents, n_frames=2), scheduler=scheduler)
    assert latents.abs().max() > 1 and latents.isfinite().all()  # only pixels are clamped


@pytest.mark.parametrize("multiplier", [1, 2])
def test_beyond_the_horizon_the_motion_is_taken_anew_from_predicted_frames(make, multiplier):
    prior = make()
    context = random_clip(prior, n_frames=3)
    options = {"num_samples": 2, "fps_multiplier": multiplier, "n_steps": 2}
    parts = record(prior.motion_sde, outputs=False)
    future = sample(prior, context, 7 * multiplier, horizon=3, **options)
    assert [part[1].shape[1] for part in parts] == [3 * multiplier, 3 * multiplier, multiplier]
    assert all(part[1][0, -1] == end for part, end in zip(parts, (3, 3, 1)))
    parts = list(parts)
    # Up to the horizon it is what one long path gives, and then something else.
    whole = sample(prior, context, 7 * multiplier, **options)
    assert torch.equal(whole[:, :, : 3 * multiplier], future[:, :, : 3 * multiplier])
    assert not torch.allclose(whole[:, :, 3 * multiplier :], future[:, :, 3 * multiplier :], atol=1e-3)
    # The context of a part is the frames at its last whole times, as many as there were observed.
    clip = torch.cat([context[:, None].expand(-1, 2, -1, -1, -1, -1), future[:, :, multiplier - 1 :: multiplier]], 2)
    for part, (start, _, seeds) in enumerate(parts):
        motion = prior.encode_motion(clip[:, :, 3 * part : 3 * part + 3].flatten(0, 1))
        torch.testing.assert_close(start, motion)
        assert len(set(seeds)) == 4 and not set(seeds) & {s for other in parts[:part] for s in other[2]}
    # The published rollout, step by step: the same model on its own predictions.
    assert torch.equal(sample(prior, context, 2, horizon=10**12, n_steps=2), sample(prior, context, 2, n_steps=2))


def test_a_context_longer_than_the_horizon_keeps_observed_frames(make):
    prior = make()
    context = random_clip(prior, n_frames=5)
    parts = record(prior.motion_sde, outputs=False)
    future = sample(prior, context, 5, horizon=2, n_steps=2)
    clip = torch.cat([context, future[:, 0]], 1)
    for part, (start, *_) in enumerate(parts):
        torch.testing.assert_close(start, prior.encode_motion(clip[:, 2 * part : 2 * part + 5]))
    assert len(parts) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": 0}, "horizon: expected a whole number of at least 1, found 0"),
        ({"horizon": 1, "fps_multiplier": 1.5}, "horizon: expected None, or a whole fps_multiplier and no frame_times"),
        ({"horizon": 1, "frame_times": [1.0, 2.0]}, "horizon: .* found frame_times"),
        ({"fps_multiplier": 1e-9}, "fps_multiplier: expected 0.0002 to 10000 for 2 frames, found 1e-09"),
        ({"frame_times": [1.0, 1e9]}, "frame_times: expected at most 10002 frame intervals, found 1e.09"),
        ({"frame_times": [0.0, 1.0]}, r"frame_times: expected increasing times above 0.*found \[0.0, 1.0\]"),
        ({"frame_times": [1.0, 1.0]}, "frame_times: expected increasing times above 0"),
        ({"frame_times": [2.0, 1.0]}, "frame_times: expected increasing times above 0"),
        ({"frame_times": [[1.0, 2.0], [1.0, torch.nan]]}, "frame_times: expected increasing times above 0"),
        ({"frame_times": [1.0, torch.inf]}, "frame_times: expected increasing times above 0"),
        ({"frame_times": [1.0]}, r"frame_times: expected shape \(2,\) or \(2, 2\), found \(1,\)"),
        ({"frame_times": [1.0, 2.0], "fps_multiplier": 2}, "fps_multiplier: expected 1 where frame_times are given"),
        ({"fps_multiplier": 0}, "fps_multiplier: expected a number above 0, found 0"),
        ({"fps_multiplier": "x"}, "fps_multiplier: expected a number above 0, found 'x'"),
        ({"n_steps": "x"}, "n_steps: expected a whole number of at least 1, found 'x'"),
        ({"motion_seed": -1}, "motion_seed: expected a whole number of at least 0, or one for each of 2 contexts"),
        ({"image_seed": [1, 2, 3]}, r"image_seed: expected .* found \[1, 2, 3\]"),
        ({"image_seed": 0.5}, "image_seed: expected a whole number"),
        ({"num_samples": 0}, "num_samples: expected a whole number of at least 1, found 0"),
        ({"scheduler": "ddpn"}, "scheduler: expected one of ddpm"),
        ({"n_steps": 1001}, "n_steps: expected 1 to 1000, found 1001"),
    ],
)
def test_bad_sampler_options_are_refused(make, options, message):
    prior = make()
    with pytest.raises(ValueError, match=message) as caught:
        sample(prior, random_clip(prior, n_frames=2), **options)
    assert "\n" not in str(caught.value)


def test_bad_clips_are_refused(make):
    prior, over_latents = make(), make("kl_vae")
    with pytest.raises(ValueError, match=r"clip: expected values in \[-1, 1\]"):
        prior(3 * random_clip(prior), 2)
    with pytest.raises(ValueError, match="n_context: expected at least 2, found 1"):
        prior(random_clip(prior), 1)
    with pytest.raises(ValueError, match=r"context: expected shape \(B, T, 3, 4, 8\)"):
        over_latents.sample(random_clip(prior), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"motion": "cde"}, "motion: expected sde or ode, found 'cde'"),
        ({"loss": "huber"}, "loss: expected l2 or l1, found 'huber'"),
        ({"previous_frame": "last"}, "previous_frame: expected sampled or immediate, found 'last'"),
        ({"n_sampled_frames": 0}, "n_sampled_frames: expected a whole number of at least 1, found 0"),
        ({"head_dim": 0}, "head_dim: expected a whole number of at least 1, found 0"),
        ({"n_blocks": 0}, "n_blocks: expected a whole number of at least 1, found 0"),
        ({"norm_groups": 0}, "norm_groups: expected a whole number of at least 1, found 0"),
        ({"n_diffusion_steps": 0}, "n_diffusion_steps: expected a whole number of at least 1, found 0"),
        ({"block_channels": []}, r"block_channels: expected whole numbers of at least 1, found \[\]"),
        ({"motion_channels": []}, "motion_channels: expected whole numbers of at least 1"),
        ({"min_snr_gamma": 0}, "min_snr_gamma: expected above 0 or None, found 0"),
        ({"motion_kernels": [3]}, "motion_kernels: expected an odd number for each"),
        (
            {"motion_channels": [4] * 4, "motion_kernels": [3] * 4},
            "motion_channels: 4 of them need multiples of 8 in height and width",
        ),
        ({"block_channels": [8, 8, 8, 8]}, "block_channels: 4 of them need multiples of 8 in height and width"),
        ({"block_channels": [8, 6]}, r"block_channels: expected multiples of norm_groups=4, found \[8, 6\]"),
        ({"block_channels": [8, 12]}, "block_channels: expected multiples of head_dim=8 from level 1 on"),
        ({"betas": "sigmoid"}, "betas: expected linear or cosine"),
        ({"diffusion_output": "relu"}, "diffusion_output: expected linear or tanh or softplus, found 'relu'"),
        ({"motion_kl_weight": 1.0}, "motion_kl_weight: expected None unless motion=sde and diffusion_output=softplus"),
        ({"motion": "ode", **LATENT_SDE}, "motion_kl_weight: expected None unless motion=sde"),
        (LATENT_SDE | {"motion_kl_weight": -1}, "motion_kl_weight: expected at least 0 or None, found -1"),
        (LATENT_SDE | {"adjoint": True}, "adjoint: expected false with a motion_kl_weight, found true"),
        ({"n_heads": 3}, "block_channels: expected multiples of n_heads=3 from level 1 on"),
        ({"prediction_type": "noise"}, "prediction_type: expected"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_an_exploding_motion_stops_training_and_sampling(make):
    prior = make()
    nn.init.constant_(prior.motion_sde.drift[-1].bias, 1e7)
    clip = random_clip(prior)
    for call in (lambda: prior(clip, 2), lambda: prior.train()(clip, 2), lambda: sample(prior, clip)):
        with pytest.raises(
            FloatingPointError, match=r"the neural SDE exploded: its largest \|m\| is .* at time"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)


# Conditions and rollouts --------------------------------------------------------------------------------------------

ACTION = {"action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 5}}


@pytest.fixture
def told(make):
    """A prior that is told actions, and some of them, (2, 9)."""
    prior = make(conditions=ACTION)
    nn.init.normal_(prior.conditioner.null)
    return prior, {"action": torch.arange(18).view(2, 9) % 5}


def cut(conditions, n_frames):
    return {"action": conditions["action"][:, :n_frames]}


def test_conditions_are_of_intervals_whatever_the_times(told):
    prior, actions = told
    context = random_clip(prior, n_frames=3)
    told_by_unet = record(prior.tell_unet, outputs=False)
    half = sample(prior, context, 4, fps_multiplier=2, conditions=cut(actions, 5), motion_seed=1, image_seed=1)
    vectors = prior.condition_vectors(cut(actions, 5), 2, 5)
    assert [torch.equal(seen, vectors[:, frame]) for (seen,), frame in zip(told_by_unet, (3, 3, 4, 4))] == [True] * 4
    assert half.shape[2] == 4
    # Each context at its own times: the second one's frames lie in the intervals 1 and 3.
    told_by_unet.clear()
    times = torch.tensor([[0.5, 1.0], [1.0, 2.5]])
    sample(prior, context, 2, frame_times=times, conditions=cut(actions, 6))
    vectors = prior.condition_vectors(cut(actions, 6), 2, 6)
    assert torch.equal(told_by_unet[1][0], torch.stack([vectors[0, 3], vectors[1, 5]]))
    assert prior.told_frames(3, 2, frame_times=times) == 6 and prior.told_frames(3, 4, fps_multiplier=2) == 5
    assert prior.told_frames(3, 4) == 7 and prior.told_frames(3, 1, frame_times=[0.2], n_steps=2) == 4
    with pytest.raises(ValueError, match=r"conditions: action: expected \(2, 5\) \(5 frames\), found \(2, 7\)"):
        sample(prior, context, 4, fps_multiplier=2, conditions=cut(actions, 7))
    # Whole times are told the same things, whatever lies between them.
    motion = record(prior.motion_sde)
    sample(prior, context, 4, fps_multiplier=2, conditions=cut(actions, 5), motion_seed=1)
    sample(prior, context, 2, conditions=cut(actions, 5), motion_seed=1)
    assert torch.equal(motion[0][:, 1::2], motion[1])


@pytest.mark.parametrize("previous_frame", ["sampled", "immediate"])
def test_training_tells_the_drift_of_each_interval_and_the_unet_of_its_frame(make, previous_frame):
    prior = make(conditions=ACTION, n_sampled_frames=2, previous_frame=previous_frame, condition_dropout=0.0).train()
    clip, actions = random_clip(prior, n_frames=6), {"action": torch.arange(12).view(2, 6) % 5}
    vectors = prior.condition_vectors(actions, 2, 6)
    drift, unet = (record(module, outputs=False) for module in (prior.tell_drift, prior.tell_unet))
    times = record(prior.motion_sde, outputs=False)
    prior(clip, 2, actions)
    steps = times[0][1]
    assert len(drift) == steps.max() and all(torch.equal(seen, vectors[:, 2 + k]) for k, (seen,) in enumerate(drift))
    assert torch.equal(unet[0][0], vectors[torch.arange(2)[:, None], 1 + steps].flatten(0, 1))


@pytest.mark.parametrize(
    "options, other",
    [
        ({"solver": "reversible_heun"}, {"adjoint": True}),
        ({}, {"gradient_checkpointing": True}),
        (LATENT_SDE, {"gradient_checkpointing": True}),
    ],
)
def test_told_priors_have_the_gradients_of_plain_training(make, options, other):
    gradients = []
    for kind in (options, options | other):
        prior = make(conditions=ACTION, **kind).train()
        torch.manual_seed(3)
        prior(random_clip(prior, n_frames=5), 2, {"action": torch.arange(10).view(2, 5) % 5}).loss.backward()
        gradients.append({name: p.grad for name, p in prior.named_parameters()})
    assert gradients[0]["tell_drift.weight"].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_explained_motion_is_told(told):
    prior, actions = told
    clip = random_clip(prior, n_frames=5)
    features = record(prior.motion_sde)
    sample(prior, clip[:, :2], 3, conditions=cut(actions, 5), motion_seed=4, num_samples=2)
    found = prior.explain(clip, 2, conditions=cut(actions, 5), motion_seed=4, num_samples=2)["motion"]
    assert torch.equal(found[:, :, 1:].flatten(0, 1), features[0])


@pytest.mark.parametrize(
    "options", [{}, {"horizon": 2}, {"guidance_scale": 2.5}, {"horizon": 3, "guidance_scale": 0.5}]
)
def test_a_told_rollout_is_sample_frame_by_frame(make, options):
    prior = make(conditions=ACTION, dt=0.3)  # frames are not on the solver's grid
    nn.init.normal_(prior.conditioner.null)
    context, actions = random_clip(prior, n_frames=3), {"action": torch.arange(16).view(2, 8) % 5}
    settings = {"num_samples": 2, "n_steps": 2, "motion_seed": [3, 4], "image_seed": 5, **options}
    expected = prior.sample(context, 5, conditions=actions, **settings)
    rollout = prior.rollout(context, conditions=cut(actions, 3), **settings)
    frames = [rollout.step({"action": actions["action"][:, t]}) for t in range(3, 8)]
    assert torch.equal(torch.stack(frames, 2), expected)


@pytest.mark.parametrize(
    "options, found", [({"fps_multiplier": 2}, "fps_multiplier=2"), ({"frame_times": [1.0]}, "frame_times")]
)
def test_a_rollout_has_the_datas_rate(make, options, found):
    prior = make()
    with pytest.raises(ValueError, match=f"rollout: expected fps_multiplier=1 and no frame_times, found {found}"):
        prior.rollout(random_clip(prior, n_frames=2), **options)


# In a pipeline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_vae", "vqvae", "continuous_pixel", "pixel"])
def test_it_runs_over_any_tokenizer_and_over_pixels(make, name, tmp_path):
    tokenizer = TINY_TOKENIZERS[name]().eval()
    prior = make(name)
    over_pixels = name.endswith("pixel")
    assert prior.accepts == ("pixels" if over_pixels else "latents")
    pipe = VideoPredictionPipeline(prior, None if over_pixels else tokenizer)
    pipe.set_progress_bar_config(disable=True)
    frames = random_frames(tokenizer)
    seeded = {"generator": torch.Generator().manual_seed(1), "num_samples": 2, "n_steps": 3}
    futures = pipe(frames, n_frames=2, frame_times=[0.5, 1.5], **seeded).frames
    assert futures.shape == (2, 2, 2, *frames.shape[2:]) and futures.abs().max() <= 1
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = VideoPredictionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    seeded["generator"].manual_seed(1)
    torch.testing.assert_close(loaded(frames, n_frames=2, frame_times=[0.5, 1.5], **seeded).frames, futures)


def test_a_scheduler_component_is_used(make):
    prior = make()
    frames = random_clip(prior, n_frames=2)
    options = {"n_frames": 2, "motion_seed": 0, "image_seed": 0, "n_steps": 3}
    pipe = VideoPredictionPipeline(prior, scheduler=DDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    expected = prior.sample(frames, 2, motion_seed=0, image_seed=0, n_steps=3, scheduler="ddim")
    torch.testing.assert_close(pipe(frames, **options).frames, expected)
    other = VideoPredictionPipeline(prior)
    other.set_progress_bar_config(disable=True)
    assert not torch.allclose(other(frames, **options).frames, expected, atol=1e-3)

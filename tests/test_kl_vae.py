"""KLVAE against diffusers' AutoencoderKL, and what becomes of its posterior on disk."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from test_latent_cache import Noise, contents
from tiny import random_frames, tiny_tokenizer
from torch.distributions import Normal, kl_divergence

from latentcast import KLVAE, LatentCacheDataset, LatentCacheWriter, load_model
from latentcast.data.loading import open_loader
from latentcast.data.store.encoding import encode_dataset
from latentcast.layers.gaussian import kl_to_standard_normal, sample_moments, scale_moments

LENGTHS = (5, 12, 9)
SIZES = {"height": 16, "width": 16, "block_channels": [8, 16], "latent_channels": 3, "norm_groups": 4}


@pytest.fixture(scope="module")
def tokenizer():
    """Of 16x16 RGB frames, with moments that are far from (0, 1)."""
    torch.manual_seed(0)
    model = KLVAE(scaling_factor=0.5, **SIZES).eval()
    with torch.no_grad():
        model.encoder.conv_out.bias.copy_(torch.tensor([1.0, -2, 0.5, -2, 0.3, -5]))
    return model


def copy_of(tokenizer, **options):
    model = KLVAE(**{"scaling_factor": 0.5} | SIZES | options)
    model.load_state_dict(tokenizer.state_dict())
    return model.eval()


@pytest.fixture
def cache(tmp_path, tokenizer):
    """A finished cache of posteriors, of two shards."""
    encode_dataset(Noise(lengths=LENGTHS), tokenizer, tmp_path / "train", batch_frames=8, shard_videos=2)
    return tmp_path / "train"


def normal(moments, dim):
    mean, logvar = moments.chunk(2, dim=dim)
    return Normal(mean, (0.5 * logvar).exp())


def random_moments(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# The model


def test_it_is_diffusers_autoencoder_without_its_outer_convolutions(tokenizer):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "latent_channels": 3, "norm_num_groups": 4}
    reference = AutoencoderKL(**blocks, **sizes, use_quant_conv=False, use_post_quant_conv=False).eval()
    reference.load_state_dict(tokenizer.state_dict())
    frames = random_frames(tokenizer)
    with torch.no_grad():
        expected = reference.encode(frames.flatten(0, 1)).latent_dist
        decoded = reference.decode(expected.mean).sample.clamp(-1, 1)
        output = tokenizer.encode(frames)
        torch.testing.assert_close(output.latents.flatten(0, 1), expected.mean * 0.5)
        posterior = normal(output.posterior.flatten(0, 1), 1)
        torch.testing.assert_close(posterior.mean, expected.mean * 0.5)
        torch.testing.assert_close(posterior.stddev, expected.std * 0.5)
        torch.testing.assert_close(tokenizer(frames).frames.flatten(0, 1), decoded)


def test_the_loss_is_a_distance_and_the_weighted_divergence(tokenizer):
    model, frames = copy_of(tokenizer, kl_weight=0.3), random_frames(tokenizer)
    with torch.no_grad():
        model.decoder.conv_out.weight *= 0.1
        output, moments = model(frames), scale_moments(model.encode(frames).posterior, 2)
    kl = kl_divergence(normal(moments, 2), Normal(0, 1)).sum((2, 3, 4)).mean()
    torch.testing.assert_close(output.logs["kl"], kl)
    assert output.frames.abs().max() < 1  # or what was clipped would be missing below
    distance = (output.frames - frames).square().mean()
    torch.testing.assert_close(output.logs["reconstruction_loss"], distance)
    torch.testing.assert_close(output.loss, distance + 0.3 * kl / (3 * 16 * 16))


def test_training_decodes_a_draw_and_evaluation_the_mean(tokenizer):
    model, frames = copy_of(tokenizer), random_frames(tokenizer)
    with torch.no_grad():
        drawn = [model.train()(frames).frames for _ in range(2)]
        assert not torch.equal(*drawn)
        assert torch.equal(model.encode(frames).latents, tokenizer.encode(frames).latents)
        assert torch.equal(model.eval()(frames).frames, model(frames).frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_are_fp32_under_autocast(tokenizer, dtype):
    frames = random_frames(tokenizer)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        output = tokenizer.encode(frames)
        assert output.posterior.dtype == output.latents.dtype == tokenizer(frames).frames.dtype == torch.float32
        torch.testing.assert_close(output.posterior, tokenizer.encode(frames).posterior, atol=0.05, rtol=0.05)


def test_log_variances_stay_finite(tokenizer):
    model, frames = copy_of(tokenizer, scaling_factor=1.0), random_frames(tokenizer)
    with torch.no_grad():
        for bias, expected in ((-1e6, -30.0), (1e6, 20.0)):
            model.encoder.conv_out.bias[3:] = bias
            assert (model.encode(frames).posterior[:, :, 3:] == expected).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 15}, "expected multiples of the stride 2, found 15, 16"),
        ({"norm_groups": 3}, r"expected multiples of norm_groups=3, found \[8, 16\]"),
        ({"block_channels": []}, "block_channels: expected"),
        ({"reconstruction_loss": "l3"}, "expected one of l2, l1, found 'l3'"),
        ({"lpips_weight": -1}, "lpips_weight: expected at least 0, found -1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KLVAE(**SIZES | options)


# Gaussians


def test_divergence_by_torch_distributions():
    moments = random_moments(2, 3, 8, 4, 5)
    expected = kl_divergence(normal(moments, 2), Normal(0.0, 1.0)).sum((2, 3, 4))
    torch.testing.assert_close(kl_to_standard_normal(moments), expected)


def test_draws_and_scaling_have_the_right_moments():
    moments = random_moments(4, 1, 1).expand(400_000, 4, 1, 1)
    drawn = (sample_moments(moments, torch.Generator().manual_seed(1)) - 0.7) * -1.5
    expected = normal(scale_moments(moments[0], -1.5, 0.7), 0)
    torch.testing.assert_close(drawn.mean(0), expected.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), expected.stddev, atol=0.02, rtol=0)


# On disk


def test_the_cache_keeps_both_moments_exactly(cache, tokenizer):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert (manifest["store"], manifest["dtype"], manifest["frame_shape"]) == ("posterior", "float32", [6, 8, 8])
    dataset = LatentCacheDataset(cache, 3)
    assert dataset.space == "latents"
    for i in range(3):
        frames = Noise(lengths=LENGTHS).whole(i)[None]
        with torch.no_grad():
            expected, reconstruction = tokenizer.encode(frames), tokenizer(frames).frames
        # batches of other sizes than here may differ in the last bits
        torch.testing.assert_close(dataset.read_posterior(i), expected.posterior[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dataset.read_video(i), expected.latents[0], atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            decoded = tokenizer.decode(dataset.read_video(i)[None])
        torch.testing.assert_close(decoded, reconstruction, atol=1e-5, rtol=1e-5)


def test_the_mode_is_exact(cache):
    dataset = LatentCacheDataset(cache, 3, split="val", sample_posterior=False)
    places = [(v, 3 * k) for v, n in enumerate(LENGTHS) for k in range(n // 3)]
    means = [dataset.read_posterior(v, start, start + 3)[:, :3] for v, start in places]
    assert len(dataset) == len(means)
    assert all(torch.equal(dataset[i]["latents"], mean) for i, mean in enumerate(means))
    assert dataset[0]["latents"].is_contiguous()


def test_draws_have_the_stored_mean_and_variance(cache):
    dataset = LatentCacheDataset(cache, 4, split="val")
    posterior = normal(dataset.read_posterior(1, 4, 8), 1)
    drawn = []
    for epoch in range(1500):
        dataset.set_epoch(epoch)
        drawn.append(dataset[2]["latents"])
    drawn = torch.stack(drawn)
    assert drawn.shape == (1500, 4, 3, 8, 8) and drawn.dtype == torch.float32
    scores = (drawn - posterior.mean) / posterior.stddev
    assert scores.mean(0).abs().max() < 5 / 1500**0.5  # five standard errors
    assert (scores.var(0) - 1).abs().max() < 5 * (2 / 1500) ** 0.5
    flat = scores.flatten(1)
    neighbours = (flat[:, :-1] * flat[:, 1:]).mean(0)
    assert neighbours.abs().max() < 5 / 1500**0.5
    assert (flat[:-1] * flat[1:]).mean().abs() < 5 / flat.numel() ** 0.5  # nor do epochs depend on one another


def test_draws_depend_on_seed_epoch_and_index_alone(cache):
    def draw(seed=0, epoch=0, num_workers=0, **options):
        dataset = LatentCacheDataset(cache, 3, split="val", seed=seed, **options)
        dataset.set_epoch(epoch)
        loader = open_loader(dataset, num_workers=num_workers, batch_size=None)
        return torch.stack([item["latents"] for item in loader])

    first = draw()
    assert torch.equal(first, draw()) and torch.equal(first, draw(num_workers=2))
    for other in (draw(epoch=1), draw(seed=1)):
        assert not torch.equal(first, other)
    dataset = LatentCacheDataset(cache, 3)
    places = [(v, 3 * k, 3 * k + 3) for v, n in enumerate(LENGTHS) for k in range(n // 3)]
    posteriors = [normal(dataset.read_posterior(*place), 1) for place in places]
    noise = torch.stack([((x - p.mean) / p.stddev).flatten() for x, p in zip(first, posteriors, strict=True)])
    likeness = torch.corrcoef(noise) - torch.eye(len(noise))
    assert likeness.abs().max() < 5 / noise.shape[1] ** 0.5


def test_half_precision_rounds_what_is_stored(tmp_path, cache, tokenizer):
    encode_dataset(
        Noise(lengths=LENGTHS), tokenizer, tmp_path / "half", dtype="bfloat16", batch_frames=8, shard_videos=2
    )
    whole, half = (LatentCacheDataset(root, 3).read_posterior(1) for root in (cache, tmp_path / "half"))
    assert half.dtype == torch.float32 and torch.equal(half, whole.bfloat16().float())


def test_means_alone_may_be_stored(tmp_path, tokenizer, cache):
    data = Noise(lengths=LENGTHS)
    encode_dataset(data, tokenizer, tmp_path / "means", store="latents", batch_frames=8, shard_videos=2)
    dataset = LatentCacheDataset(tmp_path / "means", 3, split="val")
    exact = LatentCacheDataset(cache, 3, split="val", sample_posterior=False)
    assert all(torch.equal(dataset[i]["latents"], exact[i]["latents"]) for i in range(len(exact)))
    with pytest.raises(ValueError, match="expected posteriors, found latents"):
        dataset.read_posterior(0)


def test_posteriors_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="VQVAE has no posterior; expected auto, codes or latents"):
        encode_dataset(Noise(), tiny_tokenizer("vqvae"), tmp_path / "cache", store="posterior")
    assert not (tmp_path / "cache").exists()
    spec = tiny_tokenizer("vqvae").latent_spec
    with pytest.raises(ValueError, match=r"cache.store: expected 'codes'.* found 'posterior'"):
        LatentCacheWriter(tmp_path, spec, "f" * 64, videos=Noise().videos, data={}, fps=5.0, store="posterior")


def test_a_saved_and_loaded_model_makes_the_same_cache(tmp_path, cache, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    encode_dataset(Noise(lengths=LENGTHS), loaded, tmp_path / "again", batch_frames=8, shard_videos=2)
    assert contents(tmp_path / "again") == contents(cache)

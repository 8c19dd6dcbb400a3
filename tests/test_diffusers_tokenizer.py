"""DiffusersTokenizer over tiny autoencoders that diffusers saved, against what diffusers itself makes of the frames."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_latent_cache import Noise
from tiny import SMALL_DIFFUSERS, random_frames, small_diffusers

from latentcast import DiffusersTokenizer, LatentCacheDataset, instantiate, load_config, load_model
from latentcast.data.store.encoding import encode_dataset
from latentcast.modeling import find_tokenizer

SIZES = {"height": 16, "width": 16}
SPATIAL = {"norm_type": "spatial", "block_out_channels": [32, 32], "norm_num_groups": 32, "vq_embed_dim": 3}  # MoVQ's


def saved(folder, name, **options):
    """A tiny autoencoder, saved by diffusers in ``folder``."""
    torch.manual_seed(0)
    autoencoder = getattr(diffusers, name)(**SMALL_DIFFUSERS[name] | options).eval()
    autoencoder.save_pretrained(folder)
    return autoencoder


@pytest.fixture(params=SMALL_DIFFUSERS)
def pair(request, tmp_path):
    """An autoencoder, and the tokenizer of the folder that it was saved in."""
    autoencoder = saved(tmp_path / "saved", request.param)
    return autoencoder, DiffusersTokenizer(tmp_path / "saved", **SIZES).eval()


# The same as diffusers


def test_weights_come_from_the_folder(pair):
    autoencoder, tokenizer = pair
    expected = {f"network.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    found = tokenizer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not tokenizer.needs_training


@torch.no_grad()
def test_latents_and_frames_are_those_of_diffusers(pair):
    autoencoder, tokenizer = pair
    frames = random_frames(tokenizer)
    images, config = frames.flatten(0, 1), autoencoder.config
    output = tokenizer.encode(frames)
    latents = output.latents.flatten(0, 1)
    assert tokenizer.latent_spec["scaling_factor"] == config.scaling_factor
    if isinstance(autoencoder, diffusers.VQModel):
        quantized, _, (_, _, indices) = autoencoder.quantize(autoencoder.encode(images).latents)
        torch.testing.assert_close(latents, quantized * config.scaling_factor)
        assert torch.equal(output.codes.flatten(), indices)
        assert len(indices.unique()) > 1
        expected = autoencoder(images).sample
    elif isinstance(autoencoder, diffusers.AutoencoderKL):
        posterior = autoencoder.encode(images).latent_dist
        assert config.shift_factor == 0.1
        mean, logvar = output.posterior.flatten(0, 1).chunk(2, dim=1)
        torch.testing.assert_close(latents, (posterior.mode() - 0.1) * config.scaling_factor)
        assert torch.equal(mean, latents)
        torch.testing.assert_close((0.5 * logvar).exp(), posterior.std * config.scaling_factor)
        expected = autoencoder(images).sample
    else:
        torch.testing.assert_close(latents, autoencoder.encode(images).latents)
        expected = autoencoder.decode(autoencoder.encode(images).latents).sample
    torch.testing.assert_close(tokenizer.decode(output.latents).flatten(0, 1), expected.clamp(-1, 1))


@torch.no_grad()
@pytest.mark.parametrize("options", [SPATIAL, {"lookup_from_codebook": True}])
def test_kinds_of_vqmodel(tmp_path, options):
    autoencoder = saved(tmp_path, "VQModel", **options)
    tokenizer = DiffusersTokenizer(tmp_path, **SIZES).eval()
    frames = random_frames(tokenizer)
    expected = autoencoder(frames.flatten(0, 1)).sample.clamp(-1, 1)
    torch.testing.assert_close(tokenizer(frames).frames.flatten(0, 1), expected)


def test_a_subfolder_of_a_pipeline(tmp_path):
    autoencoder = saved(tmp_path / "vae", "AutoencoderKL")
    tokenizer = DiffusersTokenizer(tmp_path, subfolder="vae", **SIZES)
    assert torch.equal(tokenizer.network.quant_conv.weight, autoencoder.quant_conv.weight)


def test_the_scaling_factor_may_be_another(tmp_path):
    saved(tmp_path, "AutoencoderKL")
    plain, scaled = (DiffusersTokenizer(tmp_path, scaling_factor=s, **SIZES).eval() for s in (None, 2.0))
    frames = random_frames(plain)
    with torch.no_grad():
        ratio = 2 / plain.config.scaling_factor
        torch.testing.assert_close(scaled.encode(frames).latents, plain.encode(frames).latents * ratio)
        torch.testing.assert_close(scaled(frames).frames, plain(frames).frames)


# Saving


def test_what_is_saved_needs_the_folder_no_more(pair, tmp_path):
    _, tokenizer = pair
    tokenizer.save_pretrained(tmp_path / "own")
    shutil.rmtree(tmp_path / "saved")
    config = (tmp_path / "own" / "config.json").read_text()
    assert (
        "saved" not in config and json.loads(config)["autoencoder"]["_class_name"] == type(tokenizer.network).__name__
    )
    loaded, frames = load_model(tmp_path / "own"), random_frames(tokenizer)
    with torch.no_grad():
        assert torch.equal(loaded(frames).frames, tokenizer(frames).frames)


def test_the_default_is_an_untrained_tiny_autoencoder():
    tokenizer = DiffusersTokenizer()
    assert isinstance(tokenizer.network, diffusers.AutoencoderTiny) and tokenizer.needs_training
    spec = tokenizer.latent_spec
    assert (spec["kind"], spec["channels"], spec["height"], spec["width"]) == ("continuous", 4, 8, 8)


def test_channels_are_those_that_are_asked_for(tmp_path):
    tokenizer = DiffusersTokenizer(in_channels=1, **SIZES)
    assert tokenizer.latent_spec["frame_channels"] == 1 == tokenizer.network.config.out_channels
    saved(tmp_path, "AutoencoderKL")
    with pytest.raises(ValueError, match="in_channels: expected the autoencoder's 3, found 1"):
        DiffusersTokenizer(tmp_path, in_channels=1, **SIZES)
    config = load_config("quickstart", ["tokenizer=diffusers", f"tokenizer.path={tmp_path}"])
    with pytest.raises(ValueError, match=r"^channels=1 \(as tokenizer.in_channels\): expected the autoencoder's 3"):
        instantiate(config.tokenizer)


def test_a_cache_of_a_pretrained_autoencoder(pair, tmp_path):
    _, tokenizer = pair
    data = Noise(lengths=(5, 7))
    encode_dataset(data, tokenizer, tmp_path / "cache", batch_frames=4)
    cached = LatentCacheDataset(tmp_path / "cache", 3)
    stores = {"AutoencoderKL": "posterior", "AutoencoderTiny": "latents", "VQModel": "codes"}
    assert cached.manifest["store"] == stores[type(tokenizer.network).__name__]
    stored = cached.read_video(1)[None]
    with torch.no_grad():
        latents = tokenizer.codes_to_latents(stored) if tokenizer.is_discrete else stored
        expected = tokenizer(data.whole(1)[None]).frames
        torch.testing.assert_close(tokenizer.decode(latents), expected, atol=1e-5, rtol=1e-5)


# Training and precision


@torch.no_grad()
def test_losses_beside_the_reconstruction():
    for name in SMALL_DIFFUSERS:
        torch.manual_seed(0)
        tokenizer = small_diffusers(name, kl_weight=0.3, **SIZES).eval()
        frames = random_frames(tokenizer)
        output = tokenizer(frames)
        extra = output.loss - output.logs["reconstruction_loss"]
        images = frames.flatten(0, 1)
        if name == "AutoencoderKL":
            kl = tokenizer.network.encode(images).latent_dist.kl().mean()
            torch.testing.assert_close(output.logs["kl"], kl)
            expected = 0.3 * kl / images[0].numel()
        elif name == "VQModel":  # in eval both terms have the same value
            expected = tokenizer.network.quantize(tokenizer.network.encode(images).latents)[1]
        else:
            expected = torch.tensor(0.0)
        torch.testing.assert_close(extra, expected, atol=1e-6, rtol=1e-5)


def test_vqmodel_pulls_codes_to_the_encoder_and_a_quarter_back():
    torch.manual_seed(0)
    tokenizer = small_diffusers("VQModel", **SIZES).train()
    frames = random_frames(tokenizer)
    z = tokenizer.network.encode(frames.flatten(0, 1)).latents.detach()
    codes = tokenizer.encode(frames).codes.flatten()
    book = tokenizer.network.quantize.embedding.weight
    tokenizer(frames).loss.backward()
    vectors = z.movedim(1, -1).flatten(0, -2)
    expected = torch.zeros_like(book).index_add(0, codes, 2 * (book.detach()[codes] - vectors) / vectors.numel())
    torch.testing.assert_close(book.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_codes_are_found_in_fp32_under_autocast(dtype):
    torch.manual_seed(0)
    tokenizer = small_diffusers("VQModel", **SIZES).eval()
    latents = 0.05 * torch.randn(4, 3, 5, 8, 8) * tokenizer.config.scaling_factor
    expected = tokenizer.latents_to_codes(latents)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(tokenizer.latents_to_codes(latents), expected)
    vectors = (latents / tokenizer.config.scaling_factor).movedim(2, -1).double()
    distances = (vectors[..., None, :] - tokenizer.network.quantize.embedding.weight.double()).square().sum(-1)
    assert (distances.argmin(-1) == expected[..., 0]).float().mean() > 0.999


@pytest.mark.parametrize("by", ["path", "some settings"])
def test_a_trained_one_is_found_by_the_settings_it_was_made_with(tmp_path, by):
    if by == "path":
        saved(tmp_path / "saved", "AutoencoderKL")
        settings = {"path": str(tmp_path / "saved")}
    else:
        settings = {"autoencoder": {"_class_name": "AutoencoderTiny", "latent_channels": 3}}
    DiffusersTokenizer(**settings, **SIZES).save_pretrained(tmp_path / "tokenizer")
    experiment = {"name": "x", "run_dir": str(tmp_path), "defaults": {"tokenizer": "diffusers"}}
    asked = [f"tokenizer.path={settings['path']}"] if by == "path" else ["tokenizer.autoencoder.latent_channels=3"]
    config = load_config(experiment, asked, go_on=True, tool="encode_dataset")
    assert isinstance(find_tokenizer(config, tmp_path), DiffusersTokenizer) and config.frame_size == 16
    with pytest.raises(ValueError, match=r"trained with tokenizer.autoencoder=.*, asked for .*5"):
        load_config(experiment, ["tokenizer.autoencoder.latent_channels=5"], go_on=True, tool="encode_dataset")


# What cannot be loaded


@pytest.mark.parametrize("name", ["diffusers_kl", "diffusers_vq"])
def test_one_that_is_not_trained_has_no_path(name):
    config = load_config("quickstart", [f"tokenizer={name}", "tokenizer.path=somewhere"])
    with pytest.raises(
        ValueError, match=r"^tokenizer.path, tokenizer.autoencoder: expected one of the two, found both"
    ):
        instantiate(config.tokenizer)


def test_weights_that_do_not_fill_the_model(tmp_path):
    saved(tmp_path, "AutoencoderKL")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fill AutoencoderKL: 1 tensors are missing, 'encoder.conv_in.weight'"):
        DiffusersTokenizer(tmp_path, **SIZES)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=r"expected _class_name to be one of .*VQModel, found 'UNet2DModel'"):
        DiffusersTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"autoencoder: expected _class_name .* found None"):
        DiffusersTokenizer(autoencoder={"in_channels": 3})
    with pytest.raises(ValueError, match="autoencoder: AutoencoderTiny has no latent_chanels"):
        DiffusersTokenizer(autoencoder={"_class_name": "AutoencoderTiny", "latent_chanels": 16})


def test_folders_without_config_or_safe_weights_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError, match="no autoencoder of diffusers can be loaded from here") as error:
            DiffusersTokenizer(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    saved(tmp_path, "AutoencoderTiny")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")  # a pickle, which nobody loads
    weights.unlink()
    with pytest.raises(OSError, match="no autoencoder of diffusers can be loaded from here"):
        DiffusersTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 15}, "expected multiples of the stride 2, found 15, 16"),
        ({"reconstruction_loss": "l3"}, "expected one of l2, l1, found 'l3'"),
        ({"height": "x"}, "height: expected a whole number of at least 1, found 'x'"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        small_diffusers("VQModel", **SIZES | options)
    with pytest.raises(ValueError, match="expected as many channels out as in, found 3 and 1"):
        DiffusersTokenizer(autoencoder={"_class_name": "AutoencoderTiny", "out_channels": 1})
    with pytest.raises(ValueError, match="autoencoder: expected a class and its sizes, found 3"):
        DiffusersTokenizer(autoencoder=3)
    with pytest.raises(ValueError, match="autoencoder: no VQModel can be built of these sizes"):
        DiffusersTokenizer(autoencoder={"_class_name": "VQModel", "block_out_channels": 3})

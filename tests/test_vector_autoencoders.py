"""DCGANAutoencoder and VGGAutoencoder: vectors as latents, BatchNorm, loss, configs, and that they learn."""

import pytest
import torch
from tiny import random_frames, tiny_tokenizer

from latentcast import DCGANAutoencoder, VGGAutoencoder, instantiate, load_config

CLASSES = {"dcgan": DCGANAutoencoder, "vgg": VGGAutoencoder}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_svgs_for_rgb_at_64(name):
    tokenizer = CLASSES[name]().eval()
    frames = random_frames(tokenizer, 1, 1)
    assert frames.shape == (1, 1, 3, 64, 64)
    with torch.no_grad():
        latents = tokenizer.encode(frames).latents
        assert latents.shape == (1, 1, 128, 1, 1)
        assert tokenizer.decode(latents).shape == frames.shape
    assert tokenizer.latent_spec["kind"] == "continuous"
    assert (tokenizer.latent_spec["height"], tokenizer.latent_spec["width"]) == (1, 1)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 128, 128), (3, 128, 128), (1, 48, 80), (3, 18, 10)])
def test_other_frames(name, channels, height, width):
    tokenizer = CLASSES[name](channels, height, width, embedding_dim=9, hidden_channels=2).eval()
    latents = tokenizer.encode(random_frames(tokenizer)).latents
    assert latents.shape == (2, 3, 9, 1, 1)
    assert tokenizer.decode(latents).shape == (2, 3, channels, height, width)


@pytest.mark.parametrize("name", CLASSES)
def test_running_statistics_normalise_encode_and_decode_in_training_mode_too(name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer)
    latents = tokenizer.encode(frames).latents
    decoded = tokenizer.decode(latents)
    tokenizer.train()
    assert torch.equal(tokenizer.encode(frames).latents, latents)
    assert torch.equal(tokenizer.decode(latents), decoded)
    assert all(module.training for module in tokenizer.modules())
    tokenizer.encoder.eval()
    tokenizer.encode(frames)
    assert tokenizer.training and not tokenizer.encoder.training
    assert not torch.allclose(tokenizer.train()(frames).frames, decoded)  # which normalises by the batch


@pytest.mark.parametrize("name", CLASSES)
def test_loss_is_the_distance(name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer)
    output = tokenizer(frames)
    assert output.loss.item() == pytest.approx((frames - output.frames).double().square().mean().item(), rel=1e-5)
    assert output.logs["reconstruction_loss"] == output.loss and output.codes is None
    tokenizer.register_to_config(reconstruction_loss="l1")
    output = tokenizer(frames)
    assert output.loss.item() == pytest.approx((frames - output.frames).double().abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_linear_output_learns_where_it_is_out_of_range_and_decodes_within(name):
    tokenizer = CLASSES[name](1, 16, 16, embedding_dim=4, hidden_channels=2, output_activation="linear")
    bias = dict(tokenizer.decoder.levels[0].named_parameters())
    bias = next(parameter for key, parameter in bias.items() if parameter.shape == (1,) and key.endswith("bias"))
    with torch.no_grad():
        bias.fill_(3.0)  # far outside of [-1, 1]
    output = tokenizer.train()(torch.full((1, 2, 1, 16, 16), -1.0))
    output.loss.backward()
    assert output.loss > 4 and output.frames.abs().max() <= 1
    assert bias.grad.abs() > 1  # a clamp before the loss would stop it
    assert tokenizer.decode(torch.zeros(1, 1, 4, 1, 1)).abs().max() <= 1


@pytest.mark.parametrize("name", CLASSES)
def test_one_frame_has_no_statistics(name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer, 1, 1)
    assert tokenizer(frames).loss.isfinite()
    with pytest.raises(ValueError, match="expected at least 2 in training mode"):
        tokenizer.train()(frames)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 63}, "height, width: expected even numbers of at least 8 pixels, found 63, 64"),
        ({"output_activation": "relu"}, "output_activation: expected 'tanh' or 'linear', found 'relu'"),
        ({"reconstruction_loss": "l3"}, "reconstruction_loss: expected one of"),
        ({"lpips_weight": -1.0}, "lpips_weight: expected at least 0, found -1"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        CLASSES[name](**arguments)


@pytest.mark.parametrize("name", CLASSES)
def test_config_files(tmp_path, name):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"defaults: {{tokenizer: {name}}}\nframe_size: 32\nchannels: 1\n")
    tokenizer = instantiate(load_config(experiment, ["tokenizer.hidden_channels=4"]).tokenizer)
    assert type(tokenizer) is CLASSES[name]
    spec = tokenizer.latent_spec
    assert (spec["frame_channels"], spec["frame_height"], spec["frame_width"], spec["channels"]) == (1, 32, 32, 128)


@pytest.mark.parametrize("name", CLASSES)
def test_it_learns(name):
    torch.manual_seed(0)
    tokenizer = CLASSES[name](1, 16, 16, embedding_dim=8, hidden_channels=8).train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    grid = torch.linspace(-1, 1, 16)

    def batch(n):
        """Soft discs at random places: (n, 1, 1, 16, 16)."""
        x, y = torch.rand(2, n, 1, 1) * 1.2 - 0.6
        distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()
        return ((0.5 - distance) * 8).tanh()[:, None, None]

    for _ in range(100):
        optimizer.zero_grad()
        tokenizer(batch(32)).loss.backward()
        optimizer.step()
    frames = batch(64)
    with torch.no_grad():
        loss = tokenizer.eval()(frames).loss
    assert loss < 0.1 * frames.var()

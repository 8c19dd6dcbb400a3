"""The VQ-VAE of the Latent Video Transformer: sizes, loss, residual blocks, configs, and that it learns."""

import pytest
import torch
from tiny import SMALL_VQVAE, random_frames, tiny_tokenizer

from latentcast import VQVAE, instantiate, load_config, load_model
from latentcast.layers.convolutions import ResidualBlock
from latentcast.metrics.codebook import CodebookUsage


@pytest.mark.parametrize(("n_codebooks", "shapes"), [(1, [(512, 256)]), (4, [(512, 64)] * 4)])
def test_published_size(n_codebooks, shapes):
    model = VQVAE(n_codebooks=n_codebooks)
    codebooks = [codebook.codebook for codebook in model.quantizer.codebooks]
    assert [tuple(codebook.shape) for codebook in codebooks] == shapes
    total = sum(p.numel() for p in model.parameters()) + sum(codebook.numel() for codebook in codebooks)
    assert total == 3_684_867  # the published code's 3.68M, codebook included
    assert model.latent_spec["height"] == model.latent_spec["width"] == 16
    assert model.latent_spec["codebook_sizes"] == [512] * n_codebooks


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_strides(stride):
    model = VQVAE(3, 32, 48, stride=stride, codebook_size=8, **SMALL_VQVAE).eval()
    frames = random_frames(model, 1, 2)
    latents = model.encode(frames).latents
    assert latents.shape == (1, 2, 8, 32 // stride, 48 // stride)
    assert model.decode(latents).shape == frames.shape
    convolutions = [m for m in model.encoder if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert [m.kernel_size for m in convolutions] == [(4, 4)] * len(convolutions)
    assert 2 ** len(convolutions) == stride


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 3}, "stride: expected 2, 4, 8 or 16, found 3"),
        ({"height": 30}, "multiples of the stride 4, found 30, 64"),
        ({"width": 62}, "multiples of the stride 4, found 64, 62"),
        ({"embedding_dim": 10, "n_codebooks": 4}, "divisor of the 10 channels, found 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQVAE(**arguments)


def test_residual_block_keeps_its_input():
    block = ResidualBlock(4, 2)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = -torch.rand(1, 4, 3, 3)
    before = x.clone()
    assert torch.equal(block(x), before)  # an in-place ReLU would give zeros
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["vqvae", "sliced_vqvae"])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_loss_is_equation_one(name, beta):
    model = tiny_tokenizer(name)
    model.register_to_config(commitment_weight=beta)
    frames = random_frames(model)
    output = model(frames)
    with torch.no_grad():
        z_e = model.encoder(frames.flatten(0, 1))
        parts = z_e.movedim(1, -1).chunk(len(model.quantizer.codebooks), -1)
        z_q = []
        for codebook, part in zip(model.quantizer.codebooks, parts):
            distances = (part[..., None, :] - codebook.codebook).square().sum(-1)
            z_q.append(codebook.codebook[distances.argmin(-1)])
        z_q = torch.cat(z_q, -1).movedim(-1, 1)
        reconstruction = torch.tanh(model.decoder(z_q)).unflatten(0, frames.shape[:2])
    reconstruction_loss = (frames - reconstruction).double().square().mean().item()
    commitment_loss = (z_e - z_q).double().square().mean().item()
    assert output.logs["reconstruction_loss"].item() == pytest.approx(reconstruction_loss, rel=1e-5)
    assert output.logs["commitment_loss"].item() == pytest.approx(commitment_loss, rel=1e-5)
    assert output.loss.item() == pytest.approx(reconstruction_loss + beta * commitment_loss, rel=1e-5)
    torch.testing.assert_close(output.frames, reconstruction)
    codes = model.encode(frames).codes
    torch.testing.assert_close(model.codes_to_latents(codes)[0, 0] / model.config.scaling_factor, z_q[0])


def test_encoder_learns_through_the_quantizer():
    """Its gradient is the decoder's gradient at the code vectors plus that of the commitment."""
    model = tiny_tokenizer("vqvae")
    frames = random_frames(model)
    z_e = model.encoder(frames.flatten(0, 1))
    z_q = model.encode(frames).latents.flatten(0, 1).requires_grad_()
    reconstruction_loss = (model.decoder(z_q).tanh().unflatten(0, frames.shape[:2]) - frames).square().mean()
    (gradient,) = torch.autograd.grad(reconstruction_loss, z_q)
    gradient = gradient + 2 * (z_e - z_q).detach() / z_e.numel()
    expected = torch.autograd.grad(z_e, list(model.encoder.parameters()), gradient)
    model(frames).loss.backward()
    for parameter, value in zip(model.encoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, value, atol=1e-6, rtol=1e-3)


def test_quantize_snaps_to_the_nearest_code():
    model = tiny_tokenizer("sliced_vqvae")
    output = model.encode(random_frames(model))
    assert torch.equal(model.latents_to_codes(output.latents), output.codes)
    noisy = output.latents + 1e-4 * torch.randn_like(output.latents)
    assert torch.equal(model.quantize(noisy), output.latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    model = tiny_tokenizer("sliced_vqvae").train()
    with torch.autocast("cpu", dtype=dtype):
        output = model(random_frames(model))
    output.loss.backward()
    assert output.frames.dtype == output.loss.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.bool}


@pytest.mark.parametrize("cast", ["load", "to"])
def test_codebooks_stay_in_single_precision(tmp_path, cast):
    model = tiny_tokenizer("sliced_vqvae")
    model.save_pretrained(tmp_path)
    half = load_model(tmp_path, torch_dtype=torch.bfloat16) if cast == "load" else load_model(tmp_path).bfloat16()
    assert half.encoder[0].weight.dtype == half.dtype == torch.bfloat16
    for name, tensor in model.quantizer.state_dict().items():
        assert torch.equal(half.quantizer.state_dict()[name], tensor), name
    frames = random_frames(model)
    with torch.no_grad():
        assert torch.equal(half(frames).frames, half.decode(half.encode(frames).latents))
        agreement = (half.encode(frames).codes == model.encode(frames).codes).float().mean()
    assert agreement > 0.9


def test_other_frame_size_from_the_same_weights(tmp_path):
    tiny_tokenizer("vqvae").save_pretrained(tmp_path)
    model = VQVAE.from_pretrained(tmp_path, height=32, width=24)
    assert (model.latent_spec["height"], model.latent_spec["width"]) == (8, 6)
    assert model(random_frames(model)).frames.shape == (2, 3, 3, 32, 24)


@pytest.mark.parametrize("n_codebooks", [1, 4])
def test_it_learns_and_uses_its_codes(n_codebooks):
    torch.manual_seed(0)
    small = SMALL_VQVAE | {"hidden_channels": 32}
    model = VQVAE(1, 16, 16, n_codebooks=n_codebooks, codebook_size=16, ema_decay=0.9, **small).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    grid = torch.linspace(-1, 1, 16)

    def batch(n):
        """Soft discs at random places: (n, 1, 1, 16, 16)."""
        x, y = torch.rand(2, n, 1, 1) * 1.2 - 0.6
        distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()
        return ((0.5 - distance) * 8).tanh()[:, None, None]

    first = model(batch(32)).logs["reconstruction_loss"].item()
    for _ in range(150):
        optimizer.zero_grad()
        model(batch(32)).loss.backward()
        optimizer.step()
    model.eval()
    frames = batch(64)
    with torch.no_grad():
        output = model(frames)
    usage = CodebookUsage(model.latent_spec["codebook_sizes"])
    usage.update(output.codes)
    assert output.logs["reconstruction_loss"] < 0.1 * first
    assert (usage.compute()["usage"] > 0.7).all()
    assert (usage.compute()["perplexity"] > 4).all()


@pytest.mark.parametrize("name", ["vqvae", "sliced_vqvae", "pixel"])
def test_config_files(tmp_path, name):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"defaults: {{tokenizer: {name}}}\nframe_size: 32\nchannels: 1\n")
    tokenizer = instantiate(load_config(experiment).tokenizer)
    spec = tokenizer.latent_spec
    assert (spec["frame_channels"], spec["frame_height"], spec["frame_width"]) == (1, 32, 32)
    assert len(spec["codebook_sizes"]) == {"vqvae": 1, "sliced_vqvae": 4, "pixel": 1}[name]
    if name != "pixel":
        tokenizer = instantiate(load_config(experiment, ["tokenizer.n_codebooks=2"]).tokenizer)
        assert tokenizer.latent_spec["codebook_sizes"] == [512, 512]


def test_linear_output_learns_where_it_is_out_of_range_and_decodes_within():
    torch.manual_seed(0)
    model = VQVAE(1, 16, 16, output_activation="linear", codebook_size=8, **SMALL_VQVAE)
    with torch.no_grad():
        model.decoder[-1].bias.fill_(3.0)  # far outside of [-1, 1]
    output = model.train()(torch.full((1, 2, 1, 16, 16), -1.0))
    output.loss.backward()
    assert output.logs["reconstruction_loss"] > 4 and output.frames.abs().max() <= 1
    assert model.decoder[-1].bias.grad.abs() > 1  # a clamp before the loss would stop it
    assert model.eval().decode(torch.zeros(1, 1, 8, 4, 4)).abs().max() <= 1


def test_replicate_padding_makes_codes_the_same_wherever_a_thing_is():
    """On a plain background, an object that moves by one stride moves its features; zeros tell where the edge is."""
    frames = torch.full((1, 2, 1, 64, 64), -1.0)
    frames[0, 0, 0, 26:30, 25:31] = 1
    frames[0, 1, 0, 26:30, 33:39] = 1
    for mode in ("zeros", "replicate"):
        torch.manual_seed(0)
        model = VQVAE(1, 64, 64, padding_mode=mode, stride=8, codebook_size=8, **SMALL_VQVAE)
        before, after = model._features(frames)[0]
        blank = model._features(torch.full((1, 1, 1, 64, 64), -1.0))[0, 0]
        moved = torch.allclose(before[:, :7], after[:, 1:], atol=1e-5)
        plain = torch.allclose(blank, blank[:1, :1], atol=1e-5)
        assert moved == plain == (mode == "replicate")


@pytest.mark.parametrize("option", ["output_activation", "padding_mode"])
def test_unknown_variant_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}: expected .*, found 'relu'"):
        VQVAE(**{option: "relu"})

"""HR-VQVAE and residual VQ as tokenizers: sizes, the full loss, coarse to fine, configs, and that they learn."""

import numpy as np
import pytest
import torch
from tiny import SMALL_VQVAE, random_frames, tiny_tokenizer

from latentcast import HRVQVAE, VQVAE, ResidualVQVAE, instantiate, load_config, load_model
from latentcast.metrics.codebook import CodebookUsage

NAMES = ["hr_vqvae", "gradient_hr_vqvae", "residual_vqvae"]


def walk(model, features):
    """Features (N, D) down the tree: codes (N, n), the residual that each layer gets and its code vector (n, N, D)."""
    m, n = model.config.codebook_size, model.config.n_layers
    xi, path = features.double(), torch.zeros(len(features), dtype=torch.int64)
    codes, residuals, vectors = [], [], []
    for layer in model.quantizer.layers:
        children = layer.codebook.double().view(-1, m, features.shape[1])[path]
        code = (xi[:, None] - children).square().sum(-1).argmin(1)
        e = children[torch.arange(len(xi)), code]
        codes, residuals, vectors = [*codes, code], [*residuals, xi], [*vectors, e]
        xi = xi - e
        path = path * m + code if model.tree else path
    assert len(codes) == n
    return torch.stack(codes, -1), torch.stack(residuals), torch.stack(vectors)


@pytest.mark.parametrize(("cls", "n_vectors"), [(HRVQVAE, 16 + 16**2 + 16**3), (ResidualVQVAE, 3 * 16)])
def test_defaults_are_for_rgb_frames_of_64_pixels(cls, n_vectors):
    model = cls()
    spec = model.latent_spec
    assert (spec["frame_channels"], spec["frame_height"], spec["frame_width"]) == (3, 64, 64)
    assert (spec["height"], spec["width"]) == (16, 16)
    assert spec["codebook_sizes"] == [16, 16, 16]
    assert sum(layer.codebook.shape[0] for layer in model.quantizer.layers) == n_vectors
    # The networks are those of VQVAE.
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in VQVAE(embedding_dim=64).named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layers": 0}, "n_layers, codebook_size: expected at least 1 of each, found 0 and 16"),
        ({"codebook_update": "adam"}, "codebook_update: expected 'ema' or 'gradient', found 'adam'"),
        ({"stride": 3}, "stride: expected 2, 4, 8 or 16, found 3"),
        ({"reconstruction_loss": "l3"}, "reconstruction_loss: expected one of l2, l1, found 'l3'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HRVQVAE(**arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_loss_is_equation_four(name, beta):
    model = tiny_tokenizer(name)
    model.register_to_config(commitment_weight=beta)
    frames = random_frames(model)
    output = model(frames)
    with torch.no_grad():
        z = model.encoder(frames.flatten(0, 1)).movedim(1, -1)
        codes, xi, e = walk(model, z.flatten(0, 2))
        e_C = e.sum(0)
        decoded = torch.tanh(model.decoder(e_C.float().view(z.shape).movedim(-1, 1))).unflatten(0, frames.shape[:2])
    reconstruction = (frames - decoded).double().square().mean().item()
    per_layer = [(xi[i] - e[i]).square().mean().item() for i in range(len(xi))]
    total = (z.flatten(0, 2).double() - e_C).square().mean().item()
    expected = reconstruction + beta * sum(per_layer) + beta * total
    if name == "gradient_hr_vqvae":
        expected += sum(per_layer) + total
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(output.codes.flatten(0, 3), codes)
    assert ("codebook_loss" in output.logs) == (name == "gradient_hr_vqvae")
    assert model.config.commitment_weight == beta and HRVQVAE(**SMALL_VQVAE).config.commitment_weight == 0.25


def test_every_layer_reaches_the_encoder():
    """Its gradient is the decoder's at e_C plus that of the commitment of all layers and of their sum."""
    model = tiny_tokenizer("hr_vqvae")
    model.register_to_config(scaling_factor=1.0)
    frames = random_frames(model)
    z = model.encoder(frames.flatten(0, 1))
    _, xi, e = walk(model, z.detach().movedim(1, -1).flatten(0, 2))
    e_C = model.encode(frames).latents.flatten(0, 1).requires_grad_()
    loss = (model.decoder(e_C).tanh().unflatten(0, frames.shape[:2]) - frames).square().mean()
    (gradient,) = torch.autograd.grad(loss, e_C)
    pull = (xi - e).sum(0) + (xi - e)[-1]  # what each layer leaves, and once more what the sum leaves
    pull = 0.25 * 2 * pull.float().view(z.movedim(1, -1).shape).movedim(-1, 1) / z.numel()
    expected = torch.autograd.grad(z, list(model.encoder.parameters()), gradient + pull)
    model(frames).loss.backward()
    for parameter, value in zip(model.encoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, value, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_by_layers(name):
    model = tiny_tokenizer(name)
    n = model.config.n_layers
    output = model.encode(random_frames(model))
    m, scale = model.config.codebook_size, model.config.scaling_factor
    for k in range(1, n + 1):
        found = model.codes_to_latents(output.codes, n_layers=k)
        row, expected = 0, 0
        for layer, column in zip(model.quantizer.layers[:k], output.codes.unbind(-1)):
            row = (row * m if model.tree else 0) + column
            expected = expected + layer.codebook.detach()[row]
        torch.testing.assert_close(found, scale * expected.movedim(-1, 2))
        assert torch.equal(model.decode(output.codes, n_layers=k), model.decode(found))
    assert torch.equal(model.codes_to_latents(output.codes, n), output.latents)
    assert torch.equal(model.decode(output.codes, n_layers=n), model.decode(output.latents))
    # Layers that are not decoded do not matter.
    other = output.codes.clone()
    other[..., -1] = (other[..., -1] + 1) % m
    assert torch.equal(model.decode(other, n_layers=n - 1), model.decode(output.codes, n_layers=n - 1))
    assert not torch.equal(model.decode(other, n_layers=n), model.decode(output.codes, n_layers=n))
    for k in (0, n + 1):
        with pytest.raises(ValueError, match=f"n_layers: expected 1 to {n}, found {k}"):
            model.decode(output.codes, n_layers=k)
    with pytest.raises(ValueError, match="codes: expected"):  # latents do not tell their layers apart
        model.decode(output.latents, n_layers=1)


def test_one_layer_is_the_plain_vqvae():
    arguments = {"height": 16, "width": 16, "codebook_size": 12, **SMALL_VQVAE}
    torch.manual_seed(0)
    plain = VQVAE(commitment_weight=0.5, **arguments)
    torch.manual_seed(0)
    model = HRVQVAE(n_layers=1, commitment_weight=0.25, **arguments)  # which counts twice: of the layer and of the sum
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (plain, model)]
    for step in range(4):
        frames, outputs = random_frames(model, seed=step), []
        for m, optimizer in zip((plain, model), optimizers):
            torch.manual_seed(step)
            outputs.append(m(frames))
            optimizer.zero_grad()
            outputs[-1].loss.backward()
            optimizer.step()
        assert torch.equal(outputs[0].codes, outputs[1].codes)
        torch.testing.assert_close(outputs[0].frames, outputs[1].frames, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(plain.quantizer.codebooks[0].codebook, model.quantizer.layers[0].codebook)


def test_options_of_the_reconstruction_loss():
    model = tiny_tokenizer("hr_vqvae")
    model.register_to_config(reconstruction_loss="l1")
    frames = random_frames(model)
    output = model(frames)
    expected = (output.frames - frames).abs().mean()  # tanh: the clamp has nothing to do
    torch.testing.assert_close(output.logs["reconstruction_loss"], expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_training_under_autocast(name, dtype):
    model = tiny_tokenizer(name).train()
    frames = random_frames(model)
    with torch.autocast("cpu", dtype=dtype):
        output = model(frames)
        features = model._features(frames)
        codes = model.quantizer.nearest(features)
    output.loss.backward()
    assert output.frames.dtype == output.loss.dtype == torch.float32
    assert features.dtype == dtype
    assert torch.equal(codes, model.quantizer.nearest(features.float()))  # the quantizer itself is not rounded
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert {tensor.dtype for tensor in model.quantizer.state_dict().values()} == {torch.float32, torch.bool}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cast", ["load", "to"])
def test_codebooks_stay_in_single_precision(tmp_path, name, cast):
    model = tiny_tokenizer(name)
    model.save_pretrained(tmp_path)
    half = load_model(tmp_path, torch_dtype=torch.bfloat16) if cast == "load" else load_model(tmp_path).bfloat16()
    assert half.encoder[0].weight.dtype == half.dtype == torch.bfloat16
    for key, tensor in model.quantizer.state_dict().items():
        assert torch.equal(half.quantizer.state_dict()[key], tensor), key
    frames = random_frames(model)
    with torch.no_grad():
        assert torch.equal(half(frames).frames, half.decode(half.encode(frames).latents))


@pytest.mark.parametrize(
    ("cls", "update"), [(HRVQVAE, "ema"), (HRVQVAE, "gradient"), (ResidualVQVAE, "ema"), (ResidualVQVAE, "gradient")]
)
def test_it_learns_coarse_to_fine_and_uses_its_codes(cls, update):
    torch.manual_seed(0)
    small = SMALL_VQVAE | {"hidden_channels": 32}
    model = cls(1, 16, 16, codebook_size=6, codebook_update=update, ema_decay=0.9, **small).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    grid = torch.linspace(-1, 1, 16)

    def batch(n):
        """Soft discs at random places: (n, 1, 1, 16, 16)."""
        x, y = torch.rand(2, n, 1, 1) * 1.2 - 0.6
        distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()
        return ((0.5 - distance) * 8).tanh()[:, None, None]

    first = model(batch(32)).logs["reconstruction_loss"].item()
    for _ in range(100):
        optimizer.zero_grad()
        model(batch(32)).loss.backward()
        optimizer.step()
    model.eval()
    frames = batch(64)
    with torch.no_grad():
        output = model(frames)
        errors = [(model.decode(output.codes, n_layers=k) - frames).square().mean().item() for k in (1, 2, 3)]
    usage = CodebookUsage(model.latent_spec["codebook_sizes"])
    usage.update(output.codes)
    result = usage.compute()
    assert errors[0] > errors[1] > errors[2] == pytest.approx(output.logs["reconstruction_loss"].item(), rel=1e-4)
    assert errors[2] < 0.15 * first
    assert [values.shape for values in result.values()] == [(3,)] * 3  # a figure for each layer
    assert np.all(result["usage"] > 0.9) and np.all(result["perplexity"] > 2)


@pytest.mark.parametrize("name", ["hr_vqvae", "residual_vqvae"])
def test_config_files(tmp_path, name):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"defaults: {{tokenizer: {name}}}\nframe_size: 32\nchannels: 1\n")
    tokenizer = instantiate(load_config(experiment).tokenizer)
    assert type(tokenizer) is {"hr_vqvae": HRVQVAE, "residual_vqvae": ResidualVQVAE}[name]
    spec = tokenizer.latent_spec
    assert (spec["frame_channels"], spec["frame_height"], spec["frame_width"]) == (1, 32, 32)
    assert spec["codebook_sizes"] == [16] * 3
    # The file says what the defaults are.
    defaults = type(tokenizer)(1, 32, 32).config
    assert {k: v for k, v in tokenizer.config.items() if k[0] != "_"} == {
        k: v for k, v in defaults.items() if k[0] != "_"
    }
    overrides = ["tokenizer.n_layers=2", "tokenizer.codebook_size=8"]
    assert instantiate(load_config(experiment, overrides).tokenizer).latent_spec["codebook_sizes"] == [8, 8]

"""What every frame tokenizer must hold, whatever its kind."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TOKENIZERS, random_frames, tiny_tokenizer

from latentcast import load_model


@pytest.fixture(params=TINY_TOKENIZERS)
def tokenizer(request):
    return tiny_tokenizer(request.param)


@pytest.fixture
def frames(tokenizer):
    return random_frames(tokenizer)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_shapes_follow_the_spec(tokenizer, frames):
    spec = json.loads(json.dumps(tokenizer.latent_spec))
    assert spec == tokenizer.latent_spec
    assert spec.keys() == {
        *("kind", "channels", "height", "width", "codebook_sizes", "scaling_factor"),
        *("frame_channels", "frame_height", "frame_width"),
    }
    output = tokenizer.encode(frames)
    assert output.latents.shape == (2, 3, spec["channels"], spec["height"], spec["width"])
    assert output.latents.dtype == torch.float32
    assert tokenizer.is_discrete == (output.codes is not None) == bool(spec["codebook_sizes"])
    assert output.latents.is_contiguous()
    if tokenizer.is_discrete:
        assert output.codes.is_contiguous()
        assert output.codes.shape == (2, 3, spec["height"], spec["width"], len(spec["codebook_sizes"]))
        assert output.codes.dtype == torch.int64
        assert (output.codes >= 0).all() and (output.codes < torch.tensor(spec["codebook_sizes"])).all()
        assert output.codes.unique().numel() > 1
    decoded = tokenizer.decode(output.latents)
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1


def test_codes_stand_for_latents(tokenizer, frames):
    output = tokenizer.encode(frames)
    if not tokenizer.is_discrete:
        with pytest.raises(ValueError, match="continuous tokenizer"):
            tokenizer.latents_to_codes(output.latents)
        with pytest.raises(ValueError, match="continuous tokenizer"):
            tokenizer.codes_to_latents(torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64))
        return
    assert torch.equal(tokenizer.codes_to_latents(output.codes), output.latents)
    assert torch.equal(tokenizer.decode(tokenizer.codes_to_latents(output.codes)), tokenizer.decode(output.latents))


def test_forward_equals_decode_of_encode(tokenizer, frames):
    with torch.no_grad():
        output = tokenizer(frames)
        encoded = tokenizer.encode(frames)
        assert torch.equal(output.frames, tokenizer.decode(encoded.latents))
    if tokenizer.is_discrete:
        assert torch.equal(output.codes, encoded.codes)


def test_encoding_to_disk_and_back_equals_forward(tokenizer, frames, tmp_path):
    output = tokenizer.encode(frames)
    if tokenizer.is_discrete:
        smallest = getattr(torch, str(np.min_scalar_type(max(tokenizer.latent_spec["codebook_sizes"]) - 1)))
        save_file({"codes": output.codes.to(smallest)}, tmp_path / "clip.safetensors")
        latents = tokenizer.codes_to_latents(load_file(tmp_path / "clip.safetensors")["codes"].long())
    else:
        save_file({"latents": output.latents}, tmp_path / "clip.safetensors")
        latents = load_file(tmp_path / "clip.safetensors")["latents"]
    with torch.no_grad():
        assert torch.equal(tokenizer.decode(latents), tokenizer(frames).frames)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_code(tokenizer, frames, dtype):
    """The encoder may round, but what it gives is quantised in fp32."""
    if not tokenizer.is_discrete:
        return
    output = tokenizer.encode(frames)
    noise = torch.randn(output.latents.shape, generator=torch.Generator().manual_seed(0))
    latents = output.latents + output.latents.std() * noise
    codes = tokenizer.latents_to_codes(latents)
    assert not torch.equal(codes, output.codes)
    given = []
    encoder = getattr(tokenizer, "encoder", getattr(getattr(tokenizer, "network", None), "quant_conv", None))
    if encoder is not None:
        encoder.register_forward_hook(lambda module, arguments, features: given.append(features.unflatten(0, (2, 3))))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(tokenizer.latents_to_codes(latents), codes)
        assert torch.equal(tokenizer.codes_to_latents(codes), tokenizer.quantize(latents))
        rounded = tokenizer.encode(frames)
    if encoder is None:  # pixels
        assert torch.equal(rounded.codes, output.codes)
    else:
        (features,) = given
        assert features.dtype == dtype
        quantizer = getattr(tokenizer, "quantizer", None)
        vectors = features.float()
        expected = quantizer.nearest(vectors.movedim(2, -1)) if quantizer else tokenizer._nearest(vectors)
        assert torch.equal(rounded.codes, expected)
    assert torch.equal(rounded.latents, tokenizer.codes_to_latents(rounded.codes))


def test_decode_never_quantises(tokenizer, frames):
    latents = tokenizer.encode(frames).latents.detach()
    latents = (0.9 * latents).requires_grad_()  # off the codebook, and inside [-1, 1] for pixels
    decoded = tokenizer.decode(latents)
    assert not torch.equal(decoded, tokenizer.decode(latents + 1e-3))
    (gradient,) = torch.autograd.grad(decoded.square().sum(), latents)
    assert gradient.abs().sum() > 0
    if tokenizer.is_discrete:
        quantized = tokenizer.quantize(latents)
        assert quantized.shape == latents.shape
        assert not torch.equal(decoded, tokenizer.decode(quantized))


def test_frames_are_independent(tokenizer, frames):
    whole, alone = tokenizer.encode(frames), tokenizer.encode(frames[:1, 1:2])
    torch.testing.assert_close(whole.latents[:1, 1:2], alone.latents)
    torch.testing.assert_close(tokenizer.decode(whole.latents)[:1, 1:2], tokenizer.decode(alone.latents))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_encoding_changes_nothing(tokenizer, frames, mode):
    before = snapshot(tokenizer)
    tokenizer.train(mode == "train")
    output = tokenizer.encode(frames)
    tokenizer.decode(output.latents)
    if tokenizer.is_discrete:
        tokenizer.quantize(output.latents)
    if mode == "eval":
        tokenizer(frames).loss.backward()
    assert_unchanged(tokenizer, before)


def test_training_step(tokenizer, frames):
    output = tokenizer.train()(frames)
    assert output.loss.ndim == 0 and output.loss.isfinite()
    output.loss.backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(value.ndim == 0 and not value.requires_grad for value in output.logs.values())


def test_save_and_load(tokenizer, frames, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert not loaded.training
    assert loaded.latent_spec == tokenizer.latent_spec
    assert_unchanged(loaded, snapshot(tokenizer))
    with torch.no_grad():
        assert torch.equal(loaded(frames).frames, tokenizer(frames).frames)


def test_half_precision_weights(tokenizer, frames, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    output = loaded.encode(frames.bfloat16())
    assert output.latents.dtype == torch.float32
    with torch.no_grad():
        decoded = loaded.decode(output.latents.bfloat16())
        assert decoded.dtype == torch.float32
        torch.testing.assert_close(decoded, tokenizer.decode(output.latents), atol=0.05, rtol=0)


def test_fitted_scaling_factor(tokenizer, frames, tmp_path):
    if "scaling_factor" not in tokenizer.config:
        with pytest.raises(ValueError, match="no scaling_factor"):
            tokenizer.fit_scaling_factor([frames])
        return
    before = tokenizer(frames)
    factor = tokenizer.fit_scaling_factor([frames[:, :1], frames[:, 1:]])
    after = tokenizer.encode(frames)
    assert after.latents.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(tokenizer.decode(after.latents), before.frames)
    if tokenizer.is_discrete:
        assert torch.equal(after.codes, before.codes)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path).latent_spec["scaling_factor"] == factor == tokenizer.latent_spec["scaling_factor"]
    with pytest.raises(ValueError, match="latents that vary"):
        tokenizer.fit_scaling_factor([])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[0], "expected a tensor of shape"),
        (lambda x: (x * 127).byte(), "expected floats"),
        (lambda x: x.repeat(1, 1, 2, 1, 1), "expected C ="),
        (lambda x: torch.cat([x, x], -1), "expected W ="),
        (lambda x: x[..., :-1, :], "expected H ="),
        (lambda x: x * 127.5 + 127.5, "expected values in"),
        (lambda x: torch.full_like(x, float("nan")), "expected values in"),
        (lambda x: x.numpy(), "found ndarray"),
    ],
)
def test_bad_frames(tokenizer, frames, spoil, message):
    for call in (tokenizer.encode, tokenizer):
        with pytest.raises(ValueError, match=message) as error:
            call(spoil(frames))
        assert "\n" not in str(error.value)


def test_bad_latents(tokenizer, frames):
    latents = tokenizer.encode(frames).latents
    calls = [tokenizer.decode] + ([tokenizer.latents_to_codes, tokenizer.quantize] if tokenizer.is_discrete else [])
    for call in calls:
        for bad in (latents[0], latents[:, :, :, 1:], latents.repeat(1, 1, 2, 1, 1), latents.long(), None):
            with pytest.raises(ValueError, match="latents: expected") as error:
                call(bad)
            assert "\n" not in str(error.value)


def test_bad_codes(tokenizer, frames):
    if not tokenizer.is_discrete:
        return
    codes = tokenizer.encode(frames).codes
    too_large = codes.clone()
    too_large[0, 0, 0, 0, 0] = tokenizer.latent_spec["codebook_sizes"][0]
    for bad in (too_large, codes - 1000, codes.int(), codes[0], codes[..., :1, :], torch.cat([codes, codes], -1)):
        with pytest.raises(ValueError, match="codes: expected") as error:
            tokenizer.codes_to_latents(bad)
        assert "\n" not in str(error.value)

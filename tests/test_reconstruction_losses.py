"""The losses between frames and their reconstruction, in the function and in the tokenizers that use it."""

import pytest
import torch
from metric_files import weights_or_skip
from tiny import SMALL_LOOKUP_FREE, random_frames, small_diffusers

from latentcast import FSQVAE, KLVAE, LFQVAE
from latentcast.metrics import lpips
from latentcast.tokenizers.losses import reconstruction_loss

SIZES = {"height": 16, "width": 16}
MODELS = {
    "kl": lambda **options: KLVAE(block_channels=[8, 16], norm_groups=4, **SIZES, **options),
    "fsq": lambda **options: FSQVAE(**SMALL_LOOKUP_FREE, **SIZES, **options),
    "lfq": lambda **options: LFQVAE(**SMALL_LOOKUP_FREE, **SIZES, **options),
    "diffusers": lambda **options: small_diffusers("AutoencoderTiny", **SIZES, **options),
}


@pytest.fixture
def videos():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2)]


def test_distances(videos):
    prediction, frames = videos
    for kind, expected in (("l2", (prediction - frames).square()), ("l1", (prediction - frames).abs())):
        loss, logs = reconstruction_loss(prediction, frames, kind)
        torch.testing.assert_close(loss, expected.mean())
        assert logs == {"reconstruction_loss": loss}


def test_distances_are_fp32_whatever_comes_in(videos):
    prediction, frames = videos
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = reconstruction_loss(prediction.bfloat16(), frames)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (prediction.bfloat16().float() - frames).square().mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_added_with_its_weight(videos, channels):
    weights_or_skip("lpips_vgg16")
    prediction, frames = (video[:, :, :channels] for video in videos)
    prediction = prediction.requires_grad_()
    loss, logs = reconstruction_loss(prediction, frames, "l1", lpips_weight=0.5)
    expected = lpips(prediction.detach(), frames, net="vgg").mean()
    torch.testing.assert_close(logs["lpips"], expected)
    torch.testing.assert_close(logs["reconstruction_loss"], (prediction - frames).abs().mean().detach())
    torch.testing.assert_close(loss.detach(), logs["reconstruction_loss"] + 0.5 * expected)
    perceptual = loss - (prediction - frames).abs().mean()
    (gradient,) = torch.autograd.grad(perceptual, prediction)
    step = 1e-2 * gradient / gradient.abs().max()
    with torch.no_grad():
        lower = 0.5 * lpips((prediction - step).clamp(-1, 1), frames, net="vgg").mean()
    assert lower < 0.5 * expected


def test_predictions_beyond_the_range_are_clipped_for_lpips_alone(videos):
    weights_or_skip("lpips_vgg16")
    prediction, frames = videos
    _, logs = reconstruction_loss(3 * prediction, frames, lpips_weight=1.0)
    torch.testing.assert_close(logs["lpips"], lpips((3 * prediction).clamp(-1, 1), frames, net="vgg").mean())
    torch.testing.assert_close(logs["reconstruction_loss"], (3 * prediction - frames).square().mean())


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_take_the_options(name):
    torch.manual_seed(0)
    model = MODELS[name](reconstruction_loss="l1").eval()
    frames = random_frames(model)
    with torch.no_grad():
        output = model(frames)
    if output.frames.abs().max() < 1:  # else clipped after the loss
        torch.testing.assert_close(output.logs["reconstruction_loss"], (output.frames - frames).abs().mean())
    assert model.config.reconstruction_loss == "l1"


@pytest.mark.parametrize("name", MODELS)
def test_lpips_trains_the_tokenizer_and_is_not_saved_with_it(name):
    weights_or_skip("lpips_vgg16")
    torch.manual_seed(0)
    plain, model = MODELS[name](), MODELS[name](lpips_weight=2.0)
    model.load_state_dict(plain.state_dict())
    frames = random_frames(model)
    output = model.eval()(frames)
    with torch.no_grad():
        expected = plain.eval()(frames).loss + 2 * lpips(output.frames.detach(), frames, net="vgg").mean()
    torch.testing.assert_close(output.loss.detach(), expected)
    last = list(model.parameters())[-1]
    (gradient,) = torch.autograd.grad(output.loss, last)
    (unweighted,) = torch.autograd.grad(plain(frames).loss, list(plain.parameters())[-1])
    assert (gradient - unweighted).abs().max() > 1e-3 * unweighted.abs().max()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())

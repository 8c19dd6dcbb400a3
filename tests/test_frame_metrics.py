"""MSE, PSNR and SSIM against scikit-image, the checks of videos, and the baselines."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentcast.metrics import mse, psnr, ssim
from latentcast.metrics.baselines import BASELINES
from latentcast.metrics.frame import SAMPLES, check_pair, check_videos, round_to_levels


def noisy_pair(channels=1, shape=(2, 3), size=(32, 40)):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(*shape, channels, *size, generator=generator) * 2 - 1
    return (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


def pictures(frames):
    """(B, T, C, H, W) in [-1, 1] -> B x T pictures (H, W, C) in [0, 1], float64."""
    return ((frames.double() + 1) / 2).permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()


def scikit_image_ssim(prediction, target, **options):
    scores = [
        structural_similarity(y, x, channel_axis=2, **options)
        for x, y in zip(pictures(prediction), pictures(target), strict=True)
    ]
    return torch.tensor(np.array(scores)).view(prediction.shape[:2]).float()


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
UNIFORM = {"gaussian_weights": False, "win_size": 7, "use_sample_covariance": True}


@pytest.mark.parametrize("channels", [1, 3])
def test_mse_and_psnr_agree_with_scikit_image(channels):
    prediction, target = noisy_pair(channels)
    expected = [peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(pictures(prediction), pictures(target))]
    torch.testing.assert_close(psnr(prediction, target).flatten(), torch.tensor(expected).float())
    expected = [((x - y) ** 2).mean() * 4 for x, y in zip(pictures(prediction), pictures(target))]
    torch.testing.assert_close(mse(prediction, target).flatten(), torch.tensor(expected).float())


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_by_channel_is_the_mean_of_scikit_images(channels):
    prediction, target = noisy_pair(channels)
    prediction[:, :, 0] = target[:, :, 0] + 0.1 * (prediction[:, :, 0] - target[:, :, 0])  # one channel far better
    expected = [
        np.mean([peak_signal_noise_ratio(y[..., c], x[..., c], data_range=1) for c in range(channels)])
        for x, y in zip(pictures(prediction), pictures(target))
    ]
    found = psnr(prediction, target, of="channel")
    torch.testing.assert_close(found.flatten(), torch.tensor(expected).float())
    if channels == 1:
        assert torch.equal(found, psnr(prediction, target))
    else:
        assert (found > psnr(prediction, target) + 1).all()
    equal = psnr(target, target, of="channel")
    assert torch.equal(equal, torch.full_like(equal, 100))
    with pytest.raises(ValueError, match=r"psnr: expected one of .* found 'pixel'"):
        psnr(prediction, target, of="pixel")


def test_rounded_frames_are_what_a_picture_keeps():
    frames = noisy_pair()[0]
    kept = ((frames.double().numpy() + 1) / 2 * 255 + 0.5).astype(np.uint8)
    torch.testing.assert_close(round_to_levels(frames), torch.from_numpy(kept).float() / 127.5 - 1)
    levels = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(round_to_levels(levels), levels)
    assert torch.equal(round_to_levels(torch.tensor([-1.0, 1.0])), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("window", "options"), [("gaussian", GAUSSIAN), ("uniform", UNIFORM)])
def test_ssim_agrees_with_scikit_image_on_frames_in_0_1(channels, window, options):
    prediction, target = noisy_pair(channels)
    expected = scikit_image_ssim(prediction, target, data_range=1, **options)
    torch.testing.assert_close(ssim(prediction, target, window), expected, atol=2e-6, rtol=0)
    if window == "gaussian":
        torch.testing.assert_close(ssim(prediction, target), expected, atol=2e-6, rtol=0)


def test_svg_era_ssim_had_a_data_range_twice_too_large():
    prediction, target = noisy_pair()
    expected = scikit_image_ssim(prediction, target, data_range=2, **UNIFORM)
    old = ssim(prediction, target, window="uniform", data_range=4.0)
    torch.testing.assert_close(old, expected, atol=2e-6, rtol=0)
    assert (old > ssim(prediction, target, window="uniform")).all()


def test_ssim_of_flat_black_and_white_frames_is_precise():
    # Squares and means of flat frames cancel: rounding must stay far below the constants of the formula.
    white = torch.ones(1, 1, 1, 16, 16)
    shades = torch.stack([white, white - 0.01, -white, -white + 0.01], 1).squeeze(2)
    for window, options in (("gaussian", GAUSSIAN), ("uniform", UNIFORM)):
        expected = scikit_image_ssim(shades, white.expand_as(shades), data_range=1, **options)
        torch.testing.assert_close(ssim(shades, white.expand_as(shades), window), expected, atol=1e-4, rtol=0)


def test_equal_frames():
    frames = torch.rand(1, 2, 1, 16, 16) * 2 - 1
    assert psnr(frames, frames).tolist() == [[100, 100]]
    torch.testing.assert_close(ssim(frames, frames), torch.ones(1, 2))


def test_half_precision_frames_are_compared_in_single_precision():
    prediction, target = (frames.bfloat16() for frames in noisy_pair())
    for metric in (mse, psnr, ssim):
        torch.testing.assert_close(metric(prediction, target), metric(prediction.float(), target.float()))


def spoilt(value):
    frames = torch.zeros(1, 2, 1, 16, 16)
    frames[0, 1, 0, 3, 4] = value
    return frames


FINE = torch.zeros(1, 2, 1, 16, 16)
BAD_PAIRS = {
    "mixed sizes": (
        torch.zeros(1, 3, 1, 16, 16),
        FINE,
        r"expected prediction and target of one shape, found \(1, 3, 1, 16, 16\)",
    ),
    "one clip alone": (FINE[0], FINE[0], r"prediction: expected a tensor of shape \(B, T, C, H, W\), found \(2, 1, 16"),
    "no clips": (FINE[:0], FINE[:0], r"prediction: expected a tensor of shape \(B, T, C, H, W\), found \(0, 2"),
    "not a tensor": (FINE, FINE.numpy(), "target: expected a tensor of shape .* found ndarray"),
    "uint8": (FINE, FINE.to(torch.uint8), r"target: expected floats in \[-1, 1\], found torch.uint8"),
    "NaN": (spoilt(torch.nan), FINE, r"prediction: expected values in \[-1, 1\], found NaN"),
    "infinity": (FINE, spoilt(torch.inf), r"target: expected values in \[-1, 1\], found \[0, inf\]"),
    "too high": (FINE, spoilt(1.002), r"target: expected values in \[-1, 1\], found \[0, 1.002\]"),
    "too low": (spoilt(-1.002), FINE, r"prediction: expected values in \[-1, 1\], found \[-1.002, 0\]"),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_bad_frames_are_refused_in_one_line(what, metric):
    prediction, target, message = BAD_PAIRS[what]
    with pytest.raises(ValueError, match=f"^{metric.__name__}: {message}") as error:
        metric(prediction, target)
    assert "\n" not in str(error.value)


def test_a_margin_for_rounding_is_allowed():
    assert torch.isfinite(psnr(spoilt(1.0009), spoilt(-1.0009))).all()


def test_checked_videos_come_back_as_floats():
    assert check_videos("x", FINE.half()).dtype == torch.float32
    assert check_videos("x", FINE.double()).dtype == torch.float64
    assert check_videos("x", FINE[None], SAMPLES).ndim == 6
    with pytest.raises(ValueError, match=r"^x: expected a tensor of shape \(B, S, T, C, H, W\)"):
        check_videos("x", FINE, SAMPLES)
    assert [frames.dtype for frames in check_pair("x", FINE.half(), FINE)] == [torch.float32] * 2


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, 10, "at least 11 x 11 pixels, found"),
        ({"window": "uniform"}, 6, "at least 7 x 7 pixels, found"),
        ({"window": "box"}, 16, "window of .* found 'box'"),
        ({"data_range": 0}, 16, "positive data_range, found 0"),
    ],
)
def test_ssim_refuses_what_it_cannot_compute(options, size, message):
    frames = torch.zeros(1, 1, 1, size, size)
    with pytest.raises(ValueError, match=message):
        ssim(frames, frames, **options)


def test_baselines():
    context = torch.rand(2, 4, 1, 8, 8) * 2 - 1
    expected = {
        "copy_last_frame": context[:, 3],
        "blank_frame": -torch.ones(2, 1, 8, 8),
        "mean_context": context.mean(1),
    }
    for name, baseline in BASELINES.items():
        prediction = baseline(context, 3)
        assert prediction.shape == (2, 3, 1, 8, 8)
        for t in range(3):
            torch.testing.assert_close(prediction[:, t], expected[name])

"""PSNR and SSIM against scikit-image, and the baselines."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentcast.metrics import mse, psnr, ssim
from latentcast.metrics.baselines import BASELINES


@pytest.mark.parametrize("channels", [1, 3])
def test_against_scikit_image(channels):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, channels, 32, 40, generator=generator) * 2 - 1
    prediction = (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(-1, 1)
    for b in range(2):
        for t in range(3):
            ours = [metric(prediction, target)[b, t].item() for metric in (mse, psnr, ssim)]
            x, y = (frames[b, t].permute(1, 2, 0).double().numpy() for frames in (prediction, target))
            assert ours[0] == pytest.approx(((x - y) ** 2).mean(), rel=1e-5)
            assert ours[1] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=2), rel=1e-5)
            expected = structural_similarity(
                y,
                x,
                data_range=2,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            assert ours[2] == pytest.approx(expected, abs=1e-5)


def test_equal_frames():
    frames = torch.rand(1, 2, 1, 16, 16) * 2 - 1
    assert psnr(frames, frames).tolist() == [[100, 100]]
    torch.testing.assert_close(ssim(frames, frames), torch.ones(1, 2))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="of one shape"):
        psnr(torch.zeros(1, 2, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8))


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

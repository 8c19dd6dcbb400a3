"""Metrics of single frames."""

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

DATA_RANGE = 2.0  # of frames in [-1, 1]
WINDOW = 5  # radius of SSIM's window, pixels


def mse(prediction, target):
    """Mean squared error of each frame: (B, T, C, H, W) twice, in [-1, 1] -> (B, T)."""
    _check_pair(prediction, target)
    return (prediction - target).square().mean((-3, -2, -1))


def psnr(prediction, target):
    """Peak signal-to-noise ratio of each frame in dB: (B, T, C, H, W) twice, in [-1, 1] -> (B, T).

    Equal frames are given 100 dB, so that a mean over frames stays finite.
    """
    return 10 * torch.log10(DATA_RANGE**2 / mse(prediction, target).clamp(min=DATA_RANGE**2 * 1e-10))


def ssim(prediction, target):
    """Structural similarity of each frame: (B, T, C, H, W) twice, in [-1, 1] -> (B, T).

    Wang et al. 2004, as scikit-image computes it: an 11 x 11 Gaussian window of sigma 1.5, K1 = .01, K2 = .03, data
    range 2, averaged over the windows that lie inside the frame; so frames must be at least 11 pixels wide and high.
    """
    _check_pair(prediction, target)
    if min(prediction.shape[-2:]) < 2 * WINDOW + 1:
        raise ValueError(f"ssim: expected frames of at least 11 x 11 pixels, found {tuple(prediction.shape[-2:])}")
    flat = [frames.flatten(0, 1) for frames in (prediction, target)]
    options = {"data_range": DATA_RANGE, "sigma": 1.5, "reduction": "none", "return_full_image": True}
    _, full = structural_similarity_index_measure(*flat, **options)
    return full[..., WINDOW:-WINDOW, WINDOW:-WINDOW].mean((1, 2, 3)).view(prediction.shape[:2])


def _check_pair(prediction, target):
    if prediction.shape != target.shape or prediction.ndim != 5:
        raise ValueError(
            f"expected two batches of frames of one shape (B, T, C, H, W), found {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )

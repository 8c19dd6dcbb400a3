"""Metrics of single frames, and the checks that all metrics of videos share: ``check_videos`` and ``check_pair``."""

import torch
from jaxtyping import Float
from torch import Tensor

from latentcast.shapes import Frames

VIDEOS, SAMPLES = "(B, T, C, H, W)", "(B, S, T, C, H, W)"
DATA_RANGE = 2.0  # of frames in [-1, 1]
BLACK = -1.0  # the value of zero intensity: SSIM depends on it, and papers compute SSIM on [0, 1] or 0..255
MARGIN = 1e-3  # by which frames may leave [-1, 1]
WINDOWS = {"gaussian": 11, "uniform": 7}  # of SSIM, and their sides
PSNR_FORMS = ("frame", "channel")


def mse(prediction: Frames, target: Frames) -> Float[Tensor, "B T"]:
    """Mean squared error of each frame, of frames in [-1, 1].

    Times ``C * H * W / 4`` it is the MSE of the Moving-MNIST tables: summed over a frame with pixels in [0, 1].
    """
    prediction, target = check_pair("mse", prediction, target)
    return (prediction - target).square().mean((-3, -2, -1))


def psnr(prediction: Frames, target: Frames, of: str = "frame") -> Float[Tensor, "B T"]:
    """Peak signal-to-noise ratio of each frame in dB, of frames in [-1, 1].

    Equal frames (channels) are given 100 dB, so that a mean over frames stays finite.

    Args:
        of: "frame": of the mean squared error over channels and pixels. "channel": of each channel's own, averaged over
            the channels, as the published code of SVG and of SRVP has it: never lower, and equal for one channel.
    Raises:
        ValueError: unlike shapes, frames outside [-1, 1], an unknown ``of``.
    """
    if of not in PSNR_FORMS:
        raise ValueError(f"psnr: expected one of {PSNR_FORMS}, found {of!r}")
    prediction, target = check_pair("psnr", prediction, target)
    error = (prediction - target).square().mean((-3, -2, -1) if of == "frame" else (-2, -1))
    values = 10 * torch.log10(DATA_RANGE**2 / error.clamp(min=DATA_RANGE**2 * 1e-10))
    return values if of == "frame" else values.mean(-1)


def ssim(
    prediction: Frames, target: Frames, window: str = "gaussian", data_range: float = DATA_RANGE
) -> Float[Tensor, "B T"]:
    """Structural similarity of each frame, of frames in [-1, 1].

    Wang et al. 2004 with K1 = .01 and K2 = .03, averaged over the channels and over the windows that lie inside the
    frame. Intensities are non-negative in that definition, so -1 counts as black: the value is scikit-image's
    ``structural_similarity`` of the frames mapped to [0, 1].

    Args:
        window: "gaussian": 11 x 11, sigma 1.5, population covariance (scikit-image's ``gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False``). "uniform": 7 x 7, sample covariance, the default of scikit-image
            (``gaussian_weights=False, win_size=7, use_sample_covariance=True``), which SVG and its successors call.
        data_range: in units of frames in [-1, 1], so 2 for the full range. Old scikit-image assumed a range of 2 for
            floats, and SVG gave it frames in [0, 1]: ``window="uniform", data_range=4.0`` is that (inflated) figure.
    Raises:
        ValueError: unlike shapes, frames outside [-1, 1] or smaller than the window, an unknown window.
    """
    if window not in WINDOWS:
        raise ValueError(f"ssim: expected a window of {tuple(WINDOWS)}, found {window!r}")
    if not data_range > 0:
        raise ValueError(f"ssim: expected a positive data_range, found {data_range}")
    x, y = check_pair("ssim", prediction, target)
    size = WINDOWS[window]
    if min(x.shape[-2:]) < size:
        raise ValueError(f"ssim: expected frames of at least {size} x {size} pixels, found {tuple(x.shape[-2:])}")
    if window == "gaussian":
        weights = torch.exp(-0.5 * (torch.arange(size, dtype=torch.float64) - size // 2).square() / 1.5**2)
        unbiased = 1
    else:
        weights = torch.ones(size, dtype=torch.float64)
        unbiased = size**2 / (size**2 - 1)
    weights = (weights / weights.sum()).tolist()

    mean_x, mean_y, xx, yy, xy = (_filter(values, weights) for values in (x, y, x * x, y * y, x * y))
    variances = unbiased * (xx + yy - mean_x.square() - mean_y.square())
    covariance = unbiased * (xy - mean_x * mean_y)
    mean_x, mean_y = mean_x - BLACK, mean_y - BLACK
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((-3, -2, -1))


def round_to_levels(frames: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """Frames in [-1, 1] as a picture of 8 bits would keep them: each value is the nearest of 256."""
    return ((frames + 1) * 127.5).round() / 127.5 - 1


def check_videos(name: str, videos: Float[Tensor, "*x"], layout: str = VIDEOS) -> Float[Tensor, "*x"]:
    """Refuse, in one line that starts with ``name``, what is not a float batch of the given layout in [-1, 1].

    Args:
        name: of the metric and its argument, "lpips: prediction" say.
        layout: ``VIDEOS`` or ``SAMPLES``, the axes that are expected.
    Returns:
        The videos in float32, or as they are in float64.
    Raises:
        ValueError: another number of axes or an empty one, integers, NaN, or values beyond [-1, 1] by more than 1e-3.
    """
    if not torch.is_tensor(videos) or videos.ndim != layout.count(",") + 1 or not videos.numel():
        found = tuple(videos.shape) if torch.is_tensor(videos) else type(videos).__name__
        raise ValueError(f"{name}: expected a tensor of shape {layout}, found {found}")
    if not videos.is_floating_point():
        raise ValueError(f"{name}: expected floats in [-1, 1], found {videos.dtype} (for uint8: x / 127.5 - 1)")
    low, high = torch.stack(torch.aminmax(videos.detach())).tolist()
    if low != low:
        raise ValueError(f"{name}: expected values in [-1, 1], found NaN")
    if low < -1 - MARGIN or high > 1 + MARGIN:
        raise ValueError(f"{name}: expected values in [-1, 1], found [{low:.4g}, {high:.4g}]")
    return videos if videos.dtype == torch.float64 else videos.float()


def check_pair(name: str, prediction: Frames, target: Frames) -> tuple[Frames, Frames]:
    """``check_videos`` of both, and refuse unlike shapes -> (prediction, target)."""
    prediction = check_videos(f"{name}: prediction", prediction)
    target = check_videos(f"{name}: target", target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name}: expected prediction and target of one shape, found {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    return prediction, target


def _filter(x, weights):
    """Weighted mean over the windows inside the last two axes, separably.

    By shifted sums, not a convolution: that could run in TF32, whose 10 bits are too few for a variance.
    """
    for axis in (-1, -2):
        n = x.shape[axis] - len(weights) + 1
        total = weights[0] * x.narrow(axis, 0, n)
        for offset, weight in enumerate(weights[1:], start=1):
            total.add_(x.narrow(axis, offset, n), alpha=weight)
        x = total
    return x

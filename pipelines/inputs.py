"""What a pipeline takes for frames: tensors, arrays and pictures, as torch and diffusers hand them around."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from latentcast.data.video.reader import fit_frames

RANGES = ((-1, 1), (0, 1))
FramesLike = torch.Tensor | np.ndarray | PIL.Image.Image | Sequence  # a clip, clips, or lists of either


def as_frames(
    frames: FramesLike,
    channels: int,
    height: int,
    width: int,
    value_range: Sequence[int] | None = None,
    crop: str = "center",
) -> FramesLike:
    """Bring clips of any usual kind into the one form that models take.

    Args:
        frames: (B, T, C, H, W) or (T, C, H, W) tensor; array, with the channels last as output_type="np" gives them or
            before the height as in tensors; list of PIL images; or a list of such clips. Integers are uint8.
        channels, height, width: of the frames that are expected: they tell where an array's channels are, and images
            become grey or RGB, and of that size.
        crop: how images of another shape get to it, see ``fit_frames``.
        value_range: (-1, 1) or (0, 1), of floats. None: arrays are in [0, 1], as diffusers' are, and tensors in
            [-1, 1]; those that look like [0, 1] are refused.
    Returns:
        (B, T, C, H, W) float in [-1, 1]; the rest (sizes, NaN) is left to ``check_frames``.
    Raises:
        ValueError: clips of different sizes, or a range that is not theirs.
    """
    if value_range is not None and tuple(value_range) not in RANGES:
        raise ValueError(f"value_range: expected (-1, 1), (0, 1) or None, found {value_range!r}")
    frames, kind = _stacked(frames, channels)
    is_array = kind != "tensor"
    if kind == "images":
        frames = _fitted(frames, (height, width), crop)
    elif is_array:
        frames = _channels_first(frames, (channels, height, width))
    if not torch.is_tensor(frames):
        return frames
    if frames.ndim == 4:
        frames = frames[None]
    if frames.dtype == torch.uint8:
        return frames.float() / 127.5 - 1
    if not frames.is_floating_point() or not frames.numel():
        return frames
    frames = frames.float() if frames.dtype == torch.float64 else frames
    low, high = (value.item() for value in torch.aminmax(frames.detach()))
    if value_range is None and not is_array:
        if low >= 0 and 0.5 < high <= 1 and high - low > 0.5:
            raise ValueError(
                f"frames: expected values in [-1, 1], found none below {low:.4g}, as in [0, 1]; give "
                "value_range=(0, 1), or value_range=(-1, 1) if they are as they should be"
            )
    elif value_range is None or tuple(value_range) == (0, 1):
        if not (low >= -0.005 and high <= 1.005):
            raise ValueError(
                f"frames: expected values in [0, 1], found [{low:.4g}, {high:.4g}]"
                f"{'; value_range=(-1, 1) says otherwise' if value_range is None else ''}"
            )
        frames = frames * 2 - 1
    return frames


def _stacked(frames, channels):
    """-> (one tensor, array, or what cannot be told; whether it is a "tensor", an "array" or "images")"""
    if isinstance(frames, PIL.Image.Image):
        return np.asarray(frames.convert("L" if channels == 1 else "RGB")).reshape(
            frames.height, frames.width, -1
        ), "images"
    if isinstance(frames, (list, tuple)) and frames:
        parts = [_stacked(part, channels) for part in frames]
        kinds = {kind for _, kind in parts}
        kinds = {"array"} if kinds == {"images", "array"} else kinds
        parts = [part for part, _ in parts]
        if len(kinds) > 1 or not all(isinstance(part, (torch.Tensor, np.ndarray)) for part in parts):
            return frames, "tensor"
        shapes = sorted({tuple(part.shape) for part in parts})
        if len(shapes) > 1:
            raise ValueError(f"frames: expected one shape, found {shapes[0]} and {shapes[1]}")
        (kind,) = kinds
        return (torch.stack if kind == "tensor" else np.stack)(parts), kind
    return frames, "array" if isinstance(frames, np.ndarray) else "tensor"


def _fitted(images, size, crop):
    """(..., H, W, C) uint8 array of images -> (..., C, *size) tensor."""
    frames = fit_frames(images.reshape(-1, *images.shape[-3:]), size, crop=crop)
    return frames.reshape(*images.shape[:-3], *frames.shape[1:])


def _channels_first(array, size):
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == np.uint8):
        raise ValueError(f"frames: expected floats or uint8, found {array.dtype}")
    channels, height, width = size
    last, first = (height, width, channels), (channels, height, width)
    if array.ndim >= 3 and (array.shape[-3:] == last or (array.shape[-3:] != first and array.shape[-1] == channels)):
        array = np.moveaxis(array, -1, -3)
    return torch.from_numpy(np.ascontiguousarray(array))

"""I3D, the network behind the Frechet video distance."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.shapes import Frames

from .frame import check_videos
from .precision import full_precision
from .weights import SOURCES, load_weights

SIZE = 224  # H = W of the frames that the network takes, pixels
MIN_FRAMES = 9
BATCH_NORM_EPS = 1e-3


class I3D(nn.Module):
    """Logits of the 400 classes of Kinetics: (B, T, C, H, W) in [-1, 1] -> (B, 400), the features of FVD.

    Carreira & Zisserman 2017, RGB stream, as published in TensorFlow (deepmind/i3d-kinetics-400/1). Grey is repeated to
    three channels. Frames are resized to 224 x 224 whatever their shape: bilinear, ``align_corners=False``, without
    antialiasing. The network halves time three times and then pools pairs of steps, so it needs 9 frames
    (the FVD code in common use asks for 10). Always in float32, under autocast too.

    Args:
        weights: folder or path of ``i3d_k400.safetensors``, or the path of ``i3d_torchscript.pt``, the scripted
            network that many papers call; None: found by `find_weights`.
        batch_size: videos that go through the network at once, which bounds the memory.
    Attributes:
        fingerprint: sha256 (hex) of the weights: of the arrays, or of the file of a scripted network.
    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights are altered; or, when called, fewer than 9 frames, channels other than 1 or 3, NaN, or
            values outside [-1, 1].
    """

    def __init__(self, weights: str | Path | None = None, batch_size: int = 8) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        self.batch_size = batch_size
        if str(weights).endswith(".pt"):
            self.network, self.fingerprint = _load_scripted(Path(weights))
            self.options = {"rescale": False, "resize": False, "return_features": True}
        else:
            self.network = InceptionI3D(load_weights("i3d_k400", weights))
            self.fingerprint = SOURCES["i3d_k400"].fingerprint
            self.options = {}
        self.eval().requires_grad_(False)

    def forward(self, videos: Frames) -> Float[Tensor, "B D"]:
        videos = check_videos("I3D: videos", videos)
        n_frames, channels = videos.shape[1:3]
        if n_frames < MIN_FRAMES:
            raise ValueError(f"I3D: expected videos of at least {MIN_FRAMES} frames, found {n_frames}")
        if channels not in (1, 3):
            raise ValueError(f"I3D: expected videos of 1 or 3 channels, found {channels}")
        with full_precision(videos.device):
            return torch.cat([self._logits(chunk.float()) for chunk in videos.split(self.batch_size)])

    def _logits(self, videos):
        frames = videos.flatten(0, 1)
        if frames.shape[-2:] != (SIZE, SIZE):
            frames = F.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        videos = frames.unflatten(0, videos.shape[:2]).transpose(1, 2)
        if not isinstance(self.network, InceptionI3D):
            videos = videos.expand(-1, 3, -1, -1, -1)
        return self.network(videos, **self.options)


class InceptionI3D(nn.Module):
    """The network itself: (B, C, T, 224, 224), C 3 or, grey, 1 -> (B, 400); widths are those of the arrays.

    Args:
        tensors: name -> array under the names and in the layout (time, height, width, in, out) of the published file.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()

        def unit(name, stride=1):
            return Unit(tensors, name, stride)

        def mixed(*names):
            return [Mixed(tensors, f"Mixed_{name}") for name in names]

        self.features = nn.Sequential(
            unit("Conv3d_1a_7x7", stride=2),
            MaxPool((1, 3, 3), (1, 2, 2)),
            unit("Conv3d_2b_1x1"),
            unit("Conv3d_2c_3x3"),
            MaxPool((1, 3, 3), (1, 2, 2)),
            *mixed("3b", "3c"),
            MaxPool((3, 3, 3), (2, 2, 2)),
            *mixed("4b", "4c", "4d", "4e", "4f"),
            MaxPool((2, 2, 2), (2, 2, 2)),
            *mixed("5b", "5c"),
        )
        name = "params.Logits/Conv3d_0c_1x1.Conv_0"
        self.weight = _frozen(tensors[f"{name}.kernel"].flatten(0, 3).T)
        self.bias = _frozen(tensors[f"{name}.bias"])

    def forward(self, videos: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D"]:
        pooled = F.avg_pool3d(self.features(videos), (2, 7, 7), stride=1)
        # The mean over time of the logits is the logits of the mean.
        return F.linear(pooled.mean((2, 3, 4)), self.weight, self.bias)


class Unit(nn.Module):
    """Convolution, batch normalisation without scale, ReLU; the normalisation is folded into the convolution."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, stride: int | Sequence[int] = 1) -> None:
        super().__init__()
        norm = f"{name}.BatchNorm_0"
        kernel = tensors[f"params.{name}.Conv_0.kernel"].double()
        mean, variance = (tensors[f"batch_stats.{norm}.{moment}"].double().flatten() for moment in ("mean", "var"))
        gain = (variance + BATCH_NORM_EPS).rsqrt()
        self.weight = _frozen((kernel * gain).permute(4, 3, 0, 1, 2))
        self.bias = _frozen(tensors[f"params.{norm}.bias"] - mean * gain)
        self.kernel, self.stride = tuple(kernel.shape[:3]), (stride,) * 3

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B out _ _ _"]:
        weight = self.weight
        if x.shape[1] == 1 < weight.shape[1]:  # of grey as of three equal channels, in a third of the operations
            weight = weight.sum(1, keepdim=True)
        x = F.pad(x, same_padding(x, self.kernel, self.stride))
        return F.relu(F.conv3d(x, weight, self.bias, self.stride), inplace=True)


class MaxPool(nn.Module):
    """Maximum over windows of values that are not negative."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C _ _ _"]:
        x = F.pad(x, same_padding(x, self.kernel, self.stride))
        # Axis after axis: on a CPU ten times as fast as max_pool3d, which would take 40 % of the network's time.
        for axis, size, stride in zip((4, 3, 2), reversed(self.kernel), reversed(self.stride)):
            last = (x.shape[axis] - size) // stride * stride + 1
            slices = (x.narrow(axis, offset, last).movedim(axis, 0)[::stride] for offset in range(size))
            x = functools.reduce(torch.maximum, slices).movedim(0, axis)
        return x


class Mixed(nn.Module):
    """Inception module: four branches, side by side along the channels."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()

        def units(branch, *convolutions):
            return [Unit(tensors, f"{name}.Branch_{branch}/Conv3d_{convolution}") for convolution in convolutions]

        self.branches = nn.ModuleList(
            [
                nn.Sequential(*units(0, "0a_1x1")),
                nn.Sequential(*units(1, "0a_1x1", "0b_3x3")),
                nn.Sequential(*units(2, "0a_1x1", "0b_3x3")),
                nn.Sequential(MaxPool((3, 3, 3), (1, 1, 1)), *units(3, "0b_1x1")),
            ]
        )

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B out T H W"]:
        return torch.cat([branch(x) for branch in self.branches], 1)


def same_padding(x: Float[Tensor, "B C T H W"], kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """TensorFlow's padding "SAME" of (B, C, T, H, W), as ``F.pad`` takes it.

    Output sizes are ceil(size / stride), and of an odd total the larger half goes behind. Zeros serve for the pooling
    as well, for its inputs are not negative.
    """
    totals = [max((-(-size // s) - 1) * s + k - size, 0) for size, k, s in zip(x.shape[2:], kernel, stride)]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]


def _frozen(values):
    return nn.Parameter(values.float().contiguous(), requires_grad=False)


def _load_scripted(path):
    """-> (module, sha256 of its file)"""
    content = path.read_bytes()
    try:
        network = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not a scripted network ({reason})") from None
    return network, hashlib.sha256(content).hexdigest()

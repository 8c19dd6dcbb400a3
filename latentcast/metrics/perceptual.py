"""LPIPS, the learned perceptual distance of Zhang et al. 2018, version 0.1."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.shapes import Frames

from .frame import check_videos
from .precision import full_precision
from .weights import SOURCES, load_weights

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the channels of images in [-1, 1]
EPS = 1e-10
# Pixels that go through the network at once: 64 and 16 frames of 64 x 64 on a CPU, sixteen times as many elsewhere.
BATCH_PIXELS = {"alex": 2**18, "vgg": 2**16}
# net -> (file, prefix of its convolutions, window of its pooling, side of the smallest image,
#         stages: (pooling before it, stride and padding of each convolution); features are taken after every stage)
NETS = {
    "alex": (
        "lpips_alex",
        "AlexNet_0",
        3,
        31,
        [(False, [(4, 2)]), (True, [(1, 2)]), (True, [(1, 1)]), (False, [(1, 1)]), (False, [(1, 1)])],
    ),
    "vgg": (
        "lpips_vgg16",
        "VGG16_0",
        2,
        16,
        [(False, [(1, 1)] * 2), (True, [(1, 1)] * 2), *[(True, [(1, 1)] * 3)] * 3],
    ),
}
SMALLEST = {net: side for net, (_, _, _, side, _) in NETS.items()}  # H and W of the frames, pixels


class LPIPS(nn.Module):
    """Perceptual distance of each frame: (B, T, C, H, W) twice, in [-1, 1] -> (B, T); 0 for equal frames.

    Version 0.1 with the linear layers: at every spatial position the features of five layers are divided by their
    length, the squared differences weighted by channel, and averaged over positions, summed over layers (Zhang et al.
    2018, equation 1). Grey is repeated to three channels; frames are not resized.

    ``features`` and ``distance`` are its two halves, for a frame that is compared many times. Gradients reach the
    frames. Always in float32, under autocast too.

    Args:
        net: "alex", which most papers report, or "vgg".
        weights: folder of the weights; None: found by `find_weights`.
        batch_size: frames that go through the network at once, which bounds the memory; None: as many as suit the
            device, by their size.
    Attributes:
        fingerprint: sha256 (hex) of the weights.
    Raises:
        FileNotFoundError: there are no weights.
        ValueError: an unknown net or altered weights; or, when called, unlike shapes, channels other than 1 or 3, NaN,
            values outside [-1, 1], or frames smaller than 31 (alex) or 16 (vgg) pixels.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None, batch_size: int | None = None) -> None:
        super().__init__()
        if net not in NETS:
            raise ValueError(f"LPIPS: expected net {' or '.join(NETS)}, found {net!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        file, prefix, self.window, self.min_size, self.layout = NETS[net]
        self.net, self.batch_size, self.fingerprint = net, batch_size, SOURCES[file].fingerprint
        tensors = load_weights(file, weights)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.kernels, self.biases, self.gains = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i in range(sum(len(convolutions) for _, convolutions in self.layout)):
            kernel = tensors[f"{prefix}.Conv_{i}.kernel"].permute(3, 2, 0, 1)
            if i == 0:
                kernel = kernel / torch.tensor(SCALE).view(3, 1, 1)
            self.kernels.append(kernel.contiguous())
            self.biases.append(tensors[f"{prefix}.Conv_{i}.bias"])
        for i in range(len(self.layout)):  # the weights are not negative
            self.gains.append(tensors[f"NetLinLayer_{i}.Conv_0.kernel"].sqrt().view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, prediction: Frames, target: Frames) -> Float[Tensor, "B T"]:
        target = check_videos("lpips: target", target)
        prediction = check_videos("lpips: prediction", prediction)
        if prediction.shape != target.shape:
            raise ValueError(
                f"lpips: expected prediction and target of one shape, found {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}"
            )
        distances = []
        for pair in zip(*(video.flatten(0, 1).split(self._step(video)) for video in (prediction, target))):
            distances.append(self.distance(*map(self._features, pair)))
        return torch.cat(distances).unflatten(0, target.shape[:2])

    def features(self, frames: Frames) -> list[Float[Tensor, "B T _"]]:
        """Of each layer, what ``distance`` takes; of frames in [-1, 1]."""
        frames = check_videos("lpips: frames", frames)
        chunks = [self._features(chunk) for chunk in frames.flatten(0, 1).split(self._step(frames))]
        return [torch.cat(layers).unflatten(0, frames.shape[:2]) for layers in zip(*chunks)]

    @staticmethod
    def distance(
        features: Sequence[Float[Tensor, "*clips _"]], others: Sequence[Float[Tensor, "*others _"]]
    ) -> Float[Tensor, "..."]:
        """LPIPS from two lists of features, whose leading axes broadcast: the sum of squared Euclidean distances."""
        distances = [torch.linalg.vector_norm(x - y, dim=-1).square() for x, y in zip(features, others)]
        return sum(distances[1:], distances[0])

    def _step(self, frames):
        if self.batch_size is not None:
            return self.batch_size
        pixels = BATCH_PIXELS[self.net] * (1 if frames.device.type == "cpu" else 16)
        return max(1, pixels // math.prod(frames.shape[-2:]))

    def _features(self, images):
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < self.min_size:
            raise ValueError(
                f"lpips: expected frames of 1 or 3 channels and at least {self.min_size} x {self.min_size} pixels, "
                f"found (C, H, W) = {tuple(images.shape[1:])}"
            )
        features = []
        with full_precision(images.device):
            for x, gain in zip(self.stages(images.float()), self.gains):
                length = torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS
                x = (x / length).mul_(gain / math.sqrt(x[0, 0].numel()))
                features.append(x.permute(0, 2, 3, 1).flatten(1))
        return features

    def stages(self, images: Float[Tensor, "N C H W"]) -> Iterator[Float[Tensor, "N _ _ _"]]:
        """The network alone: images in [-1, 1] -> one map after another, five in all."""
        x = images - self.shift
        if x.device.type == "cpu":  # faster convolutions, and channels side by side for the lengths
            x = x.contiguous(memory_format=torch.channels_last)
        layers = zip(self.kernels, self.biases)
        for pool, convolutions in self.layout:
            if pool:
                x = F.max_pool2d(x, self.window, 2)
            for (stride, padding), (kernel, bias) in zip(convolutions, layers):
                x = F.relu(F.conv2d(x, kernel, bias, stride, padding), inplace=True)
            yield x


def lpips(
    prediction: Frames, target: Frames, net: str = "alex", weights: str | Path | None = None
) -> Float[Tensor, "B T"]:
    """LPIPS of each frame, of frames in [-1, 1]; arguments and errors as for `LPIPS`.

    The network is kept, one for each net, folder and device.
    """
    return _kept(net, weights, target.device)(prediction, target)


@functools.cache
def _kept(net, weights, device):
    return LPIPS(net, weights).to(device)

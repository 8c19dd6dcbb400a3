"""The interface of stage one: a frame tokenizer turns frames into latents (and codes) and back."""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from latentcast.modeling import VideoModel
from latentcast.shapes import Codes, Frames, Latents, Scalar

from .losses import reconstruction_loss


@dataclass
class TokenizerOutput(BaseOutput):
    """What ``encode`` returns.

    latents: multiplied by ``scaling_factor``. For a discrete tokenizer these are the quantised latents, exactly what
        the decoder sees.
    codes: int64, or None for a continuous tokenizer.
    posterior: mean and log-variance of the latents, stacked along the channels; the means are ``latents``. None for a
        tokenizer without ``has_posterior``.
    """

    latents: Latents
    codes: Codes | None = None
    posterior: Float[Tensor, "B T moments h w"] | None = None


@dataclass
class ReconstructionOutput(BaseOutput):
    """What ``forward`` returns.

    frames: the reconstruction, in [-1, 1].
    loss: to minimise.
    logs: by name, detached, for the logger.
    codes: int64 that were decoded, or None for a continuous tokenizer.
    """

    frames: Frames
    loss: Scalar
    logs: dict[str, Scalar] = field(default_factory=dict)
    codes: Codes | None = None


class LatentSpec(TypedDict):
    """What latents are like, in JSON, and the frames that they stand for.

    kind: "discrete", "continuous" or "pixels". codebook_sizes: empty when continuous.
    """

    kind: str
    channels: int
    height: int
    width: int
    codebook_sizes: list[int]
    scaling_factor: float
    frame_channels: int
    frame_height: int
    frame_width: int


Weights = Sequence[Float[Tensor, "B T h w _"]]  # a distribution over the codes of each codebook, summing to 1 over them


_trusted = contextvars.ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Inside the block, a training step, checks look at no values for which the host would have to wait for a GPU; a
    run has tried a clip on the CPU before. Shapes and types are checked as ever."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def _may_look(tensor):
    """Whether a check may look at the values; under compilation that would break the graph."""
    on_cpu = tensor.device.type == "cpu"
    return tensor.numel() > 0 and not torch.compiler.is_compiling() and (on_cpu or not _trusted.get())


def check_frames(
    frames: Frames,
    channels: int | None = None,
    height: int | None = None,
    width: int | None = None,
    name: str = "frames",
) -> None:
    """Refuse anything that is not float frames in [-1, 1] of the given sizes."""
    if not torch.is_tensor(frames) or frames.ndim != 5:
        found = tuple(frames.shape) if torch.is_tensor(frames) else type(frames).__name__
        raise ValueError(f"{name}: expected a tensor of shape (B, T, C, H, W), found {found}")
    if not frames.is_floating_point():
        raise ValueError(f"{name}: expected floats in [-1, 1], found {frames.dtype} (for uint8: x / 127.5 - 1)")
    for index, (axis, expected) in enumerate(zip("CHW", (channels, height, width)), start=2):
        if expected is not None and frames.shape[index] != expected:
            raise ValueError(f"{name}: expected {axis} = {expected}, found {tuple(frames.shape)} (B, T, C, H, W)")
    if _may_look(frames):
        low, high = torch.stack(torch.aminmax(frames.detach())).tolist()  # one wait for the device, not two
        if not (low >= -1.01 and high <= 1.01):  # also catches NaN; the margin is for half precision and resampling
            raise ValueError(f"{name}: expected values in [-1, 1], found [{low:.4g}, {high:.4g}]")


def check_codes(
    codes: Codes, codebook_sizes: Sequence[int], grid: Sequence[int] | None = None, name: str = "codes"
) -> None:
    """Refuse anything that is not int64 codes within the codebooks."""
    n = len(codebook_sizes)
    if not torch.is_tensor(codes) or codes.ndim != 5 or codes.shape[-1] != n:
        found = tuple(codes.shape) if torch.is_tensor(codes) else type(codes).__name__
        raise ValueError(f"{name}: expected shape (B, T, h, w, {n}), found {found}")
    if grid is not None and tuple(codes.shape[2:4]) != tuple(grid):
        raise ValueError(f"{name}: expected a grid of {tuple(grid)} (h, w), found {tuple(codes.shape[2:4])}")
    if codes.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, found {codes.dtype}")
    if _may_look(codes):
        parts = [codes] if len(set(codebook_sizes)) == 1 else codes.unbind(-1)
        found = torch.stack([end for part in parts for end in torch.aminmax(part)]).tolist()
        if min(found) < 0 or any(high >= size for high, size in zip(found[1::2], codebook_sizes)):
            raise ValueError(
                f"{name}: expected values in [0, {min(codebook_sizes)}), found [{min(found)}, {max(found)}]"
            )


def check_weights(weights: Weights, codebook_sizes: Sequence[int], grid: Sequence[int], name: str = "weights") -> None:
    """Refuse anything that is not a float tensor for each codebook, K long of K codes."""
    expected = [(*grid, size) for size in codebook_sizes]
    found = [tuple(w.shape) if torch.is_tensor(w) else type(w).__name__ for w in weights]
    if [shape[2:] for shape in found] != expected or len({shape[:2] for shape in found}) != 1:
        wanted = ", ".join(f"(B, T, {', '.join(map(str, shape))})" for shape in expected)
        raise ValueError(f"{name}: expected a tensor a codebook, of shapes {wanted}, found {found}")
    if not all(w.is_floating_point() for w in weights):
        raise ValueError(f"{name}: expected floats, found {[w.dtype for w in weights]}")


def check_latents(latents: Latents, channels: int, height: int, width: int, name: str = "latents") -> None:
    """Refuse anything that is not float latents of that size."""
    expected = f"(B, T, {channels}, {height}, {width})"
    if not torch.is_tensor(latents) or latents.ndim != 5 or tuple(latents.shape[2:]) != (channels, height, width):
        found = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
        raise ValueError(f"{name}: expected shape {expected}, found {found}")
    if not latents.is_floating_point():
        raise ValueError(f"{name}: expected floats, found {latents.dtype}")


def mix_rows(weights: Float[Tensor, "*rows K"], table: Float[Tensor, "K D"]) -> Float[Tensor, "*rows D"]:
    """Sums of a table's rows, exact where weights are one-hot: fp32 under any autocast."""
    with torch.autocast(weights.device.type, enabled=False):
        return weights.float() @ table.float()


class FrameTokenizer(VideoModel):
    """Base class of stage one.

    A tokenizer works frame by frame: time is only carried along. Contract, tested for every subclass:
    ``decode(codes_to_latents(codes))`` equals ``decode(latents)``; encoding to disk, reading back and decoding equals
    ``forward``; ``decode`` never quantises.
    """

    has_posterior = False  # True: ``encode`` gives a Gaussian for every latent (see TokenizerOutput)
    has_layers = False  # True: codes are in layers, coarse to fine, and ``decode`` takes ``n_layers``

    @property
    def latent_spec(self) -> LatentSpec:
        """What a prior has to know of the latents."""
        raise NotImplementedError

    def spec_of(
        self, channels: int, height: int, width: int, codebook_sizes: Sequence[int] = (), **others: int | str
    ) -> LatentSpec:
        """``latent_spec`` of latents of that size; ``others`` takes the place of what follows from the config."""
        config = self.config
        spec = LatentSpec(
            kind="discrete" if codebook_sizes else "continuous",
            channels=channels,
            height=height,
            width=width,
            codebook_sizes=list(codebook_sizes),
            scaling_factor=config.get("scaling_factor", 1.0),
            frame_channels=config.get("in_channels"),
            frame_height=config.height,
            frame_width=config.width,
        )
        return LatentSpec(**spec | others)

    @property
    def is_discrete(self) -> bool:
        return len(self.latent_spec["codebook_sizes"]) > 0

    @property
    def needs_training(self) -> bool:
        """False for a tokenizer that encodes well as it was constructed."""
        return next(self.parameters(), None) is not None

    def settle(self, settled: bool) -> None:
        """Told before every training step whether the run is in its last part: what then jumps (codes that are revived)
        would not be followed by the moving average of the weights before the end."""

    def encode(self, frames: Frames) -> TokenizerOutput:
        """Frames, in [-1, 1], to latents and codes."""
        raise NotImplementedError

    def decode(self, latents: Latents) -> Frames:
        """Latents to frames, in [-1, 1]. Never quantises."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_chunked(self, frames: Frames, chunk: int = 16) -> TokenizerOutput:
        """``encode`` for long videos: ``chunk`` frames at once, whatever the length.

        The network always sees exactly ``chunk`` frames (the last ones are repeated to fill up), since kernels, and
        with them the last bits, may change with the size of a batch. A frame so gets the same bits alone, in a piece of
        a video and in the whole. A video too long for memory is encoded piece by piece, each with the same ``chunk``.

        Args:
            frames: in [-1, 1], on any device; chunks of it are moved to the model's.
            chunk: at least 1. For speed on a GPU, small frames want more.
        Returns:
            the same without gradients, on the device of ``frames``.
        Raises:
            ValueError: as ``encode``, no frames at all, or a ``chunk`` below 1.
        """
        spec = self.latent_spec
        check_frames(frames, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
        return TokenizerOutput(**_in_chunks(self.encode, frames, chunk, self.device, "frames"))

    @torch.no_grad()
    def decode_chunked(self, latents: Latents | Codes, chunk: int = 16) -> Frames:
        """``decode`` for long videos, with the promise of ``encode_chunked``.

        Args:
            latents: or codes, int64.
            chunk: as in ``encode_chunked``.
        Returns:
            frames without gradients, on the device of ``latents``.
        Raises:
            ValueError: as ``decode`` or ``codes_to_latents``, nothing to decode, or a ``chunk`` below 1.
        """
        spec, is_codes = self.latent_spec, torch.is_tensor(latents) and latents.dtype == torch.int64
        if is_codes and self.is_discrete:
            check_codes(latents, spec["codebook_sizes"], (spec["height"], spec["width"]))
        else:
            check_latents(latents, spec["channels"], spec["height"], spec["width"])

        def decode(piece):
            return {"frames": self.decode(self.codes_to_latents(piece) if is_codes else piece)}

        return _in_chunks(decode, latents, chunk, self.device, "codes" if is_codes else "latents")["frames"]

    def codes_to_latents(self, codes: Codes) -> Latents:
        """What the decoder sees of codes (int64). Discrete tokenizers only."""
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def latents_to_codes(self, latents: Latents) -> Codes:
        """The nearest codes, int64. Discrete tokenizers only."""
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def weights_to_latents(self, weights: Weights) -> Latents:
        """``codes_to_latents`` for distributions over codes, through which gradients pass. Discrete tokenizers only.

        Returns:
            the code vectors' weighted mean, fp32; where every weight is 0 or 1, exactly the latents of those codes.
            Where codebooks form a tree, the codes mixed are those below the codes of largest weight.
        """
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that ``decode`` alone uses: when they change, all codes stay what they are.

        For training a discrete tokenizer jointly with a prior; empty where the decoder has nothing to learn.
        """
        return []

    def decoder_loss(self, latents: Latents, frames: Frames) -> tuple[Scalar, dict[str, Scalar]]:
        """The first term of the training loss, of given latents: how far they are, decoded, from the frames.

        Gradients pass where ``decode`` clamps. Tokenizers that are trained only.

        Args:
            frames: in [-1, 1].
        Returns:
            loss and logs, see ``losses.py``.
        """
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        return reconstruction_loss(self._decode(latents), frames, *options)

    def quantize(self, latents: Latents) -> Latents:
        """Snap the output of a continuous prior to the codebook."""
        return self.codes_to_latents(self.latents_to_codes(latents))

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct frames, in [-1, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def fit_scaling_factor(self, batches: Iterable[Frames]) -> float:
        """Choose ``scaling_factor`` so that the latents of ``batches`` have unit variance, and keep it in the config.

        Latents and caches made before are on the old scale, so call it once, after training and before encoding.

        Returns:
            the new factor.
        Raises:
            ValueError: no batches, latents that do not vary, or a tokenizer without a ``scaling_factor``.
        """
        if "scaling_factor" not in self.config:
            raise ValueError(f"{type(self).__name__}: has no scaling_factor to fit")
        n, total, total_of_squares = 0, 0.0, 0.0
        for frames in batches:
            latents = self.encode(frames).latents.double() / self.config.scaling_factor
            n += latents.numel()
            total += latents.sum().item()
            total_of_squares += latents.square().sum().item()
        variance = total_of_squares / n - (total / n) ** 2 if n else 0.0
        if not variance > 0:
            raise ValueError(f"scaling_factor: expected latents that vary, found variance {variance} over {n} numbers")
        self.register_to_config(scaling_factor=variance**-0.5)
        return self.config.scaling_factor


def _in_chunks(function, x, chunk, device, name):
    """Apply ``function``: (1, chunk, ...) -> {name: (1, chunk, ...)} to x (B, T, ...) -> {name: (B, T, ...)}."""
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, found {chunk}")
    flat = x.flatten(0, 1)
    if len(flat) == 0:
        raise ValueError(f"{name}: expected at least one frame, found {tuple(x.shape)}")
    whole = {}
    for start in range(0, len(flat), chunk):
        piece = flat[start : start + chunk]
        filled = torch.cat([piece, piece[-1:].expand(chunk - len(piece), *piece.shape[1:])])
        for key, value in function(filled.to(device)[None]).items():
            if key not in whole:
                whole[key] = torch.empty(len(flat), *value.shape[2:], dtype=value.dtype, device=x.device)
            whole[key][start : start + len(piece)] = value[0, : len(piece)]
    return {key: value.unflatten(0, x.shape[:2]) for key, value in whole.items()}

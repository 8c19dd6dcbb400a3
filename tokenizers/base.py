"""The interface of stage one: a frame tokenizer turns frames into latents (and codes) and back."""

import contextlib
import contextvars
from dataclasses import dataclass, field

import torch
from diffusers.utils import BaseOutput

from latentcast.modeling import VideoModel

from .losses import reconstruction_loss


@dataclass
class TokenizerOutput(BaseOutput):
    """What ``encode`` returns.

    latents: (B, T, D, h, w) float, multiplied by ``scaling_factor``. For a discrete tokenizer these are the quantised
        latents, exactly what the decoder sees.
    codes: (B, T, h, w, n_codebooks) int64, or None for a continuous tokenizer.
    posterior: (B, T, 2 D, h, w) float, or None for a tokenizer without ``has_posterior``: mean and log-variance of the
        latents, stacked along the channels; the means are ``latents``.
    """

    latents: torch.Tensor
    codes: torch.Tensor | None = None
    posterior: torch.Tensor | None = None


@dataclass
class ReconstructionOutput(BaseOutput):
    """What ``forward`` returns.

    frames: (B, T, C, H, W) reconstruction in [-1, 1].
    loss: scalar training loss.
    logs: name -> detached scalar tensor, for the logger.
    codes: (B, T, h, w, n_codebooks) int64 that were decoded, or None for a continuous tokenizer.
    """

    frames: torch.Tensor
    loss: torch.Tensor
    logs: dict = field(default_factory=dict)
    codes: torch.Tensor | None = None


_trusted = contextvars.ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusted():
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


def check_frames(frames, channels=None, height=None, width=None, name="frames"):
    """Refuse anything that is not a float (B, T, C, H, W) batch in [-1, 1] of the given sizes."""
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


def check_codes(codes, codebook_sizes, grid=None, name="codes"):
    """Refuse anything that is not an int64 (B, T, h, w, n_codebooks) tensor within the codebooks."""
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


def check_weights(weights, codebook_sizes, grid, name="weights"):
    """Refuse anything that is not a list with one float (B, T, h, w, K) tensor for each codebook of K codes."""
    expected = [(*grid, size) for size in codebook_sizes]
    found = [tuple(w.shape) if torch.is_tensor(w) else type(w).__name__ for w in weights]
    if [shape[2:] for shape in found] != expected or len({shape[:2] for shape in found}) != 1:
        wanted = ", ".join(f"(B, T, {', '.join(map(str, shape))})" for shape in expected)
        raise ValueError(f"{name}: expected a tensor a codebook, of shapes {wanted}, found {found}")
    if not all(w.is_floating_point() for w in weights):
        raise ValueError(f"{name}: expected floats, found {[w.dtype for w in weights]}")


def check_latents(latents, channels, height, width, name="latents"):
    """Refuse anything that is not a float (B, T, channels, height, width) tensor."""
    expected = f"(B, T, {channels}, {height}, {width})"
    if not torch.is_tensor(latents) or latents.ndim != 5 or tuple(latents.shape[2:]) != (channels, height, width):
        found = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
        raise ValueError(f"{name}: expected shape {expected}, found {found}")
    if not latents.is_floating_point():
        raise ValueError(f"{name}: expected floats, found {latents.dtype}")


def mix_rows(weights, table):
    """Sums of a table's rows, exact where weights are one-hot: (..., K), (K, D) -> (..., D) fp32 under any autocast."""
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
    def latent_spec(self):
        """JSON-able description of the latents: ``kind`` ("discrete", "continuous" or "pixels"), ``channels``,
        ``height``, ``width``, ``codebook_sizes`` (list, empty when continuous), ``scaling_factor``, and
        ``frame_channels``, ``frame_height``, ``frame_width`` of the frames they stand for."""
        raise NotImplementedError

    def spec_of(self, channels, height, width, codebook_sizes=(), **others):
        """``latent_spec`` of latents of that size; ``others`` takes the place of what follows from the config."""
        config = self.config
        return {
            "kind": "discrete" if codebook_sizes else "continuous",
            "channels": channels,
            "height": height,
            "width": width,
            "codebook_sizes": list(codebook_sizes),
            "scaling_factor": config.get("scaling_factor", 1.0),
            "frame_channels": config.get("in_channels"),
            "frame_height": config.height,
            "frame_width": config.width,
        } | others

    @property
    def is_discrete(self):
        return len(self.latent_spec["codebook_sizes"]) > 0

    @property
    def needs_training(self):
        """False for a tokenizer that encodes well as it was constructed."""
        return next(self.parameters(), None) is not None

    def settle(self, settled):
        """Told before every training step whether the run is in its last part: what then jumps (codes that are revived)
        would not be followed by the moving average of the weights before the end."""

    def encode(self, frames):
        """(B, T, C, H, W) in [-1, 1] -> TokenizerOutput."""
        raise NotImplementedError

    def decode(self, latents):
        """(B, T, D, h, w) -> (B, T, C, H, W) in [-1, 1]. Never quantises."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_chunked(self, frames, chunk=16):
        """``encode`` for long videos: ``chunk`` frames at once, whatever the length.

        The network always sees exactly ``chunk`` frames (the last ones are repeated to fill up), since kernels, and
        with them the last bits, may change with the size of a batch. A frame so gets the same bits alone, in a piece of
        a video and in the whole. A video too long for memory is encoded piece by piece, each with the same ``chunk``.

        Args:
            frames: (B, T, C, H, W) in [-1, 1], on any device; chunks of it are moved to the model's.
            chunk: at least 1. For speed on a GPU, small frames want more.
        Returns:
            TokenizerOutput, without gradients, on the device of ``frames``.
        Raises:
            ValueError: as ``encode``, no frames at all, or a ``chunk`` below 1.
        """
        spec = self.latent_spec
        check_frames(frames, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
        return TokenizerOutput(**_in_chunks(self.encode, frames, chunk, self.device, "frames"))

    @torch.no_grad()
    def decode_chunked(self, latents, chunk=16):
        """``decode`` for long videos, with the promise of ``encode_chunked``.

        Args:
            latents: (B, T, D, h, w), or codes (B, T, h, w, n_codebooks) int64.
            chunk: as in ``encode_chunked``.
        Returns:
            (B, T, C, H, W), without gradients, on the device of ``latents``.
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

    def codes_to_latents(self, codes):
        """(B, T, h, w, n_codebooks) int64 -> (B, T, D, h, w). Discrete tokenizers only."""
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def latents_to_codes(self, latents):
        """(B, T, D, h, w) -> (B, T, h, w, n_codebooks), by nearest code. Discrete tokenizers only."""
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def weights_to_latents(self, weights):
        """``codes_to_latents`` for distributions over codes, through which gradients pass. Discrete tokenizers only.

        Args:
            weights: list with one float tensor (B, T, h, w, K) for each codebook of K codes, summing to 1 over them.
        Returns:
            (B, T, D, h, w) fp32: the code vectors' weighted mean; where every weight is 0 or 1, exactly the latents of
            those codes. Where codebooks form a tree, the codes mixed are those below the codes of largest weight.
        """
        raise ValueError(f"{type(self).__name__} is a continuous tokenizer: it has no codes")

    def decoder_parameters(self):
        """The parameters that ``decode`` alone uses, a list: when they change, all codes stay what they are.

        For training a discrete tokenizer jointly with a prior; empty where the decoder has nothing to learn.
        """
        return []

    def decoder_loss(self, latents, frames):
        """The first term of the training loss, of given latents: how far they are, decoded, from the frames.

        Gradients pass where ``decode`` clamps. Tokenizers that are trained only.

        Args:
            latents: (B, T, D, h, w).
            frames: (B, T, C, H, W) in [-1, 1].
        Returns:
            (scalar, logs), see ``losses.py``.
        """
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        return reconstruction_loss(self._decode(latents), frames, *options)

    def quantize(self, latents):
        """Snap the output of a continuous prior to the codebook: (B, T, D, h, w) -> the same shape."""
        return self.codes_to_latents(self.latents_to_codes(latents))

    def forward(self, frames):
        """Reconstruct: (B, T, C, H, W) in [-1, 1] -> ReconstructionOutput."""
        raise NotImplementedError

    @torch.no_grad()
    def fit_scaling_factor(self, batches):
        """Choose ``scaling_factor`` so that the latents of ``batches`` have unit variance, and keep it in the config.

        Latents and caches made before are on the old scale, so call it once, after training and before encoding.

        Args:
            batches: an iterable of frames (B, T, C, H, W).
        Returns:
            the new factor, a float.
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

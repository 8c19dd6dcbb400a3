"""The frame autoencoder of the Latent Video Transformer (Rakhimov et al. 2020, sections 3.1 and 4.1): a VQ-VAE."""

from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import nn

from latentcast.config import check_counts
from latentcast.layers.convolutions import ResidualBlock
from latentcast.shapes import Codes, Frames, Latents
from latentcast.sizes import check_stride

from .base import (
    FrameTokenizer,
    LatentSpec,
    ReconstructionOutput,
    TokenizerOutput,
    Weights,
    check_codes,
    check_frames,
    check_latents,
    check_weights,
)
from .losses import check_reconstruction_options, reconstruction_loss
from .quantizers.ema_codebook import EMACodebook
from .quantizers.sliced import SlicedQuantizer


class ConvolutionalVQ(FrameTokenizer):
    """What VQ-VAEs share: the convolutional encoder and decoder of the Latent Video Transformer around a quantizer.

    A subclass takes these arguments of ``VQVAE``: ``in_channels`` to ``embedding_dim``, ``commitment_weight``, and from
    ``reconstruction_loss`` on. Its ``__init__`` calls ``_build_networks`` and sets ``quantizer``, a module like
    ``SlicedQuantizer``; it says ``codebook_sizes``.
    """

    _keep_in_fp32_modules = ["quantizer"]  # noqa: RUF012
    memory_format = torch.channels_last  # convolutions are about twice as fast so

    def _build_networks(self):
        """Check the config and make ``encoder`` and ``decoder`` from it."""
        config = self.config
        output_activation, padding_mode, stride = config.output_activation, config.padding_mode, config.stride
        hidden_channels, residual_channels = config.hidden_channels, config.residual_channels
        check_reconstruction_options(config.reconstruction_loss, config.lpips_weight)
        check_counts(in_channels=config.in_channels, embedding_dim=config.embedding_dim)
        check_counts(residual_channels=residual_channels)
        check_counts(2, hidden_channels=hidden_channels)  # half of them after the first convolution
        check_counts(0, n_residual_blocks=config.n_residual_blocks)
        if output_activation not in ("tanh", "linear"):
            raise ValueError(f"output_activation: expected 'tanh' or 'linear', found {output_activation!r}")
        if padding_mode not in ("zeros", "replicate"):
            raise ValueError(f"padding_mode: expected 'zeros' or 'replicate', found {padding_mode!r}")
        if stride not in (2, 4, 8, 16):
            raise ValueError(f"stride: expected 2, 4, 8 or 16, found {stride}")
        check_stride(config.height, config.width, stride)
        n_halvings = stride.bit_length() - 1
        widths = [config.in_channels, hidden_channels // 2] + [hidden_channels] * (n_halvings - 1)

        encoder = []
        for narrow, wide in pairwise(widths):
            encoder += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1, padding_mode=padding_mode), nn.ReLU()]
        encoder += [nn.Conv2d(widths[-1], hidden_channels, 3, padding=1, padding_mode=padding_mode)]
        encoder += [
            ResidualBlock(hidden_channels, residual_channels, padding_mode) for _ in range(config.n_residual_blocks)
        ]
        if config.embedding_dim != hidden_channels:
            encoder += [nn.Conv2d(hidden_channels, config.embedding_dim, 1)]
        self.encoder = nn.Sequential(*encoder)

        decoder = [nn.Conv2d(config.embedding_dim, hidden_channels, 3, padding=1, padding_mode=padding_mode)]
        decoder += [
            ResidualBlock(hidden_channels, residual_channels, padding_mode) for _ in range(config.n_residual_blocks)
        ]
        widths = [hidden_channels, *widths[-2::-1]]
        for wide, narrow in pairwise(widths):
            decoder += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*decoder)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # as in the published code
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.to(memory_format=self.memory_format)

    @property
    def codebook_sizes(self) -> list[int]:
        """Codes in each codebook."""
        raise NotImplementedError

    @property
    def latent_spec(self) -> LatentSpec:
        config = self.config
        grid = config.height // config.stride, config.width // config.stride
        return self.spec_of(config.embedding_dim, *grid, self.codebook_sizes)

    def encode(self, frames: Frames) -> TokenizerOutput:
        """As FrameTokenizer's. Never changes the codebooks, in training mode neither."""
        codes = self.quantizer.nearest(self._features(frames))
        return TokenizerOutput(latents=self.codes_to_latents(codes), codes=codes)

    def decode(self, latents: Latents) -> Frames:
        """Latents to frames, fp32 in [-1, 1]. Never quantises."""
        return self._decode(latents).clamp(-1, 1)

    def codes_to_latents(self, codes: Codes) -> Latents:
        """The code vectors, scaled, fp32."""
        spec = self.latent_spec
        check_codes(codes, spec["codebook_sizes"], (spec["height"], spec["width"]))
        return self._to_latents(self.quantizer.lookup(codes))

    def latents_to_codes(self, latents: Latents) -> Codes:
        """The nearest code of every part, int64."""
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        return self.quantizer.nearest(latents.float().movedim(2, -1) / self.config.scaling_factor)

    def weights_to_latents(self, weights: Weights) -> Latents:
        """The code vectors' weighted mean, scaled, fp32; see ``FrameTokenizer``."""
        spec = self.latent_spec
        check_weights(weights, spec["codebook_sizes"], (spec["height"], spec["width"]))
        return self._to_latents(self.quantizer.mix(weights))

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that ``decode`` alone uses."""
        return list(self.decoder.parameters())

    def settle(self, settled: bool) -> None:
        for module in self.quantizer.modules():
            if isinstance(module, EMACodebook):
                module.revives = not settled

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct, and in training mode update the codebooks.

        The loss is eq. 1 with means for the norms: mse(frames, D(z_q)) + commitment_weight * mse(z_e, sg[z_q]);
        ``reconstruction_loss`` and ``lpips_weight`` change its first term.

        Args:
            frames: in [-1, 1].
        Returns:
            ``logs`` has ``reconstruction_loss``, ``lpips`` where it is weighted,
            ``commitment_loss`` (unweighted) and ``perplexity`` (of this batch's codes, mean over the codebooks).
        """
        config = self.config
        quantized = self.quantizer(self._features(frames))
        reconstruction = self._decode(self._to_latents(quantized.latents))
        distance, logs = reconstruction_loss(reconstruction, frames, config.reconstruction_loss, config.lpips_weight)
        penalty, quantizer_logs = self._quantizer_loss(quantized)
        return ReconstructionOutput(
            frames=reconstruction.clamp(-1, 1),
            loss=distance + penalty,
            codes=quantized.codes,
            logs=logs | quantizer_logs | {"perplexity": quantized.perplexity.mean()},
        )

    def _quantizer_loss(self, quantized):
        """The terms of the loss that come from the quantizer: (scalar, logs)."""
        commitment_loss = quantized.commitment_loss
        return self.config.commitment_weight * commitment_loss, {"commitment_loss": commitment_loss.detach()}

    def _features(self, frames):
        """Encoder output with the channels last: (B, T, C, H, W) -> (B, T, h, w, D)."""
        check_frames(frames, self.config.in_channels, self.config.height, self.config.width)
        features = self.encoder(rearrange(frames.to(self.dtype), "b t ... -> (b t) ..."))
        return rearrange(features, "(b t) d h w -> b t h w d", t=frames.shape[1])

    def _decode(self, latents):
        """``decode`` before the clamp, which would stop the gradient of a linear output."""
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        features = (latents / self.config.scaling_factor).to(self.dtype)
        frames = self.decoder(rearrange(features, "b t ... -> (b t) ...")).float()
        frames = rearrange(frames, "(b t) ... -> b t ...", t=latents.shape[1])
        return frames.tanh() if self.config.output_activation == "tanh" else frames

    def _to_latents(self, vectors):
        latents = vectors.movedim(-1, 2).clone(memory_format=torch.contiguous_format)
        return latents.mul_(self.config.scaling_factor)


class VQVAE(ConvolutionalVQ):
    """VQ-VAE over single frames, with Sliced VQ when ``n_codebooks`` is above 1.

    The defaults are the paper's for BAIR (3.68M numbers with the codebook); for Kinetics-600 it has 4 residual blocks.
    Frames of another size need another ``height`` and ``width``; the weights do not depend on them, so
    ``VQVAE.from_pretrained(path, height=128, width=128)`` reuses a trained model.

    Args:
        in_channels: C of the frames: 3 (RGB), 1 (grey), or any number of other data.
        height, width: H and W of the frames in pixels, multiples of ``stride``.
        hidden_channels: width of the network; the outermost convolution has half of it.
        residual_channels: width inside a residual block.
        n_residual_blocks: in the encoder and in the decoder.
        stride: 2, 4, 8 or 16: pixels a latent, by that many halvings.
        embedding_dim: D, channels of the latents over all codebooks.
        n_codebooks: parts that the channels are split into, a codebook each (the paper's n_c).
        codebook_size: codes in EACH codebook (the paper's K = 2048 for n_c = 4 is 4 x 512).
        commitment_weight: weight of the second term of eq. 1.
        ema_decay, ema_eps: of the codebooks' moving averages.
        kmeans_iters: Lloyd iterations that place the codes on the first training batch; 0 draws them from it.
        dead_code_threshold: codes used less than this fraction of the average are drawn anew; 0 switches it off.
        codebook_init: "data": ``kmeans_iters`` on the first training batch; "uniform": as in the published code, see
            ``EMACodebook``. With it and a threshold of 0 the codebooks are the paper's.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        output_activation: "tanh", or "linear": clamped to [-1, 1] outside the loss. Frames that are mostly black or
            white saturate tanh within a few steps at high learning rates, and nothing is learned from then on.
        padding_mode: "zeros" (grey, in frames of [-1, 1]) or "replicate": what the convolutions see beyond the edges of
            a frame. Zeros give codes near an edge a look of their own; with replicate, a thing on a plain background
            has the same codes wherever it is.
        scaling_factor: latents are code vectors times this; see ``fit_scaling_factor``.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        hidden_channels: int = 256,
        residual_channels: int = 128,
        n_residual_blocks: int = 2,
        stride: int = 4,
        embedding_dim: int = 256,
        n_codebooks: int = 1,
        codebook_size: int = 512,
        commitment_weight: float = 1.0,
        ema_decay: float = 0.99,
        ema_eps: float = 1e-5,
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.1,
        codebook_init: str = "data",
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        output_activation: str = "tanh",
        padding_mode: str = "zeros",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self._build_networks()
        self.quantizer = SlicedQuantizer(
            embedding_dim,
            n_codebooks,
            codebook_size,
            decay=ema_decay,
            eps=ema_eps,
            kmeans_iters=kmeans_iters,
            dead_code_threshold=dead_code_threshold,
            init=codebook_init,
        )

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.config.codebook_size] * self.config.n_codebooks

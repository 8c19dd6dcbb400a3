"""Frames that are their own latents: lets a prior work in pixel space."""

import torch
from diffusers.configuration_utils import register_to_config

from latentcast.config import check_counts
from latentcast.shapes import Codes, Frames, Latents

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
    mix_rows,
)


class PixelTokenizer(FrameTokenizer):
    """The identity as a tokenizer, without learned weights.

    With ``levels`` the frames are snapped to that many evenly spaced values, which are the codes, one codebook a
    channel: 256 levels reproduce 8-bit video exactly. Without, the latents are the frames and there are no codes.

    Args:
        in_channels: C of the frames: 3 (RGB), 1 (grey), or any number of other data.
        height, width: H and W of the frames in pixels.
        levels: values of a channel, at least 2, or None for continuous pixels.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, height: int = 64, width: int = 64, levels: int | None = 256) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, height=height, width=width)
        if levels is not None and levels < 2:
            raise ValueError(f"levels: expected at least 2, or None for continuous pixels, found {levels}")
        # A file of weights needs a tensor, and so does ``.device``.
        self.register_buffer("range", torch.tensor([-1.0, 1.0]))

    @classmethod
    def from_spec(cls, latent_spec: LatentSpec) -> "PixelTokenizer":
        """The tokenizer whose ``latent_spec`` this is.

        Raises:
            ValueError: the spec is not one of pixels, or its channels differ in their number of levels.
        """
        sizes = latent_spec["codebook_sizes"]
        if latent_spec["kind"] != "pixels":
            raise ValueError(f"latent_spec: expected kind 'pixels', found {latent_spec['kind']!r}")
        if len(set(sizes)) > 1 or len(sizes) not in (0, latent_spec["channels"]):
            raise ValueError(f"latent_spec: expected the same number of levels for every channel, found {sizes}")
        return cls(
            in_channels=latent_spec["channels"],
            height=latent_spec["height"],
            width=latent_spec["width"],
            levels=sizes[0] if sizes else None,
        )

    @property
    def latent_spec(self) -> LatentSpec:
        channels, levels = self.config.in_channels, self.config.levels
        sizes = [levels] * channels if levels else []
        return self.spec_of(channels, self.config.height, self.config.width, sizes, kind="pixels")

    def encode(self, frames: Frames) -> TokenizerOutput:
        """Frames, in [-1, 1]: latents are the frames, snapped, and codes have a codebook for each channel."""
        check_frames(frames, self.config.in_channels, self.config.height, self.config.width)
        if not self.is_discrete:
            return TokenizerOutput(latents=frames.float())
        codes = self.latents_to_codes(frames)
        return TokenizerOutput(latents=self.codes_to_latents(codes), codes=codes)

    def decode(self, latents: Latents) -> Frames:
        """The same, clipped to [-1, 1]. Never quantises."""
        check_latents(latents, self.config.in_channels, self.config.height, self.config.width)
        return latents.float().clamp(*self.range)

    def codes_to_latents(self, codes: Codes) -> Latents:
        """Levels to pixels, in [-1, 1]."""
        if not self.is_discrete:
            return super().codes_to_latents(codes)
        check_codes(codes, self.latent_spec["codebook_sizes"], (self.config.height, self.config.width))
        return codes.movedim(-1, 2).contiguous() * (2 / (self.config.levels - 1)) - 1

    def latents_to_codes(self, latents: Latents) -> Codes:
        """The nearest level of every number, int64."""
        if not self.is_discrete:
            return super().latents_to_codes(latents)
        check_latents(latents, self.config.in_channels, self.config.height, self.config.width)
        top = self.config.levels - 1
        return ((latents.float() + 1) * (top / 2)).round().clamp(0, top).long().movedim(2, -1).contiguous()

    def weights_to_latents(self, weights: Weights) -> Latents:
        """Distributions over the levels of each channel -> their means."""
        if not self.is_discrete:
            return super().weights_to_latents(weights)
        check_weights(weights, self.latent_spec["codebook_sizes"], (self.config.height, self.config.width))
        levels = torch.arange(self.config.levels, device=weights[0].device) * (2 / (self.config.levels - 1)) - 1
        return torch.cat([mix_rows(w, levels[:, None]) for w in weights], dim=-1).movedim(-1, 2).contiguous()

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """The frames, snapped; the loss is zero, for nothing is learned."""
        encoded = self.encode(frames)
        loss = torch.zeros((), device=frames.device, requires_grad=True)
        return ReconstructionOutput(frames=self.decode(encoded.latents), loss=loss, codes=encoded.codes)

"""A tokenizer to start from: what it is, and the paper (section, equation) it comes from."""

from diffusers.configuration_utils import register_to_config
from torch import nn

from latentcast.shapes import Frames, Latents
from latentcast.sizes import check_stride

from .base import FrameTokenizer, LatentSpec, ReconstructionOutput, TokenizerOutput, check_frames, check_latents
from .losses import check_reconstruction_options, reconstruction_loss


class MyTokenizer(FrameTokenizer):
    """A continuous tokenizer: one convolution to the latents of patches, two layers back.

    Args:
        in_channels: C of the frames: 3 (RGB), 1 (grey), or any number of other data.
        height, width: H and W of the frames in pixels, multiples of the patch.
        patch: pixels a latent, in height and width.
        latent_channels: D.
        reconstruction_loss: "l2" or "l1". lpips_weight: of LPIPS in the loss; see ``losses.py``.
        scaling_factor: latents are what the encoder gives times this; see ``fit_scaling_factor``.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        patch: int = 4,
        latent_channels: int = 8,
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_reconstruction_options(reconstruction_loss, lpips_weight)
        check_stride(height, width, patch, "the patch")
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch, patch)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_channels, 32, patch, patch), nn.SiLU(), nn.Conv2d(32, in_channels, 3, padding=1)
        )

    @property
    def latent_spec(self) -> LatentSpec:
        config = self.config
        return self.spec_of(config.latent_channels, config.height // config.patch, config.width // config.patch)

    def encode(self, frames: Frames) -> TokenizerOutput:
        """Frames, in [-1, 1], to latents."""
        check_frames(frames, self.config.in_channels, self.config.height, self.config.width)
        latents = self.encoder(frames.to(self.dtype).flatten(0, 1)).unflatten(0, frames.shape[:2]).float()
        return TokenizerOutput(latents=latents * self.config.scaling_factor)

    def decode(self, latents: Latents) -> Frames:
        """Latents to frames, fp32 in [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct frames, in [-1, 1]."""
        reconstruction = self._decode(self.encode(frames).latents)
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        loss, logs = reconstruction_loss(reconstruction, frames, *options)
        return ReconstructionOutput(frames=reconstruction.clamp(-1, 1), loss=loss, logs=logs)

    def _decode(self, latents):
        """``decode`` before the clamp, which would stop the gradient."""
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        z = (latents / self.config.scaling_factor).to(self.dtype)
        return self.decoder(z.flatten(0, 1)).unflatten(0, latents.shape[:2]).float()

"""The KL-regularised autoencoder of Latent Diffusion (Rombach et al. 2022, section 3.1 and appendix G)."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from einops import rearrange

from latentcast.config import check_counts
from latentcast.layers.gaussian import kl_to_standard_normal, sample_moments, scale_moments
from latentcast.shapes import Frames, Latents
from latentcast.sizes import check_stride

from .base import FrameTokenizer, LatentSpec, ReconstructionOutput, TokenizerOutput, check_frames, check_latents
from .losses import check_reconstruction_options, reconstruction_loss

LOGVAR_RANGE = (-30.0, 20.0)  # keeps exp() finite; the range that diffusers' AutoencoderKL has


class KLVAE(FrameTokenizer):
    """A continuous tokenizer: each latent is a Gaussian, kept near N(0, 1) by a small KL term.

    ``encode`` gives the means as latents and both moments as ``posterior``; training decodes a draw, evaluation the
    mean. The networks are diffusers' ``Encoder`` and ``Decoder``. The defaults are a smaller relative of the paper's
    f = 4 model, which has ``block_channels=[128, 256, 512]``, ``n_blocks=2``, ``latent_channels=3``.

    Args:
        in_channels: C of the frames: 3 (RGB), 1 (grey), or any number of other data.
        height, width: H and W of the frames in pixels, multiples of the stride.
        block_channels: width of the network at each resolution; n of them make a stride of 2^(n - 1) pixels a latent.
        n_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
        latent_channels: D.
        norm_groups: of the group normalisation; divides every width.
        attention: self-attention over the positions of a frame at the coarsest resolution.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        kl_weight: of the KL term, in nats a frame divided by the numbers in a frame; with the other terms a mean over
            those numbers, this is the paper's 1e-6.
        scaling_factor: latents are means times this; see ``fit_scaling_factor``.
    """

    has_posterior = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        block_channels: list[int] = (64, 128, 256),
        n_blocks: int = 1,
        latent_channels: int = 4,
        norm_groups: int = 32,
        attention: bool = True,
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        kl_weight: float = 1e-6,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_reconstruction_options(reconstruction_loss, lpips_weight)
        check_counts(in_channels=in_channels, latent_channels=latent_channels, n_blocks=n_blocks)
        check_counts(norm_groups=norm_groups)
        if not block_channels or any(channels < 1 or channels % norm_groups for channels in block_channels):
            raise ValueError(f"block_channels: expected multiples of norm_groups={norm_groups}, found {block_channels}")
        stride = self._stride
        check_stride(height, width, stride)
        n = len(block_channels)
        network = {
            "block_out_channels": tuple(block_channels),
            "layers_per_block": n_blocks,
            "norm_num_groups": norm_groups,
            "mid_block_add_attention": attention,
        }
        self.encoder = Encoder(in_channels, latent_channels, ("DownEncoderBlock2D",) * n, double_z=True, **network)
        self.decoder = Decoder(latent_channels, in_channels, ("UpDecoderBlock2D",) * n, **network)

    @property
    def latent_spec(self) -> LatentSpec:
        config = self.config
        return self.spec_of(config.latent_channels, config.height // self._stride, config.width // self._stride)

    def encode(self, frames: Frames) -> TokenizerOutput:
        """Frames, in [-1, 1]: ``latents`` are the means, ``posterior`` both moments."""
        posterior = scale_moments(self._moments(frames), self.config.scaling_factor)
        return TokenizerOutput(latents=posterior.chunk(2, dim=2)[0].contiguous(), posterior=posterior)

    def decode(self, latents: Latents) -> Frames:
        """Latents to frames, fp32 in [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct from a draw in training mode, from the means otherwise.

        Args:
            frames: in [-1, 1].
        Returns:
            ``logs`` has ``reconstruction_loss``, ``lpips`` where it is weighted, and ``kl`` (nats
            a frame, unweighted).
        """
        moments = self._moments(frames)
        latents = sample_moments(moments) if self.training else moments.chunk(2, dim=2)[0].contiguous()
        reconstruction = self._decode(latents * self.config.scaling_factor)
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        loss, logs = reconstruction_loss(reconstruction, frames, *options)
        kl = kl_to_standard_normal(moments).mean()
        return ReconstructionOutput(
            frames=reconstruction.clamp(-1, 1),
            loss=loss + self.config.kl_weight * kl / frames[0, 0].numel(),
            logs=logs | {"kl": kl.detach()},
        )

    @property
    def _stride(self):
        return 2 ** (len(self.config.block_channels) - 1)

    def _moments(self, frames):
        """Of the latents before scaling: (B, T, C, H, W) -> (B, T, 2 D, h, w) fp32."""
        check_frames(frames, self.config.in_channels, self.config.height, self.config.width)
        moments = self.encoder(rearrange(frames.to(self.dtype), "b t ... -> (b t) ...")).float()
        moments = rearrange(moments, "(b t) ... -> b t ...", t=frames.shape[1])
        mean, logvar = moments.chunk(2, dim=2)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=2)

    def _decode(self, latents):
        """``decode`` before the clamp, which would stop the gradient."""
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        z = (latents / self.config.scaling_factor).to(self.dtype)
        frames = self.decoder(rearrange(z, "b t ... -> (b t) ...")).float()
        return rearrange(frames, "(b t) ... -> b t ...", t=latents.shape[1])

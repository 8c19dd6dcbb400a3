"""The frame autoencoders of SVG (Denton and Fergus 2018) and HAF-SVG: a frame becomes one vector."""

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange

from latentcast.config import check_counts
from latentcast.layers.dcgan import DCGANDecoder, DCGANEncoder
from latentcast.layers.vgg import VGGDecoder, VGGEncoder
from latentcast.modeling import eval_mode
from latentcast.shapes import Frames, Latents

from .base import FrameTokenizer, LatentSpec, ReconstructionOutput, TokenizerOutput, check_frames, check_latents
from .losses import check_reconstruction_options, reconstruction_loss


class VectorAutoencoder(FrameTokenizer):
    """A continuous tokenizer whose latents are vectors, (B, T, D, 1, 1), without skip connections.

    In training mode ``forward`` normalises by the batch, in eval mode by running statistics, as do ``encode`` and
    ``decode`` in either mode: a frame's latents depend on no other frame.

    Args:
        in_channels: C of the frames: 3 (RGB), 1 (grey), or any number of other data.
        height, width: H and W of the frames in pixels, even and at least 8. They are halved as long as they are even
            and at least 8, and the last convolution covers what is left, so the weights are for one size. Published:
            64x64 and 128x128; sizes that can seldom be halved make that convolution large.
        embedding_dim: D.
        hidden_channels: channels of the finest level; the next ones have 2, 4 and then 8 times as many.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        output_activation: "tanh", which is SVG's sigmoid for frames in [-1, 1], or "linear": clamped to [-1, 1] outside
            the loss.
        scaling_factor: latents are vectors in [-1, 1] times this; see ``fit_scaling_factor``.
    """

    memory_format = torch.channels_last  # VGG's convolutions are a third faster so
    encoder_class = decoder_class = None

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        height: int = 64,
        width: int = 64,
        embedding_dim: int = 128,
        hidden_channels: int = 64,
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        output_activation: str = "tanh",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_reconstruction_options(reconstruction_loss, lpips_weight)
        check_counts(in_channels=in_channels, embedding_dim=embedding_dim, hidden_channels=hidden_channels)
        sizes = (in_channels, height, width, embedding_dim, hidden_channels)
        self.encoder = self.encoder_class(*sizes)
        self.decoder = self.decoder_class(*sizes, output_activation=output_activation)
        self.to(memory_format=self.memory_format)

    @property
    def latent_spec(self) -> LatentSpec:
        return self.spec_of(self.config.embedding_dim, 1, 1)

    def encode(self, frames: Frames) -> TokenizerOutput:
        """Frames, in [-1, 1], to vectors."""
        with eval_mode(self):
            return TokenizerOutput(latents=self._encode(frames))

    def decode(self, latents: Latents) -> Frames:
        """Vectors to frames, fp32 in [-1, 1]."""
        with eval_mode(self):
            return self._decode(latents).clamp(-1, 1)

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct, and in training mode update the running statistics.

        Args:
            frames: in [-1, 1]; in training mode at least two.
        Returns:
            ``logs`` has ``reconstruction_loss`` and, where it is weighted, ``lpips``.
        Raises:
            ValueError: a single frame in training mode, of which there are no statistics.
        """
        if self.training and frames.shape[:2].numel() < 2:
            raise ValueError(f"frames: expected at least 2 in training mode (BatchNorm), found {tuple(frames.shape)}")
        reconstruction = self._decode(self._encode(frames))
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        loss, logs = reconstruction_loss(reconstruction, frames, *options)
        return ReconstructionOutput(frames=reconstruction.clamp(-1, 1), loss=loss, logs=logs)

    def _encode(self, frames):
        check_frames(frames, self.config.in_channels, self.config.height, self.config.width)
        h, _ = self.encoder(rearrange(frames.to(self.dtype), "b t ... -> (b t) ..."))
        return rearrange(h.float(), "(b t) d -> b t d 1 1", t=frames.shape[1]) * self.config.scaling_factor

    def _decode(self, latents):
        """``decode`` before the clamp, which would stop the gradient of a linear output."""
        check_latents(latents, self.config.embedding_dim, 1, 1)
        h = rearrange((latents / self.config.scaling_factor).to(self.dtype), "b t d 1 1 -> (b t) d")
        return rearrange(self.decoder(h).float(), "(b t) ... -> b t ...", t=latents.shape[1])


class DCGANAutoencoder(VectorAutoencoder):
    """SVG's DCGAN networks, which it uses for Moving-MNIST, as an autoencoder of frames.

    Arguments as for ``VectorAutoencoder``.
    """

    encoder_class, decoder_class = DCGANEncoder, DCGANDecoder


class VGGAutoencoder(VectorAutoencoder):
    """SVG's VGG16 networks, which it uses for KTH and BAIR, as an autoencoder of frames.

    Arguments as for ``VectorAutoencoder``.
    """

    encoder_class, decoder_class = VGGEncoder, VGGDecoder

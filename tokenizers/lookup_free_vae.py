"""Discrete tokenizers whose codebooks cannot collapse, for they have none to learn: FSQ and LFQ."""

from diffusers.configuration_utils import register_to_config

from latentcast.shapes import Codes, Latents

from .base import check_latents
from .quantizers.without_table import FiniteScalarQuantizer, LookupFreeQuantizer
from .vqvae import ConvolutionalVQ


class _LookupFreeVAE(ConvolutionalVQ):
    """``logs`` of ``forward`` has ``quantizer_loss``, weighted, in the place of ``commitment_loss``."""

    @property
    def codebook_sizes(self) -> list[int]:
        return self.quantizer.codebook_sizes

    def _quantizer_loss(self, quantized):
        return quantized.loss, {"quantizer_loss": quantized.loss.detach()}


class FSQVAE(_LookupFreeVAE):
    """Finite scalar quantisation (Mentzer et al. 2024) between VQVAE's encoder and decoder.

    The latents are the rounded channels themselves, within [-1, 1], a channel for each entry of ``levels``. The only
    loss is the reconstruction's.

    Args:
        levels: values of each channel of a codebook; their product is its size (the paper's table 1: [8, 5, 5, 5] for
            about 2^10 codes, [8, 8, 8, 5, 5, 5] for about 2^16).
        n_codebooks: parts that the channels are split into, each with these ``levels``.
        batch_norm: give the encoder's channels mean 0 and variance 1 before tanh (not in the paper). Without it all can
            saturate in the first steps, and one code is left.
        embedding_dim: D, ``n_codebooks * len(levels)``; may be left out.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        in_channels, height, width, hidden_channels, residual_channels, n_residual_blocks: as for VQVAE.
        stride, output_activation, padding_mode, scaling_factor: as for VQVAE.
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
        levels: list[int] = (8, 5, 5, 5),
        n_codebooks: int = 1,
        batch_norm: bool = True,
        embedding_dim: int | None = None,
        output_activation: str = "tanh",
        padding_mode: str = "zeros",
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        quantizer = FiniteScalarQuantizer(levels, n_codebooks, batch_norm)
        if embedding_dim not in (None, quantizer.dim):
            raise ValueError(f"embedding_dim: expected {quantizer.dim}, as the levels say, found {embedding_dim}")
        self.register_to_config(embedding_dim=quantizer.dim)
        self._build_networks()
        self.quantizer = quantizer

    def latents_to_codes(self, latents: Latents) -> Codes:
        """The codes of the nearest level of every channel, int64."""
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        return self.quantizer.nearest_level(latents.float().movedim(2, -1) / self.config.scaling_factor)


class LFQVAE(_LookupFreeVAE):
    """Lookup-free quantisation (Yu et al. 2024, MAGVIT-v2) between VQVAE's encoder and decoder.

    The latents are -1 and 1, a bit for each channel.

    Args:
        embedding_dim: D, the bits of all codes at a position.
        n_codebooks: parts that the bits are split into, each of 2^(D / n_codebooks) codes. Training takes memory for
            every code at every position, so that more than about 14 bits need more than one codebook.
        commitment_weight: of the distance between encoder outputs and code vectors.
        entropy_weight: of the entropy terms, which make single choices sure and all choices together various.
        diversity_gamma: of the second against the first.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        in_channels, height, width, hidden_channels, residual_channels, n_residual_blocks: as for VQVAE.
        stride, output_activation, padding_mode, scaling_factor: as for VQVAE.
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
        embedding_dim: int = 10,
        n_codebooks: int = 1,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        output_activation: str = "tanh",
        padding_mode: str = "zeros",
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self._build_networks()
        self.quantizer = LookupFreeQuantizer(
            embedding_dim, n_codebooks, entropy_weight, diversity_gamma, commitment_weight
        )

"""HR-VQVAE, the hierarchical residual tokenizer of S-HR-VQVAE (Adiban et al. 2023, section 4.1)."""

from diffusers.configuration_utils import register_to_config

from latentcast.shapes import Codes, Frames, Latents

from .base import check_codes
from .quantizers.code_tree import CodeTree
from .vqvae import ConvolutionalVQ


class HRVQVAE(ConvolutionalVQ):
    """VQ-VAE over single frames whose latents are sums of n codes, chosen down a tree: m^n leaves, n * m comparisons.

    All layers have the resolution of the latents; the first says roughly what is there, each further one what its
    predecessors left. ``codebook_sizes`` is n times m, since a code is a number among the children of the code above.
    The networks are those of ``VQVAE``, for the paper gives no others.

    The loss is eq. 4 of the paper with means for the norms: the reconstruction's, plus

        sum_i (|sg[xi^(i-1)] - e^i|^2 + beta |xi^(i-1) - sg[e^i]|^2) + |sg[z] - e_C|^2 + beta |z - sg[e_C]|^2

    with xi^0 = z, xi^i = xi^(i-1) - sg[e^i], and e_C = sum_i e^i, through which gradients go straight. The terms
    without beta, which move the codes, are left out where ``codebook_update`` is "ema".

    Args:
        n_layers: n.
        codebook_size: m, the children of every code. There are m + m^2 + ... + m^n code vectors.
        codebook_update: "ema", moving averages, or "gradient", by the loss.
        commitment_weight: beta.

    The other arguments are those of ``VQVAE``.
    """

    tree = True
    has_layers = True

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
        embedding_dim: int = 64,
        n_layers: int = 3,
        codebook_size: int = 16,
        codebook_update: str = "ema",
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        ema_eps: float = 1e-5,
        kmeans_iters: int = 10,
        dead_code_threshold: float = 0.1,
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        output_activation: str = "tanh",
        padding_mode: str = "zeros",
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if codebook_update not in ("ema", "gradient"):
            raise ValueError(f"codebook_update: expected 'ema' or 'gradient', found {codebook_update!r}")
        self._build_networks()
        self.quantizer = CodeTree(
            embedding_dim,
            n_layers,
            codebook_size,
            tree=self.tree,
            learned=codebook_update == "gradient",
            decay=ema_decay,
            eps=ema_eps,
            kmeans_iters=kmeans_iters,
            dead_code_threshold=dead_code_threshold,
        )

    @property
    def codebook_sizes(self) -> list[int]:
        return [self.config.codebook_size] * self.config.n_layers

    def codes_to_latents(self, codes: Codes, n_layers: int | None = None) -> Latents:
        """The latents that codes stand for, or their first layers only.

        Args:
            codes: int64, of all layers.
            n_layers: how many of them to sum, from the coarsest; None for all.
        Returns:
            fp32.
        """
        spec = self.latent_spec
        check_codes(codes, spec["codebook_sizes"], (spec["height"], spec["width"]))
        return self._to_latents(self.quantizer.lookup(codes, n_layers))

    def decode(self, latents: Latents | Codes, n_layers: int | None = None) -> Frames:
        """Frames from latents or, coarse to fine, from the first layers of codes. Never quantises.

        Args:
            latents: with ``n_layers``, codes instead, since latents do not tell their layers apart.
            n_layers: 1 (the coarsest) to n, or None.
        Returns:
            fp32 in [-1, 1].
        """
        return super().decode(latents if n_layers is None else self.codes_to_latents(latents, n_layers))

    def _quantizer_loss(self, quantized):
        loss, logs = super()._quantizer_loss(quantized)
        if quantized.codebook_loss is not None:
            loss = loss + quantized.codebook_loss
            logs["codebook_loss"] = quantized.codebook_loss.detach()
        return loss, logs


class ResidualVQVAE(HRVQVAE):
    """HR-VQVAE without the tree: each layer has a single codebook, whatever was chosen above it.

    That is residual vector quantisation, and what the authors' published code does. Arguments as for ``HRVQVAE``; there
    are n * m code vectors.
    """

    tree = False

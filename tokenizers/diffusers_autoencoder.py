"""Image autoencoders of diffusers, trained by others for the most part, as frame tokenizers."""

import inspect
from pathlib import Path

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import nn

from latentcast.config import check_counts, one_line
from latentcast.layers.gaussian import kl_to_standard_normal, sample_moments, scale_moments
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
    mix_rows,
)
from .losses import check_reconstruction_options, reconstruction_loss

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


class DiffusersTokenizer(FrameTokenizer):
    """diffusers' ``AutoencoderKL`` (the kind of Stable Diffusion), ``AutoencoderTiny`` or ``VQModel``, frame by frame.

    The first two are continuous, AutoencoderKL with a posterior; VQModel is discrete. ``save_pretrained`` keeps weights
    and sizes, so that what it wrote does not need ``path`` any more.

    Args:
        path: folder or hub name of a saved autoencoder, whose weights are loaded; ``subfolder`` of it, "vae" in whole
            pipelines. None: an untrained one.
        height, width: H and W of the frames in pixels, multiples of the autoencoder's stride.
        autoencoder: class and sizes of an untrained autoencoder, as in the ``config.json`` that diffusers writes; not
            with ``path``. Default: what ``path`` says, else an AutoencoderTiny of default size.
        in_channels: C of the frames. Default: what the autoencoder says, 3 of an untrained one.
        scaling_factor: latents are ``(z - shift_factor) * scaling_factor``. Default: the autoencoder's own, as is
            ``shift_factor``.
        reconstruction_loss: "l2" or "l1".
        lpips_weight: of LPIPS in the loss; see ``losses.py``.
        kl_weight: of AutoencoderKL's KL term; see ``KLVAE``.
    Raises:
        OSError: nothing that can be loaded at ``path``.
        ValueError: both ``path`` and ``autoencoder``, another class of model, weights that do not fill it, other
            channels than asked for or different ones in and out, or a frame size that is not a multiple of the stride.
    """

    _keep_in_fp32_modules = ["quantize"]  # noqa: RUF012 - VQModel's codebook

    @register_to_config
    def __init__(
        self,
        path: str | Path | None = None,
        subfolder: str | None = None,
        height: int = 64,
        width: int = 64,
        autoencoder: dict | None = None,
        scaling_factor: float | None = None,
        reconstruction_loss: str = "l2",
        lpips_weight: float = 0.0,
        kl_weight: float = 1e-6,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_reconstruction_options(reconstruction_loss, lpips_weight)
        check_counts(height=height, width=width, **({} if in_channels is None else {"in_channels": in_channels}))
        if not isinstance(autoencoder, dict | None):
            raise ValueError(f"autoencoder: expected a class and its sizes, found {one_line(autoencoder)}")
        if autoencoder is not None and path is not None:
            raise ValueError(
                f"path, autoencoder: expected one of the two, found both; {path} has its own class and sizes "
                "(tokenizer=diffusers takes it)"
            )
        if path is None:
            channels = {} if in_channels is None else {"in_channels": in_channels, "out_channels": in_channels}
            self.network = _build(channels | (autoencoder or {"_class_name": "AutoencoderTiny"}))
        else:
            self.network = _load(path, subfolder)
        self._pretrained = path is not None
        inner = self.network.config
        if inner.in_channels != inner.out_channels:
            raise ValueError(
                f"autoencoder: expected as many channels out as in, found {inner.in_channels} and {inner.out_channels}"
            )
        if in_channels not in (None, inner.in_channels):
            raise ValueError(f"in_channels: expected the autoencoder's {inner.in_channels}, found {in_channels}")
        check_stride(height, width, self._stride)
        self.register_to_config(  # the weights may have stood anywhere
            path=None,
            subfolder=None,
            autoencoder={"_class_name": type(self.network).__name__} | _arguments(type(self.network), inner),
            scaling_factor=inner.scaling_factor if scaling_factor is None else scaling_factor,
        )

    @property
    def needs_training(self) -> bool:
        return not self._pretrained

    @property
    def has_posterior(self) -> bool:
        return isinstance(self.network, diffusers.AutoencoderKL)

    @property
    def latent_spec(self) -> LatentSpec:
        config, inner, codebook = self.config, self.network.config, self._codebook
        return self.spec_of(
            inner.latent_channels if codebook is None else codebook.embedding_dim,
            config.height // self._stride,
            config.width // self._stride,
            [] if codebook is None else [codebook.num_embeddings],
            frame_channels=inner.in_channels,
        )

    def encode(self, frames: Frames) -> TokenizerOutput:
        """As FrameTokenizer's; AutoencoderKL's latents are the means."""
        z = self._encode(frames)
        if self.is_discrete:
            codes = self._nearest(z)
            return TokenizerOutput(latents=self.codes_to_latents(codes), codes=codes)
        if self.has_posterior:
            posterior = scale_moments(z, self.config.scaling_factor, self._shift)
            return TokenizerOutput(latents=posterior.chunk(2, dim=2)[0].contiguous(), posterior=posterior)
        return TokenizerOutput(latents=self._scaled(z).contiguous())

    def decode(self, latents: Latents) -> Frames:
        """Latents to frames, fp32 in [-1, 1]. Never quantises."""
        return self._decode(latents).clamp(-1, 1)

    def codes_to_latents(self, codes: Codes) -> Latents:
        """The code vectors, scaled, fp32. VQModel only."""
        if not self.is_discrete:
            return super().codes_to_latents(codes)
        spec = self.latent_spec
        check_codes(codes, spec["codebook_sizes"], (spec["height"], spec["width"]))
        return self._scaled(self._lookup(codes))

    def latents_to_codes(self, latents: Latents) -> Codes:
        """The nearest codes, int64, of one codebook. VQModel only."""
        if not self.is_discrete:
            return super().latents_to_codes(latents)
        return self._nearest(self._unscaled(latents))

    def weights_to_latents(self, weights: Weights) -> Latents:
        """As FrameTokenizer's, of one codebook. VQModel only."""
        if not self.is_discrete:
            return super().weights_to_latents(weights)
        spec = self.latent_spec
        check_weights(weights, spec["codebook_sizes"], (spec["height"], spec["width"]))
        return self._scaled(mix_rows(weights[0], self._codebook.weight).movedim(-1, 2).contiguous())

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that ``decode`` alone uses; of VQModel only."""
        if not self.is_discrete:
            return super().decoder_parameters()
        return [*self.network.post_quant_conv.parameters(), *self.network.decoder.parameters()]

    def forward(self, frames: Frames) -> ReconstructionOutput:
        """Reconstruct; AutoencoderKL from a draw in training mode, from the means otherwise.

        The loss is the reconstruction's, and for AutoencoderKL the KL term as in ``KLVAE``, for VQModel codebook and
        commitment loss (the latter times the 0.25 that diffusers has).

        Args:
            frames: in [-1, 1].
        Returns:
            ``logs`` has ``reconstruction_loss``, and where they take part ``lpips``, ``kl`` (nats
            a frame) or ``codebook_loss``.
        """
        z, codes, extra, logs = self._encode(frames), None, 0.0, {}
        if self.is_discrete:
            codes = self._nearest(z)
            quantized = self._lookup(codes)
            beta = self.network.quantize.beta
            extra = (quantized - z.detach()).square().mean() + beta * (quantized.detach() - z).square().mean()
            logs = {"codebook_loss": extra.detach()}
            z = quantized.detach() + (z - z.detach())  # exact values, straight-through gradient
        elif self.has_posterior:
            kl = kl_to_standard_normal(z).mean()
            extra = self.config.kl_weight * kl / frames[0, 0].numel()
            logs = {"kl": kl.detach()}
            z = sample_moments(z) if self.training else z.chunk(2, dim=2)[0].contiguous()
        reconstruction = self._decode(self._scaled(z))
        options = (self.config.reconstruction_loss, self.config.lpips_weight)
        loss, distances = reconstruction_loss(reconstruction, frames, *options)
        return ReconstructionOutput(
            frames=reconstruction.clamp(-1, 1), loss=loss + extra, logs=distances | logs, codes=codes
        )

    @property
    def _stride(self):
        inner = self.network.config
        widths = "encoder_block_out_channels" if "encoder_block_out_channels" in inner else "block_out_channels"
        return 2 ** (len(inner[widths]) - 1)

    @property
    def _shift(self):
        return self.network.config.get("shift_factor") or 0.0

    @property
    def _codebook(self):
        """VQModel's nn.Embedding, or None."""
        return self.network.quantize.embedding if isinstance(self.network, diffusers.VQModel) else None

    def _scaled(self, z):
        return (z - self._shift) * self.config.scaling_factor

    def _unscaled(self, latents):
        spec = self.latent_spec
        check_latents(latents, spec["channels"], spec["height"], spec["width"])
        return latents.float() / self.config.scaling_factor + self._shift

    def _encode(self, frames):
        """What the autoencoder makes of the frames, before scaling: (B, T, D, h, w) fp32, AutoencoderKL: moments."""
        spec = self.latent_spec
        check_frames(frames, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
        output = self.network.encode(rearrange(frames.to(self.dtype), "b t ... -> (b t) ..."))
        if self.has_posterior:
            z = torch.cat([output.latent_dist.mean, output.latent_dist.logvar], dim=1)
        else:
            z = output.latents
        return rearrange(z.float(), "(b t) ... -> b t ...", t=frames.shape[1])

    def _decode(self, latents):
        """``decode`` before the clamp, which would stop the gradient."""
        z = rearrange(self._unscaled(latents).to(self.dtype), "b t ... -> (b t) ...")
        if self.is_discrete:  # its own ``decode`` quantises, or takes codes, as its config says
            norm = z if self.network.config.norm_type == "spatial" else None
            frames = self.network.decoder(self.network.post_quant_conv(z), norm)
        else:
            frames = self.network.decode(z).sample
        return rearrange(frames.float(), "(b t) ... -> b t ...", t=latents.shape[1])

    def _nearest(self, z):
        """(B, T, D, h, w) -> (B, T, h, w, 1) int64, by distances that autocast leaves in fp32."""
        vectors = z.detach().movedim(2, -1)
        distances = torch.cdist(vectors.flatten(0, -2), self._codebook.weight.detach().float())
        return distances.argmin(1).unflatten(0, vectors.shape[:-1])[..., None]

    def _lookup(self, codes):
        return self._codebook(codes[..., 0]).float().movedim(-1, 2).contiguous()


def _build(sizes):
    """The untrained autoencoder that a diffusers config describes."""
    cls = _class_of(sizes, "autoencoder")
    arguments = _arguments(cls, sizes)
    unknown = [name for name in sizes if name not in arguments and not name.startswith("_")]  # _: diffusers' own notes
    if unknown:
        raise ValueError(f"autoencoder: {cls.__name__} has no {', '.join(unknown)}")
    try:
        return cls(**arguments)
    except Exception as error:  # whatever Python called it
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"autoencoder: no {cls.__name__} can be built of these sizes ({found})") from None


def _load(path, subfolder):
    try:
        cls = _class_of(diffusers.AutoencoderKL.load_config(path, subfolder=subfolder), path)
        autoencoder, info = cls.from_pretrained(
            path, subfolder=subfolder, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:  # a paragraph, from which the first line says what is missing
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{path}: no autoencoder of diffusers can be loaded from here ({reason})") from None
    if info["missing_keys"]:
        raise ValueError(
            f"{path}: the weights do not fill {cls.__name__}: {len(info['missing_keys'])} tensors are missing, "
            f"{info['missing_keys'][0]!r} among them"
        )
    return autoencoder


def _class_of(config, name):
    found = config.get("_class_name")
    if found not in CLASSES:
        raise ValueError(f"{name}: expected _class_name to be one of {', '.join(CLASSES)}, found {found!r}")
    return getattr(diffusers, found)


def _arguments(cls, config):
    """Those entries of a diffusers config that the constructor takes."""
    names = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in config.items() if name in names}

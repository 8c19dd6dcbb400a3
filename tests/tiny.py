"""Tiny instances of the real models, by name: what the contract tests run over. A new model adds one line."""

import torch

import latentcast  # noqa: F401  (what the line of a new model names its class by)
from latentcast import (
    FSQVAE,
    HRVQVAE,
    KLVAE,
    LFQVAE,
    VQVAE,
    DCGANAutoencoder,
    DiffusersTokenizer,
    FlowTransformer,
    MaskedTransformer,
    PixelTokenizer,
    RecurrentVAE,
    ResidualDiffusion,
    ResidualVQVAE,
    SDEDiffusion,
    STPixelCNN,
    VGGAutoencoder,
    VideoTransformer,
)

SMALL_VQVAE = {"hidden_channels": 16, "residual_channels": 8, "n_residual_blocks": 1, "embedding_dim": 8}
SMALL_LOOKUP_FREE = {"hidden_channels": 16, "residual_channels": 8, "n_residual_blocks": 1}
SMALL_DIFFUSERS = {
    "AutoencoderKL": {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "shift_factor": 0.1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8],
        "num_encoder_blocks": [1, 1, 1],
        "num_decoder_blocks": [1, 1, 1],
    },
    "VQModel": {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "num_vq_embeddings": 20,
        "vq_embed_dim": 5,
    },
}


def small_diffusers(name, **options):
    return DiffusersTokenizer(autoencoder={"_class_name": name, **SMALL_DIFFUSERS[name]}, **options)


TINY_TOKENIZERS = {
    "vqvae": lambda: VQVAE(height=16, width=16, codebook_size=12, **SMALL_VQVAE),
    # height, width and channels differ from one another, so that a swapped axis shows
    "sliced_vqvae": lambda: VQVAE(
        1, 8, 16, n_codebooks=4, codebook_size=6, stride=2, scaling_factor=1.7, **SMALL_VQVAE
    ),
    "kl_vae": lambda: KLVAE(1, 8, 16, block_channels=[8, 16], latent_channels=3, norm_groups=4, scaling_factor=0.6),
    "fsq": lambda: FSQVAE(height=16, width=16, levels=[4, 3, 5], **SMALL_LOOKUP_FREE),
    "sliced_fsq": lambda: FSQVAE(
        1, 8, 16, stride=2, levels=[5, 4], n_codebooks=3, scaling_factor=1.7, **SMALL_LOOKUP_FREE
    ),
    "lfq": lambda: LFQVAE(1, 8, 16, stride=2, embedding_dim=6, n_codebooks=2, scaling_factor=0.7, **SMALL_LOOKUP_FREE),
    "diffusers_kl": lambda: small_diffusers("AutoencoderKL", height=8, width=12),
    "diffusers_tiny": lambda: small_diffusers("AutoencoderTiny", height=8, width=12),
    "diffusers_vq": lambda: small_diffusers("VQModel", height=8, width=12),
    "hr_vqvae": lambda: HRVQVAE(1, 8, 16, n_layers=3, codebook_size=4, stride=2, scaling_factor=1.7, **SMALL_VQVAE),
    "gradient_hr_vqvae": lambda: HRVQVAE(
        height=16, width=16, n_layers=2, codebook_size=5, codebook_update="gradient", **SMALL_VQVAE
    ),
    "residual_vqvae": lambda: ResidualVQVAE(height=16, width=16, n_layers=2, codebook_size=6, **SMALL_VQVAE),
    "dcgan": lambda: DCGANAutoencoder(height=16, width=16, embedding_dim=6, hidden_channels=4),
    "vgg": lambda: VGGAutoencoder(1, 8, 16, embedding_dim=5, hidden_channels=4, scaling_factor=1.7),
    "pixel": lambda: PixelTokenizer(3, 4, 6, levels=256),
    "continuous_pixel": lambda: PixelTokenizer(1, 4, 6, levels=None),
}


def random_frames(tokenizer, batch=2, n_frames=3, seed=0):
    """(batch, n_frames, C, H, W) in [-1, 1], of the sizes that the tokenizer takes."""
    spec = tokenizer.latent_spec
    shape = (batch, n_frames, spec["frame_channels"], spec["frame_height"], spec["frame_width"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_tokenizer(name):
    """A tiny tokenizer after one training step's forward (so that data-dependent state is set), in eval mode."""
    torch.manual_seed(0)
    tokenizer = TINY_TOKENIZERS[name]().train()
    tokenizer(random_frames(tokenizer, batch=4, seed=1))
    return tokenizer.eval()


CODES_SPEC = {
    "kind": "discrete",
    "channels": 8,
    "height": 4,
    "width": 2,
    "codebook_sizes": [5, 7],
    "scaling_factor": 1.0,
    "frame_channels": 1,
    "frame_height": 16,
    "frame_width": 8,
}
SMALL_TRANSFORMER = {"n_frames": 4, "dim": 24, "embed_dim": 12, "n_heads": 2, "head_dim": 8, "n_layers": 1}
SMALL_PIXELCNN = {"n_frames": 4, "dim": 16, "n_blocks": 1, "block_layers": 2, "n_heads": 2, "head_dim": 4}
SMALL_MASKED = {"n_frames": 4, "dim": 24, "n_layers": 2, "n_heads": 2, "head_dim": 8}
SMALL_RECURRENT_VAE = {"dim": 8, "hidden_channels": 4, "group_dim": 3, "cells": 12, "beta": 1e-2}


def small_recurrent_vae(spec, **options):
    return RecurrentVAE(spec, **SMALL_RECURRENT_VAE | options)


SMALL_SDE_DIFFUSION = {
    "motion_channels": [6, 8],
    "motion_kernels": [3, 3],
    "dt": 0.5,
    "block_channels": [8, 16],
    "n_blocks": 1,
    "head_dim": 8,
    "norm_groups": 4,
}


def small_sde_diffusion(tokenizer="continuous_pixel", **options):
    return SDEDiffusion(TINY_TOKENIZERS[tokenizer]().latent_spec, **SMALL_SDE_DIFFUSION | options)


SMALL_RESIDUAL_DIFFUSION = {"width": 8, "denoising_multipliers": [1, 2], "transform_multipliers": [1, 2]}


def small_residual_diffusion(tokenizer="continuous_pixel", **options):
    return ResidualDiffusion(TINY_TOKENIZERS[tokenizer]().latent_spec, **SMALL_RESIDUAL_DIFFUSION | options)


SMALL_FLOW = {"n_frames": 4, "dim": 24, "n_layers": 1, "n_heads": 2, "head_dim": 8}


def small_flow(tokenizer="continuous_pixel", **options):
    return FlowTransformer(TINY_TOKENIZERS[tokenizer]().latent_spec, **SMALL_FLOW | options)


TINY_PRIORS = {
    "video_transformer": lambda: VideoTransformer(CODES_SPEC, subscale=[4, 1, 1], **SMALL_TRANSFORMER),
    "video_transformer_spatial": lambda: VideoTransformer(CODES_SPEC, subscale=[1, 2, 2], **SMALL_TRANSFORMER),
    "video_transformer_spatiotemporal": lambda: VideoTransformer(CODES_SPEC, subscale=[2, 2, 2], **SMALL_TRANSFORMER),
    "st_pixelcnn": lambda: STPixelCNN(CODES_SPEC, **SMALL_PIXELCNN),
    "st_pixelcnn_shared": lambda: STPixelCNN(CODES_SPEC, layers="shared", attention="factorised", **SMALL_PIXELCNN),
    "st_pixelcnn_windowed": lambda: STPixelCNN(CODES_SPEC, attention="windowed", window=2, **SMALL_PIXELCNN),
    "masked_transformer": lambda: MaskedTransformer(CODES_SPEC, **SMALL_MASKED),
    "masked_transformer_flat": lambda: MaskedTransformer(CODES_SPEC, masking="flat", window=3, **SMALL_MASKED),
    "recurrent_vae": lambda: small_recurrent_vae(PixelTokenizer(1, 8, 16, levels=None).latent_spec, n_groups=2),
    "svg_lp_vgg": lambda: small_recurrent_vae(PixelTokenizer(1, 8, 16).latent_spec, network="vgg", aligner="none"),
    "recurrent_vae_latents": lambda: small_recurrent_vae(CODES_SPEC, n_groups=3, aligner="encoder_value"),
    "recurrent_vae_vectors": lambda: small_recurrent_vae(TINY_TOKENIZERS["dcgan"]().latent_spec, fixed_prior=True),
    "sde_diffusion": small_sde_diffusion,
    "ode_diffusion_latents": lambda: small_sde_diffusion("kl_vae", motion="ode", prediction_type="sample"),
    "residual_diffusion": small_residual_diffusion,
    "residual_diffusion_latents": lambda: small_residual_diffusion("kl_vae", learned_sigma=True, shared_step=False),
    "flow_transformer": lambda: small_flow(patch=2),
    "flow_transformer_latents": lambda: small_flow("kl_vae", patch=[2, 4]),
}


# What priors are told in tests: of each frame an action and two numbers, of each video a label.
CONDITIONS = {
    "action": {"shape": [], "dtype": "int64", "per": "frame", "n_values": 3},
    "state": {"shape": [2], "dtype": "float32", "per": "frame"},
    "label": {"shape": [], "dtype": "int64", "per": "video", "n_values": 4},
}
TOLD_PRIORS = {
    "video_transformer": lambda **told: VideoTransformer(CODES_SPEC, subscale=[4, 1, 1], **SMALL_TRANSFORMER, **told),
    "video_transformer_spatiotemporal": lambda **told: VideoTransformer(
        CODES_SPEC, subscale=[2, 2, 2], **SMALL_TRANSFORMER, **told
    ),
    "st_pixelcnn": lambda **told: STPixelCNN(CODES_SPEC, **SMALL_PIXELCNN, **told),
    "st_pixelcnn_shared": lambda **told: STPixelCNN(
        CODES_SPEC, layers="shared", attention="factorised", **SMALL_PIXELCNN, **told
    ),
    "masked_transformer": lambda **told: MaskedTransformer(CODES_SPEC, **SMALL_MASKED, **told),
    "masked_transformer_flat": lambda **told: MaskedTransformer(CODES_SPEC, masking="flat", **SMALL_MASKED, **told),
    "sde_diffusion": small_sde_diffusion,
    "ode_diffusion_latents": lambda **told: small_sde_diffusion(
        "kl_vae", motion="ode", prediction_type="sample", **told
    ),
    "latent_sde_diffusion": lambda **told: small_sde_diffusion(
        diffusion_output="softplus", motion_kl_weight=1.0, previous_frame="immediate", **told
    ),
    "recurrent_vae": lambda **told: small_recurrent_vae(
        PixelTokenizer(1, 8, 16, levels=None).latent_spec, n_groups=2, **told
    ),
    "recurrent_vae_latents": lambda **told: small_recurrent_vae(CODES_SPEC, n_groups=3, **told),
    "residual_diffusion": small_residual_diffusion,
    "residual_diffusion_latents": lambda **told: small_residual_diffusion(
        "kl_vae", learned_sigma=True, shared_step=False, **told
    ),
    "flow_transformer": lambda **told: small_flow(patch=2, **told),
    "flow_transformer_latents": lambda **told: small_flow("kl_vae", patch=[2, 4], **told),
}


def random_conditions(batch=2, n_frames=4, seed=0):
    """Of CONDITIONS, for clips of ``n_frames``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "action": torch.randint(3, (batch, n_frames), generator=generator),
        "state": torch.randn(batch, n_frames, 2, generator=generator),
        "label": torch.randint(4, (batch,), generator=generator),
    }


def told_prior(name, conditions=CONDITIONS, **options):
    """A tiny prior with conditions, whose vectors of them differ enough to matter before training."""
    torch.manual_seed(0)
    prior = TOLD_PRIORS[name](conditions=conditions, **options).eval()
    torch.nn.init.normal_(prior.conditioner.null)
    return prior


def random_clip(prior, batch=2, n_frames=4, seed=0):
    """A clip in the space that the prior accepts: codes, standard normal latents, or pixels in [-1, 1]."""
    spec = prior.config.latent_spec
    generator = torch.Generator().manual_seed(seed)
    if prior.accepts == "codes":
        shape = (batch, n_frames, spec["height"], spec["width"])
        return torch.stack([torch.randint(size, shape, generator=generator) for size in spec["codebook_sizes"]], -1)
    shape = (batch, n_frames, spec["channels"], spec["height"], spec["width"])
    if prior.accepts == "latents":
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) * 2 - 1


def tiny_prior(name):
    torch.manual_seed(0)
    return TINY_PRIORS[name]().eval()


class Bar:
    """A progress bar that counts, as ``progress`` of a sampler."""

    done = 0

    def __call__(self, total):
        self.total = total
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def update(self, n=1):
        self.done += n

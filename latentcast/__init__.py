"""latentcast: video prediction in latent space.

Stage one trains frame tokenizers and caches their latents; stage two trains priors over those latents; pipelines join
the two. The public names below are imported on first use, so ``import latentcast`` is cheap.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

# In a checkout (or an editable install) the stage folders stand beside this package; in a wheel they are inside it.
# Only the first case may extend the path: in site-packages the neighbour called "tokenizers" is HuggingFace's.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "tokenizers").is_dir():
    __path__.append(str(_HERE.parent))

# Public name -> module that defines it. A new model adds one line here.
_EXPORTS = {
    # glue
    "load_config": "latentcast.config",
    "instantiate": "latentcast.config",
    "load_model": "latentcast.modeling",
    "VideoModel": "latentcast.modeling",
    # stage one
    "FrameTokenizer": "latentcast.tokenizers.base",
    "VQVAE": "latentcast.tokenizers.vqvae",
    "HRVQVAE": "latentcast.tokenizers.hr_vqvae",
    "ResidualVQVAE": "latentcast.tokenizers.hr_vqvae",
    "KLVAE": "latentcast.tokenizers.kl_vae",
    "FSQVAE": "latentcast.tokenizers.lookup_free_vae",
    "LFQVAE": "latentcast.tokenizers.lookup_free_vae",
    "DCGANAutoencoder": "latentcast.tokenizers.vector_autoencoder",
    "VGGAutoencoder": "latentcast.tokenizers.vector_autoencoder",
    "DiffusersTokenizer": "latentcast.tokenizers.diffusers_autoencoder",
    "PixelTokenizer": "latentcast.tokenizers.pixel",
    # stage two
    "Prior": "latentcast.priors.base",
    "VideoTransformer": "latentcast.priors.video_transformer",
    "ResidualDiffusion": "latentcast.priors.residual_diffusion",
    "STPixelCNN": "latentcast.priors.st_pixelcnn",
    "MaskedTransformer": "latentcast.priors.masked_transformer",
    "FlowTransformer": "latentcast.priors.flow_transformer",
    "RecurrentVAE": "latentcast.priors.recurrent_vae",
    "SDEDiffusion": "latentcast.priors.sde_diffusion",
    # sampling
    "VideoPredictionPipeline": "latentcast.pipelines.video_prediction",
    # data
    "read_clip": "latentcast.data.video.reader",
    "probe": "latentcast.data.video.reader",
    "write_video": "latentcast.data.video.writer",
    "VideoFolder": "latentcast.data.video.folder",
    "PreparedVideos": "latentcast.data.store.prepared",
    "prepared_videos": "latentcast.data.sets.prepared_videos",
    "MovingDigits": "latentcast.data.sets.moving_digits",
    "VideoDataModule": "latentcast.data.datamodules",
    "LatentCacheWriter": "latentcast.data.store.latent_cache",
    "LatentCacheDataset": "latentcast.data.store.latent_cache",
    # evaluation
    "Protocol": "latentcast.evaluation.protocol",
    # training
    "TokenizerModule": "latentcast.training.tokenizer_module",
    "PriorModule": "latentcast.training.prior_module",
    "JointModule": "latentcast.training.joint",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "ModelMixin":
        # diffusers looks this name up in the module that a pipeline component names, which is this package.
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module 'latentcast' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)

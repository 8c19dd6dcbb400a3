"""Metrics: frames in [-1, 1], shapes (B, T, C, H, W). Imported on first use, like latentcast's own names."""

import importlib

_EXPORTS = {
    "mse": ".frame",
    "psnr": ".frame",
    "ssim": ".frame",
    "lpips": ".perceptual",
    "LPIPS": ".perceptual",
    "I3D": ".i3d",
    "FVD": ".frechet",
    "frechet_distance": ".frechet",
    "crps": ".ensemble",
    "ilpips": ".ensemble",
    "BestOfN": ".ensemble",
    "bits_per_dim": ".bits",
}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

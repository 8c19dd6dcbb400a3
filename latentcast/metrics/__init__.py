"""Metrics: frames in [-1, 1], shapes (B, T, C, H, W). Imported on first use, like latentcast's own names."""

import importlib

_EXPORTS = {"mse": ".frame", "psnr": ".frame", "ssim": ".frame"}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

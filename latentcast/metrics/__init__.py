"""Metrics: frames in [-1, 1], shapes (B, T, C, H, W)."""

from .frame import mse, psnr, ssim

__all__ = ["mse", "psnr", "ssim"]

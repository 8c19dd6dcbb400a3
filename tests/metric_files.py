"""Files of others that tests of the metric networks use where they are there, and skip without."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentcast.metrics.weights import find_weights


class ScriptedStandIn(nn.Module):
    """Has the signature of i3d_torchscript.pt and tells its arguments apart."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * 400).view(3, 400))

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        logits = x.mean((2, 3, 4)) @ self.weight + x.std() + x.shape[-1]
        if rescale or resize:
            logits = logits + 100
        return logits if return_features else logits.softmax(1)


def save_scripted(path):
    """Write a stand-in for i3d_torchscript.pt -> path"""
    torch.jit.script(ScriptedStandIn()).save(str(path))
    return path


def weights_or_skip(name):
    """Path of a network's weights, where ``LATENTCAST_WEIGHTS`` or the user's cache has them."""
    try:
        return find_weights(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def lpips_picture(name):
    """(1, 1, 3, 64, 64) in [-1, 1]: a picture of the LPIPS repository, ``$LATENTCAST_TEST_DATA/lpips/ex_NAME.png``."""
    folder = os.environ.get("LATENTCAST_TEST_DATA")
    if not folder:
        pytest.skip("LATENTCAST_TEST_DATA names no folder with lpips/ex_ref.png")
    pixels = np.asarray(Image.open(Path(folder, "lpips", f"ex_{name}.png")).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, None] / 127.5 - 1


def moving_squares(n, n_frames=10, size=32, seed=0, speed=2):
    """(n, n_frames, 1, size, size) in [-1, 1]: a bright square on a noisy ground; ``speed`` in pixels a frame."""
    generator = torch.Generator().manual_seed(seed)
    videos = torch.rand(n, 1, 1, size, size, generator=generator).expand(-1, n_frames, -1, -1, -1) * 0.5 - 1
    videos = videos.clone()
    for video in videos:
        row, column = torch.randint(size // 2, (2,), generator=generator).tolist()
        for t, frame in enumerate(video):
            shift = (column + speed * t) % (size - 8)
            frame[:, row : row + 8, shift : shift + 8] = 0.9
    return videos

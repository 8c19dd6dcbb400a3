"""docs/results/figures.py: each picture from a saved pipeline."""

import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from tiny import SMALL_PIXELCNN, SMALL_RESIDUAL_DIFFUSION, SMALL_SDE_DIFFUSION, SMALL_VQVAE

from latentcast import HRVQVAE, PixelTokenizer, ResidualDiffusion, SDEDiffusion, STPixelCNN, VideoPredictionPipeline

FIGURES = Path(__file__).parents[1] / "docs/results/figures.py"
SIZE, N_FRAMES = 32, 3


def hierarchical():
    tokenizer = HRVQVAE(1, SIZE, SIZE, n_layers=2, codebook_size=4, stride=16, **SMALL_VQVAE)
    return STPixelCNN(tokenizer.latent_spec, **SMALL_PIXELCNN), tokenizer


def over_pixels(prior, **options):
    tokenizer = PixelTokenizer(1, SIZE, SIZE, levels=None)
    return prior(tokenizer.latent_spec, **options), tokenizer


@pytest.mark.parametrize(
    "figure, make, options, n_rows, n_columns",
    [
        ("layers", hierarchical, ["temperature=0"], 3, N_FRAMES),
        ("residual", lambda: over_pixels(ResidualDiffusion, **SMALL_RESIDUAL_DIFFUSION), ["n_steps=2"], 4, N_FRAMES),
        ("half_steps", lambda: over_pixels(SDEDiffusion, **SMALL_SDE_DIFFUSION), ["n_steps=2"], 2, 2 * N_FRAMES),
    ],
)
def test_rows_are_there(monkeypatch, tmp_path, figure, make, options, n_rows, n_columns):
    torch.manual_seed(0)
    VideoPredictionPipeline(*make(), n_context=2).save_pretrained(tmp_path / "pipeline")
    arguments = ["--pipeline", str(tmp_path / "pipeline"), "--data", "moving_digits", "--n-frames", str(N_FRAMES)]
    output = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["figures.py", figure, *arguments, "--output", str(output), *options])
    runpy.run_path(str(FIGURES), run_name="__main__")
    gaps = 2
    expected = (n_columns * (SIZE + gaps) - gaps, n_rows * (SIZE + gaps) - gaps)
    assert PIL.Image.open(output).size == expected

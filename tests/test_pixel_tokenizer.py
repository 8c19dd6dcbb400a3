"""Pixels as latents: exact on 8-bit video, and rebuilt from its own description."""

import pytest
import torch
from tiny import tiny_tokenizer

from latentcast import PixelTokenizer


def every_byte():
    """All 256 values of uint8 in each of 3 channels: (1, 1, 3, 16, 16)."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).repeat(1, 1, 3, 1, 1)


def test_eight_bit_video_is_exact():
    video = every_byte()
    tokenizer = PixelTokenizer(3, 16, 16)
    output = tokenizer.encode(video / 127.5 - 1)
    assert torch.equal(output.codes, video.long().movedim(2, -1))
    assert torch.equal(((tokenizer.decode(output.latents) + 1) * 127.5).round().byte(), video)
    torch.testing.assert_close(output.latents, video / 127.5 - 1)


def test_fewer_levels_by_brute_force():
    tokenizer = PixelTokenizer(1, 8, 8, levels=5)
    frames = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    expected = (frames[..., None] - levels).abs().argmin(-1)
    output = tokenizer.encode(frames)
    assert torch.equal(output.codes, expected.movedim(2, -1))
    assert torch.equal(output.latents, levels[expected])
    assert tokenizer.latent_spec["codebook_sizes"] == [5]


def test_continuous_pixels_pass_through():
    tokenizer = PixelTokenizer(3, 4, 6, levels=None)
    frames = torch.rand(1, 2, 3, 4, 6) * 2 - 1
    output = tokenizer.encode(frames)
    assert output.codes is None
    assert torch.equal(output.latents, frames)
    assert torch.equal(tokenizer.decode(frames * 3), (frames * 3).clamp(-1, 1))
    assert tokenizer.latent_spec["codebook_sizes"] == []


def test_nothing_to_learn():
    tokenizer = tiny_tokenizer("pixel")
    assert list(tokenizer.parameters()) == []
    output = tokenizer(torch.zeros(1, 1, 3, 4, 6))
    assert output.loss.item() == 0
    output.loss.backward()


@pytest.mark.parametrize("levels", [256, 2, None])
def test_from_spec(levels):
    tokenizer = PixelTokenizer(1, 4, 6, levels=levels)
    again = PixelTokenizer.from_spec(tokenizer.latent_spec)
    assert again.latent_spec == tokenizer.latent_spec
    assert again.config.levels == levels


def test_from_spec_of_something_else():
    with pytest.raises(ValueError, match="expected kind 'pixels', found 'discrete'"):
        PixelTokenizer.from_spec(tiny_tokenizer("vqvae").latent_spec)
    spec = PixelTokenizer(3, 4, 6).latent_spec
    for sizes in ([256, 256, 128], [256]):
        with pytest.raises(ValueError, match="the same number of levels for every channel"):
            PixelTokenizer.from_spec(spec | {"codebook_sizes": sizes})


def test_bad_levels():
    for levels in (1, 0, -3):
        with pytest.raises(ValueError, match=f"levels: expected at least 2, or None.*, found {levels}"):
            PixelTokenizer(levels=levels)

"""Encoding and decoding long videos in chunks: the same bits however they are cut, and flat memory."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import TINY_TOKENIZERS, random_frames, tiny_tokenizer


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
def test_any_cut_gives_the_same_bits(name):
    tokenizer = tiny_tokenizer(name)
    video = random_frames(tokenizer, batch=2, n_frames=21)
    whole = tokenizer.encode_chunked(video, chunk=8)
    assert not any(value.requires_grad for value in whole.values())
    direct = tokenizer.encode(video)
    assert whole.keys() == direct.keys()
    for key, value in direct.items():
        torch.testing.assert_close(whole[key], value)
    latents = whole.latents
    decoded = tokenizer.decode_chunked(latents, chunk=8)
    torch.testing.assert_close(decoded, tokenizer.decode(latents))
    for length in (1, 3, 8, 20):
        for key in whole.keys():
            pieces = [tokenizer.encode_chunked(piece, chunk=8)[key] for piece in video.split(length, dim=1)]
            assert torch.equal(torch.cat(pieces, 1), whole[key])
        pieces = [tokenizer.decode_chunked(piece, chunk=8) for piece in latents.split(length, dim=1)]
        assert torch.equal(torch.cat(pieces, 1), decoded)
    assert torch.equal(tokenizer.encode_chunked(video[1:], chunk=8).latents, latents[1:])
    if tokenizer.is_discrete:
        assert torch.equal(tokenizer.decode_chunked(whole.codes, chunk=8), decoded)


def test_the_network_always_sees_a_full_chunk(monkeypatch):
    tokenizer = tiny_tokenizer("dcgan")
    seen = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda frames: seen.append(tuple(frames.shape[:2])) or encode(frames))
    assert tokenizer.encode_chunked(random_frames(tokenizer, 2, 9), chunk=7).latents.shape[:2] == (2, 9)
    assert seen == [(1, 7)] * 3


def test_bad_arguments():
    tokenizer = tiny_tokenizer("sliced_vqvae")
    frames = random_frames(tokenizer)
    codes = tokenizer.encode(frames).codes
    with pytest.raises(ValueError, match="chunk: expected at least 1, found 0"):
        tokenizer.encode_chunked(frames, chunk=0)
    with pytest.raises(ValueError, match=r"frames: expected at least one frame, found \(2, 0, 1, 8, 16\)"):
        tokenizer.encode_chunked(frames[:, :0])
    with pytest.raises(ValueError, match=r"expected W = 16, found \(2, 3, 1, 8, 15\)"):
        tokenizer.encode_chunked(frames[..., 1:])
    with pytest.raises(ValueError, match=r"codes: expected a grid of \(4, 8\)"):
        tokenizer.decode_chunked(codes[:, :, 1:])
    with pytest.raises(ValueError, match=r"latents: expected shape .* found NoneType"):
        tokenizer.decode_chunked(None)
    with pytest.raises(ValueError, match="latents: expected shape"):
        tiny_tokenizer("dcgan").decode_chunked(codes)


THREE_MINUTES = """
import json, sys, threading, time
import psutil, torch
from latentcast import VQVAE, DCGANAutoencoder

torch.set_num_threads(1)
process = psutil.Process()
video = torch.rand(1, 3 * 60 * 25, 1, 32, 32, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)


def peak(function):
    "Memory above what was held before, in MB, while it ran; and what it returned."
    highest, running, before = [0], True, process.memory_info().rss

    def watch():
        while running:
            highest[0] = max(highest[0], process.memory_info().rss)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    running = False
    thread.join()
    return (highest[0] - before) / 2**20, result


def measure(tokenizer):
    tokenizer.decode(tokenizer.encode(video[:, :16]).latents)  # what is allocated once
    encoding, whole = peak(lambda: tokenizer.encode_chunked(video))
    decoding, frames = peak(lambda: tokenizer.decode_chunked(whole.latents))
    pieces = [tokenizer.encode_chunked(piece).latents for piece in video[:, :500].split(110, dim=1)]
    same = torch.equal(torch.cat(pieces, 1), whole.latents[:, :500])
    same &= torch.equal(tokenizer.decode_chunked(whole.latents[:, 1000:1330]), frames[:, 1000:1330])
    with torch.no_grad():
        at_once, _ = peak(lambda: tokenizer.encode(video))
    encoded, decoded = (sum(x.nbytes for x in group) / 2**20 for group in (whole.values(), [frames]))
    return {"same": same, "encoding": encoding - encoded, "decoding": decoding - decoded, "at_once": at_once - encoded}


models = {
    "vqvae": lambda: VQVAE(1, 32, 32, 16, 8, 1, embedding_dim=8, n_codebooks=2, codebook_size=16),
    "dcgan": lambda: DCGANAutoencoder(1, 32, 32, hidden_channels=8),
}
print(json.dumps(measure(models[sys.argv[1]]().eval())))
"""


@pytest.mark.parametrize("name", ["vqvae", "dcgan"])
def test_three_minutes_of_video_take_no_more_memory_than_the_result(name):
    done = subprocess.run([sys.executable, "-c", THREE_MINUTES, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert found["encoding"] < 12 and found["decoding"] < 12  # MB beyond what is returned
    assert found["at_once"] > 30  # what the chunks save; and it shows that the measurement works

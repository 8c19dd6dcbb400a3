"""Speed and memory of stage one: encoding, decoding, the code tree's search, and encoding a data set to disk.

python benchmarks/tokenizers.py [--only tree,speed,encode_dataset]
"""

from common import compare, kilobytes, run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from data import moving_texture, write

from latentcast import (
    FSQVAE,
    HRVQVAE,
    KLVAE,
    LFQVAE,
    VQVAE,
    DCGANAutoencoder,
    DiffusersTokenizer,
    PixelTokenizer,
    ResidualVQVAE,
    VGGAutoencoder,
    VideoFolder,
    prepared_videos,
)
from latentcast.data.sets.folder import Folder
from latentcast.data.store.encoding import CPU_CHUNK, encode_dataset
from latentcast.data.store.prepared import prepare
from latentcast.tokenizers.quantizers.code_tree import CodeTree
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
VQ_MODEL = {
    "_class_name": "VQModel",
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [64, 128, 256],
    "num_vq_embeddings": 512,
    "vq_embed_dim": 64,
}
TOKENIZERS = {  # at their default sizes, which are the papers' where there is one
    "vqvae": VQVAE,
    "sliced_vqvae": partial(VQVAE, n_codebooks=4),
    "hr_vqvae": HRVQVAE,
    "residual_vqvae": ResidualVQVAE,
    "fsq": FSQVAE,
    "lfq": LFQVAE,
    "diffusers_vq": partial(DiffusersTokenizer, autoencoder=VQ_MODEL),
    "diffusers_tiny": DiffusersTokenizer,
    "kl_vae": KLVAE,
    "dcgan": DCGANAutoencoder,
    "vgg": VGGAutoencoder,
    "pixel": PixelTokenizer,
}
PIXELS = {"cpu": 16 * 64 * 64, "cuda": 1024 * 64 * 64}  # encoded at once
SEARCHES = {
    "tree": lambda n_layers: CodeTree(64, n_layers, 16),
    "flat": lambda n_layers: EMACodebook(16**n_layers, 64),
}


def tree():
    """HR-VQVAE's search down a tree of 16 codes a node against one codebook with as many codes as the tree has leaves.

    4096 positions (16 frames of 64 x 64) of 64 channels. Ratios are tree over flat, at 2^16 leaves and, with their
    number in the name, at fewer. Memory is that of the codes plus the peak of the search.
    """
    ratios = {}
    for device in DEVICES:
        for n_layers in (2, 3, 4):
            time = {name: search_seconds(name, n_layers, device) for name in SEARCHES}
            memory = {name: search_memory(name, n_layers, device) for name in SEARCHES}
            say(
                f"  {16**n_layers:5d} leaves, {device}: tree {time['tree'] * 1e3:.1f} ms, {memory['tree']:.0f} MB; "
                f"flat {time['flat'] * 1e3:.1f} ms, {memory['flat']:.0f} MB"
            )
            suffix = f"_{16**n_layers}" * (n_layers < 4) + "_gpu" * (device == "cuda")
            ratios[f"tree_vs_flat_time{suffix}"] = time["tree"] / time["flat"]
            ratios[f"tree_vs_flat_memory{suffix}"] = memory["tree"] / memory["flat"]
    return ratios


def search_seconds(name, n_layers, device):
    quantizer, vectors = SEARCHES[name](n_layers).to(device), torch.randn(4096, 64, device=device)
    quantizer.nearest(vectors)
    return seconds(lambda: quantizer.nearest(vectors), device, repeat=5)


def search_memory(name, n_layers, device):
    """MB; on the CPU of a fresh process, since memory that was used before is not given back reliably."""
    if device == "cpu":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(resident_memory, name, n_layers).result()
    vectors = torch.randn(4096, 64, device=device)
    before = torch.cuda.memory_allocated()
    quantizer = SEARCHES[name](n_layers).to(device)
    torch.cuda.reset_peak_memory_stats()
    quantizer.nearest(vectors)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_memory(name, n_layers):
    """MB that the process grows by at most, besides what loading the libraries' kernels takes."""
    SEARCHES[name](2).nearest(torch.randn(16, 64))
    quantizer, vectors = SEARCHES[name](n_layers), torch.randn(4096, 64)
    codes = sum(module.codebook.nbytes for module in quantizer.modules() if isinstance(module, EMACodebook))
    before = kilobytes("VmRSS")
    quantizer.nearest(vectors)
    return codes / 1e6 + (kilobytes("VmHWM") - before) / 1e3


@torch.no_grad()
def speed():
    """Frames per second of encoding and decoding RGB frames of 64 x 64 and 256 x 256, and what ``encode`` takes beside
    the forward pass of its bare convolution stack, the two in turns.

    ``quantizer_overhead`` is the largest ratio of the two over all discrete tokenizers and both sizes, in fp32 on the
    CPU; ``quantizer_overhead_{name}`` that of one tokenizer. With ``_bf16``, under autocast: the networks get faster,
    the quantizers stay in fp32. With ``_gpu``, on the GPU, where weights are channels-last and torch.compile is tried
    as well; on a CPU it gains a few per cent and takes a minute a model.
    """
    ratios = {}
    for device in DEVICES:
        for name, build in TOKENIZERS.items():
            for size in (64, 256):
                tokenizer = build(height=size, width=size).eval().to(device)
                if device == "cuda":
                    tokenizer.to(memory_format=torch.channels_last)
                n = PIXELS[device] // size**2
                frames = torch.rand(1, n, 3, size, size, device=device) * 2 - 1
                for way, run in WAYS[device].items():
                    encode, bare, ratio, decode = measure(tokenizer, frames, partial(run, device))
                    rates = f"encode {n / encode:.3g} frames/s, decode {n / decode:.3g}"
                    if bare is not None:
                        rates += f"; bare encoder {n / bare:.3g}: {100 * (ratio - 1):+.1f} %"
                    say(f"  {name} {size} px {device}{way.replace('_', ' ')}: {rates}")
                    if bare is not None and tokenizer.is_discrete:
                        suffix = way + "_gpu" * (device == "cuda")
                        for key in (f"quantizer_overhead_{name}{suffix}", f"quantizer_overhead{suffix}"):
                            ratios[key] = max(ratios.get(key, 0.0), ratio)
    return ratios


def in_bf16(device, function):
    return torch.autocast(device, torch.bfloat16)(function)


WAYS = {  # how functions are run: the name's suffix -> (device, function) -> function
    "cpu": {"": lambda device, function: function, "_bf16": in_bf16},
    "cuda": {
        "": lambda device, function: function,
        "_bf16": in_bf16,
        "_compiled": lambda device, function: torch.compile(function),
        "_bf16_compiled": lambda device, function: in_bf16(device, torch.compile(function)),
    },
}


def measure(tokenizer, frames, run):
    """-> seconds of encoding, of the bare encoder, their ratio (both None without one), seconds of decoding"""
    encode, decode = run(tokenizer.encode), run(tokenizer.decode)
    latents = encode(frames).latents
    decode(latents)
    decoding = seconds(lambda: decode(latents), frames.device, repeat=3)
    network = bare_encoder(tokenizer)
    if network is None:
        return seconds(lambda: encode(frames), frames.device, repeat=3), None, None, decoding
    network, flat = run(network), frames[0]
    ratio, whole, bare = compare(lambda: encode(frames), lambda: network(flat), frames.device, rounds=7)
    return whole, bare, ratio, decoding


def bare_encoder(tokenizer):
    """The convolution stack of ``encode``, a function of (N, C, H, W); None: there is none."""
    if isinstance(tokenizer, DiffusersTokenizer):
        return tokenizer.network.encode
    return getattr(tokenizer, "encoder", None)


def dataset():
    """The real ``encode_dataset`` of 1,800 frames of 64 x 64 through the default VQVAE, reading, encoding and writing,
    against the bare ``encode`` of as many frames in memory, the two in turns. Ratios are of frames per second.

    ``encode_dataset_vs_bare`` reads a prepared set, ``..._mp4`` decodes and resizes h264 of 240 x 320.
    """
    ratios = {}
    workers = min(4, max(1, len(os.sched_getaffinity(0)) - 1))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(12):
            write(root / f"original/train/{i:02d}.mp4", moving_texture(i), "libx264", "yuv420p", {"g": "50"})
        for split in ("val", "test"):
            (root / "original" / split).mkdir()
        prepare(Folder(root / "original", frame_size=64), root / "prepared")
        sets = {
            "": prepared_videos(root / "prepared", "train", 16),
            "_mp4": VideoFolder(root / "original", "train", 16, 64),
        }
        for device in DEVICES:
            tokenizer = VQVAE().eval().to(device)
            group = torch.rand(1, CPU_CHUNK if device == "cpu" else 256, 3, 64, 64, device=device) * 2 - 1
            for kind, videos in sets.items():
                n_frames = sum(video.n_frames for video in videos.videos)
                runs = iter(range(100))

                def whole(videos=videos, tokenizer=tokenizer, runs=runs, device=device, kind=kind):
                    output = root / f"{device}{kind}" / str(next(runs))
                    encode_dataset(videos, tokenizer, output, num_workers=workers, device=device)

                @torch.no_grad()
                def bare(tokenizer=tokenizer, group=group, n_frames=n_frames):
                    for _ in range(0, n_frames, group.shape[1]):
                        tokenizer.encode(group)

                ratio, bare_s, whole_s = compare(bare, whole, device, rounds=3)
                rates = f"{n_frames / whole_s:.0f} frames/s, bare encode {n_frames / bare_s:.0f}"
                say(f"  encode_dataset{kind} {device}, {workers} workers: {rates}")
                ratios[f"encode_dataset_vs_bare{kind}{'_gpu' * (device == 'cuda')}"] = ratio
    return ratios


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"tree": tree, "speed": speed, "encode_dataset": dataset})

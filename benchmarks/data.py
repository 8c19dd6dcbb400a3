"""Reading clips for training: prepared shards against lossless video and against decoding the original files.

    python benchmarks/data.py

Random windows of 16 frames at 64 x 64, RGB, batches of 16, from files that this script makes: 24 mp4 files of 240 x 320
pixels and 150 frames (h264, a key frame every 50). Everything lies in the page cache.
"""

import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path

from common import run_parts, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import av
import torch

from latentcast import VQVAE, VideoFolder, prepared_videos
from latentcast.data.loading import open_loader
from latentcast.data.sets.folder import Folder
from latentcast.data.store.prepared import prepare

N_VIDEOS, N_FRAMES, HEIGHT, WIDTH, SIZE = 24, 150, 240, 320, 64
CLIP_LENGTH, BATCH, SECONDS = 16, 16, 6.0
LOSSLESS = {"ffv1": ("ffv1", "bgr0", {"g": "1"}), "h264 lossless": ("libx264rgb", "rgb24", {"qp": "0", "g": "16"})}


def storage():
    """Clips per second by storage and number of loader processes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(N_VIDEOS):
            write(root / f"original/train/{i:02d}.mp4", moving_texture(i), "libx264", "yuv420p", {"g": "50"})
        for split in ("val", "test"):
            (root / "original" / split).mkdir()
        prepare(Folder(root / "original", frame_size=SIZE), root / "shards")
        stored = prepared_videos(root / "shards", "train", N_FRAMES)
        for name, (codec, pix_fmt, options) in LOSSLESS.items():
            for i in range(N_VIDEOS):
                frames = ((stored.read_video(i, 0, N_FRAMES) + 1) * 127.5).round().to(torch.uint8)
                write(root / f"{name}/train/{i:02d}.mkv", frames, codec, pix_fmt, options)
            for split in ("val", "test"):
                (root / name / split).mkdir()
        sets = {"original mp4": VideoFolder(root / "original", "train", CLIP_LENGTH, SIZE)}
        sets |= {name: VideoFolder(root / name, "train", CLIP_LENGTH, SIZE) for name in LOSSLESS}
        sets["shards"] = prepared_videos(root / "shards", "train", CLIP_LENGTH)
        check_equal(sets)
        workers = sorted({0, 1, 2, os.cpu_count()})
        rates = {name: {n: clips_per_second(data, n) for n in workers} for name, data in sets.items()}
        sizes = {
            name: sum(f.stat().st_size for f in (root / folder).rglob("*") if f.is_file())
            for name, folder in (
                ("original mp4", "original"),
                *((name, name) for name in LOSSLESS),
                ("shards", "shards"),
            )
        }
    for name, by_workers in rates.items():
        figures = ", ".join(f"{n} workers {rate:.0f}" for n, rate in by_workers.items())
        say(f"  {name:14s} {sizes[name] / 1e6:6.1f} MB; clips/s: {figures}")
    say(f"  a VQ-VAE of 64 channels trains on {training_rate():.1f} clips/s here")
    best = {name: max(by_workers.values()) for name, by_workers in rates.items()}
    return {
        "prepared_vs_original": best["shards"] / best["original mp4"],
        "prepared_vs_ffv1": best["shards"] / best["ffv1"],
        "prepared_vs_h264_lossless": best["shards"] / best["h264 lossless"],
    }


def moving_texture(seed):
    """(N_FRAMES, 3, HEIGHT, WIDTH) uint8: smooth noise that drifts, about as hard to code as a real scene."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, HEIGHT // 4, WIDTH // 4, generator=generator)
    texture = torch.nn.functional.interpolate(noise, size=(HEIGHT, WIDTH), mode="bicubic")[0]
    frames = torch.stack([texture.roll((2 * t, 3 * t), (1, 2)) for t in range(N_FRAMES)])
    frames += 0.05 * torch.randn(N_FRAMES, 1, HEIGHT, WIDTH, generator=generator)
    return (128 + 50 * frames).clamp(0, 255).to(torch.uint8)


def write(path, frames, codec, pix_fmt, options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def check_equal(sets):
    """The lossless storages must hold the same frames."""
    for name in LOSSLESS:
        difference = (sets[name].read_video(3, 20, 36) - sets["shards"].read_video(3, 20, 36)).abs().max()
        assert difference < 1e-5, f"{name} differs from the shards by {difference}"


def clips_per_second(dataset, n_workers):
    """Of the best of three windows of SECONDS / 3 seconds, after a first epoch."""
    options = {"batch_size": BATCH, "shuffle": True, "drop_last": True, "persistent_workers": n_workers > 0}
    loader = open_loader(dataset, num_workers=n_workers, read_timeout=300, **options)
    for _ in loader:
        pass
    best = 0.0
    for _ in range(3):
        start, n_clips = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS / 3:
            for batch in loader:
                n_clips += len(batch["frames"])
        best = max(best, n_clips / (time.perf_counter() - start))
    return best


def training_rate():
    """Clips per second of forward, backward and step of a small tokenizer."""
    model = VQVAE(hidden_channels=64, residual_channels=32, n_residual_blocks=1, embedding_dim=16, codebook_size=128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.train().to(device)
    optimizer = torch.optim.Adam(model.parameters())
    frames = torch.rand(4, CLIP_LENGTH, 3, SIZE, SIZE, device=device) * 2 - 1

    def step():
        optimizer.zero_grad()
        model(frames).loss.backward()
        optimizer.step()

    step()
    return 4 / seconds(step, device, repeat=4)


if __name__ == "__main__":
    run_parts(__doc__.splitlines()[0], {"storage": storage})

"""Train every tokenizer with one budget on one data set, and compare what they keep of its test frames.

    python benchmarks/tokenizer_quality.py tokenizers_smmnist [--only A,B] [--measure] [--root DIR] [key=value ...]

Each tokenizer is trained by tools/train_tokenizer.py in ROOT/NAME, ROOT being runs/EXPERIMENT unless given; what stands
there is not trained again. Then the table (table.md, table.json) and the pictures (reconstructions.png, layers.png) are
written beside them, of every tokenizer that stands. ``--measure`` trains none.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import environment, say, seconds  # isort: skip  (sets the thread policy before torch loads)

import torch

from latentcast.config import instantiate, load_config
from latentcast.data.video.writer import write_image
from latentcast.figures.sheets import contact_sheet
from latentcast.metrics import lpips, mse, psnr, ssim
from latentcast.metrics.codebook import CodebookUsage
from latentcast.modeling import load_model

NARROW = ["tokenizer.hidden_channels=64", "tokenizer.residual_channels=32"]
# No tanh: it saturates on frames that are mostly black. Replicated borders: an edge has no codes of its own.
CONVOLUTIONAL = [*NARROW, "tokenizer.output_activation=linear", "tokenizer.padding_mode=replicate"]
# name -> what tools/train_tokenizer.py is told beyond the experiment. Bits at a position stand behind each.
TOKENIZERS = {
    "vqvae": ["tokenizer=vqvae", *CONVOLUTIONAL, "tokenizer.embedding_dim=64"],  # 9
    "sliced_vqvae": ["tokenizer=sliced_vqvae", *CONVOLUTIONAL, "tokenizer.embedding_dim=64"],  # 36
    "flat_4096": [
        "tokenizer=vqvae",
        *CONVOLUTIONAL,
        "tokenizer.embedding_dim=64",
        "tokenizer.codebook_size=4096",
    ],  # 12
    "hr_vqvae": ["tokenizer=hr_vqvae", *CONVOLUTIONAL],  # 12
    "residual_vqvae": ["tokenizer=residual_vqvae", *CONVOLUTIONAL],  # 12
    "fsq": ["tokenizer=fsq", *CONVOLUTIONAL],  # 9.97
    "lfq": ["tokenizer=lfq", *CONVOLUTIONAL, "tokenizer.n_codebooks=2"],  # 10
    "kl_vae": [
        "tokenizer=kl_vae",
        "tokenizer.block_channels=[16,32,64]",
        "tokenizer.norm_groups=16",
        "tokenizer.attention=false",
    ],
    "dcgan": ["tokenizer=dcgan", "tokenizer.output_activation=linear"],
    "vgg": ["tokenizer=vgg", "tokenizer.output_activation=linear", "tokenizer.hidden_channels=16"],
}
FRAMES = 2560  # of the test split and of the training split
SHOWN = 8  # frames in the pictures
BATCH = 64


def main(experiment, root, names, training, overrides):
    if training:
        for name in names:
            train(experiment, root / name, [*TOKENIZERS[name], *overrides])
    frames, seen = (some_frames(experiment, split, overrides) for split in ("test", "train"))
    rows, pictures, layers = {}, {"test frames": frames[:SHOWN]}, {}
    for name in TOKENIZERS:
        if not (root / name / "tokenizer").is_dir():
            continue
        tokenizer = load_model(root / name / "tokenizer")
        rows[name], reconstruction = measure(tokenizer, frames, seen)
        pictures[name] = reconstruction[:SHOWN]
        say(f"  {name}: {rows[name]}")
        if name == "hr_vqvae":
            rows[name]["layers"], layers = by_layer(tokenizer, frames)
    text = table(rows) + picture(root / "reconstructions.png", pictures)
    if layers:
        text += picture(root / "layers.png", {"test frames": frames[:SHOWN], **layers})
    (root / "table.md").write_text(text)
    result = {
        "experiment": experiment,
        "test_frames": len(frames),
        "train_frames": len(seen),
        "tokenizers": rows,
        "env": environment(),
    }
    (root / "table.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def train(experiment, run_dir, overrides):
    if (run_dir / "tokenizer").is_dir():
        return
    tool = Path(__file__).parents[1] / "tools" / "train_tokenizer.py"
    command = [sys.executable, str(tool), experiment, f"run_dir={run_dir}", "resume=true", *overrides]
    say(" ".join(command[1:]))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def some_frames(experiment, split, overrides):
    """The first frame of evenly spread clips of a split -> (N, 1, C, H, W)."""
    config = load_config(experiment, [o for o in overrides if o.startswith("data")], tool="train_tokenizer")
    dataset = instantiate(config.data)(split=split)
    count = min(FRAMES, len(dataset))
    return torch.stack([dataset[i * len(dataset) // count]["frames"][:1] for i in range(count)])


@torch.no_grad()
def measure(tokenizer, frames, seen):
    """-> (figures of one row, reconstructions like ``frames``); ``seen`` are frames of the training split."""
    spec = tokenizer.latent_spec
    (reconstruction, usage_test), (of_seen, usage_train) = (reconstruct(tokenizer, part) for part in (frames, seen))
    batch = frames[:BATCH]
    latents = tokenizer.encode(batch).latents
    error = mse(reconstruction, frames).mean()
    row = {
        "bits_per_frame": bits_per_frame(spec),
        "numbers_per_frame": None if tokenizer.is_discrete else spec["channels"] * spec["height"] * spec["width"],
        "mse": error.item() / 4,  # of intensities in [0, 1]
        "psnr": psnr(reconstruction, frames).mean().item(),
        "psnr_train": psnr(of_seen, seen).mean().item(),
        "ssim": ssim(reconstruction, frames).mean().item(),
        "lpips": torch.cat([lpips(*pair) for pair in zip(reconstruction.split(BATCH), frames.split(BATCH))])
        .mean()
        .item(),
        "encode_fps": BATCH / seconds(lambda: tokenizer.encode(batch), repeat=3),
        "decode_fps": BATCH / seconds(lambda: tokenizer.decode(latents), repeat=3),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
    }
    for split, usage in (("test", usage_test), ("train", usage_train)):
        row |= {f"{name}_{split}": values.tolist() for name, values in usage.items()}
    return row, reconstruction


def reconstruct(tokenizer, frames):
    """-> (reconstructions like ``frames``, figures of ``CodebookUsage``; none of a continuous tokenizer)"""
    usage = CodebookUsage(tokenizer.latent_spec["codebook_sizes"]) if tokenizer.is_discrete else None
    parts = []
    for batch in frames.split(BATCH):
        encoded = tokenizer.encode(batch)
        if usage is not None:
            usage.update(encoded.codes)
        parts.append(tokenizer.decode(encoded.latents))
    return torch.cat(parts), {} if usage is None else usage.compute()


def bits_per_frame(spec):
    """Of codes stored plainly: the sum of log2 K over codebooks and positions. None for continuous latents."""
    if not spec["codebook_sizes"]:
        return None
    bits = torch.tensor(spec["codebook_sizes"], dtype=torch.float64).log2().sum().item()
    return round(bits * spec["height"] * spec["width"])


@torch.no_grad()
def by_layer(tokenizer, frames):
    """PSNR, MSE and the share of the tree's nodes in use with the first layers only -> (rows, label -> frames)."""
    codes = torch.cat([tokenizer.encode(batch).codes for batch in frames.split(BATCH)])
    rows, pictures = [], {}
    path = torch.zeros_like(codes[..., 0])
    for n, size in enumerate(tokenizer.latent_spec["codebook_sizes"], 1):
        decoded = torch.cat([tokenizer.decode(part, n_layers=n) for part in codes.split(BATCH)])
        path = path * size + codes[..., n - 1]
        rows.append(
            {
                "n_layers": n,
                "psnr": psnr(decoded, frames).mean().item(),
                "mse": mse(decoded, frames).mean().item() / 4,
                "nodes_used": len(path.unique()) / size**n,
            }
        )
        pictures[f"{n} layer{'s' * (n > 1)}"] = decoded[:SHOWN]
    return rows, pictures


def picture(path, rows):
    """Write rows of frames, and say in Markdown which is which."""
    write_image(path, contact_sheet(torch.stack([row[:, 0] for row in rows.values()]), scale=2))
    return f"\n![{path.stem}]({path.name})\n\nRows: {', '.join(rows)}.\n"


def table(rows):
    lines = [
        "| tokenizer | bits a frame | MSE | PSNR, dB (training frames) | SSIM | LPIPS | codes used (training frames) "
        "| frames/s in, out | parameters |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        size = f"{row['bits_per_frame']:,}" if row["bits_per_frame"] else f"{row['numbers_per_frame']} floats"
        usage = ""
        if "usage_test" in row:
            test, train = (", ".join(f"{100 * u:.0f} %" for u in row[f"usage_{split}"]) for split in ("test", "train"))
            usage = f"{test} ({train})"
        lines.append(
            f"| {name} | {size} | {row['mse']:.5f} | {row['psnr']:.2f} ({row['psnr_train']:.2f}) | {row['ssim']:.3f} "
            f"| {row['lpips']:.3f} | {usage} | {row['encode_fps']:.0f}, {row['decode_fps']:.0f} "
            f"| {row['parameters'] / 1e6:.2f}M |"
        )
    if "hr_vqvae" in rows:
        lines += ["", "| HR-VQVAE, layers decoded | MSE | PSNR, dB | nodes of the tree in use |", "|--:|--:|--:|--:|"]
        for row in rows["hr_vqvae"]["layers"]:
            lines.append(
                f"| {row['n_layers']} | {row['mse']:.5f} | {row['psnr']:.2f} | {100 * row['nodes_used']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="tokenizers_smmnist, tokenizers_folder or one like them")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--only", default=",".join(TOKENIZERS), help="comma-separated names of tokenizers to train")
    parser.add_argument("--root", type=Path, metavar="DIR", help="default: runs/EXPERIMENT")
    parser.add_argument("--measure", action="store_true", help="train none")
    args = parser.parse_intermixed_args()
    chosen = args.only.split(",")
    if not set(chosen) <= TOKENIZERS.keys():
        parser.error(f"--only: expected some of {', '.join(TOKENIZERS)}, found {args.only}")
    main(args.experiment, args.root or Path("runs") / args.experiment, chosen, not args.measure, args.overrides)

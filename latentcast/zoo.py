"""Pipelines to be handed on: a folder each, with weights in half precision, example clips and a card."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replacing, write_json, write_text
from .metrics import psnr
from .schemas import one_line

EXAMPLES = "examples.safetensors"
N_EXAMPLES = 8
N_SAMPLES = 4  # of each example, for the card's PSNR
SEED = 0


def export(pipe, folder, clips, results, *, title, command, licence):
    """Write ``folder``: the pipeline in float16, its example clips, ``metrics.json`` and the card, ``README.md``.

    Args:
        pipe: a VideoPredictionPipeline; it is left in float16.
        clips: (N, T, C, H, W) in [-1, 1], test clips that become the examples.
        results: protocol name -> what tools/evaluate.py wrote.
        title, command, licence: of the card: what it is, how it was trained, the licence of weights and data.
    Returns:
        the examples' PSNR, dB: see ``example_psnr``.
    """
    folder = Path(folder)
    pipe.register_to_config(_name_or_path=folder.name)  # not where it lay on this machine
    pipe.to(torch.float16).save_pretrained(folder)
    uint8 = ((clips + 1) * 127.5).round().to(torch.uint8)
    with replacing(folder / EXAMPLES) as temporary:
        save_file({"clips": uint8}, temporary)
    found = example_psnr(type(pipe).from_pretrained(folder), read_examples(folder))
    write_json(folder / "metrics.json", {name: result["metrics"] for name, result in results.items()})
    write_text(folder / "README.md", _card(pipe, folder.name, results, found, title, command, licence))
    return found


def read_examples(folder):
    """The example clips of an exported pipeline -> (N, T, C, H, W) in [-1, 1].

    Raises:
        OSError: there are none, or they are damaged.
    """
    path = Path(folder) / EXAMPLES
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("clips").float() / 127.5 - 1
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: expected example clips ({one_line(error, 200)})") from None


def example_psnr(pipe, clips):
    """Mean PSNR of the best of four samples over the example clips, dB; always of the same noise."""
    context, future = clips[:, : pipe.config.n_context], clips[:, pipe.config.n_context :]
    generator = torch.Generator().manual_seed(SEED)
    settings = {"num_samples": N_SAMPLES, "generator": generator, "value_range": (-1, 1)}
    frames = pipe(context, future.shape[1], **settings).frames
    scores = psnr(frames.flatten(0, 1), future.repeat_interleave(N_SAMPLES, 0)).mean(1)
    return scores.unflatten(0, (len(clips), N_SAMPLES)).amax(1).mean().item()


def _card(pipe, name, results, found, title, command, licence):
    parameters = sum(p.numel() for part in (pipe.prior, pipe.tokenizer) if part for p in part.parameters())
    lines = ["---", f"license: {licence.split()[0].lower()}", "library_name: latentcast", "---", "", f"# {name}", ""]
    lines += [f"{title} {parameters / 1e6:.2f}M parameters, float16.", ""]
    for protocol, result in results.items():
        settings, lpips = result["protocol"], result["metrics"].get("lpips", {}).get("mean_of_samples")
        frames = f"{settings['n_context']} → {settings['n_predicted']} frames, {settings['n_samples']} samples"
        lines += [f"Protocol `{protocol}`: {frames}, {result['data']['n_clips']} test clips.", ""]
        lines += ["| metric | mean | 95 % |", "|---|--:|---|"]
        entries = result["metrics"] | ({"lpips, mean of samples": lpips} if lpips else {})
        for metric, entry in entries.items():
            low, high = entry.get("ci95") or ("", "")
            spread = f"{low:.4g} to {high:.4g}" if low != "" else ""
            lines.append(f"| {metric} | {entry['mean']:.4g} | {spread} |")
        lines.append("")
    lines += [f"PSNR of the best of {N_SAMPLES} samples on the {N_EXAMPLES} example clips: {found:.2f} dB.", ""]
    lines += ["Trained by", "", "```sh", command, "```", "", f"Licence: {licence}.", ""]
    return "\n".join(lines)

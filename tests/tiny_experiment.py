"""A tiny experiment on real classes, and ways to run the training tools on it."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import yaml

from latentcast import load_config

TOOLS = Path(__file__).parents[1] / "tools"
N_CLIPS = 24

EXPERIMENT = {
    "defaults": {"tokenizer": "vqvae", "data": "moving_digits", "trainer": "default"},
    "frame_size": 16,
    "channels": 1,
    "clip_length": 4,
    "n_context": 1,
    "batch_size": 8,
    "num_workers": 0,
    "data": {"n_videos": N_CLIPS, "n_heldout_videos": 8, "video_length": 6, "digit_size": 12},
    "tokenizer": {
        "hidden_channels": 16,
        "residual_channels": 8,
        "n_residual_blocks": 1,
        "embedding_dim": 8,
        "codebook_size": 16,
        "stride": 8,
    },
    "prior": {
        "_target_": "latentcast.VideoTransformer",
        "n_frames": 4,
        "subscale": [4, 1, 1],
        "dim": 16,
        "embed_dim": 8,
        "n_heads": 2,
        "head_dim": 8,
        "n_layers": 1,
    },
    "trainer": {
        "max_steps": 4,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "preview": {"n_clips": 2, "every_n_steps": 0},
    "wandb": {"mode": "disabled"},
}


def write_experiment(folder):
    """Write ``folder/tiny.yaml``, whose runs go to ``folder/run``."""
    path = Path(folder) / "tiny.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | {"run_dir": str(Path(folder) / "run")}))
    return path


def tiny_config(folder, *overrides):
    return load_config(write_experiment(folder), overrides)


def call_tool(tool, folder, *overrides):
    """Run a tool's ``main`` in this process -> its figures; errors are raised."""
    arguments = argparse.Namespace(experiment=str(write_experiment(folder)), overrides=list(overrides), verify=False)
    return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"](arguments)


def start_tool(tool, folder, *overrides):
    """Start a tool as a process of its own -> Popen."""
    return subprocess.Popen(
        [sys.executable, str(TOOLS / f"{tool}.py"), str(write_experiment(folder)), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,  # a process group of its own, as a terminal gives it
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_tool(tool, folder, *overrides):
    """Run a tool as a process of its own -> (exit status, figures or None, stderr)."""
    process = start_tool(tool, folder, *overrides)
    out, err = process.communicate(timeout=150)
    return process.returncode, json.loads(out.splitlines()[-1]) if out.strip() else None, err

"""train_tokenizer.py and train_prior.py as a user meets them: processes, exit statuses, one-line errors."""

import json
import os
import signal
import time

import pytest
import torch
from tiny_experiment import TOOLS, Started, call_tool, finished, run_ranks, start_tool, write_experiment

from latentcast import VideoPredictionPipeline, VideoTransformer, load_config, load_model
from latentcast.cli import UserError
from latentcast.config import ConfigError
from latentcast.modeling import fingerprint


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder whose run has a tokenizer and a latents cache."""
    folder = tmp_path_factory.mktemp("encoded")
    figures = call_tool("train_tokenizer", folder)
    assert figures["tokenizer"] == str(folder / "run/tokenizer")
    call_tool("encode_dataset", folder)
    return folder


def test_prior_tool_ends_with_a_complete_pipeline(encoded, command):
    tokenizer = fingerprint(load_model(encoded / "run/tokenizer"))
    status, figures, err = command("train_prior", write_experiment(encoded), "preview.sampler={temperature: 0.5}")
    assert status == 0, err
    assert figures["steps"] == 4 and set(figures["val"]) >= {"loss", "bits_per_code"} and figures["seconds"] > 0
    assert fingerprint(load_model(encoded / "run/tokenizer")) == tokenizer

    pipeline = VideoPredictionPipeline.from_pretrained(figures["pipeline"])
    assert fingerprint(pipeline.tokenizer) == tokenizer
    assert fingerprint(pipeline.prior) == fingerprint(load_model(figures["prior"]))
    future = pipeline(torch.zeros(1, 1, 1, 16, 16), n_frames=3, num_samples=2).frames
    assert future.shape == (1, 2, 3, 1, 16, 16)
    # The kept weights are the averaged ones of the last checkpoint.
    checkpoint = torch.load(encoded / "run/prior_training/last.ckpt", weights_only=True)
    for name, tensor in pipeline.prior.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"model.{name}"]), name
    # What was run can be run again from the file that it left.
    assert load_config(encoded / "run/config_prior.yaml").prior.dim == 16


def test_tokenizer_latents_have_unit_variance(encoded):
    tokenizer = load_model(encoded / "run/tokenizer")
    from latentcast import LatentCacheDataset

    dataset = LatentCacheDataset(encoded / "run/latents/train", clip_length=6)
    codes = torch.stack([dataset.read_video(i) for i in range(len(dataset))])
    assert tokenizer.codes_to_latents(codes).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "tool, overrides, message",
    [
        ("train_prior", ["optimiser.lr=1"], "unknown key 'optimiser'.*did you mean 'optimizer'"),
        ("train_prior", ["lr_scheduler.name=cosin"], "cosin.*not a valid SchedulerType"),
        ("train_prior", ["preview.sampler={temprature: 1}"], "unknown sampler option 'temprature'; did you mean"),
        ("train_prior", ["n_context=4"], "n_context: expected fewer than the clip's 4 frames, found 4"),
        ("train_prior", ["data.digit_size=10"], "latents cache .*data.*digit_size"),
        ("train_prior", ["wandb.mode=of"], "wandb.mode: expected auto, online, offline or disabled, found 'of'"),
        ("train_prior", ["clip_length=7"], "clip_length"),
        ("train_prior", ["trainer.max_steps=abc"], "trainer.max_steps: expected a number, found 'abc'"),
        ("train_prior", ["ema_decay=1"], "ema_decay: expected at least 0 and below 1, found 1"),
        ("train_prior", ["preview.n_clips=0"], "preview.n_clips: expected at least 1, found 0"),
        ("train_prior", ["preview.figures=[future]"], "figure 'future': not known; did you mean 'futures'"),
        ("train_prior", ["prior.subscale=[4,1,x]"], "subscale: expected three divisors"),
        ("train_prior", ["prior.n_frames=2", "prior.subscale=[2,1,1]"], "clip: expected 2 frames .*, found 4"),
        ("train_prior", ["prior=null"], "prior: the experiment names none; choose one by prior=NAME"),
        ("train_prior", ["data=null"], "data: the experiment names none; choose one by data=NAME"),
        ("train_prior", ["tokenizer=pixel"], "trained with tokenizer._target_=VQVAE, asked for PixelTokenizer"),
        ("train_prior", ["tokenizer.stride=4"], "trained with tokenizer.stride=8, asked for 4; leave it out"),
        ("train_prior", ["tokenizer=vqvae", "frame_size=8"], "trained with frame_size=16, asked for 8; leave it out"),
        ("train_prior", ["tokenizer=sliced_vqvae"], "trained with tokenizer.codebook_size=16, asked for 512; leave it"),
        ("train_prior", ["final_weights=worst"], "final_weights: expected last or best, found 'worst'"),
        ("train_tokenizer", [], "holds tokenizer_training/last.ckpt of an earlier training; resume=true continues it"),
        ("train_tokenizer", ["data.size=24", "overwrite=true"], "frames: expected H = 16, found .*24"),
        ("train_tokenizer", ["tokenizer=pixel", "run_dir=elsewhere"], "PixelTokenizer has nothing to learn"),
        ("train_prior", ["run_dir=elsewhere"], "no trained tokenizer here; run tools/train_tokenizer.py first"),
        ("train_tokenizer", ["run_dir=/proc/no"], "run_dir /proc/no: not writable"),
    ],
)
def test_mistakes_are_one_clear_line_and_lose_nothing(encoded, tmp_path, monkeypatch, tool, overrides, message):
    monkeypatch.chdir(tmp_path)
    if tool == "train_prior":
        overrides = [*overrides, "overwrite=true"]
    before = {path: path.stat().st_mtime_ns for path in (encoded / "run").rglob("*.safetensors")}
    with pytest.raises((ValueError, OSError, UserError, ConfigError), match=message):
        call_tool(tool, encoded, *overrides)
    assert before == {path: path.stat().st_mtime_ns for path in (encoded / "run").rglob("*.safetensors")}


def test_a_missing_or_foreign_cache_is_refused(encoded, tmp_path):
    call_tool("train_tokenizer", tmp_path, "optimizer.lr=0.1")
    with pytest.raises(UserError, match=r"latents/train: no latents cache here; run tools/encode_dataset.py first"):
        call_tool("train_prior", tmp_path)
    (tmp_path / "run/latents").symlink_to(encoded / "run/latents")
    with pytest.raises(ValueError, match=r"latents cache .*tokenizer.*re-run tools/encode_dataset.py"):
        call_tool("train_prior", tmp_path)


def test_overwrite_starts_over_and_resume_extends(tmp_path):
    first = call_tool("train_tokenizer", tmp_path)
    weights = load_model(first["tokenizer"]).state_dict()
    again = call_tool("train_tokenizer", tmp_path, "overwrite=true")
    assert again["steps"] == 4
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in load_model(again["tokenizer"]).state_dict().items()
    )
    assert call_tool("train_tokenizer", tmp_path, "resume=true", "overwrite=true")["steps"] == 4  # nothing left to do
    assert call_tool("train_tokenizer", tmp_path, "resume=true", "trainer.max_steps=6")["steps"] == 6


def test_non_finite_loss_ends_the_tool_with_one_line(tmp_path, command):
    status, figures, err = command("train_tokenizer", write_experiment(tmp_path), "optimizer.lr=1e30")
    assert status == 1 and figures is None
    assert err.splitlines()[-1].startswith("error: FloatingPointError: VQVAE: the training ")
    assert "Traceback" not in err and not (tmp_path / "run/tokenizer").exists()


def test_killed_and_interrupted_runs_can_be_resumed(tmp_path):
    """kill -9 leaves the periodic checkpoint; ctrl-C the step at hand; then the run goes on to its end.

    A terminal's signals reach the loader's workers as well.
    """
    endless = ["trainer.max_steps=100000", "checkpoint_every_n_steps=3", "resume=true", "num_workers=2"]
    last = tmp_path / "run/tokenizer_training/last.ckpt"
    steps = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = start_tool("train_tokenizer", tmp_path, *endless)
        since = last.stat().st_mtime_ns if last.exists() else 0
        deadline = time.monotonic() + 120
        while not (last.exists() and last.stat().st_mtime_ns > since):
            assert process.poll() is None and time.monotonic() < deadline, (process.kill(), process.communicate())
            time.sleep(0.02)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert out == ""
        steps.append(torch.load(last, weights_only=True)["global_step"])
        if number == signal.SIGINT:
            assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"
    assert steps[0] % 3 == 0 and steps[1] > steps[0] >= 3
    figures = call_tool("train_tokenizer", tmp_path, "resume=true", f"trainer.max_steps={steps[1] + 2}")
    assert figures["steps"] == steps[1] + 2


@pytest.mark.parametrize("again", [True, False])
def test_slurms_signal_ends_a_run_at_a_checkpoint_and_queues_its_job_again(tmp_path, again):
    """As ``srun`` starts it, with a scontrol that writes down what it is told."""
    told = tmp_path / "told"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    scontrol.chmod(0o755)
    task = {"SLURM_JOB_ID": 4711, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": 1, "SLURM_NODELIST": "localhost"}
    task |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), 0)
    task["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    endless = ["trainer.max_steps=100000", "checkpoint_every_n_steps=1", *(["resume=true"] if again else [])]
    process = Started(TOOLS / "train_tokenizer.py", write_experiment(tmp_path), *endless, cwd=tmp_path, **task)
    last = tmp_path / "run/tokenizer_training/last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    status, _, err = finished(process)
    assert status == 130 and "SLURM: the time is nearly up" in err
    if again:
        assert told.read_text() == "requeue 4711\n" and "job 4711 is queued again" in err
    else:
        assert not told.exists() and "without resume=true the job would start over" in err
    assert not list((tmp_path / "run").glob("hpc*"))
    step = torch.load(last, weights_only=True)["global_step"]
    assert call_tool("train_tokenizer", tmp_path, "resume=true", f"trainer.max_steps={step + 1}")["steps"] == step + 1


def test_two_runs_do_not_train_in_one_folder(tmp_path):
    endless = ["trainer.max_steps=100000", "checkpoint_every_n_steps=1"]
    processes = [start_tool("train_tokenizer", tmp_path, *endless) for _ in range(2)]
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)
    processes.sort(key=lambda process: process.poll() is None)
    (_, err), second = processes[0].communicate(), processes[1]
    assert processes[0].returncode == 1 and "Traceback" not in err
    assert str(second.pid) in err.splitlines()[-1] and "training (tokenizer)" in err.splitlines()[-1], err
    last = tmp_path / "run/tokenizer_training/last.ckpt"
    while not last.exists():
        assert second.poll() is None
        time.sleep(0.05)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    step = torch.load(last, weights_only=True)["global_step"]  # and the lock of a killed run keeps nobody out
    assert call_tool("train_tokenizer", tmp_path, "resume=true", f"trainer.max_steps={step}")["steps"] == step


def test_a_resumed_run_may_have_larger_batches(tmp_path):
    call_tool("train_tokenizer", tmp_path, "batch_size=2", "trainer.max_steps=10")  # 20 of 24 clips
    assert call_tool("train_tokenizer", tmp_path, "batch_size=8", "trainer.max_steps=14", "resume=true")["steps"] == 14


def test_two_processes_train_together(tmp_path):
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=2", "batch_size=4"]
    process = start_tool("train_tokenizer", tmp_path, *two)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    (line,) = out.splitlines()  # one process speaks for both
    assert json.loads(line)["steps"] == 2
    call_tool("encode_dataset", tmp_path)
    two[two.index("trainer.strategy=ddp")] = "trainer.strategy=fsdp"
    (status, figures, err), (other, nothing, _) = run_ranks("train_prior", tmp_path, write_experiment(tmp_path), *two)
    assert status == other == 0, err
    assert figures["steps"] == 2 and nothing is None
    prior = VideoPredictionPipeline.from_pretrained(figures["pipeline"]).prior
    assert type(prior) is VideoTransformer and (tmp_path / "run/previews/prior/step_0000002.png").is_file()

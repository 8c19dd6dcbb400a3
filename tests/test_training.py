"""The training loop: resuming, averaging, stopping, what is logged and drawn."""

import functools
import itertools
import logging
import math
import os
import resource
import shutil
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from skimage.metrics import structural_similarity
from tiny import SMALL_TRANSFORMER, random_frames, tiny_tokenizer
from tiny_experiment import N_CLIPS, assert_same_checkpoints, call_tool, free_port, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from video_files import counter_frames, encode

from latentcast import (
    MovingDigits,
    PriorModule,
    TokenizerModule,
    VideoDataModule,
    VideoTransformer,
    instantiate,
    load_config,
    load_model,
    probe,
)
from latentcast.cli import DTYPES, UserError, pick_dtype
from latentcast.config import to_container
from latentcast.data.base import ShownClips
from latentcast.figures import frames, training_curves
from latentcast.figures.sheets import BORDER, GAP, scale_for
from latentcast.files import printable
from latentcast.modeling import fingerprint
from latentcast.tokenizers.quantizers.ema_codebook import EMACodebook
from latentcast.training.callbacks import CodebookMonitor, ReconstructionPreview, WeightAverage
from latentcast.training.checkpoints import check_checkpoint
from latentcast.training.loggers import plot_curves
from latentcast.training.metrics_file import read_metrics
from latentcast.training.module import TrainingModule
from latentcast.training.run import TrainingRun, preview_clips, replacing_folder

EPOCH = N_CLIPS // 8  # steps


class Stop(pl.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def build(config, stage):
    """-> (TrainingRun, module, data) of the tiny experiment; the prior learns pixels, so that it needs no tokenizer."""
    with TrainingRun.open(config, stage) as run:
        pass
    pl.seed_everything(config.seed)
    data = VideoDataModule(instantiate(config.data), config.batch_size, config.num_workers, config.seed)
    arguments = (instantiate(config.optimizer), to_container(config.lr_scheduler))
    if stage == "tokenizer":
        module = TokenizerModule(instantiate(config.tokenizer), *arguments, config=to_container(config))
    else:
        tokenizer = instantiate(config.tokenizer)
        prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec)
        module = PriorModule(prior, *arguments, config.n_context, tokenizer, to_container(config))
    return run, module, data


def fit(config, stage="tokenizer", callbacks=()):
    run, module, data = build(config, stage)
    return run.fit(module, data, callbacks), module, run


def last(run):
    return torch.load(run.last, weights_only=True)


def curves(run):
    figures = defaultdict(list)
    for step, name, value in read_metrics(run.run_dir / "metrics" / f"{run.stage}.csv"):
        figures[name].append((step, value))
    return figures


PIXEL_PRIOR = [
    "tokenizer=pixel",
    "tokenizer.levels=4",
    "frame_size=8",
    "data.digit_size=6",
    "data.speeds=[2]",
    "batch_size=4",
]
REVIVAL = ["tokenizer.dead_code_threshold=0.6", "tokenizer.ema_decay=0.5", "batch_size=4"]
SMALL_HR_VQVAE = [
    *("tokenizer.hidden_channels=16", "tokenizer.residual_channels=8", "tokenizer.n_residual_blocks=1"),
    *("tokenizer.embedding_dim=8", "tokenizer.stride=8", "tokenizer.n_layers=2", "tokenizer.codebook_size=6"),
]
EXACT = ["trainer.max_steps=9", "lr_scheduler.name=cosine", "lr_scheduler.num_warmup_steps=3", "data.n_videos=20"]


@pytest.mark.parametrize(
    "stage, extra, number",
    [
        ("tokenizer", ["trainer.accumulate_grad_batches=2", "batch_size=4", "num_workers=2"], signal.SIGTERM),
        ("tokenizer", [*REVIVAL, "tokenizer.n_codebooks=2", "tokenizer.codebook_size=24"], signal.SIGTERM),
        ("tokenizer", ["tokenizer=hr_vqvae", *REVIVAL, *SMALL_HR_VQVAE], signal.SIGTERM),
        ("prior", PIXEL_PRIOR, signal.SIGINT),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, stage, extra, number, monkeypatch):
    """5 batches an epoch, stopped inside the second or third one: weights, average, optimizer and rate are equal.

    So are codebooks with all that they remember, where codes die and are revived before and after the stop."""
    revived, update = [], EMACodebook.update
    monkeypatch.setattr(EMACodebook, "update", lambda *args: revived.append(update(*args)) or revived[-1])
    _, _, whole = fit(tiny_config(tmp_path, *EXACT, *extra, f"run_dir={tmp_path}/whole"), stage)
    if REVIVAL[0] in extra:
        n_codebooks = len(revived) // 9
        assert len(torch.cat(revived[: 6 * n_codebooks])) > 0 and len(torch.cat(revived[-2 * n_codebooks :])) > 0
    half = [*EXACT, *extra, f"run_dir={tmp_path}/half"]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config(tmp_path, *half), stage, [Stop(6, number)])
    assert signal.getsignal(signal.SIGINT) is handler
    _, _, resumed = fit(tiny_config(tmp_path, *half, "resume=true"), stage)

    expected, found = last(whole), last(resumed)
    assert found["global_step"] == expected["global_step"] == 9
    assert_same_checkpoints(found, expected)
    assert expected["lr_schedulers"] == found["lr_schedulers"]
    assert curves(whole)["train/loss"] == curves(resumed)["train/loss"]
    assert [step for step, _ in curves(resumed)["train/loss"]] == list(range(1, 10))


class StopAt(pl.Callback):
    """Sends this process a signal, or raises, in a hook of the n-th validation or at the n-th picture."""

    def __init__(self, hook, n, number):
        self.n, self.number = n, number
        setattr(self, hook, self.count)

    def count(self, trainer, *_):
        if not trainer.sanity_checking:
            self.n -= 1
            if self.n == 0 and self.number is None:
                raise RuntimeError("of this test")
            if self.n == 0:
                os.kill(os.getpid(), self.number)


class Pictures(ReconstructionPreview):
    def subject(self, pl_module, model):
        self.before(pl_module.trainer)
        return super().subject(pl_module, model)


CHAIN = [
    *(
        "trainer.max_steps=11",
        "lr_scheduler.name=cosine",
        "data.n_videos=20",
        "batch_size=4",
        "trainer.val_check_interval=3",
    ),
    *("trainer.check_val_every_n_epoch=null", "trainer.limit_val_batches=2", "data.n_heldout_videos=12"),
    *("checkpoint_every_n_steps=2", "optimizer.lr=0.02", "preview.every_n_steps=4"),
]


def chain(config, stop=None):
    """5 batches an epoch; validations of two batches after steps 3, 6 and 9, pictures after 4, 8 and 11."""
    run, module, data = build(config, "tokenizer")
    pictures = Pictures(preview_clips(data, 2), run.preview_dir, config.preview.every_n_steps)
    pictures.before = stop.count if hasattr(stop, "draw") else lambda trainer: None
    run.fit(module, data, [CodebookMonitor([16]), pictures, *([stop] if stop else [])])
    return run, module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return chain(tiny_config(tmp_path_factory.mktemp("whole"), *CHAIN))[0]


def rows(run):
    found = read_metrics(run.run_dir / "metrics" / f"{run.stage}.csv")
    return sorted(row for row in found if not row[1].startswith("throughput"))


@pytest.mark.parametrize("error", [False, True])
def test_wherever_a_run_is_stopped_it_goes_on_with_the_right_weights_and_every_row(tmp_path, whole, error):
    """A signal saves the step at hand, an error leaves the last checkpoint; what is logged is logged once."""
    term, interrupt = (None, None) if error else (signal.SIGTERM, signal.SIGINT)
    stops = [
        StopAt("on_validation_batch_start", 1, term),
        StopAt("on_before_optimizer_step", 2, term),  # of the last step of an epoch
        StopAt("on_before_optimizer_step", 1, interrupt),  # of a step that validates
        StopAt("draw", 1, interrupt),
        StopAt("on_validation_batch_end" if error else "on_validation_batch_start", 1, interrupt),
        StopAt("on_validation_end", 1, term),
    ]
    for n, stop in enumerate(stops):
        with pytest.raises(RuntimeError if error else KeyboardInterrupt):
            chain(tiny_config(tmp_path, *CHAIN, *(["resume=true"] if n else [])), stop)
        assert stop.n == 0
    resumed, _ = chain(tiny_config(tmp_path, *CHAIN, "resume=true"))
    expected, found = last(whole), last(resumed)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, found[part][name]) for name, tensor in expected[part].items()), part
    assert str(expected["optimizer_states"]) == str(found["optimizer_states"])
    assert rows(resumed) == rows(whole)


def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, whole, caplog):
    """And ends as a run that was never stopped. The damaged file does not take its place."""
    with pytest.raises(RuntimeError):
        chain(tiny_config(tmp_path, *CHAIN), StopAt("draw", 2, None))  # at step 8
    folder = tmp_path / "run/tokenizer_training"
    steps = [torch.load(folder / name, weights_only=True)["global_step"] for name in ("previous.ckpt", "last.ckpt")]
    assert steps == [4, 6]
    cut = (folder / "last.ckpt").read_bytes()[:-1000]
    (folder / "last.ckpt").write_bytes(cut)
    moments = Moments(tmp_path / "moments")
    with caplog.at_level("WARNING", "latentcast"):
        resumed, _ = chain(tiny_config(tmp_path, *CHAIN, "resume=true"), moments)
    assert f"{folder / 'last.ckpt'}: damaged, cannot be resumed" in caplog.text
    assert "the one before it is taken" in caplog.text
    found, expected = last(resumed), last(whole)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, found[part][name]) for name, tensor in expected[part].items()), part
    assert rows(resumed) == rows(whole)
    for copy in moments.folder.glob("*/tokenizer_training/previous.ckpt"):
        assert torch.load(copy, weights_only=True)["global_step"] >= 4


def test_each_run_has_its_own_time_limit(tmp_path):
    limits = ["trainer.max_steps=100000", "trainer.max_time=00:00:00:01", "lr_scheduler=null", "resume=true"]
    first, second = (fit(tiny_config(tmp_path, *limits))[0]["steps"] for _ in range(2))
    assert 0 < first < second < 100000


class Moments(pl.Callback):
    """Copies what lies on the disk, which is all that kill -9 leaves, between any two things that a run writes."""

    def __init__(self, folder):
        self.folder, self.n = folder, 0

    def copy(self, run_dir):
        self.n += 1
        shutil.copytree(run_dir, self.folder / f"{self.n}", ignore=shutil.ignore_patterns("previews"))

    def __getattribute__(self, name):
        hooks = ("on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_save_checkpoint")
        if name not in (*hooks, "on_before_optimizer_step"):
            return super().__getattribute__(name)
        return lambda trainer, *_: self.copy(trainer.default_root_dir) if 5 <= trainer.global_step <= 8 else None


def test_wherever_a_run_is_killed_every_row_is_there_once(tmp_path, whole):
    """Between a checkpoint and its rows in the metrics above all."""
    moments = Moments(tmp_path)
    chain(tiny_config(tmp_path, *CHAIN), moments)
    states = {}
    for n in range(1, moments.n + 1):
        folder = tmp_path / str(n)
        kept = [folder / "metrics/tokenizer.csv", *folder.glob("tokenizer_training/last.ckpt")]
        states.setdefault(tuple(path.read_bytes() for path in kept), folder)
    assert len({state[0] for state in states}) > 2 and len({state[1] for state in states}) > 1
    chosen = list(states.values())
    for folder in (chosen[0], chosen[len(chosen) // 2], chosen[-1]):
        with open(folder / "metrics/tokenizer.csv", "a") as file:
            file.write("7,train/lo")  # a row that was being written
        resumed, _ = chain(tiny_config(tmp_path, *CHAIN, "resume=true", f"run_dir={folder}"))
        assert rows(resumed) == rows(whole)
    resumed, _ = chain(tiny_config(tmp_path, *CHAIN, "resume=true"))  # killed after its last validation
    assert rows(resumed) == rows(whole)


def count_on_rank(rank, port, folder):
    """Half of an epoch, a stop, the other half in a new monitor, and what it reports."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    codes = torch.randint(40, (2, 8, 1), generator=torch.Generator().manual_seed(rank))
    before, after = CodebookMonitor([64]), CodebookMonitor([64])
    before.train.update(codes[0])
    after.load_state_dict(before.state_dict())
    after.train.update(codes[1])
    found = {name: values.item() for name, values in after.train.compute().items()}
    torch.save((codes, found), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_codebook_usage_over_ranks_and_after_a_stop_inside_an_epoch(tmp_path):
    torch.multiprocessing.start_processes(count_on_rank, (free_port(), tmp_path), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    counts = torch.bincount(torch.cat([codes for codes, _ in ranks]).flatten(), minlength=64).double()
    share = counts[counts > 0] / counts.sum()
    for _, found in ranks:
        assert found["usage"] == pytest.approx(len(share) / 64)
        assert found["perplexity"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)


def test_batches_of_validation_have_noise_of_their_own_and_the_same_each_time(tmp_path):
    seen = []

    class Record(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(torch.rand(()).item())

        def on_validation_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.model.eval_seed)

    steps = ["trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.num_sanity_val_steps=0"]
    pair = ["batch_size=4", "trainer.limit_val_batches=2"]
    fit(tiny_config(tmp_path, *PIXEL_PRIOR, *steps, *pair), "prior", [Record()])
    assert seen[:4] * 3 == seen and seen[0] != seen[2] and seen[1] != seen[3]


def test_the_average_lives_on_the_device_of_the_training(tmp_path):
    """Lightning sets callbacks up before it moves the module. "meta" stands for the GPU."""

    class OnMeta(SingleDeviceStrategy):
        def setup_environment(self):
            """No accelerator is asked whether it has such a device."""

        def teardown(self):
            """Nothing comes back from there."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("stopped before")

        def on_fit_start(self):
            parts = self, average._average_model.module
            self.devices = {tensor.device.type for part in parts for tensor in part.state_dict().values()}
            raise InterruptedError

    average, module = WeightAverage(0.9), Module()
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(strategy=OnMeta(device="meta"), accelerator="cpu", callbacks=[average], **settings)
    with pytest.raises(InterruptedError):
        trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4, 2)))
    assert module.devices == {"meta"}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tokenizer=hr_vqvae", *SMALL_HR_VQVAE],
        ["tokenizer=fsq", *SMALL_HR_VQVAE[:3], "tokenizer.stride=8", "tokenizer.levels=[4,3,5]"],
    ],
)
def test_quantizers_train_in_fp32_where_all_else_is_bf16(tmp_path, overrides):
    config = tiny_config(tmp_path, *overrides, "trainer.precision=bf16-true")
    sizes = instantiate(config.tokenizer).latent_spec["codebook_sizes"]
    _, module, run = fit(config, callbacks=[CodebookMonitor(sizes)])
    kept = {t.dtype for name, t in module.state_dict().items() if "quantizer" in name and t.is_floating_point()}
    assert kept == {torch.float32}
    perplexities = [value for name, rows in curves(run).items() if "perplexity" in name for _, value in rows]
    assert perplexities and all(1 <= value <= max(sizes) * (1 + 1e-6) for value in perplexities)


def test_average_follows_the_formula_and_keeps_masks_and_flags():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    model.register_buffer("codebook", torch.zeros(3))
    model.register_buffer("flag", torch.tensor(False))
    callback = WeightAverage(decay=0.4)
    callback.setup(SimpleNamespace(strategy=SimpleNamespace(root_device="cpu")), model, "fit")
    weight, codebook = model.weight.detach().clone(), torch.zeros(3)
    for n in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
            model.codebook.add_(1)
        model.flag.fill_(True)
        callback._average_model.update_parameters(model)
        decay = min(0.4, (1 + n) / (10 + n))
        weight = decay * weight + (1 - decay) * model.weight.detach()
        codebook = decay * codebook + (1 - decay) * model.codebook
    current = model.weight.detach().clone()
    with callback.averaged(model):
        assert torch.allclose(model.weight, weight) and torch.allclose(model.codebook, codebook)
        assert model.flag and torch.equal(model.mask, torch.full((2,), -torch.inf))
    assert torch.equal(model.weight, current)
    callback.apply(model)
    assert torch.allclose(model.weight, weight)


def test_validation_and_the_kept_weights_are_the_average(tmp_path):
    figures, module, run = fit(tiny_config(tmp_path, "optimizer.lr=0.05"))
    checkpoint = last(run)
    assert not torch.equal(
        checkpoint["state_dict"]["model.encoder.0.weight"], checkpoint["current_model_state"]["model.encoder.0.weight"]
    )
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][name]), name
    data = VideoDataModule(instantiate(run.config.data), run.config.batch_size)
    with torch.no_grad():
        loss = module.model.eval()(next(iter(data.val_dataloader()))["frames"]).loss
    assert figures["val"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_best_weights_can_be_kept(tmp_path):
    _, module, run = fit(tiny_config(tmp_path, "optimizer.lr=0.3", "final_weights=best", "ema_decay=0"))
    best = torch.load(run.best, weights_only=True)
    steps = curves(run)["val/loss"][:-1]  # the last is of the weights that are kept
    assert best["global_step"] == min(steps, key=lambda point: point[1])[0]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, best["state_dict"][name]), name


def test_previews_do_not_change_the_training(tmp_path):
    named = "preview.figures=[reconstructions, change_masks, code_frequencies, code_maps, training_tokenizer]"
    call_tool("train_tokenizer", tmp_path, f"run_dir={tmp_path}/a", "preview.every_n_steps=1", named)
    call_tool("train_tokenizer", tmp_path, f"run_dir={tmp_path}/b")
    a, b = (load_model(tmp_path / name / "tokenizer").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    pictures = {name: sorted(p.name for p in (tmp_path / name / "previews/tokenizer").iterdir()) for name in "ab"}
    kinds = ["", "_change_masks", "_code_frequencies", "_code_maps"]
    assert pictures == {
        "a": sorted(f"step_{step:07d}{kind}.png" for step in (1, 2, 3, 4) for kind in kinds),
        "b": ["step_0000004.png"],  # the experiment names one
    }
    assert [(tmp_path / name / "metrics/tokenizer_curves.png").exists() for name in "ab"] == [True, False]


@pytest.mark.parametrize("clip_length, n_rows, n_columns", [(3, 4, 3), (1, 2, 2)])
def test_reconstruction_grid_shows_each_frame_above_its_reconstruction(tmp_path, clip_length, n_rows, n_columns):
    config = tiny_config(tmp_path, f"clip_length={clip_length}", "trainer.max_steps=1")
    run, module, data = build(config, "tokenizer")
    shown = preview_clips(data, 2)
    clips = shown.frames
    run.fit(module, data, [ReconstructionPreview(shown, run.preview_dir, 0)])
    picture = torch.from_numpy(np.array(Image.open(run.preview_dir / "step_0000001.png").convert("L"))) / 127.5 - 1
    scale = scale_for(16)
    step = scale * 16 + 2 * BORDER + GAP
    assert picture.shape[0] > n_rows * step and picture.shape[1] > n_columns * step
    # The kept weights drew it: the reconstruction of the last clip's last frame stands below the truth.
    with torch.no_grad():
        reconstruction = module.model.eval()(clips).frames[1, -1, 0].clamp(-1, 1)
    row, column = place_of(picture, clips[1, -1, 0], scale)
    below = picture[row + step :, column:][: 16 * scale : scale, : 16 * scale : scale]
    assert (below - reconstruction).abs().mean() < 0.01


def place_of(picture, frame, scale):
    """Where ``frame`` stands in ``picture``, enlarged: (row, column) of its corner."""
    windows = picture.unfold(0, scale * len(frame), 1).unfold(1, scale * len(frame), 1)[..., ::scale, ::scale]
    distances = torch.stack([(row - frame).abs().mean((1, 2)) for row in windows])
    assert distances.min() < 0.01  # 8 bits
    return divmod(int(distances.argmin()), distances.shape[1])


def drawn(monkeypatch, module, name):
    """What ``module.name`` is given from now on: a list of its positional arguments."""
    given, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: given.append(args) or function(*args, **kwargs))
    return given


@pytest.mark.parametrize("second, title", [("val", "held-out clips"), ("b", "TRAINING clips, as none are held out")])
def test_previews_say_which_clips_they_show_and_of_which_videos(tmp_path, monkeypatch, second, title):
    for folder in ("train", second):
        (tmp_path / "clips" / folder).mkdir(parents=True)
        for number in range(2):
            encode(tmp_path / "clips" / folder / f"{number}.mp4", counter_frames(12, 16, 16))
    data = ["data=video_folder", f"data.root={tmp_path / 'clips'}", "data.val_fraction=0", "data.test_fraction=0"]
    sheets = drawn(monkeypatch, frames, "labelled_sheet")
    videos = drawn(monkeypatch, frames, "labelled_videos")
    pixels = [option for option in PIXEL_PRIOR if not option.startswith("data.")]
    call_tool("train_prior", tmp_path, *pixels, *data, "n_context=2")
    ((rows, _, said, *_),) = [sheet for sheet in sheets if sheet[2].startswith("Futures")]
    (cells, titles, *_) = videos[0]
    assert said == f"Futures · VideoTransformer, step 4: {title}"
    assert titles[0] == f"{said}: -1 (-0.04 s)"
    names = [f"{second}/0.mp4", f"{second}/1.mp4"]  # two videos, though the first has three clips
    kinds = ["best of 2", "random", "mean", "spread"]
    expected = [["truth", *kinds][i] if i else f"{name}\ntruth" for name in names for i in range(5)]
    assert [row.name.split("\n")[0] if "dB" in row.name else row.name for row in rows] == expected
    assert [name for name, _ in cells][:3] == [names[0], "best of 2", "random"]


def test_clips_of_one_video_are_numbered():
    shown = ShownClips(torch.zeros(3, 1, 1, 8, 8), 10, ["a", "b", "a"])
    assert shown.names == ["a #1", "b", "a #2"]


def test_a_loss_that_is_not_finite_stops_before_it_reaches_weights_or_checkpoint(tmp_path):
    run, module, data = build(tiny_config(tmp_path, "checkpoint_every_n_steps=1"), "tokenizer")

    def poison(model, arguments):
        model.decoder[0].bias.data[0] = torch.inf

    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.model.register_forward_pre_hook(poison)  # after the checkpoint of this moment

    message = r"^VQVAE: the training loss is (nan|inf) at step 2, first in decoder\.0 \(Conv2d\); stopped before"
    with pytest.raises(FloatingPointError, match=message):
        run.fit(module, data, [Poison()])
    checkpoint = last(run)
    assert checkpoint["global_step"] == 2
    assert all(t.isfinite().all() for t in checkpoint["current_model_state"].values() if t.is_floating_point())


def test_a_gradient_that_is_not_finite_names_the_module_where_it_came_up(tmp_path):
    run, module, data = build(tiny_config(tmp_path), "tokenizer")
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}

    def overflow(block, arguments, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)  # and so all that comes before it

    module.model.encoder[4].register_forward_hook(overflow)
    message = r"^VQVAE: the training gradient norm is (nan|inf) at step 0, first in encoder\.4(\.\S+)? \(\w+\); stopped"
    with pytest.raises(FloatingPointError, match=message):
        run.fit(module, data)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_codes_of_a_cache_train_as_they_are_stored():
    spec = tiny_tokenizer("vqvae").latent_spec
    module = PriorModule(VideoTransformer(spec, subscale=[4, 1, 1], **SMALL_TRANSFORMER).eval(), torch.optim.SGD)
    codes = torch.randint(12, (2, 4, spec["height"], spec["width"], 1))
    losses = [module.compute({"codes": codes.to(dtype)}).loss for dtype in (torch.int64, torch.uint8, torch.uint16)]
    assert losses[0] == losses[1] == losses[2]


def test_trainer_keys_reach_the_trainer(tmp_path):
    overrides = ["trainer.precision=bf16-mixed", "trainer.max_time=00:00:10:00", "trainer.val_check_interval=2"]
    _, module, run = fit(tiny_config(tmp_path, *overrides))
    assert module.trainer.precision == "bf16-mixed"
    assert module.model.dtype == torch.float32
    assert [step for step, _ in curves(run)["val/loss"]][:1] == [2]


def test_learning_rate_gradient_norm_and_throughput_are_logged(tmp_path):
    overrides = [
        "lr_scheduler.name=linear",
        "lr_scheduler.num_warmup_steps=2",
        "trainer.max_steps=6",
        "optimizer.lr=.01",
    ]
    config = tiny_config(tmp_path, *overrides)
    config.preview.figures = None  # the default: all, the curves too
    _, _, run = fit(config)
    figures = curves(run)
    expected = [0, 0.005, 0.01, 0.0075, 0.005, 0.0025]  # warm-up over 2 steps, then down to 0 at step 6
    assert [value for _, value in figures["train/lr"]] == pytest.approx(expected)
    assert all(math.isfinite(value) and value > 0 for _, value in figures["train/grad_norm"])
    clips, frames = (dict(figures[f"throughput/{unit}_per_s"]) for unit in ("clips", "frames"))
    assert clips and all(frames[step] == pytest.approx(4 * clips[step]) for step in clips)
    assert [step for step, share in figures["throughput/data_wait"] if 0 < share < 1] == list(clips)
    assert (run.run_dir / "metrics/tokenizer_curves.png").read_bytes().startswith(b"\x89PNG")


class Counted(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **kwargs or {})


def test_the_gradient_norm_is_computed_once_a_step_and_clips_as_lightning_does(tmp_path, monkeypatch):
    def trained(*overrides):
        few = ["trainer.max_steps=3", "trainer.gradient_clip_val=0.01", "trainer.limit_val_batches=0", "overwrite=true"]
        with Counted() as counted:
            _, module, run = fit(tiny_config(tmp_path, *few, *overrides))
        norms = [value for _, value in curves(run)["train/grad_norm"]]
        return counted.counts[torch.ops.aten._foreach_norm.Scalar], norms, module.state_dict()

    def same(first, second):
        return all(torch.equal(first[name], tensor) for name, tensor in second.items())

    n_calls, norms, weights = trained()
    assert not same(weights, trained("trainer.gradient_clip_algorithm=value")[2])
    monkeypatch.delattr(TrainingModule, "configure_gradient_clipping")
    n_theirs, expected, expected_weights = trained()
    assert (n_calls, n_theirs) == (3, 6) and norms == expected and min(norms) > 0.01
    assert same(weights, expected_weights)


def test_curves_have_units_the_learning_rate_and_scales_and_nothing_is_cut_off(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9 $x_{$") / "metrics/tokenizer.csv"  # of a run in any folder
    path.parent.mkdir(parents=True)
    rows = [(step, f"{split}/loss", 1000 / (step + 1) ** 2) for step in range(60) for split in ("train", "val")]
    rows += [(step, "val/psnr", 20 + step / 10) for step in range(60)] + [
        (step, "train/lr", 1e-3) for step in range(60)
    ]
    rows += [(0, "train/grad_norm", 1.0), (0, "val/usage_1", 0.5)]
    rows += [(step * 10**5, "val/kl", -0.00012 - step / 10**7) for step in range(60)]  # the widest that ticks get
    rows += [(step, "val/bits_per_code", 654321 - 20000 * step) for step in range(60)]
    path.write_text("\n".join(",".join(map(str, row)) for row in [("step", "metric", "value"), *rows]))
    plot_curves(path, path.with_suffix(".png"))
    figure = training_curves(read_metrics(path), printable(path.parent.parent.name)).chart
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "bits per code", "kl", "psnr", "learning rate"]
    assert panels["psnr"].get_ylabel() == "dB"
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())  # steps
    assert [panels[name].get_yscale() for name in panels] == ["log", *["linear"] * 4]
    assert [text.get_text() for text in panels["loss"].get_legend().get_texts()] == ["train", "val"]
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    around = [axes.get_tightbbox() for axes in figure.axes] + [figure.texts[0].get_window_extent()]
    for one, other in itertools.combinations(around, 2):
        assert not one.overlaps(other)
    for name in ("bits per code", "kl"):
        axis = panels[name].yaxis
        ticks = [tick.label1.get_window_extent().x0 for tick in axis.get_major_ticks() if tick.label1.get_text()]
        assert axis.label.get_window_extent().x1 < min(ticks)
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup"])
def test_a_warm_up_is_a_fraction_of_the_run_or_so_many_steps(tmp_path, schedule):
    for steps, value, expected in (
        (8, 0.5, [0, 0.0025, 0.005, 0.0075, 0.01]),
        (8, 2, [0, 0.005, 0.01]),
        (4, 0.5, [0, 0.005, 0.01]),
    ):
        options = [f"trainer.max_steps={steps}", f"lr_scheduler.num_warmup_steps={value}", "overwrite=true"]
        _, _, run = fit(tiny_config(tmp_path, *options, f"lr_scheduler.name={schedule}", "optimizer.lr=.01"))
        rates = [rate for _, rate in curves(run)["train/lr"]]
        assert len(rates) == steps and rates[: len(expected)] == pytest.approx(expected)


def test_a_warm_up_that_ends_after_the_run_is_refused_and_costs_nothing(tmp_path):
    _, _, run = fit(tiny_config(tmp_path))
    before = run.last.read_bytes()
    options = ["lr_scheduler.name=cosine", "overwrite=true"]
    for value, message in {
        "5": "expected at most the 4 steps of the run, .*, found 5; below 1 it is a fraction",
        "1.5": "expected a whole number of steps, or a fraction of the run below 1, found 1.5",
        "-1": "expected a whole number of steps, or a fraction .*, found -1",
        "true": "expected a number, found True",
    }.items():
        with pytest.raises(ValueError, match=f"^lr_scheduler.num_warmup_steps: {message}"):
            fit(tiny_config(tmp_path, *options, f"lr_scheduler.num_warmup_steps={value}"))
    with pytest.raises(ValueError, match=r"0.5 of the run, which has no end; give steps, or trainer.max_steps"):
        endless = ["trainer.max_steps=-1", "trainer.max_epochs=-1", "lr_scheduler.name=constant_with_warmup"]
        fit(tiny_config(tmp_path, *options, *endless, "lr_scheduler.num_warmup_steps=0.5"))
    assert run.last.read_bytes() == before


def test_a_short_run_logs_its_loss_and_stage_one_says_how_good_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTCAST_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, module, run = fit(tiny_config(tmp_path, "trainer.log_every_n_steps=50", "trainer.max_steps=20"))
    figures = curves(run)
    assert [step for step, _ in figures["train/loss"]] == list(range(2, 21, 2))
    assert found["val"].keys() >= {"loss", "psnr", "ssim"} and "lpips" not in found["val"]  # no weights at hand
    data = instantiate(tiny_config(tmp_path).data)(split="val")
    clips = torch.stack([data[i]["frames"] for i in range(8)])
    with torch.no_grad():
        reconstruction = module.model.eval()(clips).frames
    error = (clips - reconstruction).square().mean((2, 3, 4)) / 4
    assert found["val"]["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(*((frames.flatten(0, 2).numpy() + 1) / 2 for frames in (clips, reconstruction)))
    expected = [structural_similarity(*pair, **options) for pair in pairs]
    assert found["val"]["ssim"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert dict(figures["val/psnr"])[20] == pytest.approx(found["val"]["psnr"], abs=1e-3)


class SlowDigits(MovingDigits):
    def __getitem__(self, index):
        time.sleep(0.1)
        return super().__getitem__(index)


def test_the_share_of_time_that_training_waits_for_data_is_logged(tmp_path):
    run, module, data = build(tiny_config(tmp_path), "tokenizer")
    data.dataset = functools.partial(SlowDigits, **data.dataset.keywords)
    run.fit(module, data)
    shares = [share for _, share in curves(run)["throughput/data_wait"]]
    assert len(shares) == 4 and all(0.5 < share < 1 for share in shares)  # of a step, .8 s are read


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("every", [0, 2, EPOCH + 2])
def test_throughput_is_logged_every_so_many_steps_also_over_short_epochs(tmp_path, every, accumulated):
    overrides = [f"trainer.log_every_n_steps={every}", f"trainer.accumulate_grad_batches={accumulated}"]
    _, _, run = fit(tiny_config(tmp_path, "trainer.max_steps=12", *overrides))
    steps = [step for step, _ in curves(run)["throughput/clips_per_s"]]
    assert steps == (list(range(every, 13, every)) if every else [])


@pytest.mark.parametrize(
    "overrides, every",
    [
        ([], 2 * EPOCH),  # a tenth of the run, one and a half epochs
        (["least_steps_between_val=4"], 2 * EPOCH),
        (["least_steps_between_val=3"], EPOCH),
        (["least_steps_between_val=0"], EPOCH),
        (["trainer.accumulate_grad_batches=2", "least_steps_between_val=3"], 4),  # two steps an epoch
        (["batch_size=1"], 5),  # an epoch of 24 steps, within which a tenth of the run
        (["trainer.check_val_every_n_epoch=3"], 3 * EPOCH),
        (["trainer.val_check_interval=1"], 1),
        (["trainer.val_check_interval=5", "trainer.check_val_every_n_epoch=null"], 5),
    ],
)
def test_short_epochs_share_a_validation(tmp_path, overrides, every):
    _, _, run = fit(tiny_config(tmp_path, "trainer.max_steps=50", *overrides))
    steps = {step for step, _ in curves(run)["val/loss"]}
    assert steps == {*range(every, 51, every), 50}  # in the end in any case


def test_a_run_shorter_than_an_epoch_keeps_its_best_weights(tmp_path, caplog):
    short = ["batch_size=1", "final_weights=best"]
    for name in "ab":
        (tmp_path / name).mkdir()
    _, _, run = fit(tiny_config(tmp_path / "a", "trainer.max_steps=20", *short))
    assert run.best.exists() and "nothing was validated" not in caplog.text
    _, _, run = fit(tiny_config(tmp_path / "b", "trainer.max_steps=2", *short))
    assert not run.best.exists() and "final_weights=best: nothing was validated in training" in caplog.text


def test_codebook_usage_covers_the_whole_epoch_and_warns_by_name(tmp_path, caplog):
    seen = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["codes"].clone())

    overrides = ["tokenizer.n_codebooks=2", "tokenizer.codebook_size=512", "tokenizer.dead_code_threshold=0"]
    n_batches = N_CLIPS // 8
    _, _, run = fit(
        tiny_config(tmp_path, *overrides, f"trainer.max_steps={n_batches}"),
        callbacks=[Record(), CodebookMonitor([512, 512])],
    )
    codes = torch.cat(seen).flatten(0, -2)
    assert len(codes) == N_CLIPS * 4 * 2 * 2  # clips, frames, grid
    for index in range(2):
        used = len(set(codes[:, index].tolist()))
        figures = {
            name: curves(run)[f"train/{name}_{index + 1}"][-1][1] for name in ("usage", "dead_fraction", "perplexity")
        }
        share = torch.bincount(codes[:, index]).double() / len(codes)
        share = share[share > 0]
        assert figures["usage"] == pytest.approx(used / 512)
        assert figures["dead_fraction"] == pytest.approx(1 - used / 512, abs=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("size, n_warnings", [(2048, 2), (8, 0)])  # a validation sees 128 positions
def test_train_tokenizer_warns_by_name_of_codebooks_that_are_hardly_used(tmp_path, caplog, size, n_warnings):
    call_tool("train_tokenizer", tmp_path, "tokenizer.n_codebooks=2", f"tokenizer.codebook_size={size}")
    warnings = [record.message for record in caplog.records if "codes are used (val, step" in record.message]
    assert len(warnings) == n_warnings  # once, though there are several validations
    for index in range(n_warnings):
        (line,) = [line for line in warnings if line.startswith(f"VQVAE: codebook {index + 1}: only ")]
        assert f" % of its {size} codes" in line


@pytest.mark.parametrize("name", ["sliced_vqvae", "hr_vqvae", "gradient_hr_vqvae", "residual_vqvae"])
def test_a_tokenizer_does_not_move_while_a_prior_learns_its_codes(name):
    tokenizer = tiny_tokenizer(name).train()
    identity, spec = fingerprint(tokenizer), tokenizer.latent_spec
    prior = VideoTransformer(spec, subscale=[2, 1, 1], **SMALL_TRANSFORMER | {"n_frames": 2})
    module = PriorModule(prior, torch.optim.Adam, tokenizer=tokenizer).train()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for step in range(3):
        loss = module.compute({"frames": random_frames(tokenizer, n_frames=2, seed=step)}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fingerprint(tokenizer) == identity


def test_checkpoints_are_plain_and_bad_ones_are_refused_in_one_line(tmp_path):
    _, module, run = fit(tiny_config(tmp_path))
    assert last(run)["hyper_parameters"]["batch_size"] == 8
    assert check_checkpoint(run.last, module, averaging=True) == 4
    with pytest.raises(ValueError, match=r"without a moving average|with a moving average"):
        check_checkpoint(run.last, module, averaging=False)
    other = build(tiny_config(tmp_path, "tokenizer.embedding_dim=4", "overwrite=true"), "tokenizer")[1]
    with pytest.raises(
        ValueError, match=r"of another model than the config's: model\.\S+ is \(.* in the checkpoint, .* in the config"
    ):
        check_checkpoint(run.last, other, averaging=True)
    whole = run.last.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        run.last.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.ckpt: damaged, cannot be resumed") as error:
            fit(tiny_config(tmp_path, "resume=true"))
        assert "\n" not in str(error.value)
        assert run.last.read_bytes() == damaged


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    config = tiny_config(tmp_path, "checkpoint_every_n_steps=1")
    run, module, data = build(config, "tokenizer")

    class NoSpace(pl.Callback):
        """No file may grow beyond half a checkpoint: what a full disk does to one that is being written."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (run.last.stat().st_size // 2, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"(last|best)\.ckpt: cannot be written \(File too large\)$"):
            run.fit(module, data, [NoSpace()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert last(run)["global_step"] == 2
    assert {path.name for path in run.training_dir.iterdir()} <= {"last.ckpt", "previous.ckpt", "best.ckpt"}
    figures, _, _ = fit(tiny_config(tmp_path, "resume=true"))
    assert figures["steps"] == 4


def test_what_resuming_applies_and_what_it_refuses_by_name(tmp_path):
    start = ["optimizer.lr=0.01", "lr_scheduler.name=linear", "lr_scheduler.num_warmup_steps=2", "ema_decay=0.9"]
    _, _, run = fit(tiny_config(tmp_path, *start, "trainer.max_steps=2"))
    config, checkpoint = (run.run_dir / "config.yaml").read_text(), run.last.read_bytes()
    go_on = [*start, "resume=true", "trainer.max_steps=6"]
    for override, found in {
        "optimizer._target_=torch.optim.SGD": "optimizer._target_=torch.optim.AdamW, asked for torch.optim.SGD",
        "optimizer.betas=[0.5,0.9]": r"optimizer.betas=\[0.9, 0.999\], asked for \[0.5, 0.9\]",
        "tokenizer.dead_code_threshold=0.5": "tokenizer.dead_code_threshold=.*, asked for 0.5",
        "data.n_videos=20": "data.n_videos=24, asked for 20",
        "clip_length=3": "clip_length=4, asked for 3",
        "seed=1": "data.seed=0, asked for 1",
        "trainer.overfit_batches=1": "trainer.overfit_batches=0.0, asked for 1",
    }.items():
        with pytest.raises(ValueError, match=rf"last.ckpt: trained with {found}, which resume=true cannot change;"):
            fit(tiny_config(tmp_path, *go_on, override))
    assert (run.run_dir / "config.yaml").read_text() == config and run.last.read_bytes() == checkpoint

    older = last(run)  # of a version without some of the options
    for key in ("conditions", "compile"):
        del older["hyper_parameters"][key]
    torch.save(older, run.last)
    lower = ["optimizer.lr=0.002", "optimizer.weight_decay=0.3", "trainer.precision=bf16-mixed", "batch_size=4"]
    _, module, run = fit(tiny_config(tmp_path, *go_on, *lower))
    rates = dict(curves(run)["train/lr"])
    assert [rates[step] for step in range(3, 7)] == pytest.approx([0.002, 0.0015, 0.001, 0.0005])  # down to 0 at step 6
    (group,) = last(run)["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.3 and module.trainer.precision == "bf16-mixed"
    assert load_config(run.run_dir / "config.yaml").optimizer.lr == 0.002
    for n_steps, schedule in ((7, "lr_scheduler.name=constant"), (8, "lr_scheduler=null")):
        fit(tiny_config(tmp_path, *start, "resume=true", f"trainer.max_steps={n_steps}", schedule))
        assert curves(run)["train/lr"][-1] == (n_steps, pytest.approx(0.01))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["strategy=ddp_spawn", "devices=2"], "trainer.strategy: expected auto, ddp or fsdp, found DDPStrategy by"),
        (
            ["strategy=fsdp", "precision=16-mixed"],
            "trainer.strategy=fsdp: expected trainer.precision 32-true, bf16-mixed",
        ),
        (["fast_dev_run=true"], "trainer.fast_dev_run: not with the tools; trainer.max_steps=1"),
        (["barebones=true"], "trainer.barebones: not with the tools; it logs nothing"),
        (["default_root_dir=elsewhere"], "trainer.default_root_dir: not with the tools; run_dir says where"),
        (["max_steps=0"], "trainer.max_steps: expected anything but 0"),
        (["limit_train_batches=0.0"], "trainer.limit_train_batches: expected anything but 0"),
        (["accumulate_grad_batches=0"], "trainer.accumulate_grad_batches: expected anything but 0"),
        (["check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch: expected anything but 0"),
        (["val_check_interval=50"], "`val_check_interval` .50. must be less than or equal"),
        (["callbacks=[{_target_: pytorch_lightning.callbacks.WeightAveraging}]"], "found a second average"),
    ],
)
def test_options_of_the_trainer_that_cannot_be_honoured_are_refused_and_cost_nothing(tmp_path, overrides, message):
    earlier = tmp_path / "run/tokenizer_training/last.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier training")
    with pytest.raises((UserError, ValueError), match=message):
        fit(tiny_config(tmp_path, "overwrite=true", *(f"trainer.{override}" for override in overrides)))
    assert earlier.read_text() == "of an earlier training" and not list((tmp_path / "run").glob("*.yaml"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="says what the processor has")
def test_the_precision_is_what_the_hardware_computes_fast_in_where_it_is_left_to_it(tmp_path):
    options = ["trainer.precision=auto", "trainer.max_steps=1", "trainer.accelerator=cpu"]
    _, module, run = fit(tiny_config(tmp_path, *options))
    native = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    assert module.trainer.precision == ("bf16-mixed" if native else "32-true")
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if native else torch.float32)
    assert [pick_dtype(name, "cpu") for name in DTYPES[1:]] == [torch.float32, torch.bfloat16, torch.float16]
    assert load_config(run.run_dir / "config.yaml").trainer.precision == "auto"  # for it may go on elsewhere


def test_options_of_the_trainer_that_change_the_batches(tmp_path):
    seen = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch["frames"].numpy().tobytes())

    def batches(name, *overrides):
        seen.clear()
        fit(
            tiny_config((tmp_path / name).mkdir() or tmp_path / name, "trainer.max_steps=6", *overrides),
            "tokenizer",
            [Record()],
        )
        return list(seen)

    plain = batches("plain")
    assert len(set(plain)) == 6
    assert batches("reloaded", "trainer.reload_dataloaders_every_n_epochs=1") == plain
    assert len(set(batches("overfit", "trainer.overfit_batches=1"))) == 1
    stops = "trainer.callbacks=[{_target_: pytorch_lightning.callbacks.Timer, duration: '00:00:00:00'}]"
    assert batches("stopped", stops) == []  # one's own callbacks are called


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with replacing_folder(folder) as new:
        new.mkdir()
        (new / "weights").write_text("1")
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        new.mkdir()
        (new / "weights").write_text("2")
        raise RuntimeError
    assert (folder / "weights").read_text() == "1"
    with replacing_folder(folder) as new:
        new.mkdir()
        (new / "weights").write_text("3")
    assert (folder / "weights").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_prior_over_pixel_codes_needs_no_cache_and_draws_its_futures(tmp_path):
    figures = call_tool("train_prior", tmp_path, *PIXEL_PRIOR, "n_context=2", "preview.num_samples=3")
    assert figures["steps"] == 4 and figures["val"]["bits_per_code"] > 0
    previews = tmp_path / "run/previews/prior"
    assert {path.suffix for path in previews.iterdir()} == {".mp4", ".gif", ".png"}
    info = probe(previews / "step_0000004.mp4")
    dataset = instantiate(tiny_config(tmp_path, *PIXEL_PRIOR).data)(split="val")
    assert isinstance(dataset, MovingDigits)
    assert info.fps == pytest.approx(dataset.fps) and info.n_frames == 4
    shown = preview_clips(VideoDataModule(instantiate(tiny_config(tmp_path, *PIXEL_PRIOR).data), 4), 2)
    assert shown.fps == dataset.fps and torch.equal(shown.frames[1], dataset[1]["frames"])


class Revivals(pl.Callback):
    """Which steps a tokenizer may revive codes in."""

    def __init__(self):
        self.steps = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        books = [m for m in pl_module.model.modules() if isinstance(m, EMACodebook)]
        self.steps[trainer.global_step] = {book.revives for book in books}


@pytest.mark.parametrize("length", ["trainer.max_steps=20", "trainer.max_epochs=7"])  # epochs of 3 steps
def test_codes_are_revived_until_the_last_tenth_of_a_run_also_of_a_resumed_one(tmp_path, length):
    options = ["trainer.max_steps=-1", length, "tokenizer=hr_vqvae", "tokenizer.hidden_channels=8"]
    stopped, resumed = Revivals(), Revivals()
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config(tmp_path, *options), callbacks=[stopped, Stop(4)])
    fit(tiny_config(tmp_path, *options, "resume=true"), callbacks=[resumed])
    assert sorted(stopped.steps) == list(range(5)) and min(resumed.steps) == 5
    first_settled = 18 if length == "trainer.max_steps=20" else 19  # of 21
    for step, revives in (stopped.steps | resumed.steps).items():
        assert revives == {step < first_settled}, step
    assert max(resumed.steps) >= first_settled


def test_a_prior_looks_at_the_codes_before_it_is_trained_and_a_resumed_one_does_not(tmp_path):
    options = [*PIXEL_PRIOR, "prior.decoder_output=adaptive"]
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config(tmp_path, *options), "prior", [Stop(1)])
    run, module, data = build(tiny_config(tmp_path, *options, "resume=true"), "prior")
    run.fit(module, data, [])
    counts = torch.zeros(4, dtype=torch.int64)
    for index in range(len(data.train_set)):
        counts += torch.bincount(module._clip({"frames": data.train_set[index]["frames"][None]}).flatten(), minlength=4)
    rank = module.model.head.logits[0].rank
    assert rank.tolist() != [0, 1, 2, 3] and counts.argsort(descending=True)[rank].tolist() == [0, 1, 2, 3]


def compiler_that_breaks(graph, inputs):
    raise RuntimeError("no such machine\nand more")


@pytest.mark.usefixtures("unchecked")
def test_models_are_compiled_and_one_that_breaks_the_compiler_is_trained_as_it_is(tmp_path, caplog):
    torch._dynamo.register_backend(compiler_that_breaks, "breaks")
    caplog.set_level(logging.INFO, "latentcast")
    said, weights = [], []
    for backend in ("null", "eager", "breaks"):
        torch._dynamo.reset()
        options = ["trainer.max_steps=2", f"compile={backend}", "overwrite=true"]
        _, module, _ = fit(tiny_config(tmp_path, *options))
        compiled = module.model._compiled_call_impl is not None and torch._dynamo.utils.counters["frames"]["ok"] > 0
        said.append((compiled, [line for line in caplog.messages if line.startswith("compile")]))
        weights.append(module.model.state_dict())
        caplog.clear()
        torch._dynamo.utils.counters.clear()
    assert said[:2] == [(False, []), (True, ["compile: VQVAE is compiled"])]
    (compiled, (message,)) = said[2]
    expected = (
        "compile: VQVAE is trained uncompiled, torch.compile failed: backend='breaks' raised: RuntimeError: no such"
    )
    assert not compiled and message.startswith(expected)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])
    with pytest.raises(UserError, match=r"compile: expected true, false or one of .*eager.*, found 'nothere'"):
        fit(tiny_config(tmp_path, "compile=nothere", "overwrite=true"))

"""Several processes that train together: they end where one process with all of their clips does, and end together."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from test_joint_training import HR_VQVAE, JOINT
from tiny_experiment import TOOLS, Started, call_main, finished, free_port, tiny_config, torchrun, write_experiment
from torch import distributed as dist

from latentcast import JointModule, PriorModule, TokenizerModule, VideoDataModule, instantiate, load_config
from latentcast.config import to_container
from latentcast.tokenizers.quantizers.routing import RoutedBatch
from latentcast.training.callbacks import StepSeed
from latentcast.training.run import TrainingRun

REVIVAL = ["tokenizer.dead_code_threshold=0.6", "tokenizer.ema_decay=0.5"]
PIXELS = [
    "tokenizer=pixel",
    "tokenizer.levels=4",
    "prior.slices_per_clip=null",
    "frame_size=8",
    "data.digit_size=6",
    "data.speeds=[2]",
]
# Into the second epoch, with a validation between. With its usual eps AdamW makes steps of the rounding errors in
# gradients that are zero.
STEPS = ["trainer.max_steps=5", "optimizer.lr=0.01", "optimizer.eps=1e-4", "checkpoint_every_n_steps=3"]
STAGES = {
    "tokenizer": REVIVAL,
    "prior": PIXELS,
    "joint": [*HR_VQVAE, *JOINT, "joint_training.bridge=straight_through", "joint_training.weight=10"],
}
UNEVEN = ["data.n_videos=23", "data.n_heldout_videos=7", "trainer.max_steps=4", "trainer.limit_val_batches=null"]


class Losses(pl.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(outputs["loss"].item())


def train(config, stage, *callbacks):
    """-> losses, weights and averages that are left, and the figures of ``TrainingRun.fit``."""
    with TrainingRun.open(config, stage) as run:
        pl.seed_everything(config.seed)
        data = VideoDataModule(instantiate(config.data), config.batch_size, config.num_workers, config.seed)
        settings = (instantiate(config.optimizer), to_container(config.lr_scheduler))
        tokenizer = instantiate(config.tokenizer)
        if stage == "tokenizer":
            module = TokenizerModule(tokenizer, *settings, config=to_container(config))
        else:
            prior = instantiate(config.prior, latent_spec=tokenizer.latent_spec)
            if stage == "joint":
                options = {"n_context": config.n_context, **to_container(config.joint_training)}
                module = JointModule(prior, tokenizer, *settings, **options, config=to_container(config))
            else:
                module = PriorModule(prior, *settings, config.n_context, tokenizer, to_container(config))
        losses = Losses()
        figures = run.fit(module, data, [*callbacks, losses])
        return SimpleNamespace(losses=losses.found, state=module.state_dict(), figures=figures)


def train_on_rank(rank, port, folder, n, runs):
    """All ``runs``, name -> (stage, overrides), one after another in one group of ``n`` processes."""
    os.environ |= torchrun(rank, n, port)
    torch.set_num_threads(1)
    found = {}
    for name, (stage, overrides) in runs.items():
        settings = [f"run_dir={folder / name}", f"trainer.devices={n}", *overrides]
        config = load_config(folder / "tiny.yaml", settings)
        found[name] = train(config, stage).__dict__
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def train_together(folder, runs, n=2):
    """What each of ``n`` ranks found, see ``train_on_rank``."""
    folder.mkdir(exist_ok=True)
    write_experiment(folder)
    arguments = free_port(), folder, n, runs
    torch.multiprocessing.start_processes(train_on_rank, arguments, nprocs=n, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n)]


class DrawsAsTwo(pl.Callback):
    """Makes one process draw vectors for its codes as two ranks do that share its batch: each shuffles those of every
    other clip by its own seed, and they take turns."""

    n_draws = 0

    def __init__(self, seed, monkeypatch):
        self.seeds = StepSeed(seed)
        monkeypatch.setattr(RoutedBatch, "draw", lambda batch: self.draw(batch))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        before, self.generators, self.n_clips = torch.get_rng_state(), [], len(batch["frames"])
        for rank in range(2):
            self.seeds._draw_from(rank, trainer.fit_loop.epoch_loop.total_batch_idx)
            self.generators.append(torch.Generator())
            self.generators[-1].set_state(torch.get_rng_state())
        torch.set_rng_state(before)

    def draw(self, batch):
        self.n_draws += 1
        clips, K = batch.vectors.unflatten(0, (self.n_clips, -1)), batch.codebook_size
        shares = [clips[rank::2].flatten(0, 1) for rank in range(2)]
        orders = [torch.randperm(len(share), generator=g) for share, g in zip(shares, self.generators)]
        drawn = torch.stack([share[order] for share, order in zip(shares, orders)], 1).flatten(0, 1)[:K]
        return drawn[None], torch.tensor([K])


def continued(folder, others):
    """Copy the runs of all stages into ``others``, without their last checkpoint, of step 5; before it was that of
    step 3."""
    for stage in STAGES:
        last = shutil.copytree(folder / stage, others / stage) / f"{stage}_training/last.ckpt"
        shutil.rmtree(last) if last.is_dir() else last.unlink()


DDP = ["trainer.strategy=ddp", "batch_size=4"]
RUNS = {stage: (stage, [*settings, *STEPS, *DDP]) for stage, settings in STAGES.items()}


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder_of_two):
    """What two ranks found that train one thing after another."""
    return train_together(folder_of_two, RUNS | {"uneven": ("tokenizer", [*UNEVEN, *DDP])})


def assert_close_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process_with_both_batches(two, tmp_path, monkeypatch, stage):
    """Losses, weights (of the moving average) and codebooks, which k-means places and revival draws anew."""
    config = tiny_config(tmp_path, *STAGES[stage], *STEPS, "batch_size=8")
    draws = [DrawsAsTwo(config.seed, monkeypatch)] if stage == "tokenizer" else []
    alone = train(config, stage, *draws)
    assert not draws or draws[0].n_draws > 2  # the start, and revivals
    losses = torch.tensor([rank[stage]["losses"] for rank in two])
    assert losses.shape == (2, 5) and not torch.equal(*losses)
    torch.testing.assert_close(losses.mean(0), torch.tensor(alone.losses), rtol=1e-4, atol=1e-6)
    for rank in two:
        assert_close_states(rank[stage]["state"], alone.state)
        assert rank[stage]["figures"]["val"]["loss"] == pytest.approx(alone.figures["val"]["loss"], rel=1e-4)


def test_two_ranks_go_on_as_if_they_had_not_been_stopped(two, folder_of_two, tmp_path):
    """Bit for bit."""
    continued(folder_of_two, tmp_path)
    resumed = train_together(tmp_path, {stage: (stage, [*s, "resume=true"]) for stage, s in RUNS.values()})
    for found, expected in zip(resumed, two):
        for stage in STAGES:
            assert found[stage]["losses"] == expected[stage]["losses"][3:]
            state = expected[stage]["state"]
            assert all(torch.equal(tensor, found[stage]["state"][name]) for name, tensor in state.items())


def test_uneven_shares_do_not_hang(two):
    first, second = (rank["uneven"] for rank in two)  # 12 and 11 clips to train on, 4 and 3 to validate on
    assert first["figures"]["steps"] == second["figures"]["steps"] == len(first["losses"]) == len(second["losses"]) == 4
    assert_close_states(first["state"], second["state"])


def test_a_rank_that_dies_ends_all_and_the_run_resumes(tmp_path):
    experiment, port = write_experiment(tmp_path), free_port()
    endless = ["trainer.max_steps=100000", "trainer.strategy=ddp", "trainer.devices=2", "batch_size=4"]
    arguments = [TOOLS / "train_tokenizer.py", experiment, *endless, "checkpoint_every_n_steps=2"]
    ranks = [Started(*arguments, cwd=tmp_path, **torchrun(rank, 2, port)) for rank in range(2)]
    last = tmp_path / "run/tokenizer_training/last.ckpt"
    while not last.exists():
        assert all(rank.poll() is None for rank in ranks), ranks[0].read()
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGKILL)
    began = time.monotonic()
    status, _, err = finished(ranks[0])
    assert status == 1 and time.monotonic() - began < 60
    assert "error: another process of this job has ended, and this one, rank 0 of 2, with it: " in err.splitlines()[-1]
    assert "run the same command again" in err.splitlines()[-1] and "Traceback" not in err
    step = torch.load(last, weights_only=True)["global_step"]
    more = ["resume=true", f"trainer.max_steps={step + 1}", "batch_size=8"]
    assert call_main("train_tokenizer", experiment, *more)["steps"] == step + 1


# Codes that are drawn anew are others with another number of ranks.
SHARED = {stage: [*STAGES[stage], *STEPS, "trainer.strategy=fsdp"] for stage in STAGES}
SHARED["tokenizer"].append("tokenizer.dead_code_threshold=0")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Trainings of two ranks that share the weights, and others that go on with their checkpoints -> (folder, what the
    ranks of the first and of the others found, by their number)."""
    folder, found = tmp_path_factory.mktemp("sharded"), {}
    for n, more in ((2, []), (1, ["resume=true"]), (3, ["resume=true"])):
        if more:
            continued(folder / "2", folder / str(n))
        runs = {stage: (stage, [*SHARED[stage], f"batch_size={12 // n}", *more]) for stage in STAGES}
        found[n] = train_together(folder / str(n), runs, n)
    return folder, found


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_share_the_weights_end_where_one_process_does(sharded, tmp_path, monkeypatch, stage):
    folder, found = sharded
    config = tiny_config(tmp_path, *SHARED[stage], "trainer.strategy=auto", "batch_size=12")
    alone = train(config, stage, *([DrawsAsTwo(config.seed, monkeypatch)] if stage == "tokenizer" else []))
    losses = torch.tensor([rank[stage]["losses"] for rank in found[2]])
    torch.testing.assert_close(losses.mean(0), torch.tensor(alone.losses), rtol=1e-4, atol=1e-6)
    assert_close_states(found[2][0][stage]["state"], alone.state)  # clipped, averaged, put together
    checkpoint = folder / "2" / stage / f"{stage}_training/last.ckpt"
    assert len(list(checkpoint.glob("*.safetensors"))) == 2 and (checkpoint.parent / "best.ckpt").is_dir()
    weights = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    shared = set(weights[0]) & set(weights[1])
    assert any("exp_avg" in name for name in shared) and any("current_model_state" in name for name in shared)
    assert stage != "joint" or any("exp_avg" in name and "tokenizer.decoder" in name for name in shared)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n", [1, 3])
def test_sharded_checkpoints_go_on_with_another_number_of_ranks(sharded, n, stage):
    _, found = sharded
    losses, before = (torch.tensor([rank[stage]["losses"] for rank in found[k]]).mean(0) for k in (n, 2))
    torch.testing.assert_close(losses, before[3:], rtol=1e-4, atol=1e-6)
    assert_close_states(found[n][0][stage]["state"], found[2][0][stage]["state"])


def test_checkpoints_that_cannot_go_on(sharded, tmp_path):
    run = shutil.copytree(sharded[0] / "2/prior", tmp_path / "run") / "prior_training"
    resumed = [*PIXELS, *STEPS, "batch_size=12", "resume=true"]
    with pytest.raises(ValueError, match=r"last.ckpt: expected one file, found the other; keep trainer.strategy=fsdp"):
        train(tiny_config(tmp_path, *resumed), "prior")
    shutil.rmtree(run / "previous.ckpt")
    shard = next((run / "last.ckpt").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"last.ckpt: damaged, cannot be resumed \({shard.name}: expected \d+ bytes"):
        train(tiny_config(tmp_path, *resumed, "trainer.strategy=fsdp"), "prior")

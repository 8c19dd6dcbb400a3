"""The data modules under a real Trainer: batches, epochs in persistent workers, ranks, missing val splits."""

import functools
import logging

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DistributedSampler, default_collate
from video_files import counter_frames, encode

from latentcast import (
    KLVAE,
    LatentCacheDataset,
    LatentCacheWriter,
    MovingDigits,
    PixelTokenizer,
    VideoDataModule,
    VideoFolder,
)
from latentcast.data.base import EmptySplitError, VideoEntry
from latentcast.data.datamodules import LatentDataModule

DIGITS = functools.partial(
    MovingDigits, clip_length=4, size=32, video_length=7, n_videos=10, n_heldout_videos=3, lattice=1
)


def clips_of(batch):
    (clips,) = (tensor for name, tensor in batch.items() if name != "conditions")
    return clips


class Recorder(pl.LightningModule):
    """Keeps what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.val_batches = {}, []

    def training_step(self, batch, _):
        self.batches.setdefault(self.current_epoch, []).append(clips_of(batch))
        return self.weight * 0

    def validation_step(self, batch, _):
        self.val_batches.append(clips_of(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, model=None, max_epochs=3, **kwargs):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": max_epochs}
    model = model or Recorder()
    trainer = pl.Trainer(**(options | kwargs))
    trainer.fit(model, datamodule=data)
    return model, trainer


def expected_epoch(epoch):
    """The clips of an epoch, as a set of bytes."""
    dataset = DIGITS("train")
    dataset.set_epoch(epoch)
    return {dataset[i]["frames"].numpy().tobytes() for i in range(len(dataset))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_bring_new_windows_also_to_persistent_workers(num_workers):
    model, _ = fit(VideoDataModule(DIGITS, batch_size=5, num_workers=num_workers))
    orders = []
    for epoch in range(3):
        clips = torch.cat(model.batches[epoch])
        assert {clip.numpy().tobytes() for clip in clips} == expected_epoch(epoch)
        dataset = DIGITS("train")
        dataset.set_epoch(epoch)
        plain = [dataset[i]["frames"].numpy().tobytes() for i in range(10)]
        orders.append([plain.index(clip.numpy().tobytes()) for clip in clips])
    assert len(set(map(tuple, orders))) == 3 and all(order != list(range(10)) for order in orders)
    assert torch.cat(model.val_batches[-1:]).shape == (3, 4, 1, 32, 32)


def test_last_batch_is_dropped_unless_it_is_the_only_one(caplog):
    model, _ = fit(VideoDataModule(DIGITS, batch_size=4), max_epochs=1)
    assert [len(batch) for batch in model.batches[0]] == [4, 4]
    model, trainer = fit(VideoDataModule(DIGITS, batch_size=64), max_epochs=1)
    assert [len(batch) for batch in model.batches[0]] == [10] and trainer.global_step == 1
    assert "train: 10 clips a process are fewer than batch_size=64" in caplog.text


@pytest.mark.parametrize("batch_size, n_left", [(1, 4), (2, 2), (3, 1), (4, 1), (5, 0)])
def test_a_pass_goes_on_at_its_clip_with_any_batch_size(batch_size, n_left):
    def loader(size):
        return VideoDataModule(DIGITS, batch_size=size).train_dataloader()

    def epoch(number):
        data = loader(1)
        data.load_state_dict({"epoch": number, "n_clips": 0})
        return torch.cat([batch["frames"] for batch in data])

    first = loader(2)
    served = torch.cat([batch["frames"] for _, batch in zip(range(3), first)])
    assert torch.equal(served, epoch(0)[:6])
    resumed = loader(batch_size)
    resumed.load_state_dict(first.state_dict())
    for batch, expected in zip(range(n_left), epoch(0)[6:].split(batch_size)):
        if batch == 0:
            rest = iter(resumed)
        assert torch.equal(next(rest)["frames"], expected)
    assert n_left == 0 or not list(rest)
    assert torch.equal(next(iter(resumed))["frames"], epoch(1)[:batch_size])


def test_empty_val_split_leaves_out_validation(tmp_path, caplog):
    caplog.set_level(logging.INFO, "latentcast")
    encode(tmp_path / "a.mp4", counter_frames(12))
    folder = functools.partial(VideoFolder, tmp_path, clip_length=4, size=16, val_fraction=0.0, test_fraction=0.0)
    data = VideoDataModule(folder, batch_size=3)
    model, trainer = fit(data, max_epochs=2, num_sanity_val_steps=2)
    assert data.val_set is None and trainer.global_step == 2 and not model.val_batches
    assert "no validation: " in caplog.text and "1 in other splits" in caplog.text
    everything_in_test = functools.partial(folder, test_fraction=1.0)
    with pytest.raises(EmptySplitError, match="no usable video in split 'train'"):
        fit(VideoDataModule(everything_in_test, batch_size=3))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        VideoDataModule(DIGITS, batch_size=0)
    with pytest.raises(ValueError, match="num_workers"):
        VideoDataModule(DIGITS, batch_size=1, num_workers=-1)


class RankRecorder(Recorder):
    """Leaves its clips in a file, for the process that started the ranks."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        clips = [torch.cat(self.batches[epoch]) for epoch in range(2)]
        torch.save((clips, torch.cat(self.val_batches)), self.folder / f"{self.global_rank}.pt")


def test_ranks_share_an_epoch(tmp_path):
    strategy = DDPStrategy(start_method="forkserver")
    fit(VideoDataModule(DIGITS, batch_size=5), RankRecorder(tmp_path), max_epochs=2, strategy=strategy, devices=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch in range(2):
        clips = [clip.numpy().tobytes() for clip in torch.cat([trained[epoch] for trained, _ in ranks])]
        assert len(clips) == 10 and set(clips) == expected_epoch(epoch)
    assert all(len(validated) == 2 * 2 for _, validated in ranks)  # two epochs, 3 clips over 2 ranks


def write_cache(folder, lengths):
    """A cache of random codes, one tensor a video."""
    spec = PixelTokenizer(1, 2, 2, levels=256).latent_spec
    videos = [VideoEntry(f"v{i}", n, 10.0) for i, n in enumerate(lengths)]
    codes = [torch.randint(256, (n, 2, 2, 1)) for n in lengths]
    writer = LatentCacheWriter(folder, spec, "f" * 64, videos=videos, data={"size": 2}, fps=10.0)
    with writer.open_shard(0) as shard:
        for i, tensor in enumerate(codes):
            shard.append(i, tensor)
    writer.finish()
    return codes


@pytest.mark.parametrize(
    "store, dtype", [("codes", "float32"), ("latents", "bfloat16"), ("posterior", "float16"), ("posterior", "float32")]
)
def test_batches_are_the_items(tmp_path, store, dtype):
    """Of several shards, with conditions, also where the data set fills batches in workers."""
    spec = (PixelTokenizer(1, 2, 2, levels=512) if store == "codes" else KLVAE(1, 8, 8, latent_channels=3)).latent_spec
    action = {"shape": [2], "dtype": "float32", "per": "frame"}
    conditions = {"action": action, "label": {"shape": [], "dtype": "int64", "per": "video"}}
    videos = [VideoEntry(f"v{i}", n, 10.0) for i, n in enumerate((7, 9, 3, 8, 12))]
    options = {"store": store, "dtype": dtype, "shard_videos": 2, "conditions": conditions}
    writer = LatentCacheWriter(tmp_path / "train", spec, "f" * 64, videos=videos, data={}, fps=10.0, **options)
    for shard in range(3):
        with writer.open_shard(shard) as file:
            for i in writer.shard_videos(shard):
                shape = videos[i].n_frames, *writer.job["frame_shape"]
                file.append(i, torch.randint(512, shape) if store == "codes" else torch.randn(shape))
                file.describe(i, {"action": torch.randn(shape[0], 2), "label": torch.tensor(i)})
    writer.finish()
    for sample_posterior in (True, False) if store == "posterior" else (True,):
        loaders = [
            LatentDataModule(
                tmp_path, 2, 3, stride=2, num_workers=workers, seed=4, sample_posterior=sample_posterior
            ).train_dataloader()
            for workers in (0, 2)
        ]
        dataset = LatentCacheDataset(tmp_path / "train", 2, 2, seed=4, sample_posterior=sample_posterior)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            sampler = DistributedSampler(dataset, 1, 0, shuffle=True, seed=4)
            sampler.set_epoch(epoch)
            expected = [default_collate([dataset[i] for i in part]) for part in batched(sampler, 3)]
            for batches in map(list, loaders):
                for batch, items in zip(batches, expected, strict=True):
                    assert torch.equal(batch[dataset.space].to(items[dataset.space].dtype), items[dataset.space])
                    assert batch["conditions"].keys() == conditions.keys()
                    assert all(torch.equal(batch["conditions"][name], items["conditions"][name]) for name in conditions)


def batched(indices, size):
    """Whole batches alone."""
    indices = list(indices)
    return [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]


def test_latents(tmp_path, caplog):
    codes = write_cache(tmp_path / "train", [9] * 6)
    data = LatentDataModule(tmp_path, clip_length=5, batch_size=3, num_workers=1, expect={"data": {"size": 2}})
    model, _ = fit(data, max_epochs=2)
    assert data.val_set is None and "val: no such folder; tools/encode_dataset.py makes it" in caplog.text
    caplog.clear()
    assert LatentDataModule(tmp_path, 5, 3, has_val=False).val_set is None and not caplog.text  # said of the videos
    for epoch in range(2):
        clips = torch.cat(model.batches[epoch])
        assert clips.shape == (6, 5, 2, 2, 1) and clips.dtype == torch.uint8  # as stored
        windows = [
            [(v, s) for v, c in enumerate(codes) for s in range(5) if torch.equal(c[s : s + 5], clip)] for clip in clips
        ]
        assert sorted(v for ((v, _),) in windows) == list(range(6))
    assert not torch.equal(*(torch.cat(model.batches[epoch]) for epoch in range(2)))

    val_codes = write_cache(tmp_path / "val", [7, 8])
    model, _ = fit(LatentDataModule(tmp_path, clip_length=5, batch_size=3), max_epochs=1)
    assert torch.equal(torch.cat(model.val_batches).long(), torch.stack([c[:5] for c in val_codes]))

    # Through memory that workers use again and again; every batch is still what it was, the last, smaller one too.
    here, apart = (LatentDataModule(tmp_path, 2, 1, num_workers=workers, seed=3) for workers in (0, 2))
    for epoch in range(2):
        batches = [list(data.train_dataloader() if epoch == 0 else data._train_loader) for data in (here, apart)]
        assert len(batches[0]) == 24 and batches[0][0]["conditions"] == batches[1][0]["conditions"] == {}
        assert all(torch.equal(a["codes"], b["codes"]) for a, b in zip(*batches, strict=True))
    assert [len(batch["codes"]) for batch in LatentDataModule(tmp_path, 3, 3, num_workers=1).val_dataloader()] == [3, 1]

    with pytest.raises(ValueError, match="size"):
        _ = LatentDataModule(tmp_path, clip_length=5, batch_size=3, expect={"data": {"size": 4}}).train_set
    with pytest.raises(FileNotFoundError):
        _ = LatentDataModule(tmp_path / "nowhere", clip_length=5, batch_size=3).train_set

"""Prepared sets and latents caches behind URLs: the files of a folder, read by few local copies, in one order."""

import contextlib
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import pytorch_lightning as pl
import torch
from noise_benchmark import Noise
from store_files import Flaky, contents
from test_encode_dataset import save_tokenizer
from tiny_experiment import ROOT, call_tool, start_tool

from latentcast import LatentCacheDataset, LatentCacheWriter, PixelTokenizer, PreparedVideos, urls
from latentcast.cli import UserError
from latentcast.copies import local_copy
from latentcast.data.base import VideoEntry
from latentcast.data.checking import check_folder
from latentcast.data.datamodules import LatentDataModule, _ShardSampler
from latentcast.data.store.latent_cache import verify_cache
from latentcast.data.store.prepared import prepare
from latentcast.files import InUseError, locked
from latentcast.urls import folder_at


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared") / "noise"
    prepare(Noise(), root)
    return root


@pytest.fixture(autouse=True)
def empty_store():
    Flaky.clear()
    yield
    Flaky.clear()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(urls, "PAUSE", 0.001)


# --- written, listed, resumed, verified there


@pytest.mark.parametrize("store", ["memory", "flaky"])
def test_a_prepared_set_is_that_of_a_folder(prepared, tmp_path, store):
    root = folder_at(f"{store}://bucket/{tmp_path.name}", tmp_path / "copies")
    fs = fsspec.filesystem(store)
    assert prepare(Noise(), root)["counts"] == {"train": 5, "test": 2}
    base = fs._strip_protocol(str(root))
    found = {f"{base}/{name}": content for name, content in files_of(prepared).items()}
    if store == "memory":
        assert {path: fs.cat_file(path) for path in fs.find(base)} == found
    else:
        assert Flaky.objects == found
    data = PreparedVideos(str(root), "train", 3, cache_dir=tmp_path / "copies")
    local = PreparedVideos(prepared, "train", 3)
    assert data.describe() == local.describe() and len(data) == len(local)
    assert all(torch.equal(data[i]["frames"], local[i]["frames"]) for i in range(len(data)))
    assert not check_folder(root)["problems"]

    shard = f"{base}/train/shard-00001.safetensors"
    damaged = bytearray(found[shard])
    damaged[-1] ^= 1
    fs.pipe_file(shard, bytes(damaged)) if store == "memory" else Flaky.objects.update({shard: bytes(damaged)})
    assert f"{root}/train/shard-00001.safetensors: expected sha256" in check_folder(root)["problems"][0]
    fs.rm_file(shard)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: expected \d+ bytes, found no file"):
        PreparedVideos(root, "train", 3)
    prepare(Noise(), root)  # that shard alone is written again
    assert fs.cat_file(shard) == found[shard] and not check_folder(root)["problems"]


def test_a_killed_encoding_goes_on_and_ends_as_in_a_folder(tmp_path):
    save_tokenizer(tmp_path)
    store, copies = tmp_path / "store", tmp_path / "copies"
    overrides = "cache.shard_videos=1", "cache.splits=[train]", "data.n_videos=60"
    there = *overrides, f"cache.root=file://{store}", f"cache_dir={copies}"
    process = start_tool("encode_dataset", tmp_path, *there)
    while not (store / "train/shard-00002.json").exists():
        assert process.poll() is None, process.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    # What a store that shows files before they are whole may have kept of the writing that was cut short.
    for name in ("shard-00001.json", "shard-00002.safetensors"):
        path = store / "train" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    figures = call_tool("encode_dataset", tmp_path, *there)["splits"]["train"]
    assert figures["videos"] == 60 and figures["frames_per_s"]
    assert call_tool("encode_dataset", tmp_path, *there)["splits"]["train"]["frames_per_s"] is None
    call_tool("encode_dataset", tmp_path, *overrides)
    assert files_of(store / "train") == files_of(tmp_path / "run/latents/train")
    root = folder_at(f"file://{store}/train")
    assert verify_cache(root) == 60 and not list((copies / "uploads").iterdir())
    shard = store / "train/shard-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x01"[shard.read_bytes()[-1:] == b"\x00"].to_bytes())
    with pytest.raises(ValueError, match=rf"{root}/shard-00007.safetensors: expected sha256"):
        verify_cache(root)


def test_wherever_writing_is_cut_short_the_next_run_goes_on(prepared, tmp_path):
    """Each file is left in half once, by a run that ends there."""
    root, n_runs = folder_at("flaky://bucket/noise", tmp_path), 0
    Flaky.faults = staticmethod(lambda kind, path, before: "killed" if kind == "put" and before == 0 else None)
    while True:
        n_runs += 1
        with contextlib.suppress(KeyboardInterrupt):
            prepare(Noise(), root)
            break
        if not contents(root).get("manifest.json", b"").endswith(b"\n}\n"):
            with pytest.raises((OSError, ValueError)):
                PreparedVideos(root, "train", 1)
    # Four shards with notes, a plan and a manifest of two splits, the set's manifest and its picture.
    assert n_runs == 15 and contents(root) == files_of(prepared)


def test_one_run_of_this_machine_at_a_time(tmp_path):
    root = folder_at("flaky://bucket/set", tmp_path)
    command = f"""
from latentcast.files import locked
from latentcast.urls import Url
from pathlib import Path
with locked(Url("flaky://bucket/set", Path({str(tmp_path)!r})), "encoding"):
    print("in", flush=True)
    input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "in\n"
    with pytest.raises(InUseError, match="flaky://bucket/set: another run works here: encoding"):
        with locked(root, "preparing"):
            pass
    process.communicate("\n")
    with locked(root, "preparing"):
        pass


# --- a store that fails


def test_what_fails_is_tried_again(prepared, tmp_path, impatient, caplog):
    """Of four requests one fails, and one brings or leaves half of the bytes without an error."""
    kinds = itertools.cycle([ConnectionError("reset"), TimeoutError("no answer"), RuntimeError("503 Slow Down")])

    def faults(kind, path, before):
        return next(kinds) if before % 4 == 0 else "cut" if before % 4 == 1 and kind in ("get", "put") else None

    Flaky.clear(faults)
    root = folder_at("flaky://bucket/noise", tmp_path / "copies")
    prepare(Noise(), root)
    assert contents(root) == files_of(prepared)
    data, local = PreparedVideos(root, "train", 3), PreparedVideos(prepared, "train", 3)
    assert all(torch.equal(data[i]["frames"], local[i]["frames"]) for i in range(len(data)))
    for line in (
        r"train/shard-00000.safetensors: could not be written \(.*\); once more in 0.0 s",
        r"could not be (written|read) \(expected 12368 bytes, found 6184\)",
        r"could not be read \(RuntimeError: 503 Slow Down\)",
    ):
        assert re.search(line, caplog.text)


@pytest.mark.parametrize(
    "fault, message",
    [
        (ConnectionError("reset"), r"cannot be read, tried 5 times \(reset\)"),
        ("cut", r"cannot be read, tried 5 times \(expected 12368 bytes, found 6184\)"),
        (PermissionError("403 Forbidden"), r"cannot be read \(403 Forbidden\)"),
        (FileNotFoundError("gone"), "no such file or folder"),
    ],
)
def test_what_goes_on_failing_is_named(tmp_path, impatient, fault, message):
    root = folder_at("flaky://bucket/noise", tmp_path)
    prepare(Noise(), root)
    local_copies = copies_of(tmp_path)
    for name in local_copies:
        (tmp_path / name).unlink()
    Flaky.faults = staticmethod(lambda kind, path, before: fault if path.endswith("0.safetensors") else None)
    data = PreparedVideos(root, "train", 3)
    with pytest.raises(OSError, match=f"^flaky://bucket/noise/train/shard-00000.safetensors: {message}$"):
        data[0]
    assert not copies_of(tmp_path) and not list((tmp_path / "fetching").iterdir())


def test_a_store_that_does_not_answer_loses_nothing(prepared, tmp_path, impatient):
    """Where nobody can tell what stands there, nothing is taken for missing and cleared away."""
    root = folder_at("flaky://bucket/noise", tmp_path)
    prepare(Noise(), root)
    before = contents(root)
    for kind in ("info", "ls", "get"):
        Flaky.faults = staticmethod(lambda found, *_, kind=kind: ConnectionError("reset") if found == kind else None)
        with pytest.raises(OSError, match=r"^flaky://bucket/noise.*, tried 5 times \(reset\)$"):
            prepare(Noise(), root)
        assert contents(root) == before
    Flaky.faults = staticmethod(lambda kind, *_: ConnectionError("reset") if kind == "put" else None)
    with pytest.raises(OSError, match=r"^flaky://bucket/other/train/plan.json: cannot be written, tried 5 times"):
        prepare(Noise(), folder_at("flaky://bucket/other", tmp_path))
    assert not list((tmp_path / "uploads").iterdir())


def test_urls_that_nothing_can_open_are_one_line():
    for text, message in (
        ("s3://bucket/set", "s3://bucket/set: s3:// needs the package s3fs; pip install s3fs"),
        ("gs://bucket/set", "gs://bucket/set: gs:// needs the package gcsfs; pip install gcsfs"),
        ("s4://bucket", "s4://bucket: expected a kind of URL that fsspec knows, found s4://"),
        ("simplecache::s3://b", "simplecache::s3://b: expected the URL of one store, found several, chained by '::'"),
    ):
        package = text[:2] + "fs" if text[0] != "g" else "gcsfs"
        if any((Path(folder) / package).is_dir() for folder in sys.path):
            continue
        with pytest.raises(ValueError) as error:
            folder_at(text)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="cache_gigabytes: expected more than 0, found 0"):
        folder_at("memory://a", cache_gigabytes=0)
    hub = folder_at("hf://datasets/me/clips/")
    assert (str(hub / "train"), hub.name) == ("hf://datasets/me/clips/train", "clips")
    assert fsspec.get_filesystem_class("hf").__module__.startswith("huggingface_hub")
    assert folder_at("data/kth") == Path("data/kth") and folder_at(r"C://sets") == Path("C://sets")


def test_tools_name_a_url_that_is_not_there(tmp_path, command):
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"file://{tmp_path}/none/train: no latents cache here; run tools/encode"):
        call_tool("train_prior", tmp_path, f"cache.root=file://{tmp_path}/none")
    status, _, err = command("prepare_dataset", "check", f"file://{tmp_path}/none")
    assert status == 1 and err.splitlines()[-1] == f"error: file://{tmp_path}/none: no such folder"
    status, _, err = command("prepare_dataset", "flow", "--output", "s4://bucket/flow")
    assert status == 1 and err.splitlines()[-1].startswith("error: s4://bucket/flow: expected a kind of URL")


# --- few local copies


def fill(n_files, n_bytes):
    """Files in the store, each of other bytes."""
    Flaky.objects.update({f"b/{i}.bin": bytes([i]) * n_bytes for i in range(n_files)})


def test_the_least_recently_used_copies_make_way(tmp_path):
    fill(5, 100)
    (tmp_path / "mine.bin").write_bytes(bytes(1000))  # others' files are neither counted nor removed
    root = folder_at("flaky://b", tmp_path, 3e-7)

    def first_bytes():
        return sorted(path.read_bytes()[0] for path in tmp_path.iterdir() if len(path.name) == 68)

    for i in range(3):
        local_copy(root / f"{i}.bin")
    used = local_copy(root / "0.bin")
    assert first_bytes() == [0, 1, 2] and used.read_bytes() == bytes(100)
    with open(local_copy(root / "1.bin"), "rb") as file:
        local_copy(root / "3.bin")
        assert first_bytes() == [0, 1, 3]
        local_copy(root / "4.bin"), local_copy(root / "2.bin")
        assert first_bytes() == [2, 3, 4] and file.read() == b"\1" * 100  # who reads goes on
    assert (tmp_path / "mine.bin").exists()
    Flaky.objects["b/2.bin"] = b"\7" * 90  # written anew
    assert local_copy(root / "2.bin").read_bytes() == b"\7" * 90
    with pytest.raises(OSError, match=r"^flaky://b/5.bin: 301 bytes are more than cache_gigabytes=3e-07 has room for$"):
        Flaky.objects["b/5.bin"] = bytes(301)
        local_copy(root / "5.bin")


HAMMER = """
import os, random, sys, time
from pathlib import Path
from latentcast.copies import local_copy
from latentcast.urls import folder_at
store, copies, seed = sys.argv[1:]
root, chance = folder_at(f"file://{store}", Path(copies), 1e-4), random.Random(seed)
for _ in range(80):
    i = chance.randrange(12)
    try:
        assert local_copy(root / f"{i}.bin").read_bytes() == bytes([i]) * 30_000
    except FileNotFoundError:  # made way
        pass
    with os.scandir(copies) as entries:
        sizes = []
        for entry in entries:
            try:
                sizes.append(entry.stat().st_size if entry.is_file() else 0)
            except FileNotFoundError:
                pass
    assert sum(sizes) <= 100_000 + 30_000, sizes  # a file that another one replaces may be seen twice
"""


def test_processes_share_a_bounded_folder(tmp_path):
    (tmp_path / "store").mkdir()
    for i in range(12):
        (tmp_path / "store" / f"{i}.bin").write_bytes(bytes([i]) * 30_000)
    (tmp_path / "copies").mkdir()
    arguments = [sys.executable, "-c", HAMMER, tmp_path / "store", tmp_path / "copies"]
    processes = [subprocess.Popen([*arguments, str(seed)], cwd=ROOT) for seed in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sum(path.stat().st_size for path in (tmp_path / "copies").iterdir() if path.is_file()) <= 100_000
    assert not list((tmp_path / "copies/fetching").iterdir())


# --- one order


def write_cache(root, n_videos=23, shard_videos=2, n_frames=9):
    spec = PixelTokenizer(1, 2, 2, levels=256).latent_spec
    videos = [VideoEntry(f"v{i}", n_frames, 10.0) for i in range(n_videos)]
    writer = LatentCacheWriter(root, spec, "f" * 64, videos=videos, data={}, fps=10.0, shard_videos=shard_videos)
    for shard in range(writer.n_shards):
        with writer.open_shard(shard) as file:
            for i in writer.shard_videos(shard):
                file.append(i, torch.full((n_frames, 2, 2, 1), i))
    writer.finish()
    return root


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cached") / "train").parent


def order_of(loader):
    return [batch["codes"].clone() for batch in loader]


def module(cached, folder, workers=0, batch_size=4, gigabytes=1, **options):
    """Over the cache behind a URL: 12 shards of two videos, of four clips each; blocks of two shards."""
    root = folder_at(f"file://{cached}", folder, gigabytes)
    return LatentDataModule(root, 2, batch_size, num_workers=workers, seed=3, shuffle_buffer=10, **options)


def test_the_order_is_the_same_for_workers_and_resumes_anywhere(cached, tmp_path):
    here, apart = (module(cached, tmp_path, workers).train_dataloader() for workers in (0, 2))
    epochs = []
    for _ in range(2):
        batches = order_of(here)
        assert all(map(torch.equal, batches, order_of(apart))) and len(batches) == 23
        epochs.append(torch.cat(batches)[:, 0, 0, 0, 0].tolist())
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(v for v in range(23) for _ in range(4))
    for epoch in epochs:
        # A block's shards are left when it ends, and inside it clips of both are mixed.
        shards = [video // 2 for video in epoch]
        last = {shard: place for place, shard in enumerate(shards)}
        first = {shard: shards.index(shard) for shard in set(shards)}
        together = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(shards))]
        assert max(together) == 2 and sum(n == 2 for n in together) > 50

    whole = order_of(here)
    served = [batch["codes"].clone() for _, batch in zip(range(9), apart)]
    resumed = module(cached, tmp_path).train_dataloader()
    resumed.load_state_dict(apart.state_dict())
    assert all(map(torch.equal, whole, [*served, *order_of(resumed)]))
    local = LatentDataModule(cached, 2, 4, seed=3).train_dataloader()
    with pytest.raises(ValueError, match=r"clips' order was that of 10, .* of null; resume with shuffle_buffer=10"):
        local.load_state_dict(apart.state_dict())
    with pytest.raises(ValueError, match="shuffle_buffer: expected null or a whole number of at least 1, found 0"):
        LatentDataModule(cached, 2, 4, shuffle_buffer=0)
    # By option in a folder as well; there it is the same order.
    local = LatentDataModule(cached, 2, 4, seed=3, shuffle_buffer=10).train_dataloader()
    local.load_state_dict({"epoch": 2, "n_clips": 0, "shuffle_buffer": 10})
    assert all(map(torch.equal, whole, order_of(local)))


class Learner(pl.LightningModule):
    """Whose losses tell which clips came in which order."""

    def __init__(self):
        super().__init__()
        self.weight, self.losses = torch.nn.Parameter(torch.zeros(2, 2, 2, 1)), []

    def training_step(self, batch, _):
        loss = ((self.weight - batch["codes"] / 23) ** 2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_a_training_that_goes_on_has_the_losses_of_one_that_did_not_stop(cached, tmp_path):
    """In the middle of the second epoch, with the copies of the first run gone."""

    def fit(folder, steps, checkpoint=None):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = pl.Trainer(max_steps=steps, enable_model_summary=False, **options)
        model = Learner()
        trainer.fit(model, datamodule=module(cached, tmp_path / folder), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return model.losses

    whole = fit("whole", 50)
    assert [*fit("half", 31), *fit("rest", 50, tmp_path / "half.ckpt")] == whole and len(set(whole)) == 50


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("skip", [0, 5, 11])
def test_ranks_share_the_order(cached, world_size, skip):
    dataset = LatentCacheDataset(cached / "train", 2)
    alone = _ShardSampler(dataset, 1, 0, 3, 10)
    ranks = [_ShardSampler(dataset, world_size, rank, 3, 10) for rank in range(world_size)]
    for sampler in ranks:
        sampler.skip = skip
    turns = [index for turn in zip(*map(list, ranks), strict=True) for index in turn]
    expected = list(alone)
    assert sorted(expected) == list(range(92)) and len(turns) == (-(-92 // world_size) - skip) * world_size
    assert turns == [*expected, *expected][skip * world_size :][: len(turns)]


def test_each_shard_is_fetched_once_though_few_fit(tmp_path, caplog):
    root = folder_at("flaky://b/cache", tmp_path, 4.5e-6)
    write_cache(root / "train", shard_videos=3, n_frames=30)
    n_bytes = max((root / "train").sizes()[f"shard-{i:05d}.safetensors"] for i in range(8))
    Flaky.requests.clear()
    data = LatentDataModule(root, 2, 4, seed=3, shuffle_buffer=40)
    taken, most = [], 0
    for batch in data.train_dataloader():
        taken.append(batch["codes"])
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()))
    assert len(torch.cat(taken)) == 344 and 3 * n_bytes < most <= 4500 + n_bytes and not caplog.text
    fetched = [path for kind, path in Flaky.requests if kind == "get" and path.endswith(".safetensors")]
    assert set(map(fetched.count, fetched)) == {1} and len(fetched) >= 8
    root = folder_at("flaky://b/cache", tmp_path, 1.5e-6)
    LatentDataModule(root, 2, 4, shuffle_buffer=40).train_dataloader()
    assert "shuffle_buffer=40 asks for copies of" in caplog.text and "gigabytes=1.5e-06 has no room" in caplog.text


def test_wandb_has_a_cache_behind_a_url_by_reference(tmp_path):
    pytest.importorskip("wandb")
    from latentcast.training.lineage import build

    root = folder_at("flaky://b/latents", tmp_path)
    write_cache(root / "train")
    first = build("run-latents", "latents", [root])
    assert first.manifest.entries["train"].ref == "flaky://b/latents/train"
    assert first.metadata["path"] == str(root) and first.metadata["splits"]["train"]["shards"] == 12
    assert build("run-latents", "latents", [root]).digest == first.digest
    Flaky.clear()
    write_cache(root / "train", n_videos=24)
    assert build("run-latents", "latents", [root]).digest != first.digest

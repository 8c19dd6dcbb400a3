"""The latents cache: what is read back is what the tokenizer made, and nothing else passes for it."""

import json
import logging
import multiprocessing
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL_VQVAE, TINY_TOKENIZERS, random_frames, tiny_tokenizer
from torch.utils.data import DataLoader

from latentcast import KLVAE, VQVAE, LatentCacheDataset, LatentCacheWriter, PixelTokenizer, load_model
from latentcast.data.base import VideoDataset, VideoEntry
from latentcast.data.store.encoding import encode_dataset
from latentcast.data.store.latent_cache import read_manifest
from latentcast.data.video.reader import VideoError
from latentcast.modeling import fingerprint

LENGTHS = (5, 12, 9, 3, 20, 8, 7)


class Noise(VideoDataset):
    """Videos of noise. ``damaged`` ones fail at their fourth frame; reading ``kill_at`` ends the process by SIGKILL."""

    def __init__(self, channels=3, size=16, lengths=LENGTHS, damaged=(), kill_at=None):
        self.channels, self.size, self.lengths, self.damaged, self.kill_at = channels, size, lengths, damaged, kill_at
        self.split, self.clip_length, self.fps = "train", 3, 10.0
        self.longest_read = 0

    @property
    def videos(self):
        return [VideoEntry(f"noise/{i}", n, 10.0) for i, n in enumerate(self.lengths)]

    def read_video(self, index, start, stop):
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.damaged and stop > 3:
            raise VideoError(f"noise/{index}: damaged at frame 3")
        self.longest_read = max(self.longest_read, stop - start)
        return self.whole(index)[start:stop]

    def whole(self, index):
        shape = (self.lengths[index], self.channels, self.size, self.size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(index)) * 2 - 1

    def describe(self):
        return {"source": "noise", "size": self.size, "frame_stride": 2}


def vqvae(**options):
    """Another tokenizer than the fixture's."""
    torch.manual_seed(1)
    return VQVAE(height=16, width=16, **SMALL_VQVAE, **options).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("vqvae")


@pytest.fixture
def cache(tmp_path, tokenizer):
    """A finished cache of three shards."""
    encode_dataset(Noise(), tokenizer, tmp_path / "train", batch_frames=8, shard_videos=3)
    return tmp_path / "train"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spec_of(*codebook_sizes):
    sizes = {"height": 2, "width": 3, "frame_channels": 1, "frame_height": 8, "frame_width": 12}
    kind = "discrete" if codebook_sizes else "continuous"
    return {"kind": kind, "channels": 4, "codebook_sizes": list(codebook_sizes), "scaling_factor": 1.0, **sizes}


def write(root, frames, spec, **options):
    """A cache of one video, through the writer alone."""
    videos = [VideoEntry("a", len(frames), 5.0)]
    writer = LatentCacheWriter(root, spec, "f" * 64, videos=videos, data={}, fps=5.0, **options)
    with writer.open_shard(0) as file:
        file.append(0, frames)
    writer.finish()


# --- what is read back


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
def test_decoding_the_cache_equals_forward(tmp_path, name):
    tokenizer = tiny_tokenizer(name)
    frames = random_frames(tokenizer, batch=1, n_frames=9)
    with torch.no_grad():
        direct, expected = tokenizer.encode(frames), tokenizer(frames).frames
    write(tmp_path, (direct.codes if tokenizer.is_discrete else direct.latents)[0], tokenizer.latent_spec)
    item = LatentCacheDataset(tmp_path, 9)[0]
    if tokenizer.is_discrete:
        assert item["codes"].dtype == torch.int64 and torch.equal(item["codes"], direct.codes[0])
        latents = tokenizer.codes_to_latents(item["codes"][None])
    else:
        latents = item["latents"][None]
    torch.testing.assert_close(latents, direct.latents)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(latents), expected, atol=1e-5, rtol=1e-5)


def test_every_video_is_encoded(cache, tokenizer):
    dataset = LatentCacheDataset(cache, 3)
    assert [(v.name, v.n_frames, v.fps) for v in dataset.videos] == [
        (v.name, v.n_frames, v.fps) for v in Noise().videos
    ]
    for i in range(len(LENGTHS)):
        frames = Noise().whole(i)[None]
        assert torch.equal(dataset.read_video(i), tokenizer.encode(frames).codes[0])
        decoded = tokenizer.decode(tokenizer.codes_to_latents(dataset.read_video(i)[None]))
        torch.testing.assert_close(decoded, tokenizer(frames).frames, atol=1e-5, rtol=1e-5)


def test_encoding_continuous_latents(tmp_path):
    tokenizer = PixelTokenizer(1, 16, 16, levels=None)
    figures = encode_dataset(Noise(channels=1), tokenizer, tmp_path, batch_frames=8, shard_videos=3)
    speed, size = figures.pop("frames_per_s"), figures.pop("bytes")
    assert figures == {"videos": 7, "frames": sum(LENGTHS), "skipped": 0}
    assert speed > 0 and size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert torch.equal(LatentCacheDataset(tmp_path, 3).read_video(4), Noise(channels=1).whole(4))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 256), torch.uint8),
        ((257, 4), torch.uint16),
        ((2**16,), torch.uint16),
        ((2**16 + 1,), torch.uint32),
    ],
)
def test_codes_take_the_smallest_type(tmp_path, sizes, dtype):
    codes = torch.stack([torch.tensor([0, n - 1, n // 2]).expand(5, 2, 3) for n in sizes], dim=-1)
    write(tmp_path, codes, spec_of(*sizes))
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert [tensor.dtype for tensor in stored.values()] == [dtype]
    assert torch.equal(LatentCacheDataset(tmp_path, 5)[0]["codes"], codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_latents_are_stored_in_the_type_asked_for(tmp_path, dtype):
    latents = torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    write(tmp_path, latents, spec_of(9), store="latents", dtype=dtype)
    item = LatentCacheDataset(tmp_path, 5)[0]["latents"]
    assert item.dtype == torch.float32
    assert torch.equal(item, latents.to(getattr(torch, dtype)).float())


def test_shards_are_plain_safetensors(cache, tokenizer):
    found = {}
    for path in sorted(cache.glob("*.safetensors")):
        found |= load_file(path)
    assert list(found) == [f"{i:08d}" for i in range(len(LENGTHS))]
    for i, codes in enumerate(found.values()):
        assert torch.equal(codes.long(), tokenizer.encode(Noise().whole(i)[None]).codes[0])


def test_batches_do_not_shape_the_files(tmp_path, tokenizer, cache):
    for batch_frames, num_workers in ((1, 0), (1000, 2)):
        root = tmp_path / str(batch_frames)
        encode_dataset(Noise(), tokenizer, root, batch_frames=batch_frames, shard_videos=3, num_workers=num_workers)
        assert contents(root) == contents(cache)


def test_shards_and_batches_do_not_change_a_bit(tmp_path):
    """Also of latents, whose last bits would follow the size of what the network gets at once."""
    tokenizer, found = KLVAE(3, 16, 16, block_channels=[8, 16], norm_groups=4), []
    for batch_frames, shard_videos in ((256, 64), (7, 2)):
        root = tmp_path / str(batch_frames)
        options = {"batch_frames": batch_frames, "shard_videos": shard_videos, "store": "latents"}
        encode_dataset(Noise(), tokenizer, root, **options)
        cached = LatentCacheDataset(root, 3)
        found.append([cached.read_video(i) for i in range(len(LENGTHS))])
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("name", ["vqvae", "gradient_hr_vqvae", "residual_vqvae", "fsq", "dcgan"])
def test_encoding_leaves_the_tokenizer_as_it_is(tmp_path, name):
    tokenizer = tiny_tokenizer(name).train()
    identity = fingerprint(tokenizer)
    encode_dataset(Noise(), tokenizer, tmp_path)
    assert fingerprint(tokenizer) == identity == read_manifest(tmp_path)["tokenizer"]


def test_long_videos_are_read_in_pieces(tmp_path, tokenizer):
    data = Noise(lengths=(500,))
    encode_dataset(data, tokenizer, tmp_path, batch_frames=64)
    assert data.longest_read == 64
    assert torch.equal(LatentCacheDataset(tmp_path, 500)[0]["codes"], tokenizer.encode(data.whole(0)[None]).codes[0])


def test_the_manifest_names_its_makers(cache, tokenizer):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["tokenizer"] == fingerprint(tokenizer)
    assert manifest["latent_spec"] == tokenizer.latent_spec
    assert manifest["data"] == Noise().describe()
    assert (manifest["format"], manifest["fps"], manifest["dtype"], manifest["store"]) == (2, 10.0, "uint8", "codes")
    assert manifest["videos"][4] == {"name": "noise/4", "n_frames": 20, "fps": 10.0}
    assert [shard["bytes"] for shard in manifest["shards"]] == [p.stat().st_size for p in sorted(cache.glob("shard*"))]
    assert {path.name for path in cache.iterdir()} == {"manifest.json", *(s["file"] for s in manifest["shards"])}


# --- windows


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_windows_are_slices_of_their_video(cache, stride):
    whole = LatentCacheDataset(cache, 1)
    train = LatentCacheDataset(cache, 3, stride)
    usable = [i for i, n in enumerate(LENGTHS) if n >= 2 * stride + 1]
    assert [video.name for video in train.videos] == [f"noise/{i}" for i in usable]
    assert train.fps == 10 / stride
    fixed = LatentCacheDataset(cache, 3, stride, split="val")
    places = [(n, 3 * k) for n, i in enumerate(usable) for k in range(-(-LENGTHS[i] // stride) // 3)]
    assert len(train) == len(fixed) == len(places)
    for index, i in enumerate(usable):
        video = whole.read_video(i)
        windows = [video[s : s + 2 * stride + 1 : stride] for s in range(0, len(video) - 2 * stride, stride)]
        clips = [k for k, (n, _) in enumerate(places) if n == index]
        assert len(clips) == len(video[::stride]) // 3
        seen = set()
        for epoch in range(300 // len(clips)):
            train.set_epoch(epoch)
            for clip in clips:
                matches = [k for k, window in enumerate(windows) if torch.equal(window, train[clip]["codes"])]
                assert matches
                seen.add(matches[0])
        assert len(seen) == len(windows)  # 18 starts at most: in 300 draws each comes up
        for clip in clips:
            assert torch.equal(fixed[clip]["codes"], windows[places[clip][1]])


def test_windows_depend_on_seed_and_epoch_alone(cache):
    def draw(seed, epoch):
        dataset = LatentCacheDataset(cache, 3, seed=seed)
        dataset.set_epoch(epoch)
        return torch.stack([dataset[i]["codes"] for i in range(len(dataset))])

    assert torch.equal(draw(0, 3), draw(0, 3))
    assert not torch.equal(draw(0, 3), draw(0, 4))
    assert not torch.equal(draw(0, 3), draw(1, 3))


def test_workers_read_what_this_process_reads(cache):
    dataset = LatentCacheDataset(cache, 3)
    here = [dataset[i]["codes"] for i in range(len(dataset))]  # opens files, which must not travel
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="forkserver")
    assert all(torch.equal(item["codes"], codes) for item, codes in zip(loader, here, strict=True))


def test_items_do_not_share_the_file(cache):
    dataset = LatentCacheDataset(cache, 3, split="val")
    dataset[0]["codes"].zero_()
    assert dataset[0]["codes"].any()
    assert dataset[0]["codes"].untyped_storage().nbytes() == dataset[0]["codes"].numel() * 8


def test_short_videos_are_counted(cache, caplog):
    caplog.set_level(logging.INFO)
    assert len(LatentCacheDataset(cache, 8).videos) == 4
    assert "3 of 7 videos are shorter" in caplog.text
    with pytest.raises(ValueError, match="no video has clip_length=11 frames at stride 2; the longest of 7 has 10"):
        LatentCacheDataset(cache, 11, stride=2)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (-1, 2), (3, 3)])
def test_read_video_refuses_frames_that_are_not_there(cache, start, stop):
    with pytest.raises(ValueError, match=rf"video 0 \(.*\): expected 0 <= start < stop <= 5, found {start}:{stop}"):
        LatentCacheDataset(cache, 1).read_video(0, start, stop)


# --- another tokenizer, size or stride


def test_fingerprint_follows_the_model_not_its_copy(tmp_path, tokenizer):
    identity = fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert fingerprint(loaded) == identity
    with torch.no_grad():
        next(loaded.parameters())[0, 0, 0, 0] += 1e-6
    assert fingerprint(loaded) != identity
    assert fingerprint(load_model(tmp_path, scaling_factor=0.5)) != identity


def test_a_request_that_does_not_fit_is_refused(cache, tokenizer):
    dataset = LatentCacheDataset(cache, 3)
    identity, spec = fingerprint(tokenizer), tokenizer.latent_spec
    assert dataset.expect(identity, spec, {"size": 16, "frame_stride": 2}) is dataset
    with pytest.raises(ValueError, match=f"made with tokenizer {identity}, asked for abc"):
        dataset.expect("abc")
    with pytest.raises(ValueError, match=r"made with latent_spec.codebook_sizes\[0\] 12, asked for 13"):
        dataset.expect(identity, {**spec, "codebook_sizes": [13]})
    with pytest.raises(
        ValueError, match=r"made with data.size 16, asked for 32; made with data.frame_stride 2, asked for 1"
    ):
        dataset.expect(data={"size": 32, "frame_stride": 1})


def test_continuing_another_job_is_refused(cache, tokenizer):
    before = contents(cache)
    other = vqvae(codebook_size=12)
    with pytest.raises(
        ValueError, match=f"tokenizer {fingerprint(tokenizer)}, asked for {fingerprint(other)}.*overwrite"
    ):
        encode_dataset(Noise(), other, cache, shard_videos=3)
    with pytest.raises(ValueError, match="made with videos of 7 entries, asked for 1"):
        encode_dataset(Noise(lengths=(5,)), tokenizer, cache, shard_videos=3)
    with pytest.raises(ValueError, match=r"the tokenizer takes \(C, H, W\) = \(3, 16, 16\).*serves \(3, 32, 32\)"):
        encode_dataset(Noise(size=32), tokenizer, cache, shard_videos=3)
    assert contents(cache) == before
    encode_dataset(Noise(), other, cache, shard_videos=4, overwrite=True)
    assert LatentCacheDataset(cache, 3).expect(fingerprint(other)).verify() == 2


def test_a_finished_cache_is_left_alone(cache, tokenizer):
    stamps = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert encode_dataset(Noise(kill_at=0), tokenizer, cache, shard_videos=3)["frames_per_s"] is None
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == stamps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "code"}, "cache.store: expected one of auto, codes, latents, posterior, found 'code'"),
        ({"store": "codes"}, "cache.store: expected 'latents' or 'auto' .* found 'codes'"),
        ({"dtype": "int8"}, "cache.dtype: expected one of float32, bfloat16, float16, found 'int8'"),
        ({"shard_videos": 0}, "shard_videos: expected at least 1, found 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, torch.zeros(2, 4, 2, 3), spec_of(), **options)


# --- the size of shards


@pytest.mark.parametrize(
    ("n_videos", "n_frames", "expected"),
    [
        (2000, 16, 64),
        (2000, 1000, 20),
        (2000, 50_000, 1),
        (63, 16, 7),  # nine shards
        (5, 30_000, 1),
        (1, 5, 1),
    ],
)
def test_long_and_few_videos_make_small_shards(tmp_path, n_videos, n_frames, expected):
    videos = [VideoEntry(str(i), n_frames, 5.0) for i in range(n_videos)]
    writer = LatentCacheWriter(tmp_path, spec_of(), "f" * 64, videos=videos, data={}, fps=5.0, shard_videos=None)
    assert writer.job["shard_videos"] == expected


def test_a_cache_keeps_the_shards_that_it_was_begun_with(cache, tokenizer, tmp_path):
    before = contents(cache)
    assert encode_dataset(Noise(kill_at=0), tokenizer, cache)["frames_per_s"] is None
    assert contents(cache) == before
    with pytest.raises(ValueError, match="made with shard_videos 3, asked for 2"):
        encode_dataset(Noise(), tokenizer, cache, shard_videos=2)
    root = tmp_path / "killed"
    killed = multiprocessing.get_context("forkserver").Process(target=encode_until_killed, args=(tokenizer, root))
    killed.start()
    killed.join()
    encode_dataset(Noise(kill_at=0), tokenizer, root, batch_frames=8)
    assert contents(root) == before
    encode_dataset(Noise(), tokenizer, root, batch_frames=8, overwrite=True)
    assert len(list(root.glob("*.safetensors"))) == len(LENGTHS)


# --- damage and interruption


def test_a_truncated_or_missing_shard_is_named_and_encoded_again(cache, tokenizer):
    before, shard = contents(cache), cache / "shard-00001.safetensors"
    n = shard.stat().st_size
    os.truncate(shard, n - 7)
    with pytest.raises(ValueError, match=f"shard-00001.safetensors: expected {n} bytes, found {n - 7}"):
        LatentCacheDataset(cache, 3)
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard-00001.safetensors: expected {n} bytes, found no file"):
        LatentCacheDataset(cache, 3)
    # Only that shard is read again: video 0 is in another, and reading it would end this process.
    encode_dataset(Noise(kill_at=0), tokenizer, cache, batch_frames=8, shard_videos=3)
    assert contents(cache) == before


def test_an_altered_shard_fails_its_checksum(cache):
    shard = cache / "shard-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        LatentCacheDataset(cache, 3).verify()


def test_an_unfinished_cache_says_how_to_finish_it(cache, tmp_path):
    (cache / "manifest.json").rename(cache / "plan.json")
    with pytest.raises(FileNotFoundError, match=r"unfinished; run tools/encode_dataset.py, which resumes"):
        LatentCacheDataset(cache, 3)
    with pytest.raises(FileNotFoundError, match=r"not there; run tools/encode_dataset.py"):
        LatentCacheDataset(tmp_path / "nowhere", 3)


def test_an_unknown_format_is_refused(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(ValueError, match="expected format 2, found 3"):
        LatentCacheDataset(cache, 3)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: not valid JSON"):
        LatentCacheDataset(cache, 3)


def test_kill_and_resume_equals_an_uninterrupted_run(cache, tokenizer, tmp_path):
    root = tmp_path / "killed"
    killed = multiprocessing.get_context("forkserver").Process(target=encode_until_killed, args=(tokenizer, root))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    left = contents(root)
    # One shard is whole, the second was under way: its first videos are in a temporary file.
    assert set(left) >= {"plan.json", "shard-00000.safetensors"}
    assert sum(name.endswith(".tmp") for name in left) == 1
    assert "manifest.json" not in left and "shard-00001.safetensors" not in left
    with pytest.raises(ValueError, match="made with tokenizer"):
        encode_dataset(Noise(), vqvae(codebook_size=12), root, shard_videos=3)
    encode_dataset(Noise(kill_at=0), tokenizer, root, batch_frames=8, shard_videos=3)  # the first shard is skipped
    assert contents(root) == contents(cache)


def encode_until_killed(tokenizer, root):
    encode_dataset(Noise(kill_at=5), tokenizer, root, batch_frames=8, shard_videos=3)


def test_unreadable_videos_are_named_and_left_out(tmp_path, tokenizer, caplog):
    data = Noise(damaged=(1, 5, 6))
    figures = encode_dataset(data, tokenizer, tmp_path / "a", batch_frames=4, shard_videos=3)
    assert (figures["videos"], figures["skipped"]) == (4, 3)
    assert caplog.text.count("noise/1: skipped (noise/1: damaged at frame 3)") == 1
    cached = LatentCacheDataset(tmp_path / "a", 3)
    assert [video.name for video in cached.videos] == ["noise/0", "noise/2", "noise/3", "noise/4"]
    for index, i in enumerate((0, 2, 3, 4)):
        assert torch.equal(cached.read_video(index), tokenizer.encode(data.whole(i)[None]).codes[0])
    with pytest.raises(ValueError, match=r"none of 7 videos could be written .*damaged"):
        encode_dataset(Noise(damaged=range(7), lengths=(9,) * 7), tokenizer, tmp_path / "b")


def test_an_error_while_reading_keeps_finished_shards_alone(tmp_path, tokenizer, cache):
    class Breaking(Noise):
        def read_video(self, index, start, stop):
            if index == 4 and stop > 8:
                raise RuntimeError("the cable is out")
            return super().read_video(index, start, stop)

    root = tmp_path / "again"
    with pytest.raises(RuntimeError, match="the cable is out"):
        encode_dataset(Breaking(), tokenizer, root, batch_frames=8, shard_videos=3)
    assert sorted(path.name for path in root.glob("*shard*")) == ["shard-00000.json", "shard-00000.safetensors"]
    encode_dataset(Noise(), tokenizer, root, batch_frames=8, shard_videos=3)
    assert contents(root) == contents(cache)


def test_a_disk_that_is_too_small_is_found_before_the_start(tmp_path, tokenizer):
    with pytest.raises(OSError, match=r"needs 1.6e\+04 TB, but .* are free"):
        encode_dataset(Noise(lengths=(10**15,), kill_at=0), tokenizer, tmp_path)


def test_a_full_disk_keeps_finished_shards(tmp_path, tokenizer):
    data = Noise(lengths=(3, 3, 900))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"shard-00002.safetensors: cannot be written .*; finished shards are kept"):
            encode_dataset(data, tokenizer, tmp_path, shard_videos=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.glob("shard-*.safetensors*")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    data.kill_at = 0  # not read again
    assert encode_dataset(data, tokenizer, tmp_path, shard_videos=1)["videos"] == 3

"""Give every loader thousands of damaged and hostile files: each is used, or refused in one line that names it.

    python tests/stress/fuzz.py --inputs 10000 --seconds 120 --seed 0
    python tests/stress/fuzz.py "video mp4" overrides

Documents (manifests, headers, YAML, TFRecords, overrides) are changed by hypothesis, files of bytes (shards, weights,
checkpoints, archives, tables, pictures, videos of each container) by flipped bits, cuts, and ranges that are inserted,
repeated or left out. A process of its own uses each input, under a limit of memory: one that crashes, hangs, takes too
much memory or time, prints, or raises anything but one line of ValueError or OSError is a finding, and its input is
kept. Not part of ``make test``; the figures are in docs/reliability.md.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}

import diffusers  # noqa: E402
import google_crc32c  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, Phase, configuration, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from test_compare import make_result  # noqa: E402
from test_latent_cache import Noise, vqvae  # noqa: E402
from test_pipeline import transformer  # noqa: E402
from test_prepared import Noise as NoiseSet  # noqa: E402
from test_schemas import continue_cache, places, read_cache  # noqa: E402
from tfrecord_files import bair_clip, bair_features, example  # noqa: E402
from tiny import tiny_tokenizer  # noqa: E402
from tiny_experiment import EXPERIMENT  # noqa: E402
from video_files import counter_frames, encode  # noqa: E402

from latentcast import VideoFolder, VideoPredictionPipeline, load_config  # noqa: E402
from latentcast.cli import UserError  # noqa: E402
from latentcast.config import instantiate  # noqa: E402
from latentcast.data.checking import check_folder  # noqa: E402
from latentcast.data.sets.action_tables import read_actions  # noqa: E402
from latentcast.data.sets.bair import BAIR  # noqa: E402
from latentcast.data.sets.prepared_videos import prepared_videos  # noqa: E402
from latentcast.data.store.encoding import encode_dataset  # noqa: E402
from latentcast.data.store.prepared import prepare  # noqa: E402
from latentcast.data.video.folder import INDEX_NAME  # noqa: E402
from latentcast.data.video.pictures import read_pictures  # noqa: E402
from latentcast.data.video.reader import VideoError, iter_clip, probe, read_clip  # noqa: E402
from latentcast.evaluation.comparison import describe_differences, differences, paired  # noqa: E402
from latentcast.evaluation.markdown import published_table, table  # noqa: E402
from latentcast.evaluation.published import PUBLISHED, published_beside, read_published  # noqa: E402
from latentcast.evaluation.results import read_result  # noqa: E402
from latentcast.pipelines.base import VideoPipeline  # noqa: E402
from latentcast.reporting.folder import read_run  # noqa: E402
from latentcast.reporting.page import write_page  # noqa: E402
from latentcast.training.checkpoints import check_checkpoint  # noqa: E402
from latentcast.yaml_text import flattened  # noqa: E402

MEMORY = 4 << 30  # bytes of addresses that an input may take; more fails, and is found
MOST_MB, MOST_SECONDS, HANG = 600, 20, 120  # resident memory; of the CPU; by the clock
LONGEST_LINE = 6000  # characters, as in test_untrusted_configs.py
BATCH = 500  # inputs that hypothesis makes from one seed
REPORT_EVERY = 30  # seconds
DECORD = b"video_reader.cc"  # in a line that it prints of a file which it cannot open, and nothing silences

# Documents -----------------------------------------------------------------------------------------------------------

HOSTILE = ["", "x", "5", "../../x", "/etc/passwd", "a\nb", "\0", "é\u202e", "1" * 3000, "${oc.env:HOME}", "${name}"]
HOSTILE += ["os.system", "torch.hub.load", "latentcast.VQVAE", "nan", "-inf", "[" * 200, "{a: ", "<script>", "~", "%s"]
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**12, 10**400]
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(HOSTILE), st.text()
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def made(make, *args):
    """A strategy of what ``make(draw, *args)`` returns, whose name does not write out the arguments: they are large."""
    return st.composite(lambda draw: make(draw, *args))()


def inner(document, path):
    return functools.reduce(lambda value, key: value[key], path, document)


def changed(draw, document):
    """A document of which one to three places are gone, replaced, swapped with others, or added to."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(document))
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        holder, action = inner(document, above), draw(st.integers(0, 9))
        if action == 0:
            del holder[last]
        elif action < 7 or (action == 9 and isinstance(holder, list)):
            holder[last] = draw(junk)
        elif action < 9:
            holder[last] = copy.deepcopy(inner(document, draw(st.sampled_from(paths))))
        else:
            holder[draw(st.text(max_size=8) | st.sampled_from(HOSTILE))] = draw(junk)
    return document


def as_json(draw, document):
    return json.dumps(changed(draw, document)).encode()


YAML_PARTS = ["!!python/object/apply:os.system [true]", "&a [*a, *a]", "<<: *a", "? [a]\n: b", "\t", "---\n", "...\n"]
YAML_PARTS += [
    "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\n",
    "!!set {a}",
    "'",
    '"',
    "|\n",
    "%",
]
YAML_PARTS += ["${oc.env:HOME}", "${oc.decode:1}", "_target_: os.system", "on", "1e999", "0x", "\u2028", "\ufeff", "\0"]


def as_yaml(draw, document):
    """Its YAML, sometimes with a piece of syntax somewhere, or cut off."""
    found = changed(draw, document)
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(YAML_PARTS) | st.text(max_size=6)) + text[at:]
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    return text.encode("utf-8", "surrogatepass")


def with_header(draw, content):
    """A safetensors file with another header, whose stated length is sometimes wrong."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(changed(draw, json.loads(content[8 : 8 + length])), separators=(",", ":")).encode()
    header = header.ljust(length)  # the tensors stay where they are, if it fits
    stated = draw(st.one_of(st.just(len(header)), st.just(len(header)), st.sampled_from(NUMBERS[:-1])))
    return struct.pack("<Q", stated % 2**64) + header + content[8 + length :]


numbers_of_bytes = st.binary(max_size=40) | st.just(bytes(12288)) | st.just(bytes(12287))
feature = st.one_of(
    st.lists(numbers_of_bytes, min_size=1, max_size=3),
    st.lists(st.floats(width=32), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
)


def records(draw, features):
    """A TFRecord file of one to three records whose checksums are right, but for some that are not."""
    written = []
    for _ in range(draw(st.integers(1, 3))):
        found = dict(features)
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(list(found)) | st.text(max_size=8)) if found else "x"
            if draw(st.booleans()):
                found[name] = draw(feature)
            else:
                found.pop(name, None)
        data = bytearray(example(found) if found else b"")
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(data)) | st.integers(0, min(64, len(data))))
            data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=6))
        record = framed_fast(bytes(data))
        if draw(st.integers(0, 9)) == 0:
            at = draw(st.integers(0, len(record)))
            record = record[:at] + draw(st.binary(max_size=9)) + record[at + draw(st.integers(0, 9)) :]
        written.append(record)
    return b"".join(written)


def framed_fast(data):
    """One record; checksums in Python, as tfrecord_files.py has them, take a second for a record of frames."""

    def masked(part):
        crc = google_crc32c.value(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def overrides(draw, keys):
    """One to four arguments key=value, most of them of keys that there are."""
    values = st.one_of(scalars.map(str), st.sampled_from(YAML_PARTS), st.text(max_size=12), junk.map(repr))
    key = st.sampled_from(keys) | st.text(max_size=12) | st.builds(".".join, st.lists(st.text(max_size=5), max_size=4))
    form = st.sampled_from(["{}={}", "{}={}", "{}={}", "{}={}", "{}{}", "{}.{}=1"])
    pairs = st.builds(lambda form, key, value: form.format(key, value), form, key, values)
    return json.dumps(draw(st.lists(pairs, min_size=1, max_size=4))).encode()


# Bytes ---------------------------------------------------------------------------------------------------------------

EXTREMES = (
    [bytes(n) for n in (1, 2, 4, 8)] + [b"\xff" * n for n in (1, 2, 4, 8)] + [b"\x7f" + b"\xff" * 3, b"\x80" + bytes(3)]
)


def damaged(content, rng):
    """The bytes with one to four of: flipped bits, a cut, a range that is inserted, repeated, left out or extreme; half
    of the time near the start, where headers are."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content)) if content else 0
        length, kind = rng.choice((1, 2, 4, 16, 100, 1000)), rng.random()
        if kind < 0.35:
            for _ in range(rng.choice((1, 1, 3, 20))):
                at = min(max(0, at + rng.randint(-8, 8)), len(content) - 1)
                if content:
                    content[at] ^= 1 << rng.randrange(8)
        elif kind < 0.45:
            del content[at:]
        elif kind < 0.6:
            content[at:at] = rng.randbytes(length)
        elif kind < 0.7:
            content[at:at] = content[at : at + length] * rng.choice((1, 1, 3))
        elif kind < 0.8:
            del content[at : at + length]
        else:
            extreme = rng.choice(EXTREMES)
            content[at : at + len(extreme)] = extreme
    return bytes(content)


# Targets -------------------------------------------------------------------------------------------------------------


class Target:
    """A file that is damaged, and what uses it.

    Args:
        path: of the file, whole. use: called with nothing. make: a strategy for its bytes; None: ``damaged``.
        names: what errors name, the file's folder or one above it; None: nothing.
        kept: files that ``use`` changes or removes, besides, and which are put back.
        sized: inputs are cut, or filled with zeros, to the size that a manifest states.
    """

    def __init__(self, path, use, make=None, names=True, kept=(), sized=False):
        self.path, self.use, self.make = Path(path), use, make
        self.names = self.path.parent if names is True else names
        self.content, self.sized = self.path.read_bytes(), sized
        self.kept = {Path(other): Path(other).read_bytes() for other in kept}

    def put(self, content):
        for other, whole in self.kept.items():
            other.write_bytes(whole)
        size = len(self.content) if self.sized else len(content)
        self.path.write_bytes(content[:size].ljust(size, b"\0"))


def json_target(path, use, **options):
    return Target(path, use, made(as_json, json.loads(Path(path).read_text())), **options)


def caches(folder):
    tokenizer, root = vqvae(codebook_size=12), folder / "cache"
    encode_dataset(Noise(), tokenizer, root, batch_frames=8, shard_videos=3)
    yield "cache manifest", json_target(root / "manifest.json", lambda: read_cache(root))
    shard, use = root / "shard-00000.safetensors", lambda: read_cache(root)
    yield "cache header", Target(shard, use, made(with_header, shard.read_bytes()), sized=True)
    yield "cache shard", Target(shard, use, sized=True)
    unfinished = Path(shutil.copytree(root, folder / "unfinished"))
    manifest = json.loads((unfinished / "manifest.json").read_text())
    *notes, last = manifest.pop("shards")
    (unfinished / "plan.json").write_text(json.dumps(manifest))
    for number, note in enumerate(notes):
        (unfinished / f"shard-{number:05d}.json").write_text(json.dumps(note))
    (unfinished / last["file"]).unlink()
    (unfinished / "manifest.json").unlink()
    for name, file in (("cache plan", "plan.json"), ("cache note", "shard-00000.json")):
        kept = [path for path in unfinished.iterdir() if path.name != file]
        yield name, json_target(unfinished / file, lambda: continue_cache(unfinished, tokenizer), kept=kept)


def prepared_sets(folder):
    root = folder / "set"
    prepare(NoiseSet(), root)

    def use():
        data = prepared_videos(root, "train", 2)
        data[0], data.describe(), data.read_conditions(0, 0, 1)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            check_folder(root)

    yield "set manifest", json_target(root / "manifest.json", use)
    yield "split manifest", json_target(root / "train/manifest.json", use, names=root)
    yield "set shard", Target(root / "train/shard-00000.safetensors", use, names=root, sized=True)


def models(folder):
    tokenizer, root = tiny_tokenizer("sliced_vqvae"), folder / "pipeline"
    VideoPredictionPipeline(transformer(tokenizer.latent_spec), tokenizer, n_context=2, fps=10).save_pretrained(root)

    def use():
        VideoPipeline.from_pretrained(root)

    (weights,) = (root / "prior").glob("*.safetensors")
    yield "pipeline index", json_target(root / "model_index.json", use)
    yield "prior config", json_target(root / "prior/config.json", use, names=root)
    yield "tokenizer config", json_target(root / "tokenizer/config.json", use, names=root)
    yield "weights header", Target(weights, use, made(with_header, weights.read_bytes()), names=root)
    yield "weights", Target(weights, use, names=root)


class Small(torch.nn.Linear):
    """What ``check_checkpoint`` asks of a module."""

    hparams, stage = {"name": "x", "optimizer": {"lr": 0.1}}, "tokenizer"


def checkpoints(folder):
    module, path = Small(3, 4), folder / "last.ckpt"
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    content = {"state_dict": module.state_dict(), "global_step": 3, "optimizer_states": [optimizer.state_dict()]}
    torch.save(content | {"hyper_parameters": Small.hparams, "data": None, "loops": {"a": {"b": 1}}}, path)
    yield "checkpoint", Target(path, lambda: check_checkpoint(path, module, False))


def archives(folder):
    features = bair_features(bair_clip(0), views=("aux1",))
    for split in ("train", "test"):
        (folder / "softmotion30_44k" / split).mkdir(parents=True)
        path = folder / "softmotion30_44k" / split / "traj_0_to_2.tfrecords"
        path.write_bytes(framed_fast(example(features)) * 3)

    def use(source):
        benchmark = BAIR(source)
        names = benchmark.videos()["train"][:3]
        for name in names:
            benchmark.read("train", name)

    train = folder / "softmotion30_44k/train/traj_0_to_2.tfrecords"
    yield "tfrecord", Target(train, lambda: use(folder), made(records, features), names=folder)
    yield "tfrecord bytes", Target(train, lambda: use(folder), names=folder)
    path, buffer = folder / "bair.tar", io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for split in ("train", "test"):
            content = framed_fast(example(features))
            entry = tarfile.TarInfo(f"softmotion30_44k/{split}/traj_0_to_0.tfrecords")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    yield "tar", Target(path, lambda: use(path))


def configs(folder):
    experiment, protocol, published = (folder / f"{name}.yaml" for name in ("experiment", "protocol", "published"))
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    shutil.copy(ROOT / "configs/protocol/video_folder.yaml", protocol)
    shutil.copy(PUBLISHED, published)
    yield "experiment YAML", Target(experiment, lambda: load_config(experiment), made(as_yaml, EXPERIMENT), names=None)
    found = yaml.safe_load(protocol.read_text())

    def measure():
        config = load_config("quickstart", [f"protocol={protocol.with_suffix('')}"], tool="evaluate")
        instantiate(config.protocol).describe()

    yield "protocol YAML", Target(protocol, measure, made(as_yaml, found), names=None)
    content, result = yaml.safe_load(published.read_text()), make_result(data="bair")
    content["tables"] = content["tables"][:2]
    yield (
        "published.yaml",
        Target(
            published,
            lambda: published_table({"b": result}, published_beside(read_published(published), result)),
            made(as_yaml, content),
        ),
    )
    given = folder / "overrides.json"
    given.write_text('["seed=1"]')
    keys = [*flattened(json.loads(json.dumps(EXPERIMENT))), "data", "prior", "tokenizer", "protocol", "trainer"]

    def override():
        config = load_config("quickstart", json.loads(given.read_text()))
        for group in ("data", "optimizer", "protocol", "tokenizer"):
            instantiate(config[group])

    yield "overrides", Target(given, override, made(overrides, keys), names=None)


def compare(one, other):
    found = differences(one, other)
    describe_differences(found), paired(one, other), table({"a": one, "b": other}, {"b": found})


def results(folder):
    run = folder / "run"
    (run / "metrics/tiny").mkdir(parents=True)
    path, good = run / "metrics/tiny.json", make_result()
    path.write_text(json.dumps(good))
    yield "result", json_target(path, lambda: compare(good, read_result(path)))
    config = run / "config_tokenizer.yaml"
    experiment = {name: value for name, value in EXPERIMENT.items() if name != "defaults"}
    experiment |= {"tokenizer": {"_target_": "latentcast.VQVAE"}, "optimizer": {"lr": 0.1}}
    config.write_text(yaml.safe_dump(experiment))

    def report():
        write_page([read_run(run)], folder / "page.html")

    yield "report's config", Target(config, report, made(as_yaml, experiment))
    curves = run / "metrics/tokenizer.csv"
    curves.write_text("step,metric,value\n" + "".join(f"{n},val/loss,{1 / (n + 1)}\n" for n in range(20)))
    yield "metrics csv", Target(curves, report, names=run)


def tables(folder):
    rows = np.arange(40, dtype=np.float64).reshape(20, 2)
    np.save(folder / "a.npy", rows)
    (folder / "a.csv").write_text("x,y\n" + "\n".join(f"{a},{b}" for a, b in rows))
    made = [folder / "a.npy", folder / "a.csv"]
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"action": rows.tolist()}), folder / "a.parquet")
        made.append(folder / "a.parquet")
    for path in made:
        yield f"table {path.suffix[1:]}", Target(path, functools.partial(read_actions, path))


def pictures(folder):
    array = counter_frames(1, height=48, width=64)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    for suffix, options in (("png", {}), ("jpg", {"quality": 90, "exif": exif})):
        path = folder / f"a_1.{suffix}"
        Image.fromarray(array).save(path, **options)
        yield f"picture {suffix}", Target(path, lambda path=path: next(read_pictures([path], 16)))


VIDEOS = {
    "mp4": {},
    "mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mkv": {"codec": "ffv1", "pix_fmt": "yuv444p"},
    "webm": {"codec": "libvpx-vp9"},
    "avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "ts": {"codec": "mpeg2video"},
    "mpg": {"codec": "mpeg1video"},
    "wmv": {"codec": "wmv2"},
    "ogv": {"codec": "libvpx", "format": "ogg"},
    "flv": {"options": {"crf": "20"}},
    "3gp": {"codec": "mpeg4"},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
}


def videos(folder):
    for kind, options in VIDEOS.items():
        path = folder / f"a.{kind}"
        try:
            encode(path, counter_frames(12, height=32, width=48), **options)
        except Exception as error:  # an encoder that this FFmpeg lacks
            print(f"video {kind}: cannot be made here ({error})", flush=True)
            continue
        yield f"video {kind}", Target(path, functools.partial(read_all, path))
    root = folder / "tree"
    root.mkdir()
    for kind in ("mp4", "mkv", "avi"):
        shutil.copy(folder / f"a.{kind}", root)

    def use():
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            data = VideoFolder(root, "train", 4, 16, val_fraction=0, test_fraction=0)
        data.describe(), [data.read_video(n, 0, 4) for n in range(len(data.videos))]

    use()
    yield "index of videos", json_target(root / INDEX_NAME, use)


def read_all(path):
    """Every way to read a video, as a folder of them is indexed and then read."""
    info = probe(path)
    probe(path, "packets")
    read_clip(path, sorted({0, info.n_frames // 2, info.n_frames - 1}), 16, info=info)
    for _ in itertools.islice(iter_clip(path, 16), 4):
        pass


FAMILIES = (caches, prepared_sets, models, checkpoints, archives, configs, results, tables, pictures, videos)


def targets(home):
    """name -> Target of all that there are, made below ``home``."""
    found = {}
    for family in FAMILIES:
        folder = home / family.__name__
        folder.mkdir()
        found |= family(folder)
    return found


# The process that uses the inputs ------------------------------------------------------------------------------------


def status_mb(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def work(target, pipe):
    """Use one input after another, told over ``pipe``; each is answered by (what came of it, its words)."""
    log = tempfile.TemporaryFile()
    os.dup2(log.fileno(), 2)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("latentcast").propagate = False
    diffusers.utils.logging.set_verbosity_error()  # which says what it ignores
    size = int(status_mb("VmSize") * 2**20) + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    while (content := pipe.recv()) is not None:
        try:
            target.put(content)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before, began = status_mb("VmRSS"), time.process_time()
            answer = use(target)
            seconds, peak = time.process_time() - began, status_mb("VmHWM") - before
            log.seek(0)
            printed = b"".join(line for line in log if DECORD not in line).decode(errors="replace")
            os.ftruncate(log.fileno(), 0)
            log.seek(0)
            if answer[0] != "finding":
                if seconds > MOST_SECONDS:
                    answer = "finding", f"slow: {seconds:.0f} s, then: {answer[1][-300:]}"
                elif peak > MOST_MB:
                    answer = "finding", f"memory: {peak:.0f} MB, then: {answer[1][-300:]}"
                elif printed.strip():
                    answer = "finding", f"printed: {printed[:2000]}"
        except MemoryError:
            answer = "finding", "memory: even what was left of it did not do"
        pipe.send(answer)


def use(target):
    """-> ("used" | "refused" | "finding", words)"""
    try:
        target.use()
    except (ValueError, OSError, UserError) as error:
        text, where = str(error), traceback.format_exc()
        if "\n" in text.strip() or len(text) > LONGEST_LINE:
            return "finding", f"no line: {where}"
        if target.names and str(target.names) not in text:
            return "finding", f"names nothing: {where}"
        if "allocate" in text and not isinstance(error, VideoError):  # which FFmpeg says of more than it ever takes
            return "finding", f"memory: {where}"
        return "refused", text
    except BaseException as error:
        return "finding", f"{type(error).__name__}: {traceback.format_exc()}"
    return "used", ""


class Worker:
    """The process, started anew where an input ended it."""

    context = multiprocessing.get_context("fork")

    def __init__(self, target):
        self.target, self.process = target, None

    def ask(self, content):
        """What comes of an input -> (what, words)."""
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(target=work, args=(self.target, theirs), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(content)
            if self.pipe.poll(HANG):
                return self.pipe.recv()
            found = f"hang: {HANG} s"
        except (EOFError, OSError):
            self.process.join(10)
            found = f"crash: status {self.process.exitcode}"
        self.end()
        return "finding", found

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


# A run ---------------------------------------------------------------------------------------------------------------


class Enough(BaseException):
    """Ends a batch; hypothesis lets pass what is no Exception."""


class Tally:
    """What came of a target's inputs; findings are kept once for each kind."""

    def __init__(self, name, keep):
        self.name, self.keep = name, keep
        self.counts, self.kinds = dict.fromkeys(("inputs", "used", "refused", "finding"), 0), {}
        self.began = self.said = time.monotonic()
        self.ended = None

    def add(self, content, what, words):
        self.counts["inputs"] += 1
        self.counts[what] += 1
        if what == "finding":
            kind = kind_of(words)
            smallest = self.kinds.get(kind)
            if smallest is None or len(content) < smallest:
                number = list(self.kinds).index(kind) if kind in self.kinds else len(self.kinds)
                self.kinds[kind] = len(content)
                self.keep.mkdir(parents=True, exist_ok=True)
                stem = self.keep / f"{self.name.replace(' ', '_').replace('/', '_')}-{number}"
                Path(f"{stem}.input").write_bytes(content)
                Path(f"{stem}.txt").write_text(words)
            if smallest is None:
                print(f"{self.name}: FOUND {kind}; kept as {stem}.input", flush=True)
        if time.monotonic() - self.said > REPORT_EVERY:
            self.said = time.monotonic()
            self.report()

    @property
    def seconds(self):
        return (self.ended or time.monotonic()) - self.began

    def report(self):
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.items())
        print(f"{self.name}: {counts}, {len(self.kinds)} kinds, {self.seconds:.0f} s", flush=True)


def kind_of(words):
    """What tells findings apart: the error, and the last lines of ours that it passed."""
    lines = [line.strip() for line in words.splitlines()]
    places = [line.partition(", in ")[0] for line in lines if line.startswith("File ") and str(ROOT) in line]
    first = words.partition(":")[0]
    return f"{first} at {places[-1].replace(str(ROOT) + '/', '')}" if places else words[:60]


def run(name, target, args, keep):
    """Use up to ``args.inputs`` inputs in up to ``args.seconds`` -> Tally."""
    if not name.startswith("video"):
        target.use()  # what it imports is then there for every process; decoders have threads, which a fork loses
    tally, worker = Tally(name, keep), Worker(target)
    what, words = worker.ask(target.content)
    if what != "used":
        raise SystemExit(f"{name}: undamaged, it is not used: {words}")

    def enough():
        return tally.counts["inputs"] >= args.inputs or tally.seconds > args.seconds

    for batch in itertools.count(args.first_batch):
        if enough():
            break
        if target.make is None:
            for number in range(BATCH):
                if not enough():
                    content = damaged(target.content, random.Random(f"{args.seed} {name} {batch} {number}"))
                    tally.add(content, *worker.ask(content))
            continue

        @seed(f"{args.seed} {name} {batch}")
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.make)
        def use_them(content):
            if enough():
                raise Enough
            tally.add(content, *worker.ask(content))

        with contextlib.suppress(Enough):
            use_them()
    tally.ended = time.monotonic()
    worker.end()
    target.put(target.content)  # others use files beside it
    tally.report()
    return tally


def main(args):
    home = Path(tempfile.mkdtemp(prefix="fuzz_"))
    keep = args.keep or home.with_name(f"{home.name}_found")
    configuration.set_hypothesis_home_dir(home / "hypothesis")
    logging.getLogger("latentcast").setLevel(logging.ERROR)
    found = targets(home)
    if unknown := [name for name in args.targets if name not in found]:
        raise SystemExit(f"{unknown[0]}: no such target; there are {', '.join(found)}")
    tallies = [run(name, found[name], args, keep) for name in args.targets or found]
    shutil.rmtree(home)
    total = {what: sum(tally.counts[what] for tally in tallies) for what in tallies[0].counts}
    print(json.dumps({"targets": {t.name: t.counts | {"seconds": round(t.seconds)} for t in tallies}, "total": total}))
    if total["finding"]:
        raise SystemExit(f"{sum(len(tally.kinds) for tally in tallies)} kinds of findings; their inputs lie in {keep}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--seconds", type=float, default=120, help="for each target, after which it is left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-batch", type=int, default=0, help=f"go on after so many batches of {BATCH} inputs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for the inputs that were findings")
    main(parser.parse_args())

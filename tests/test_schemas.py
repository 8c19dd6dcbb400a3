"""Files of others, damaged in every way: what is read back either works or is refused in one line that names it."""

import copy
import json
import os
import random
import shutil
import struct

import pytest
import torch
from test_compare import PUBLISHED, make_result
from test_latent_cache import Noise, vqvae
from test_pipeline import transformer
from test_prepared import Noise as NoiseSet
from tiny import tiny_tokenizer

from latentcast import LatentCacheDataset, Protocol, VideoPredictionPipeline, load_config, load_model
from latentcast.config import load_pipeline_config
from latentcast.data.checking import check_folder
from latentcast.data.sets.prepared_videos import prepared_videos
from latentcast.data.store.encoding import encode_dataset
from latentcast.data.store.latent_cache import LatentCacheWriter
from latentcast.data.store.prepared import prepare
from latentcast.evaluation.comparison import describe_differences, differences, paired
from latentcast.evaluation.markdown import published_table, table
from latentcast.evaluation.published import published_beside, read_published
from latentcast.evaluation.results import read_result
from latentcast.files import read_json
from latentcast.modeling import fingerprint
from latentcast.pipelines.base import VideoPipeline

JUNK = [None, True, 0, -1, 5, "x", "5", "", [], {}, [1, 2], {"a": 1}, 1.5, 10**9, 10**12, 10**400, float("nan")]
JUNK += [float("inf"), "../../x", "1" * 3000, "a\nb", [None], [[[]]], [10**9] * 3]


def places(value, path=()):
    """The paths of keys and list entries within a document; of long lists the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutations(document, number):
    """``number`` documents with one or two places gone, replaced or added to; always the same."""
    rng = random.Random("mutations")
    for _ in range(number):
        changed = copy.deepcopy(document)
        for _ in range(rng.choice((1, 1, 2))):
            *path, last = rng.choice(list(places(changed)) or [("new",)])
            inner = changed
            for key in path:
                inner = inner[key]
            action = rng.random()
            if action < 0.2 and inner:
                del inner[last]
            elif action < 0.85 or isinstance(inner, list):
                inner[last] = copy.deepcopy(rng.choice(JUNK))
            else:
                inner[rng.choice(("", "99", "a\nb"))] = copy.deepcopy(rng.choice(JUNK))
        yield changed


def fuzz(path, use, number, folder=None):
    """Use the file's mutations; each works or is one line naming ``folder`` (the file's own by default)."""
    document, refused = json.loads(path.read_text()), 0
    for changed in mutations(document, number):
        path.write_text(json.dumps(changed))
        try:
            use()
        except (OSError, ValueError) as error:  # whatever else is raised fails the test
            message = str(error)
            assert str(folder or path.parent) in message and "\n" not in message and len(message) < 1500, message
            refused += 1
    path.write_text(json.dumps(document))
    use()
    assert number / 3 < refused < number  # it did look


@pytest.fixture(scope="module")
def tokenizer():
    return vqvae(codebook_size=12)


@pytest.fixture(scope="module")
def encoded(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("encoded") / "cache"
    encode_dataset(Noise(), tokenizer, root, batch_frames=8, shard_videos=3)
    return root


@pytest.fixture
def cache(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "cache")


@pytest.fixture
def unfinished(cache):
    """The cache as it is before its last shard."""
    manifest = read_json(cache / "manifest.json")
    *notes, last = manifest.pop("shards")
    (cache / "plan.json").write_text(json.dumps(manifest))
    for number, note in enumerate(notes):
        (cache / f"shard-{number:05d}.json").write_text(json.dumps(note))
    (cache / last["file"]).unlink()
    (cache / "manifest.json").unlink()
    return cache


def read_cache(root):
    data = LatentCacheDataset(root, 3)
    for index in (0, len(data) - 1):
        data[index]
    for video in range(len(data.videos)):
        data.read_video(video, 0, 1), data.read_conditions(video, 0, 1)


def continue_cache(root, tokenizer):
    data = Noise()
    known = {"videos": data.videos, "data": data.describe(), "fps": data.fps, "conditions": data.conditions}
    writer = LatentCacheWriter(root, tokenizer.latent_spec, fingerprint(tokenizer), **known, shard_videos=None)
    assert len(writer.notes()) == writer.n_shards and writer.pending()


def test_manifests_of_caches(cache):
    fuzz(cache / "manifest.json", lambda: read_cache(cache), 100)


@pytest.mark.parametrize("name", ["plan.json", "shard-00000.json"])
def test_plans_and_notes(unfinished, tokenizer, name):
    kept = {path.name: path.read_bytes() for path in unfinished.iterdir()}

    def use():
        for other, content in kept.items():
            if other != name:
                (unfinished / other).write_bytes(content)
        continue_cache(unfinished, tokenizer)

    fuzz(unfinished / name, use, 60)


@pytest.mark.parametrize("name", ["manifest.json", "train/manifest.json"])
def test_manifests_of_prepared_sets(tmp_path, name):
    prepare(NoiseSet(), tmp_path / "set")

    def use():
        data = prepared_videos(tmp_path / "set", "train", 2)
        data[0], data.describe(), data.read_conditions(0, 0, 1)
        check_folder(tmp_path / "set")

    fuzz(tmp_path / "set" / name, use, 60, tmp_path / "set")


def test_a_set_of_frames_too_large_is_named(tmp_path):
    prepare(NoiseSet(), tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    path.write_text(json.dumps(read_json(path) | {"frame_size": [387044, 15]}))
    with pytest.raises(ValueError, match=rf"^{path}: frame_size\[0\]: expected at most 65536, found 387044"):
        prepared_videos(tmp_path / "set", "train", 2)


def test_results(tmp_path):
    good, path, rows = make_result(), tmp_path / "result.json", read_published(PUBLISHED)[:20]
    path.write_text(json.dumps(good))

    def use():
        result = read_result(path)
        found = differences(good, result)
        describe_differences(found), paired(good, result), table({"a": good, "b": result}, {"b": found})
        published_table({"b": result}, published_beside(rows, result))

    fuzz(path, use, 60)


def test_published_figures(tmp_path):
    import yaml

    content = yaml.safe_load(PUBLISHED.read_text())
    content["tables"] = content["tables"][:1]
    (tmp_path / "published.yaml").write_text(json.dumps(content))  # which is YAML
    result = make_result(data="bair")

    def use():
        published_table({"b": result}, published_beside(read_published(tmp_path / "published.yaml"), result))

    fuzz(tmp_path / "published.yaml", use, 30)


def test_protocols():
    fields = dict(load_config("quickstart").protocol)
    fields = json.loads(json.dumps({key: value for key, value in fields.items() if key != "_target_"}, default=list))
    refused = 0
    for changed in mutations(fields, 100):
        try:
            Protocol(**changed).describe()
        except ValueError as error:
            assert str(error).startswith("protocol ") and "\n" not in str(error)
            refused += 1
    assert refused > 30


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    tokenizer = tiny_tokenizer("sliced_vqvae")
    VideoPredictionPipeline(transformer(tokenizer.latent_spec), tokenizer, n_context=2, fps=12.5).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name, number", [("model_index.json", 60), ("prior/config.json", 40)])
def test_saved_models(pipeline, name, number):
    def use():
        if name == "model_index.json":
            VideoPipeline.from_pretrained(pipeline)
        else:
            load_model(pipeline / "prior")

    fuzz(pipeline / name, use, number, pipeline)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("model_index.json", {"prior": 5}, r"model_index.json: prior: expected \[latentcast or diffusers, a class\]"),
        ("model_index.json", {"prior": ["os", "system"]}, "prior: expected .latentcast or diffusers, a class"),
        ("model_index.json", {"fps": "x"}, "model_index.json: fps: expected a number, found 'x'"),
        ("model_index.json", {"crop": "x"}, "model_index.json: crop: expected one of center, none, pad, found 'x'"),
        ("model_index.json", {"n_context": "x"}, "model_index.json: n_context: expected a whole number, found 'x'"),
        ("model_index.json", {"n_context": True}, "model_index.json: n_context: expected a whole number, found True"),
        ("prior/config.json", {"_class_name": [1]}, r"config.json: _class_name: expected text, found \[1\]"),
        ("prior/config.json", {"n_layers": 10**12}, "config.json: n_layers: expected at most 16777216, found 10000"),
        ("prior/config.json", {"n_layers": 10**6}, "config.json: expected a model of its weights' size"),
        ("prior/config.json", {"n_heads": "x"}, "config.json: n_heads: expected a whole number of at least 1"),
    ],
)
def test_settings_of_saved_models_are_named(pipeline, tmp_path, name, change, message):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    (folder / name).write_text(json.dumps(read_json(folder / name) | change))
    with pytest.raises(ValueError, match=message):
        VideoPipeline.from_pretrained(folder)


def test_a_prior_without_latent_spec_is_named(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    config = read_json(folder / "prior/config.json")
    del config["latent_spec"]["frame_height"]
    (folder / "prior/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: latent_spec: frame_height: expected, found nothing"):
        load_pipeline_config(folder, "bair")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' * 60 + "1" + "}" * 60, r"not valid JSON \(more than 50 levels\)"),
        ('{"a": NaN}', r"not valid JSON \(NaN is no number\)"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_json_of_any_kind_is_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a.json: {message}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 10**9)
    with pytest.raises(ValueError, match=r"a.json: expected at most 64 MB of JSON, found 1000 MB"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("n_frames", [10**9, 10**14])
def test_no_more_frames_than_the_bytes_hold(cache, n_frames):
    manifest = read_json(cache / "manifest.json")
    manifest["shards"][0]["videos"]["0"]["n_frames"] = n_frames
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest.json: shards\[0\]: n_frames: expected as many as \d+ bytes hold"):
        LatentCacheDataset(cache, 3)


@pytest.mark.parametrize("outside", ["../secret", "absolute"])
def test_a_shard_outside_its_folder_is_not_read(cache, tmp_path, outside):
    manifest = read_json(cache / "manifest.json")
    secret = shutil.copy(cache / manifest["shards"][0]["file"], tmp_path / "secret")
    manifest["shards"][0]["file"] = str(secret) if outside == "absolute" else outside
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shards\[0\]: file: expected shard-00000.safetensors, found '"):
        LatentCacheDataset(cache, 3)


def test_a_shard_that_links_outside_is_not_read(cache, tmp_path):
    shard = cache / "shard-00000.safetensors"
    shard.rename(tmp_path / "secret")
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: expected a file in this folder, found a link to"):
        LatentCacheDataset(cache, 3)
    shard.unlink()
    (tmp_path / "secret").rename(cache / "moved")
    shard.symlink_to("moved")
    LatentCacheDataset(cache, 3)


def hostile(**tensors):
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


U8, HUGE = {"dtype": "U8"}, struct.pack("<Q", 400 * 10**6)


@pytest.mark.parametrize(
    "content",
    [
        hostile(a=U8 | {"shape": [2**60, 2**60], "data_offsets": [0, 64]}),
        hostile(a=U8 | {"shape": [64], "data_offsets": [-64, 0]}),
        hostile(a=U8 | {"shape": [64], "data_offsets": [0, 64]}, b=U8 | {"shape": [32], "data_offsets": [32, 64]}),
        hostile(a=U8 | {"shape": [10**9], "data_offsets": [0, 10**9]}),
        hostile(a={"dtype": "a\nb", "shape": [64], "data_offsets": [0, 64]}),
        HUGE + b"{" + b" " * 80,
        b"",
    ],
    ids=["shape", "negative", "overlap", "beyond", "dtype", "header", "empty"],
)
def test_hostile_safetensors_are_one_line(cache, pipeline, tmp_path, content):
    def refused(use):
        with pytest.raises((OSError, ValueError)) as error:
            use()
        assert ".safetensors" in str(error.value) and "\n" not in str(error.value)

    manifest = read_json(cache / "manifest.json")
    note = manifest["shards"][0]
    (cache / note["file"]).write_bytes(content + bytes(max(0, note["bytes"] - len(content))))
    refused(lambda: LatentCacheDataset(cache, 3).read_video(0))
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    (weights,) = (folder / "prior").glob("*.safetensors")
    weights.write_bytes(content)
    refused(lambda: load_model(folder / "prior"))


def test_tensors_of_another_shape_than_the_manifest_says_are_named(cache):
    shard = cache / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["00000000"]["shape"].reverse()
    content[8 : 8 + length] = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: tensor 00000000: expected"):
        LatentCacheDataset(cache, 3).read_video(0)


def test_a_second_encoder_is_refused_by_name(cache, tokenizer, tmp_path):
    from test_files import hold

    root = tmp_path / "new"
    first, _ = hold(root)
    with pytest.raises(OSError, match=rf"another run works here: encoding, process {first.pid} on"):
        encode_dataset(Noise(), tokenizer, root, batch_frames=8, shard_videos=3)
    with pytest.raises(OSError, match=rf"another run works here: encoding, process {first.pid} on"):
        prepare(NoiseSet(), root)
    first.communicate()
    encode_dataset(Noise(), tokenizer, root, batch_frames=8, shard_videos=3)
    assert {path.name for path in root.iterdir()} == {path.name for path in cache.iterdir()}
    assert torch.equal(LatentCacheDataset(root, 3).read_video(0), LatentCacheDataset(cache, 3).read_video(0))

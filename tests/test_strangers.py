"""Strangers' files that run something, reach out of their folder, or ask for more than they hold: one line, soon."""

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_cache import Noise, vqvae
from tiny import SMALL_TRANSFORMER, tiny_prior, tiny_tokenizer
from tiny_experiment import TOOLS
from video_files import counter_frames, encode

from latentcast import LatentCacheDataset, PixelTokenizer, VideoFolder, VideoTransformer, load_model
from latentcast.data.sets import action_tables
from latentcast.data.sets.action_tables import read_actions
from latentcast.data.sets.kinetics600 import Kinetics600
from latentcast.data.sets.tfrecord import tar_members
from latentcast.data.store.encoding import encode_dataset
from latentcast.data.video.folder import INDEX_NAME
from latentcast.data.video.pictures import read_pictures
from latentcast.data.video.reader import MOST_PIXELS, VideoError, is_away, iter_clip, probe
from latentcast.evaluation.published import PUBLISHED, read_published
from latentcast.reporting.folder import read_run
from latentcast.reporting.page import write_page
from latentcast.training.checkpoints import DamagedCheckpoint, check_checkpoint

MOST_MB = 300  # resident memory that a file may cost before it is refused


def peak_mb():
    """The most resident memory of this process since it was asked last."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 1024


def refused(use, path, message=""):
    """``use`` ends in one line that names ``path`` and says ``message``, having taken little memory."""
    peak_mb()
    before = peak_mb()
    with pytest.raises((OSError, ValueError)) as caught:
        use()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1500 and str(path) in line and message in line, line
    assert peak_mb() - before < MOST_MB
    return line


class Malice:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Weights and checkpoints ---------------------------------------------------------------------------------------------


def test_a_pickle_by_another_name_is_not_run(tmp_path):
    evil = pickle.dumps(Malice(tmp_path / "ran"), protocol=2)
    tokenizer = vqvae(codebook_size=12)
    tokenizer.save_pretrained(tmp_path / "model")
    encode_dataset(Noise(), tokenizer, tmp_path / "cache", batch_frames=8, shard_videos=3)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.write_bytes(evil)
    refused(lambda: load_model(tmp_path / "model"), weights, "not a readable safetensors file")
    shard = tmp_path / "cache/shard-00000.safetensors"
    shard.write_bytes(evil.ljust(shard.stat().st_size, b"\0"))
    refused(lambda: LatentCacheDataset(tmp_path / "cache", 3).read_video(0), shard, "not a readable safetensors file")
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(evil)
    refused(lambda: check_checkpoint(checkpoint, tokenizer, False), checkpoint, "damaged")
    write_checkpoint(checkpoint, evil)
    refused(lambda: check_checkpoint(checkpoint, tokenizer, False), checkpoint, "damaged")
    assert not (tmp_path / "ran").exists()
    os_mkdir, (path,) = Malice(tmp_path / "ran").__reduce__()
    os_mkdir(path)  # it would have done so
    assert (tmp_path / "ran").exists()


def write_checkpoint(path, pickled, compression=zipfile.ZIP_STORED):
    """What torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as parts:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            parts.writestr(f"archive/{name}", content)


@pytest.mark.parametrize(
    "pickled, compression, message",
    [
        (b".", zipfile.ZIP_STORED, "pop from empty list"),
        (b"\x80\x02X\x02\0\0\0\xff\xff.", zipfile.ZIP_STORED, "can't decode byte"),
        (b"\x80\x02}X\x0a\0\0\0state_dictK\x01s.", zipfile.ZIP_STORED, "'int' object has no attribute 'items'"),
        (
            b"\x80\x02X" + struct.pack("<I", 10**6) + bytes(10**6) + b".",
            zipfile.ZIP_DEFLATED,
            "its parts are compressed",
        ),
    ],
    ids=["nothing", "text", "no weights", "bomb"],
)
def test_any_damage_of_a_checkpoint_is_one(pickled, compression, message, tmp_path):
    write_checkpoint(tmp_path / "last.ckpt", pickled, compression)
    with pytest.raises(DamagedCheckpoint):
        refused(lambda: check_checkpoint(tmp_path / "last.ckpt", torch.nn.Linear(1, 1), False), "last.ckpt", message)
        check_checkpoint(tmp_path / "last.ckpt", torch.nn.Linear(1, 1), False)


SIZES = {  # what a config of some bytes may ask for: gigabytes, but that nothing is built of it
    "vqvae": {"hidden_channels": 20_000},
    "hr_vqvae": {"n_layers": 20_000},
    "fsq": {"levels": [1000, 1000, 1000]},
    "video_transformer": {"context_frames": 2**23},
    "video_transformer_spatial": {"latent_spec": {"height": 2**16}},
    "st_pixelcnn": {"dim": 2**16},
    "masked_transformer": {"latent_spec": {"width": 2**20}},
}


@pytest.mark.parametrize("name", SIZES)
def test_a_config_asks_for_no_more_memory_than_its_weights(name, tmp_path):
    (tiny_tokenizer if name in ("vqvae", "hr_vqvae", "fsq") else tiny_prior)(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in SIZES[name].items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: load_model(tmp_path), tmp_path / "config.json")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "pickle.bin"])
def test_weights_in_several_files_are_those_of_their_folder(file, tmp_path):
    prior = VideoTransformer(PixelTokenizer(1, 8, 8).latent_spec, subscale=[4, 1, 1], **SMALL_TRANSFORMER)
    prior.save_pretrained(tmp_path / "prior", max_shard_size="50KB")
    (index,) = (tmp_path / "prior").glob("*.index.json")
    load_model(tmp_path / "prior")
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    if file.startswith(".."):
        shutil.copy(tmp_path / "prior" / content["weight_map"][name], tmp_path / "secret.safetensors")
    content["weight_map"][name] = file
    index.write_text(json.dumps(content))
    refused(lambda: load_model(tmp_path / "prior"), index, "weight_map: expected safetensors files of this folder")


# Archives and lists --------------------------------------------------------------------------------------------------


def tar_header(name, size, kind=b"0"):
    """A header of 512 bytes with any size, in base 256."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    header[148:157] = b" " * 8 + kind
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "content",
    [
        tar_header("a", 0) + tar_header("b", -1024),
        tar_header("a", -512),
        tar_header("a", 10**19),
        tar_header("././@LongLink", 10**19, b"L"),
        tar_header("././@LongLink", -512, b"L"),
        tar_header("x", 6 * 10**9, b"x"),
        tar_header("././@LongLink", 1, b"L") * 20_000,
    ],
    ids=["round and round", "negative", "exabytes", "long name", "negative name", "pax", "names of names"],
)
def test_hostile_headers_of_archives(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024))
    refused(lambda: tar_members(tmp_path / "a.tar"), tmp_path / "a.tar", "expected an uncompressed tar, found none, or")


def test_names_in_archives_are_one_line(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a\nb.tfrecords"))
    (records,) = tar_members(tmp_path / "a.tar").values()
    refused(lambda: records.read(0), tmp_path / "a.tar", "a b.tfrecords: cut off")


def test_links_in_archives_are_no_files(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo("softmotion30_44k/train/traj_0_to_0.tfrecords")
            entry.type, entry.linkname = kind, str(tmp_path / "secret")
            archive.addfile(entry)
    assert tar_members(tmp_path / "a.tar") == {}


@pytest.mark.parametrize("label, video", [("../../x", "a"), ("/etc", "a"), ("..", "a"), ("x", "../a")])
def test_a_list_of_videos_names_none_outside(label, video, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.csv").write_text(f"label,youtube_id,time_start,time_end\n{label},{video},0,10\n")
    refused(lambda: Kinetics600(tmp_path), tmp_path / "train.csv", "row 2: expected names of a folder and a file")


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10**9,), (10**18,), (2**60, 2**60)])
def test_a_table_of_exabytes(shape, tmp_path):
    header = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header)
    refused(lambda: read_actions(tmp_path / "a.npy"), tmp_path / "a.npy", "not a readable npy file of numbers")


@pytest.mark.parametrize("content", [b"{'descr': ('<f8'", b"(" * 90, b"{'descr': '<f8', 'shape': (" + b"1," * 40])
def test_a_header_of_a_table_that_nobody_can_read(content, tmp_path):
    header = content.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header)
    refused(lambda: read_actions(tmp_path / "a.npy"), tmp_path / "a.npy", "not a readable npy file of numbers")
    with zipfile.ZipFile(tmp_path / "b.npy", "w"):
        pass
    refused(lambda: read_actions(tmp_path / "b.npy"), tmp_path / "b.npy", "found a npz file")


def test_a_parquet_file_damaged_anywhere(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"action": np.zeros(9)}), path)
    whole = path.read_bytes()
    for at in range(len(whole) - 700, len(whole), 7):  # its footer
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            read_actions(path)
        except OSError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_a_table_that_unpacks_without_end(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(action_tables, "MOST_ROWS", 10**4)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"action": np.zeros(10**4 + 1)}), path)
    assert path.stat().st_size < 10**4
    refused(lambda: read_actions(path), path, "expected a table of at most 10000 rows, found 10001")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's data")
def test_a_list_that_unpacks_without_end(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, n = tmp_path / "a.parquet", 30 * 10**6
    actions = pyarrow.ListArray.from_arrays(pyarrow.array([0, n], pyarrow.int32()), pyarrow.array(np.zeros(n, "f4")))
    parquet.write_table(pyarrow.table({"action": actions}), path)
    assert path.stat().st_size < 1000
    monkeypatch.setattr(action_tables, "MOST_BYTES", 2**26)
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    refused(lambda: read_actions(path), path, "expected a table that takes at most 64 MB, found more")
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_conditions_that_unpack_without_end(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as parts, parts.open("action.npy", "w") as part:
        np.save(part, np.zeros(1))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 4 * 10**9)  # the size that is stated
    (tmp_path / "a.npz").write_bytes(content)
    import runpy

    read = runpy.run_path(str(TOOLS / "sample.py"))["read_conditions"]
    with pytest.raises(Exception, match=r"a.npz: expected an npz file of numbers, found 4000 MB, of at most 1000"):
        read(tmp_path / "a.npz", {})


# Pictures and videos -------------------------------------------------------------------------------------------------


def png(width, height):
    """The beginning of a picture of one bit a pixel."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 + width // 8)))


@pytest.mark.parametrize("side", [60_000, 12_000, 9_000])
def test_a_picture_too_large(side, tmp_path, recwarn):
    (tmp_path / "a_1.png").write_bytes(png(side, side))
    refused(lambda: list(read_pictures([tmp_path / "a_1.png"], 16)), tmp_path / "a_1.png", f"{side**2}")
    assert not recwarn  # of Pillow


def test_damaged_exif_is_nobodys_business(tmp_path, recwarn):
    Image.new("RGB", (8, 8)).save(tmp_path / "a_1.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert next(read_pictures([tmp_path / "a_1.jpg"])).shape == (1, 3, 8, 8) and not recwarn


def gif(side, inner=1):
    """Two frames of ``inner`` pixels on a canvas."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, inner, inner) + b"\0\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HH", side, side) + b"\xf0\0\0" + bytes(6) + 2 * frame + b"\x3b"


@pytest.mark.parametrize(
    "side, message",
    [(60_000, "(Invalid argument)"), (16_000, f"expected at most {MOST_PIXELS} pixels a frame, found 16000 x 16000")],
)
def test_a_video_too_large(side, message, tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(side))
    for use in (probe, lambda path: list(iter_clip(path, 16))):
        refused(lambda use=use: use(tmp_path / "a.gif"), tmp_path / "a.gif", message)
    (tmp_path / "small.gif").write_bytes(gif(64))
    assert probe(tmp_path / "small.gif").n_frames == 2


def boxes(content, change):
    """An MP4 with other tables of its samples."""
    made, at = b"", 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        inner, at = content[at + 8 : at + size], at + size
        inner = boxes(inner, change) if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl") else inner
        inner = change.get(kind, inner)
        made += struct.pack(">I4s", len(inner) + 8, kind) + inner
    return made


def test_a_video_of_more_samples_than_bytes(tmp_path):
    """FFmpeg takes 35 bytes for each, whether or not it is there."""
    whole = encode(tmp_path / "whole.mp4", counter_frames(4)).read_bytes()
    path = tmp_path / "a.mp4"

    def write(chunks, each):
        change = {
            b"stsz": struct.pack(">III", 0, 1, chunks * each),
            b"stts": struct.pack(">IIII", 0, 1, chunks * each, 512),
            b"stsc": struct.pack(">IIIII", 0, 1, 1, each, 1),
            b"stco": struct.pack(">II", 0, chunks) + struct.pack(">I", 48) * chunks,  # all in one place
        }
        path.write_bytes(boxes(whole, change))

    write(20_000, 2_000)
    refused(lambda: probe(path), path, f"states more samples than its {path.stat().st_size} bytes hold")
    write(2_000, 4)
    refused(lambda: probe(path, "packets"), path, "has more packets than its bytes hold")
    path.write_bytes(boxes(whole, {b"stts": struct.pack(">IIII", 0, 1, 2**31 + 12, 512)}))
    info = probe(path)  # these decode, but decord would end the process
    assert (info.n_frames, info.reader) == (4, "pyav")
    path.write_bytes(boxes(whole, {b"stsz": struct.pack(">III4I", 0, 0, 4, 2**29, 9, 9, 9)}))
    with pytest.raises(VideoError, match="Cannot allocate memory") as caught:  # as FFmpeg calls it
        probe(path)
    assert not is_away(caught.value)
    path.write_bytes(b"\0\0\0\1free" + b"\xff" * 8 + whole)  # a box of exabytes
    refused(lambda: probe(path), path)
    path.write_bytes(boxes(whole, {}))
    assert probe(path).n_frames == 4


def test_a_video_that_lasts_longer_than_the_world(tmp_path):
    """In fragments, of which none says how many frames there are: decord makes room for its duration's."""
    options = {"movflags": "frag_keyframe+empty_moov", "options": {"g": "4"}}
    content = bytearray(encode(tmp_path / "a.mp4", counter_frames(12), **options).read_bytes())
    assert probe(tmp_path / "a.mp4").n_frames == 12
    at = content.rindex(b"tfdt") + 8  # when the last fragment begins
    content[at : at + 8] = (2**42).to_bytes(8, "big")
    (tmp_path / "a.mp4").write_bytes(content)
    assert probe(tmp_path / "a.mp4").reader == "pyav"


def test_an_index_that_comes_with_the_videos(tmp_path, caplog):
    """One that is none counts for nothing."""
    encode(tmp_path / "a.mp4", counter_frames(6))

    def videos():
        return VideoFolder(tmp_path, "train", 4, 16, val_fraction=0, test_fraction=0).videos

    found, path = videos(), tmp_path / INDEX_NAME
    content = json.loads(path.read_text())
    content["files"]["a.mp4"]["info"]["more"] = 1
    path.write_text(json.dumps(content))
    assert videos() == found and "more: expected no such key, found 1; indexing again" in caplog.text


# Published figures and runs ------------------------------------------------------------------------------------------


def bomb(form):
    """Ten lines, each eight times the one before."""
    first = "a: &a {x: 1}\n" if "<<" in form else "a: &a [x, x, x, x, x, x, x, x]\n"
    parts = zip("abcdefgh", "bcdefghi")
    return first + "".join(form.format(new=new, old=",".join([f"*{old}"] * 8)) for old, new in parts)


@pytest.mark.parametrize(
    "text, message",
    [
        (bomb("{new}: &{new} [{old}]\n"), "it comes to more than 200000"),
        (bomb("{new}: &{new} {{<<: [{old}]}}\n"), "it comes to more than 200000"),
        ("x: !!python/object/apply:os.system [true]\n", "line 1: expected no tag"),
        (f"x: {'9' * 9000}\n", "not valid YAML"),
        ("x: \udcff\n", "cannot be read"),
        ("[" * 100_000, "nested more than"),
    ],
    ids=["aliases", "merges", "tag", "digits", "bytes", "depth"],
)
def test_hostile_published_figures(text, message, tmp_path):
    path = tmp_path / "published.yaml"
    path.write_bytes((text + PUBLISHED.read_text()).encode("utf-8", "surrogateescape"))
    refused(lambda: read_published(path), path, message)


def test_a_report_shows_nothing_from_outside_of_its_run(tmp_path, caplog):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "metrics").mkdir()
    (tmp_path / "token.yaml").write_text("token: hunter2\n")
    (run / "config_prior.yaml").symlink_to(tmp_path / "token.yaml")
    (run / "samples/a.mp4").symlink_to(tmp_path / "token.yaml")
    (run / "samples/b.mp4").write_bytes(b"video")
    (run / "samples/c.mp4").symlink_to("b.mp4")
    (run / "config_tokenizer.yaml").write_text("tokenizer: {_target_: latentcast.VQVAE}\ndata: [1]\noptimizer: x\n")
    (run / "metrics/tokenizer.csv").write_bytes(b"step,metric,value\n1," + b"x" * 200_000 + b",2\n")
    write_page([read_run(run)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "hunter2" not in page and page.count("data:video/mp4;base64,") == 2
    lines = "\n".join(record.getMessage() for record in caplog.records)
    for name in ("config_prior.yaml", "samples/a.mp4"):
        assert f"{run / name}: expected a file in this folder, found a link to {tmp_path / 'token.yaml'}" in lines
    assert f"{run / 'metrics/tokenizer.csv'}: not a readable csv file (field larger" in lines
    (run / "config_tokenizer.yaml").write_text(bomb("{new}: &{new} [{old}]\n") + "data: {root: *i}\n")
    (run / "metrics/tokenizer.csv").unlink()
    peak_mb()
    before = peak_mb()
    assert not read_run(run).stages and peak_mb() - before < MOST_MB

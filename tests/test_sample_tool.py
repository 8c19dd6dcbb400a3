"""tools/sample.py: from a saved pipeline and real video files to predicted futures on disk."""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import SMALL_SDE_DIFFUSION, small_recurrent_vae
from tiny_experiment import Started
from video_files import counter_frames, encode, overwrite_middle

from latentcast import (
    VQVAE,
    PixelTokenizer,
    SDEDiffusion,
    VideoPredictionPipeline,
    VideoTransformer,
    probe,
    read_clip,
    write_video,
)
from latentcast.cli import run_tool
from latentcast.data.video import futures
from latentcast.data.video.reader import VideoError
from latentcast.figures.sheets import GIVEN, LINE, PREDICTED

TOOL = Path(__file__).parents[1] / "tools" / "sample.py"
SIZE, SCALE, BORDER, GAP = 32, 4, 2, 2
CELL = (SIZE + 2 * BORDER) * SCALE  # width of one frame in the output


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("sample_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline at 10 frames a second with 2 context frames, and videos at 20: good, short, damaged, and no video."""
    root = tmp_path_factory.mktemp("sample")
    torch.manual_seed(0)
    size = {
        "hidden_channels": 8,
        "residual_channels": 4,
        "n_residual_blocks": 1,
        "embedding_dim": 4,
        "codebook_size": 8,
    }
    tokenizer = VQVAE(1, SIZE, SIZE, stride=16, **size)
    size = {"dim": 8, "embed_dim": 4, "n_heads": 1, "head_dim": 8, "n_layers": 1}
    prior = VideoTransformer(tokenizer.latent_spec, n_frames=4, subscale=[4, 1, 1], **size)
    VideoPredictionPipeline(prior, tokenizer, n_context=2, fps=10).save_pretrained(root / "run/pipeline")

    ramp = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 3, 48, 64)  # frame i has grey level i
    write_video(root / "videos/long.mp4", ramp, 20)
    write_video(root / "videos/deep/er/brief.mp4", ramp[:4], 20)  # enough for the context alone
    write_video(root / "videos/short.gif", ramp[:2], 20)
    (root / "videos/text.mp4").write_text("not a video")
    whole = (root / "videos/long.mp4").read_bytes()
    (root / "videos/cut.avi").write_bytes(whole[: len(whole) // 2])
    (root / "videos/notes.txt").write_text("not looked at")
    (root / "photos").mkdir()
    for name in ("me.jpg", "you.PNG"):
        PIL.Image.new("RGB", (8, 8)).save(root / "photos" / name)
    return root


def call(tool, capsys, *arguments):
    """Run the tool in this process -> its JSON, or its one-line error."""
    try:
        run_tool(tool.main, tool.make_parser(), [str(argument) for argument in arguments])
    except SystemExit as stop:
        assert stop.code == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def finished(tool, capsys, *arguments, status=0):
    """Run the tool in this process -> its JSON and its stderr."""
    capsys.readouterr()
    code = 0
    try:
        run_tool(tool.main, tool.make_parser(), [str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == status, err
    return json.loads(out), err


def cells(path, row_count):
    """The frames in a written video: (row_count, T, 3, height, width) without borders and gaps."""
    info = probe(path)
    video = read_clip(path, range(info.n_frames)).float() / 127.5 - 1
    edge = BORDER * SCALE
    starts = [i * (CELL + GAP) for i in range(row_count)]
    assert video.shape[3] - (starts[-1] + CELL) in (0, 1)  # h264 wants even sizes
    assert video.shape[2] - (2 * LINE + CELL) in (0, 1)
    title, names = video[:, :, :LINE], video[:, :, LINE : 2 * LINE]
    assert (title.amin((1, 2, 3)) < 0).all() and all((names[..., s : s + CELL] < 0).any() for s in starts)  # words
    video = video[:, :, 2 * LINE :]
    return torch.stack([video[:, :, edge : CELL - edge, s + edge : s + CELL - edge] for s in starts])


def test_a_folder_of_videos_from_the_shell(folder, tmp_path):
    options = "--n-frames", "5", "--num-samples", "3", "temperature=0.8", "top_k=4"
    place = "--pipeline", folder / "run/pipeline", "--input", folder / "videos"
    process = Started(TOOL, *place, *options, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    samples = folder / "run/samples"
    names = ["deep_er_brief.mp4", "deep_er_brief.gif", "long.mp4", "long.gif", "contact_sheet.png"]
    assert result["outputs"] == [str(samples / name) for name in names]
    assert sorted(path.name for path in samples.iterdir()) == sorted(names)
    assert sorted(Path(path).name for path in result["skipped"]) == ["cut.avi", "short.gif", "text.mp4"]
    for name in ("cut.avi", "short.gif", "text.mp4"):
        assert f"skipped: {folder / 'videos' / name}" in err
    assert result["seconds"] > 0 and result["frames_per_s"] > 0
    assert len(out.strip().splitlines()) == 1

    # Every second frame, for the pipeline was trained at half the rate; the truth first, then the samples.
    for suffix in (".mp4", ".gif"):
        info = probe(samples / f"long{suffix}")
        assert (info.n_frames, round(info.fps, 2)) == (2 + 5, 10)
        shown = cells(samples / f"long{suffix}", 4)
        expected = torch.linspace(-1, 1, 20)[: 2 * 7 : 2]
        torch.testing.assert_close(shown[0].mean((1, 2, 3)), expected, atol=0.03, rtol=0)
        torch.testing.assert_close(shown[:, :2].mean((2, 3, 4)), expected[:2].expand(4, 2), atol=0.03, rtol=0)
    cells(samples / "deep_er_brief.mp4", 3)  # no truth
    sheet = PIL.Image.open(samples / "contact_sheet.png")
    side = 7 * (SIZE + 2 * BORDER) * 2 + 6 * GAP  # 7 frames; 3 + 4 rows
    assert sheet.size[0] > side and sheet.size[1] == side + 2 * LINE
    words = torch.tensor(np.asarray(sheet.convert("L")))[2 * LINE :, : sheet.size[0] - side] < 128
    assert all(row.any() for row in words.any(1).split(-(-side // 7)))  # every row has its name


def test_no_more_is_decoded_than_is_shown(folder, tool, capsys, tmp_path):
    """Damage is named where the frames asked for need the damaged part, and not met elsewhere."""
    (tmp_path / "in").mkdir()
    overwrite_middle(encode(tmp_path / "whole.mp4", counter_frames(96), fps=10), tmp_path / "in/late.mp4")
    with pytest.raises(VideoError, match="damaged"):
        probe(tmp_path / "in/late.mp4")
    common = ["--pipeline", folder / "run/pipeline", "--input", tmp_path / "in", "--output", tmp_path]
    assert call(tool, capsys, *common, "--n-frames", 4)["skipped"] == []
    assert cells(tmp_path / "late.mp4", 5).shape[1] == 2 + 4
    assert "late.mp4: damaged" in call(tool, capsys, *common, "--n-frames", 4, "--start", 60)


def test_given_frames_are_marked(folder, tool, capsys, tmp_path):
    given, predicted = (torch.tensor(colour).view(3, 1) for colour in (GIVEN, PREDICTED))
    call(
        tool, capsys, "--pipeline", folder / "run/pipeline", "--input", folder / "videos/long.mp4", "--output", tmp_path
    )
    video = read_clip(tmp_path / "long.mp4", range(2 + 16)).float() / 127.5 - 1
    edge = video[:, :, 2 * LINE + 3, 20:100]  # inside the top border of the first sample
    torch.testing.assert_close(edge[:2], given.expand(2, 3, 80), atol=0.15, rtol=0)
    torch.testing.assert_close(edge[2:], predicted.expand(16, 3, 80), atol=0.15, rtol=0)


def test_the_seed_decides(folder, tool, capsys, tmp_path):
    futures = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / str(number)
        arguments = ["--input", folder / "videos/long.mp4", "--output", output, "--n-frames", 4, "--seed", seed]
        call(tool, capsys, "--pipeline", folder / "run/pipeline", *arguments)
        futures.append((output / "long.gif").read_bytes())
    assert futures[0] == futures[1]
    assert futures[0] != futures[2]


@pytest.mark.parametrize(
    "arguments, n_frames, fps, first, last",
    [
        (["--fps", "5"], 4, 5, 0, 12),  # every fourth
        (["--frame-stride", "1"], 4, 20, 0, 3),
        (["--frame-stride", "3", "--n-context", "3", "--start", "1"], 5, 20 / 3, 3, 15),
    ],
)
def test_which_frames_are_taken(folder, tool, capsys, tmp_path, arguments, n_frames, fps, first, last):
    common = ["--input", folder / "videos/long.mp4", "--output", tmp_path, "--n-frames", 2, "--num-samples", 1]
    call(tool, capsys, "--pipeline", folder / "run/pipeline", *common, *arguments)
    info = probe(tmp_path / "long.mp4")
    assert info.n_frames == n_frames
    assert info.fps == pytest.approx(fps, rel=0.01)
    truth = cells(tmp_path / "long.mp4", 2)[0].mean((1, 2, 3))
    levels = torch.linspace(-1, 1, 20)
    torch.testing.assert_close(truth[[0, -1]], levels[[first, last]], atol=0.03, rtol=0)


def test_twice_the_frame_rate(folder, tool, capsys, tmp_path):
    tokenizer = PixelTokenizer(1, SIZE, SIZE, levels=None)
    prior = SDEDiffusion(tokenizer.latent_spec, **SMALL_SDE_DIFFUSION)
    VideoPredictionPipeline(prior, tokenizer, n_context=3, fps=10).save_pretrained(tmp_path / "pipeline")
    common = ["--input", folder / "videos/long.mp4", "--n-frames", 5, "--num-samples", 1, "n_steps=2"]
    call(tool, capsys, "--pipeline", tmp_path / "pipeline", *common, "fps_multiplier=2")
    info = probe(tmp_path / "samples/long.mp4")
    assert (info.n_frames, round(info.fps, 2)) == (5 + 5, 20)
    truth = cells(tmp_path / "samples/long.mp4", 2)[0].mean((1, 2, 3))
    expected = torch.linspace(-1, 1, 20)[[0, 0, 2, 2, 4, 4, 6, 6, 8, 8]]  # after the last given frame: 4 (half a step)
    torch.testing.assert_close(truth, expected, atol=0.03, rtol=0)


def test_a_folder_of_numbered_pictures_is_a_video(folder, tool, capsys, tmp_path):
    """By itself and among others; at the rate of training, so that no picture is left out, or at its own."""
    walk = tmp_path / "in/walk.v2"
    walk.mkdir(parents=True)
    for number in range(12):
        PIL.Image.new("L", (48, 40), 20 * number).save(walk / f"frame{number:02d}.png")
    common = ["--pipeline", folder / "run/pipeline", "--output", tmp_path, "--n-frames", 3, "--num-samples", 1]
    levels = torch.arange(12) * 20 / 127.5 - 1
    for given, options, places in ((walk, [], range(5)), (walk.parent, ["--image-fps", 20], range(0, 10, 2))):
        result = call(tool, capsys, *common, "--input", given, *options)
        assert result["outputs"][0] == str(tmp_path / "walk.v2.mp4") and result["skipped"] == []
        assert probe(tmp_path / "walk.v2.mp4").fps == pytest.approx(10)
        truth = cells(tmp_path / "walk.v2.mp4", 2)[0].mean((1, 2, 3))
        torch.testing.assert_close(truth, levels[list(places)], atol=0.03, rtol=0)


def test_a_gif_of_a_fast_video_can_be_watched(folder, tool, capsys, tmp_path):
    common = ["--input", folder / "videos/long.mp4", "--output", tmp_path, "--n-frames", 4, "--num-samples", 1]
    call(tool, capsys, "--pipeline", folder / "run/pipeline", *common, "--frame-stride", 1)
    assert probe(tmp_path / "long.mp4").fps == pytest.approx(20)
    with PIL.Image.open(tmp_path / "long.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
    assert durations == [100] * 5 + [1100] and gif.info["loop"] == 0


def test_of_a_prior_that_draws_nothing_one_future_is_shown(folder, tool, capsys, tmp_path):
    tokenizer = PixelTokenizer(1, SIZE, SIZE, levels=None)
    prior = small_recurrent_vae(tokenizer.latent_spec, n_groups=0)
    assert prior.deterministic
    VideoPredictionPipeline(prior, tokenizer, n_context=2, fps=10).save_pretrained(tmp_path / "pipeline")
    arguments = ["--pipeline", tmp_path / "pipeline", "--input", folder / "videos/long.mp4", "--n-frames", 2]
    _, err = finished(tool, capsys, *arguments, "--num-samples", 3)
    assert "RecurrentVAE draws nothing: one future of each video is all there is" in err
    assert cells(tmp_path / "samples/long.mp4", 2).shape[1] == 4  # the truth and the future


ODD_NAMES = [os.fsdecode(b"caf\xe9"), "two\nlines", "take #2", "http:x", "take: 2", "-dash", "é 日本"]
ODD_NAMES += ["x" * 251, "ü" * 120]


def test_names_of_every_kind_give_an_output_each(folder, tool, capsys, tmp_path):
    """Three files that would share a name, names that differ in case alone, long ones, and links."""
    source = tmp_path / "in"
    for name in ("a/b_c", "a_b/c", "a_b_c", "A_B_C", *ODD_NAMES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "videos/deep/er/brief.mp4", source / f"{name}.mp4")
    for name in (".hidden.mp4", "@eaDir/thumb.mp4"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    (source / "linked").symlink_to(folder / "videos/deep")
    (source / "no\nvideo.mp4").touch()
    same = {f"a_b_c-{sha256(name)[:8]}" for name in ("a_b/c.mp4", "a_b_c.mp4")}  # one name where case does not count
    expected = {"A_B_C", "a_b_c_mp4", *same, "linked_er_brief", *ODD_NAMES[:-2]}
    expected |= {f"{short}-{sha256(name)[:12]}" for short, name in zip(("x" * 187, "ü" * 93), ODD_NAMES[-2:])}
    arguments = ["--pipeline", folder / "run/pipeline", "--input", source, "--output", tmp_path / "out"]
    for _ in range(2):
        result, err = finished(tool, capsys, *arguments, "--n-frames", 1, "--num-samples", 1)
        assert (result["skipped"], result["failed"]) == ([str(source / "no\nvideo.mp4")], [])
        stems = {Path(path).stem for path in result["outputs"] if Path(path).is_file()}
        assert stems == expected | {"contact_sheet"}
    assert f"out: replacing {len(result['outputs']) - 1} files and contact_sheet.png of an earlier run" in err
    assert "in/no\\nvideo.mp4: not a readable video" in err
    assert all(line.isprintable() for line in err.replace("\r", "\n").splitlines())
    arguments = [*arguments[:3], folder / "videos/long.mp4", *arguments[4:]]
    _, err = finished(tool, capsys, *arguments, "--n-frames", 1, "--num-samples", 1)
    assert "out: replacing contact_sheet.png of an earlier run; --output DIR keeps them" in err


def test_many_futures_are_laid_out_in_rows_and_columns(folder, tool, capsys, tmp_path):
    common = ["--pipeline", folder / "run/pipeline", "--input", folder / "videos/long.mp4", "--output", tmp_path]
    assert call(tool, capsys, *common, "--n-frames", 1, "--num-samples", 256)["failed"] == []
    cell = (SIZE + 2 * BORDER) * 2  # 16 rows with their names would be higher than 2,048 pixels at scale 3
    for suffix in (".mp4", ".gif"):
        info = probe(tmp_path / f"long{suffix}")
        height, width = LINE + 16 * (LINE + cell + GAP) - GAP, 17 * (cell + GAP) - GAP
        assert info.n_frames == 3 and (info.height, info.width) == (height, width)
    with PIL.Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size[1] == 2 * LINE + 9 * 2 * (SIZE + 4) + 8 * GAP
    first = read_clip(tmp_path / "long.mp4", range(3)).float()[:, :, 2 * LINE :]
    first = first[:, :, 12 : cell - 12, 12 : cell - 12]
    levels = torch.linspace(0, 255, 20)[: 2 * 3 : 2]
    torch.testing.assert_close(first.mean((1, 2, 3)), levels, atol=4, rtol=0)  # the truth comes first
    last = read_clip(tmp_path / "long.mp4", [0]).float()[0, :, -cell:, -cell:]
    assert last.min() > 240  # 257 videos leave places of 16 x 17 empty


def test_what_writers_cannot_take_is_known_before_the_sampling(folder, tool, capsys, tmp_path):
    common = ["--pipeline", folder / "run/pipeline", "--input", folder / "videos/long.mp4", "--output", tmp_path / "o"]
    error = call(tool, capsys, *common, "--num-samples", 100000)
    assert "--num-samples 100000: frames of 17712 x 12044 pixels (H x W) are too large" in error
    assert not (tmp_path / "o").exists()


def test_odd_files_do_not_end_the_run(folder, tool, capsys, tmp_path):
    """A jump of a day, a song with its cover, damage; and one whose output cannot be written, which is status 1."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    jump = [*range(20), *range(954_430, 954_450)]
    encode(source / "a jump.mkv", counter_frames(40), fps=10, pts=jump)
    shutil.copy(folder / "videos/text.mp4", source)
    for name in ("long.mp4", "other.mp4"):
        shutil.copy(folder / "videos/long.mp4", source / name)
    (output / "long.mp4").mkdir(parents=True)
    arguments = ["--pipeline", folder / "run/pipeline", "--input", source, "--output", output]
    result, err = finished(tool, capsys, *arguments, "--n-frames", 4, "--num-samples", 1, status=1)
    assert (result["skipped"], result["failed"]) == ([str(source / "text.mp4")], [str(source / "long.mp4")])
    assert (output / "other.gif").is_file() and 0.1 <= probe(output / "a jump.mp4").fps <= 240
    lines = err.strip().splitlines()
    assert lines[-1].startswith(f"error: {source}: 1 of 4 videos failed, first: {source}/long.mp4: ")
    assert "cannot be written (Is a directory)" in lines[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["temperatur=1"], "unknown sampler option 'temperatur'; did you mean 'temperature'"),
        (["hot"], "'hot': expected an option as key=value"),
        (["top_k=[1"], "'top_k=[1': not valid YAML"),
        (["temperature=hot"], "temperature: expected a number >= 0, found 'hot'"),
        (["top_k=2.5"], "top_k: expected an integer >= 1 or None, found 2.5"),
        (["top_p=most"], "top_p: expected a number in (0, 1] or None, found 'most'"),
        (["--n-frames", "0"], "--n-frames: expected at least 1, found 0"),
        (["--n-context", "0"], "--n-context: expected at least 1, found 0"),
        (["--start", "-1"], "--start: expected at least 0, found -1"),
        (["--fps", "0"], "--fps: expected a rate above 0, found 0.0"),
        (["--fps", "inf"], "--fps: expected a rate above 0, found inf"),
        (["--image-fps", "0"], "--image-fps: expected a rate above 0, found 0.0"),
        (["--input", "{root}/photos"], "2 pictures: numbered ones become videos by tools/prepare_dataset.py folder"),
        (["top_k=2", "--seed", "1", "hotter=1"], "unknown sampler option 'hotter'"),  # on both sides of an option
        (["--device", "abacus"], "--device abacus: not available"),
        (["--pipeline", "{root}/run"], "no model_index.json"),
        (["--pipeline", "{root}/nowhere/at/all"], "not a folder"),
        (["--input", "{root}/nowhere"], "no such file or folder"),
        (["--input", "{root}/run/pipeline"], "no video files here"),
        (["--input", "{root}/videos/text.mp4"], "none of 1 videos could be used: {root}/videos"),
        (["--n-context", "30"], "none of 1 videos could be used: {root}/videos"),
        (["--output", "{root}/videos"], "this is where the input lies"),
        (["--output", "{root}/videos/notes.txt"], "notes.txt: not writable"),
    ],
)
def test_bad_input_is_one_line_and_status_1(folder, tool, capsys, tmp_path, arguments, message):
    common = ["--pipeline", folder / "run/pipeline", "--input", folder / "videos/long.mp4", "--output", tmp_path]
    error = call(tool, capsys, *common, *(argument.format(root=folder) for argument in arguments))
    assert message.format(root=folder) in error
    assert not list(tmp_path.glob("*.mp4"))


def test_what_the_contact_sheet_leaves_out_is_said(folder, tool, capsys, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abc":
        encode(tmp_path / f"in/{name}.mp4", counter_frames(8, 32, 32), fps=10)
    common = ["--pipeline", folder / "run/pipeline", "--input", tmp_path / "in", "--n-frames", 2, "--num-samples", 1]
    _, err = finished(tool, capsys, *common, "--output", tmp_path / "all")
    assert "leaves out" not in err and err.startswith(f"loading {folder / 'run/pipeline'}\n")
    monkeypatch.setattr(futures, "SHEET_VIDEOS", 2)
    _, err = finished(tool, capsys, *common, "--output", tmp_path / "two")
    sheet = tmp_path / "two/contact_sheet.png"
    assert f"{sheet} shows the first 2 videos and leaves out 1; each has its own mp4 and GIF" in err
    heights = [PIL.Image.open(tmp_path / name / "contact_sheet.png").size[1] - 2 * LINE for name in ("all", "two")]
    assert heights[0] > 1.4 * heights[1]


def test_a_runs_folder_in_the_place_of_its_pipeline_is_named_at_once(folder, tool, capsys):
    error = call(tool, capsys, "--pipeline", folder / "run", "--input", folder / "videos")
    assert error == f"error: pipeline {folder / 'run'}: no model_index.json in it; try {folder / 'run/pipeline'}"

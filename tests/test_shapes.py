"""Frames of any shape and number of channels, from video files to predictions, through the real tools."""

import argparse
import json
import logging
import re
import runpy
import shutil

import numpy as np
import pytest
import torch
import yaml
from noise_benchmark import Noise
from PIL import Image
from tiny import (
    SMALL_DIFFUSERS,
    SMALL_FLOW,
    SMALL_LOOKUP_FREE,
    SMALL_MASKED,
    SMALL_PIXELCNN,
    SMALL_RESIDUAL_DIFFUSION,
    SMALL_SDE_DIFFUSION,
    SMALL_TRANSFORMER,
    SMALL_VQVAE,
    random_clip,
    small_recurrent_vae,
)
from tiny_experiment import EXPERIMENT, TOOLS
from video_files import encode

import latentcast
from latentcast import (
    DiffusersTokenizer,
    FlowTransformer,
    MaskedTransformer,
    Protocol,
    ResidualDiffusion,
    SDEDiffusion,
    STPixelCNN,
    VideoFolder,
    VideoPredictionPipeline,
    VideoTransformer,
    load_model,
    prepared_videos,
    probe,
    read_clip,
)
from latentcast.config import config_root, instantiate, load_config, load_pipeline_config
from latentcast.data.base import VideoDataset
from latentcast.data.sets.folder import Folder
from latentcast.data.store.latent_cache import LatentCacheDataset
from latentcast.data.store.prepared import prepare, read_set_manifest
from latentcast.evaluation.choice import check_fit
from latentcast.figures import sheets
from latentcast.figures.sheets import BORDER, shown_channels
from latentcast.playground import Clip, Playground
from latentcast.sizes import as_size, nearest_divisors, nearest_multiples, sides, size_text

HEIGHT, WIDTH = 16, 24  # of the frames that the models here take
LETTERBOX = (HEIGHT - 14) // 2  # black rows above and below 160 x 90 pixels in them: 24 x 13.5 is 24 x 14
ALL_TRAIN = {"val_fraction": 0.0, "test_fraction": 0.0}


def picture(n_frames=12, height=90, width=160, first=0):
    """Bright frames with a dark disc that moves from left to right: (n_frames, height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    frames = np.full((n_frames, height, width, 3), 200, np.uint8)
    for i, frame in enumerate(frames):
        centre = width * (i + first + 1) / (n_frames + first + 2)
        frame[(y - height / 2) ** 2 + (x - centre) ** 2 < (height / 4) ** 2] = (60, 90, 120)
    return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 90 x 160 and of 96 x 64 pixels (H x W)."""
    root = tmp_path_factory.mktemp("shapes")
    for number, (height, width) in enumerate(3 * [(90, 160)] + 2 * [(96, 64)]):
        encode(root / f"{number}_{height}x{width}.mp4", picture(12, height, width, number))
    return root


def by_pillow(frame, size, crop):
    """One frame (H, W, 3) uint8 brought to a size (H, W) as ``crop`` says, by Pillow."""
    (height, width), image = frame.shape[:2], Image.fromarray(frame)
    if crop == "none":
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    ratios = size[0] / height, size[1] / width
    if crop == "center":
        rows, columns = round(size[0] / max(ratios)), round(size[1] / max(ratios))
        top, left = (height - rows) // 2, (width - columns) // 2
        image = image.crop((left, top, left + columns, top + rows))
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    rows, columns = round(height * min(ratios)), round(width * min(ratios))
    canvas = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    fitted = image.resize((columns, rows), Image.Resampling.BILINEAR)
    canvas[top : top + rows, left : left + columns] = np.asarray(fitted)
    return canvas


# ------------------------------------------------------------------------------------------------------------- sizes


def test_a_size_has_one_form():
    assert [as_size(size) for size in (64, [64, 64], (96, 64), np.int64(8))] == [64, 64, [96, 64], 8]
    assert (sides(64), sides([96, 64]), size_text(64), size_text([96, 64])) == ((64, 64), (96, 64), "64", "96 x 64")
    assert nearest_multiples(90, 161, 16) == (96, 160) and nearest_multiples(3, 9, 8) == (8, 8)
    assert nearest_divisors((4, 9, 10), (3, 2, 4)) == [2, 1, 5]
    for wrong in (0, -4, 1.5, True, "64", [64], [64, 0], [1, 2, 3], None, 10**30, 10**5000):
        with pytest.raises(ValueError, match=r"^frame_size: expected pixels, .* or \[height, width\], found") as caught:
            as_size(wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("crop", ["center", "none", "pad"])
@pytest.mark.parametrize("size", [[HEIGHT, WIDTH], [40, 20], [30, 30]])
def test_video_files_get_to_a_shape_as_asked(videos, crop, size):
    dataset = VideoFolder(videos, "train", 4, size, crop=crop, **ALL_TRAIN)
    assert dataset.frame_shape == (3, *size) and dataset.size == as_size(size)
    for index, entry in enumerate(dataset.videos):
        whole = read_clip(videos / entry.name, [5])[0].permute(1, 2, 0).numpy()
        found = (dataset.read_video(index, 5, 6)[0] + 1) * 127.5
        expected = torch.from_numpy(by_pillow(whole, size, crop).copy()).permute(2, 0, 1)
        assert (found - expected).abs().max() <= 1.01
        edges = found[:, [0, -1]], found[:, :, [0, -1]]
        assert (min(edge.max() for edge in edges) < 1) == (crop == "pad")  # black on two sides
    assert dataset[0]["frames"].shape == (4, 3, *size)


def test_descriptions_name_a_crop_that_is_not_the_usual(videos, tmp_path):
    options = {"root": videos, "split": "train", "clip_length": 4, "index_dir": tmp_path, **ALL_TRAIN}
    square, other = VideoFolder(size=24, **options), VideoFolder(size=[24, 24], **options)
    assert square.describe() == other.describe() and square.describe()["size"] == 24
    assert "crop" not in square.describe() and (square.crop, VideoDataset.crop) == ("center", "center")
    padded = VideoFolder(size=[HEIGHT, WIDTH], crop="pad", **options).describe()
    assert (padded["size"], padded["crop"]) == ([HEIGHT, WIDTH], "pad")
    with pytest.raises(ValueError, match=r"^crop: expected one of center, none, pad, found 'middle'"):
        VideoFolder(size=24, crop="middle", **options)


def test_prepared_sets_of_any_shape(videos, tmp_path):
    for crop in ("center", "pad", "none"):
        root = tmp_path / crop
        benchmark = Folder(videos, frame_size=[HEIGHT, WIDTH], crop=crop, channels=1, **ALL_TRAIN)
        prepare(benchmark, root)
        manifest = read_set_manifest(root)
        assert manifest["frame_size"] == [HEIGHT, WIDTH]
        assert manifest["protocol"].get("crop") == (None if crop == "center" else crop)
        dataset = prepared_videos(root, "train", 4, [HEIGHT, WIDTH])
        assert (dataset.size, dataset.frame_shape, dataset.crop) == ([HEIGHT, WIDTH], (1, HEIGHT, WIDTH), crop)
        direct = VideoFolder(videos, "train", 4, [HEIGHT, WIDTH], 1, crop=crop, **ALL_TRAIN)
        assert (dataset.read_video(0, 0, 4) - direct.read_video(0, 0, 4)).abs().max() <= 1.01 / 127.5
        assert (root / "preview.png").is_file()
        message = rf"holds frames of \[{HEIGHT},{WIDTH}\] pixels, asked for 16: set frame_size=\[{HEIGHT},{WIDTH}\]"
        with pytest.raises(ValueError, match=message):
            prepared_videos(root, "train", 4, 16)
    with pytest.raises(ValueError, match="another"):  # of another crop: refused, not mixed
        prepare(Folder(videos, frame_size=[HEIGHT, WIDTH], channels=1, **ALL_TRAIN), tmp_path / "pad")


def test_sets_that_are_square_say_so(tmp_path):
    for make in (
        lambda: latentcast.MovingDigits("train", 4, [HEIGHT, WIDTH], digit_size=12),
        lambda: instantiate(load_config("quickstart", ["frame_size=[32,48]"]).data)(split="train"),
    ):
        with pytest.raises(ValueError, match=r"frames of moving digits are square, found \[") as caught:
            make()
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("tokenizer", sorted(path.stem for path in (config_root() / "tokenizer").glob("*.yaml")))
def test_frame_size_reaches_every_tokenizer_in_either_form(tokenizer):
    config = load_config("lvt_bair", [f"tokenizer={tokenizer}", "frame_size=[32,48]"])
    assert (config.tokenizer.height, config.tokenizer.width) == (32, 48)
    assert config.data.size == config.frame_size == [32, 48]
    if tokenizer != "vqvae":
        return
    for size in ("[32,32]", "32"):
        config = load_config("lvt_bair", [f"tokenizer={tokenizer}", f"frame_size={size}"])
        assert config.tokenizer.height == config.tokenizer.width == config.data.size == config.frame_size == 32
    again = load_config("lvt_bair", [f"tokenizer={tokenizer}", "frame_size=[32,48]", "tokenizer.width=64"])
    assert (again.tokenizer.height, again.tokenizer.width) == (32, 64)


def test_a_saved_config_with_a_shape_is_an_experiment_of_it(tmp_path):
    config = load_config("video_folder", ["frame_size=[32,48]", "data.root=x"])
    path = tmp_path / "config.yaml"
    path.write_text(latentcast.yaml_text.dump(latentcast.config.to_container(config)))
    again = load_config(str(path))
    assert latentcast.config.to_container(again) == latentcast.config.to_container(config)
    protocol = instantiate(load_config("video_folder", ["frame_size=[32,48]", "protocol=video_folder"]).protocol)
    assert protocol.frame_size == [32, 48] and protocol.describe()["frame_size"] == [32, 48]


def test_a_shape_that_cannot_be_is_one_line():
    for overrides, message in (
        (["frame_size=[64]"], r"frame_size: expected pixels, .* found \[64\]"),
        (["frame_size=[64,0]"], r"frame_size: expected pixels, .* found \[64, 0\]"),
        (["frame_size=big"], "frame_size: expected a number, found 'big'"),
        (["data.size={a: 1}"], r"data.size: expected a value like '\$\{frame_size\}', found a mapping"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            load_config("video_folder", [*overrides, "data.root=x"])
    config = load_config("video_folder", ["frame_size=[90,160]", "tokenizer.stride=16", "data.root=x"])
    with pytest.raises(ValueError) as caught:
        instantiate(config.tokenizer)
    assert str(caught.value) == (
        "frame_size=[90, 160] (as tokenizer.height, tokenizer.width): expected multiples of the stride 16, found 90, "
        "160; the nearest are 96 x 160"
    )
    with pytest.raises(ValueError, match=r"protocol x: frame_size: expected at least 11 for ssim, found \[8, 64\]"):
        Protocol(name="x", n_context=1, n_predicted=1, metrics=["ssim"], frame_size=[8, 64])


# ------------------------------------------------------------------------------------------------------- the networks

SHAPED = {  # by class: frames of 24 x 16 pixels (H x W), two channels
    "VQVAE": SMALL_VQVAE | {"codebook_size": 8},
    "HRVQVAE": SMALL_VQVAE | {"codebook_size": 4, "n_layers": 2},
    "ResidualVQVAE": SMALL_VQVAE | {"codebook_size": 4, "n_layers": 2},
    "FSQVAE": SMALL_LOOKUP_FREE | {"levels": [4, 3]},
    "LFQVAE": SMALL_LOOKUP_FREE | {"embedding_dim": 4},
    "KLVAE": {"block_channels": [8, 16], "norm_groups": 4, "latent_channels": 3},
    "DCGANAutoencoder": {"embedding_dim": 4, "hidden_channels": 4},
    "VGGAutoencoder": {"embedding_dim": 4, "hidden_channels": 4},
    "PixelTokenizer": {"levels": 4},
}
STRIDES = {"KLVAE": 2, "DCGANAutoencoder": (24, 16), "VGGAutoencoder": (24, 16), "PixelTokenizer": 1}


@pytest.mark.parametrize("name", SHAPED)
def test_tokenizers_take_any_shape_and_number_of_channels(name):
    torch.manual_seed(0)
    tokenizer = getattr(latentcast, name)(2, 24, 16, **SHAPED[name])
    frames = torch.rand(2, 2, 2, 24, 16) * 2 - 1
    output = tokenizer.train()(frames)
    output.loss.backward()
    assert output.frames.shape == frames.shape
    with torch.no_grad():
        latents = tokenizer.eval().encode(frames).latents
    down = sides(STRIDES.get(name, 4)) if not isinstance(STRIDES.get(name), tuple) else STRIDES[name]
    assert latents.shape[-2:] == (24 // down[0], 16 // down[1])
    assert tokenizer.decode(latents).shape == frames.shape
    spec = tokenizer.latent_spec
    assert [spec[f"frame_{key}"] for key in ("channels", "height", "width")] == [2, 24, 16]


def test_an_autoencoder_of_diffusers_takes_any_shape_and_number_of_channels():
    small = {"_class_name": "AutoencoderKL", "in_channels": 2, "out_channels": 2, **SMALL_DIFFUSERS["AutoencoderKL"]}
    tokenizer = DiffusersTokenizer(autoencoder=small, height=24, width=16).eval()
    frames = torch.rand(1, 2, 2, 24, 16) * 2 - 1
    with torch.no_grad():
        assert tokenizer(frames).frames.shape == frames.shape
    assert tokenizer.latent_spec["frame_channels"] == 2


@pytest.mark.parametrize("name", [*SHAPED, "DiffusersTokenizer"])
def test_tokenizers_name_the_nearest_frames_that_they_can_divide(name):
    options = SHAPED.get(name) or {"autoencoder": {"_class_name": "AutoencoderKL", **SMALL_DIFFUSERS["AutoencoderKL"]}}
    make = getattr(latentcast, name)
    if name == "PixelTokenizer":
        assert make(height=23, width=17, **options).latent_spec["height"] == 23  # any
        return
    with pytest.raises(ValueError) as caught:
        make(height=23, width=17, **options)
    found = str(caught.value)
    assert "\n" not in found and "found 23, 17; the nearest are " in found
    height, width = map(int, found.rpartition("are ")[2].split(" x "))
    assert abs(height - 23) <= 2 and abs(width - 17) <= 2
    make(height=height, width=width, **options)


def spec_of(height, width, kind="discrete", channels=2):
    codes = [5, 3] if kind == "discrete" else []
    scale = 1 if kind == "pixels" else 4
    frames = {"frame_channels": channels, "frame_height": scale * height, "frame_width": scale * width}
    spec = {"kind": kind, "channels": channels, "height": height, "width": width, "codebook_sizes": codes}
    return spec | {"scaling_factor": 1.0} | frames


PRIORS = {
    "video_transformer": ("discrete", lambda spec: VideoTransformer(spec, subscale=[4, 1, 1], **SMALL_TRANSFORMER)),
    "spatial": ("discrete", lambda spec: VideoTransformer(spec, subscale=[1, 2, 2], **SMALL_TRANSFORMER)),
    "st_pixelcnn": ("discrete", lambda spec: STPixelCNN(spec, **SMALL_PIXELCNN)),
    "windowed": ("discrete", lambda spec: STPixelCNN(spec, attention="windowed", window=[2, 3], **SMALL_PIXELCNN)),
    "masked_transformer": ("discrete", lambda spec: MaskedTransformer(spec, **SMALL_MASKED)),
    "dcgan": ("pixels", lambda spec: small_recurrent_vae(spec, network="dcgan")),
    "vgg": ("pixels", lambda spec: small_recurrent_vae(spec, network="vgg", aligner="none")),
    "recurrent_vae_latents": ("continuous", lambda spec: small_recurrent_vae(spec, n_groups=2)),
    "sde_diffusion": ("continuous", lambda spec: SDEDiffusion(spec, **SMALL_SDE_DIFFUSION)),
    "sde_diffusion_pixels": ("pixels", lambda spec: SDEDiffusion(spec, **SMALL_SDE_DIFFUSION)),
    "residual_diffusion": ("continuous", lambda spec: ResidualDiffusion(spec, **SMALL_RESIDUAL_DIFFUSION)),
    "residual_diffusion_pixels": ("pixels", lambda spec: ResidualDiffusion(spec, **SMALL_RESIDUAL_DIFFUSION)),
    "flow_transformer": ("continuous", lambda spec: FlowTransformer(spec, **SMALL_FLOW)),
    "flow_transformer_patches": ("pixels", lambda spec: FlowTransformer(spec, patch=2, **SMALL_FLOW)),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("height, width", [(4, 6), (12, 8), (9, 10), (1, 1)])
def test_priors_take_any_grid_that_they_can_halve_or_name_the_nearest(name, height, width):
    kind, make = PRIORS[name]
    try:
        prior = make(spec_of(height, width, kind))
    except ValueError as error:
        found = str(error)
        assert "\n" not in found
        if name in ("spatial", "windowed", "flow_transformer_patches"):  # an option does not divide the grid
            assert re.search(r"the nearest are \[[\d, ]+\]$", found)
            return
        assert (height, width) != (12, 8)
        nearest = tuple(map(int, re.search(r"nearest\D*(\d+) x (\d+)", found).groups()))
        assert nearest != (height, width)
        prior = make(spec_of(*nearest, kind))
    torch.manual_seed(0)
    context = random_clip(prior, 1, max(2, prior.min_context))
    steps = {key: 2 for key in prior.sampler_options() if key == "n_steps"}
    with torch.no_grad():
        assert prior.eval().sample(context, 2, **steps).shape == (1, 1, 2, *context.shape[2:])
    assert prior(random_clip(prior, 2, 4), 2).loss.isfinite()


# --------------------------------------------------------------------------------------------- from files to futures


def call(tool, folder, *overrides, **others):
    """Run a tool's ``main`` in this process on ``folder/shaped.yaml`` -> its figures."""
    arguments = argparse.Namespace(experiment=str(folder / "shaped.yaml"), overrides=list(overrides), **others)
    return runpy.run_path(str(TOOLS / f"{tool}.py"))["main"](arguments)


def experiment(folder, **changes):
    settings = EXPERIMENT | {"run_dir": str(folder / "run"), "clip_length": 4, "n_context": 2} | changes
    settings["tokenizer"] = EXPERIMENT["tokenizer"] | {"stride": 8}
    (folder / "shaped.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """A run on letterboxed videos of another shape: tokenizer, cache, prior and pipeline, by the tools."""
    folder = tmp_path_factory.mktemp("trained")
    wide = folder / "videos"
    wide.mkdir()
    for path in videos.glob("*90x160.mp4"):
        shutil.copy(path, wide)
    data = {"root": str(wide), "crop": "pad", "val_fraction": 0.2, "test_fraction": 0.4}
    defaults = EXPERIMENT["defaults"] | {"data": "video_folder"}
    experiment(folder, defaults=defaults, data=data, frame_size=[HEIGHT, WIDTH], channels=3)
    for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
        call(tool, folder, "preview.every_n_steps=4", verify=False)
    return folder


def is_letterboxed(frames):
    """Whether (..., H, W) in [-1, 1] have the black rows of videos of 90 x 160 pixels, and bright ones between."""
    bars = torch.cat([frames[..., :LETTERBOX, :], frames[..., -LETTERBOX:, :]], -2)
    return bool((bars < -0.95).all() and frames[..., LETTERBOX + 1 : -LETTERBOX - 1, :].max() > 0.3)


def test_a_run_of_another_shape_has_it_everywhere(trained):
    run = trained / "run"
    tokenizer, pipe = load_model(run / "tokenizer"), VideoPredictionPipeline.from_pretrained(run / "pipeline")
    assert (tokenizer.config.height, tokenizer.config.width) == (HEIGHT, WIDTH)
    assert (pipe.config.crop, pipe.config.n_context) == ("pad", 2)
    cache = LatentCacheDataset(run / "latents/train", 4)
    assert cache.manifest["frame_size"] == [HEIGHT, WIDTH] and cache.manifest["data"]["crop"] == "pad"
    assert cache[0]["codes"].shape == (4, 2, 3, 1)
    assert list((run / "previews/prior").glob("step_*.mp4"))
    index = json.loads((run / "pipeline/model_index.json").read_text())
    del index["crop"]  # as saved before
    older = trained / "older"
    shutil.copytree(run / "pipeline", older)
    (older / "model_index.json").write_text(json.dumps(index))
    assert VideoPredictionPipeline.from_pretrained(older).config.crop == "center"
    found = load_pipeline_config(run / "pipeline", "video_folder", ["data.root=x"])
    assert (found.frame_size, found.data.size, found.data.crop) == ([HEIGHT, WIDTH], [HEIGHT, WIDTH], "pad")


def test_a_cache_of_another_crop_is_refused(trained):
    cache = LatentCacheDataset(trained / "run/latents/train", 4)
    described = cache.manifest["data"]
    cache.expect(data=described)
    usual = {name: value for name, value in described.items() if name != "crop"}
    with pytest.raises(ValueError, match="crop"):
        cache.expect(data=usual)


def sampled(folder, tmp_path, source, *options):
    parser = (tool := runpy.run_path(str(TOOLS / "sample.py")))["make_parser"]()
    arguments = ["--pipeline", str(folder), "--input", str(source), "--output", str(tmp_path / "out")]
    return tool["main"](parser.parse_args([*arguments, "--device", "cpu", *options]))


def test_sampling_fits_videos_and_pictures_as_in_training(trained, videos, tmp_path, monkeypatch):
    given = []

    def watched(self, frames, *args, **kwargs):
        given.append(frames)
        return predict(self, frames, *args, **kwargs)

    predict = VideoPredictionPipeline.__call__
    monkeypatch.setattr(VideoPredictionPipeline, "__call__", watched)
    pictures = tmp_path / "input/frames"
    pictures.mkdir(parents=True)
    for number, frame in enumerate(picture(6)):
        Image.fromarray(frame).save(pictures / f"{number:03d}.png")
    shutil.copy(videos / "0_90x160.mp4", tmp_path / "input/clip.mp4")
    figures = sampled(trained / "run/pipeline", tmp_path, tmp_path / "input", "--n-frames", "3", "--num-samples", "2")
    assert len(given) == 2 and all(is_letterboxed(frames) and frames.shape[-2:] == (HEIGHT, WIDTH) for frames in given)
    for name in ("clip.mp4", "frames.mp4"):
        info = probe(tmp_path / "out" / name)
        scale = round(128 / WIDTH)
        assert info.width == 3 * (scale * (WIDTH + 2 * BORDER) + 2) - 2  # the truth and two samples
        assert info.height >= scale * (HEIGHT + 2 * BORDER) and info.height < info.width
    assert (tmp_path / "out/contact_sheet.png").is_file() and not figures["failed"] + figures["skipped"]


def test_the_playground_fits_uploads_as_in_training(trained, videos, tmp_path):
    pipe = VideoPredictionPipeline.from_pretrained(trained / "run/pipeline")
    playground = Playground(pipe, None, tmp_path / "files", most_read=100)
    clip = Clip("clip.mp4", path=videos / "1_90x160.mp4")
    context, truth, _ = playground.read(clip, 0, 2, 3)
    assert is_letterboxed(context) and is_letterboxed(truth)
    files, _ = playground.predict(clip, 0, 2, 3, 2, 0, {})[:3], None
    assert all(path for path in files) and probe(files[0]).width > probe(files[0]).height
    shown, _ = playground.given(clip, 0, 2)
    assert shown.shape[1] > shown.shape[0]


def test_a_pipeline_fits_images_as_in_training(trained):
    pipe = VideoPredictionPipeline.from_pretrained(trained / "run/pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(frame) for frame in picture(2)]
    seed = torch.Generator().manual_seed(0)
    fitted = torch.from_numpy(np.stack([by_pillow(np.asarray(image), (HEIGHT, WIDTH), "pad") for image in images]))
    one = pipe(images, n_frames=2, generator=seed).frames
    assert torch.equal(one, pipe(fitted.numpy(), n_frames=2, generator=seed.manual_seed(0)).frames)
    with pytest.raises(ValueError, match=r"expected H = 16"):  # arrays and tensors are of the right size already
        pipe(np.stack([np.asarray(image) for image in images]), n_frames=2)


def test_evaluating_and_drawing_another_shape(trained, tmp_path):
    settings = ["protocol=video_folder", "protocol.n_predicted=2", "protocol.n_samples=2"]
    arguments = {"arguments": [str(trained / "shaped.yaml"), *settings], "pipeline": None, "data": None}
    tool = runpy.run_path(str(TOOLS / "evaluate.py"))["main"]
    figures = tool(argparse.Namespace(**arguments, weights=None, device="cpu", dtype="float32"))
    results = json.loads((trained / "run/metrics/video_folder.json").read_text())
    assert results["protocol"]["frame_size"] == [HEIGHT, WIDTH] and results["data"]["describe"]["crop"] == "pad"
    assert f"{HEIGHT} x {WIDTH} pixels" in (trained / "run/metrics/video_folder.md").read_text()
    assert all(figures["metrics"][name] for name in ("psnr", "ssim", "crps"))
    from latentcast.evaluation.subjects import open_subject, write_figures

    subject, _ = open_subject(str(trained / "run"), videos=trained / "videos", n_clips=2, n_frames=3)
    assert is_letterboxed(subject.clips.frames)
    written = write_figures(subject, tmp_path)
    assert not written.failed and {"futures", "reconstructions", "code_maps"} <= written.files.keys()


def test_one_line_for_what_belongs_to_another_shape(trained):
    with pytest.raises(ValueError, match=r"trained with frame_size=\[16, 24\], asked for 16; leave it out"):
        load_config(str(trained / "shaped.yaml"), ["frame_size=16"], "train_prior", go_on=True)
    pipe = VideoPredictionPipeline.from_pretrained(trained / "run/pipeline")
    data = VideoFolder(trained / "videos", "train", 4, [WIDTH, HEIGHT], **ALL_TRAIN)
    protocol = Protocol(name="x", n_context=2, n_predicted=2, frame_size=[HEIGHT, WIDTH], metrics=["psnr"])
    with pytest.raises(ValueError, match=r"\(C, H, W\) = \(3, 16, 24\), the data set serves \(3, 24, 16\)"):
        check_fit(pipe, data, protocol)
    data = VideoFolder(trained / "videos", "train", 4, [HEIGHT, WIDTH], **ALL_TRAIN)
    other = Protocol(name="x", n_context=2, n_predicted=2, frame_size=24, metrics=["psnr"])
    with pytest.raises(ValueError, match=r"frame_size: expected 24, the data set serves \[16, 24\]"):
        check_fit(pipe, data, other)


# ---------------------------------------------------------------------------------------------------------- channels


def test_pictures_show_the_first_channel_or_the_first_three_and_say_so_once(caplog):
    caplog.set_level(logging.INFO, "latentcast")
    sheets._say_shown.cache_clear()
    frames = torch.rand(2, 5, 8, 12) * 2 - 1
    for n_channels, shown in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        for _ in range(2):
            assert torch.equal(shown_channels(frames[:, :n_channels]), frames[:, :shown])
        drawn = sheets.bordered(frames[:, :n_channels], sheets.GIVEN)[:, :, BORDER:-BORDER, BORDER:-BORDER]
        expected = ((frames[:, :shown] + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        assert torch.equal(drawn, expected)
    said = [record.getMessage() for record in caplog.records if "pictures show" in record.getMessage()]
    assert said == [
        "pictures show of 2 channels the first, as grey",
        "pictures show of 4 channels the first three, as RGB",
        "pictures show of 5 channels the first three, as RGB",
    ]


@pytest.mark.parametrize("n_channels, tokenizer", [(2, "vqvae"), (5, "pixel")])
def test_data_of_other_channels_from_end_to_end(n_channels, tokenizer, tmp_path):
    prepare(Noise(name="folder", frame_size=[HEIGHT, WIDTH], channels=n_channels), tmp_path / "set")
    dataset = prepared_videos(tmp_path / "set", "train", 4)
    assert dataset[0]["frames"].shape == (4, n_channels, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=f"^channels: expected {n_channels}, as prepared, found 3"):
        prepared_videos(tmp_path / "set", "train", 4, channels=3)
    changes = {"defaults": EXPERIMENT["defaults"] | {"data": "folder"}, "data": {"root": str(tmp_path / "set")}}
    if tokenizer == "pixel":
        changes["prior"] = {"_target_": "latentcast.ResidualDiffusion", **SMALL_RESIDUAL_DIFFUSION}
        changes["preview"] = EXPERIMENT["preview"] | {"sampler": {"n_steps": 2}}
    experiment(tmp_path, frame_size=[HEIGHT, WIDTH], channels=n_channels, **changes)
    if tokenizer == "pixel":
        settings = yaml.safe_load((tmp_path / "shaped.yaml").read_text())
        settings |= {"tokenizer": {"levels": None}, "defaults": settings["defaults"] | {"tokenizer": "pixel"}}
        (tmp_path / "shaped.yaml").write_text(yaml.safe_dump(settings))
    for tool in ("train_tokenizer", "encode_dataset", "train_prior")[2 * (tokenizer == "pixel") :]:
        call(tool, tmp_path, verify=False)
    pipe = VideoPredictionPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipe.set_progress_bar_config(disable=True)
    steps = {"n_steps": 2} if tokenizer == "pixel" else {}
    frames = dataset.read_video(0, 0, 2)
    assert pipe(frames, n_frames=3, value_range=(-1, 1), **steps).frames.shape == (1, 1, 3, n_channels, HEIGHT, WIDTH)
    images = pipe(frames, n_frames=1, value_range=(-1, 1), output_type="pil", **steps).frames[0][0]
    assert (images[0].mode, images[0].size) == ("L" if n_channels == 2 else "RGB", (WIDTH, HEIGHT))
    assert list((tmp_path / "run/previews/prior").glob("step_*.mp4"))

    settings = ["protocol=video_folder", "protocol.n_predicted=2", "protocol.n_samples=2"]
    settings += [f"preview.sampler={json.dumps(steps)}"]
    arguments = {"arguments": [str(tmp_path / "shaped.yaml"), *settings], "pipeline": None, "data": None}
    tool = runpy.run_path(str(TOOLS / "evaluate.py"))["main"]
    tool(argparse.Namespace(**arguments, weights=None, device="cpu", dtype="float32"))
    assert (tmp_path / "run/metrics/video_folder.json").is_file()
    protocol = Protocol(name="x", n_context=2, n_predicted=8, frame_size=[HEIGHT, WIDTH], metrics=["fvd"])
    message = f"metrics: fvd is of frames of 1 or 3 channels, the data set serves {n_channels}; leave it out"
    with pytest.raises(ValueError, match=message):
        check_fit(pipe, prepared_videos(tmp_path / "set", "test", 4), protocol)
    encode(tmp_path / "clip.mp4", picture(12, 32, 48))
    with pytest.raises(latentcast.cli.UserError, match=rf"a video has 1 \(grey\) or 3 \(RGB\), found {n_channels}"):
        sampled(tmp_path / "run/pipeline", tmp_path, tmp_path / "clip.mp4", "--n-frames", "2")

"""VideoPredictionPipeline: shapes, sampling, output types, bad input, and saving and loading in a fresh process."""

import functools
import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from tiny import random_frames, small_recurrent_vae, small_sde_diffusion, tiny_tokenizer

from latentcast import VQVAE, PixelTokenizer, Prior, VideoPredictionPipeline, VideoTransformer, load_model
from latentcast.config import load_pipeline_config
from latentcast.pipelines.base import VideoPipeline


def transformer(spec, **kwargs):
    """A video transformer over any codes, with weights that make it far from uniform."""
    torch.manual_seed(0)
    size = {"dim": 16, "embed_dim": 8, "n_heads": 2, "head_dim": 8, "n_layers": 1}
    prior = VideoTransformer(spec, n_frames=4, subscale=[4, 1, 1], **size, **kwargs)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


class Drift(Prior):
    """The shortest prior there can be: the last frame, plus noise. For the spaces that no prior here works in yet."""

    @register_to_config
    def __init__(self, latent_spec, accepts="latents", noise=0.1):
        super().__init__()
        self.accepts = accepts
        self.scale = torch.nn.Parameter(torch.tensor(noise))

    def sample(
        self, context, n_frames, *, num_samples=1, generator=None, progress=None, frame_times=None, scheduler=None
    ):
        self.seen = {"context": context, "frame_times": frame_times, "scheduler": scheduler}
        last = context[:, None, -1:].expand(-1, num_samples, n_frames, *context.shape[2:])
        return last + self.scale * torch.randn(last.shape, generator=generator, dtype=context.dtype)


@pytest.fixture(scope="module")
def pipe():
    tokenizer = tiny_tokenizer("sliced_vqvae")
    pipe = VideoPredictionPipeline(transformer(tokenizer.latent_spec).eval(), tokenizer, n_context=2, fps=12.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def frames(pipe):
    return random_frames(pipe.tokenizer, batch=2, n_frames=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_futures_of_any_length_and_number(pipe, frames):
    for n_frames, num_samples in [(1, 1), (2, 3), (7, 2)]:  # 7: beyond the trained clip
        futures = pipe(frames, n_frames=n_frames, num_samples=num_samples).frames
        assert futures.shape == (2, num_samples, n_frames, *frames.shape[2:])
        assert futures.dtype == torch.float32
        assert futures.abs().max() <= 1
    assert pipe(frames[0], n_frames=2).frames.shape == (1, 1, 2, *frames.shape[2:])


def test_the_result_is_encode_sample_decode(pipe, frames):
    futures = pipe(frames, n_frames=3, num_samples=2, generator=seeded(), temperature=0.7).frames
    codes = pipe.tokenizer.encode(frames).codes
    sampled = pipe.prior.sample(codes, 3, num_samples=2, generator=seeded(), temperature=0.7)
    with torch.no_grad():
        for b in range(2):
            expected = pipe.tokenizer.decode(pipe.tokenizer.codes_to_latents(sampled[b]))
            torch.testing.assert_close(futures[b], expected)


def test_sampling_is_reproducible_and_samples_differ(pipe, frames):
    one = pipe(frames, n_frames=3, num_samples=2, generator=seeded(1)).frames
    same = pipe(frames, n_frames=3, num_samples=2, generator=seeded(1)).frames
    other = pipe(frames, n_frames=3, num_samples=2, generator=seeded(2)).frames
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1])


class Bars:
    """Stands for tqdm: which bars were opened, how far they came, whether they were closed."""

    def __init__(self):
        self.opened = []

    def __call__(self, iterable=None, total=None):
        self.opened.append(self)
        self.total, self.n, self.closed = total, 0, False
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def update(self, n=1):
        self.n += n

    def close(self):
        self.closed = True


def test_with_a_generator_each_contexts_futures_do_not_hang_on_the_rest_of_the_batch(pipe, frames, monkeypatch):
    monkeypatch.setattr(pipe, "progress_bar", Bars())
    options = {"n_frames": 3, "num_samples": 2}
    both = pipe(frames, generator=[seeded(1), seeded(2)], **options).frames
    assert len(pipe.progress_bar.opened) == 1 and pipe.progress_bar.closed
    assert pipe.progress_bar.n == pipe.progress_bar.total
    swapped = pipe(frames.flip(0), generator=(seeded(2), seeded(1)), **options).frames
    alone = pipe(frames[1], generator=seeded(2), **options).frames
    assert torch.equal(both[1:], alone) and torch.equal(swapped.flip(0), both)
    again = pipe(frames, generator=[seeded(1), seeded(3)], **options).frames
    assert torch.equal(again[0], both[0]) and not torch.equal(again[1], both[1])


def test_options_of_each_context_go_with_its_generator():
    tokenizer = tiny_tokenizer("continuous_pixel")
    pipe = VideoPredictionPipeline(small_sde_diffusion().eval(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    frames = random_frames(tokenizer, batch=2, n_frames=2)
    times = torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    options = {"frame_times": times, "motion_seed": [5, 6], "n_steps": 1}
    both = pipe(frames, generator=[seeded(1), seeded(2)], **options).frames
    options = {"frame_times": times[1:], "motion_seed": [6], "num_inference_steps": 1}
    assert torch.equal(both[1:], pipe(frames[1:], generator=[seeded(2)], **options).frames)
    with pytest.raises(ValueError, match="motion_seed: expected a whole number of at least 0, or one for each of 2"):
        pipe(frames, generator=[seeded(1), seeded(2)], motion_seed=[1, 2, 3], n_steps=1, n_frames=1)
    with pytest.raises(ValueError, match=r"num_inference_steps: .* these once, found n_steps as well"):
        pipe(frames, n_frames=1, n_steps=1, num_inference_steps=1)


def test_fixed_groups_of_each_context_go_with_its_generator():
    tokenizer = PixelTokenizer(1, 8, 16, levels=None)
    pipe = VideoPredictionPipeline(small_recurrent_vae(tokenizer.latent_spec, n_groups=2).eval(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    frames, values = random_frames(tokenizer, batch=2, n_frames=2), torch.randn(2, 2, 3)
    both = pipe(frames, 2, generator=[seeded(1), seeded(2)], z_groups={1: values, 2: 0}).frames
    alone = pipe(frames[1:], 2, generator=seeded(2), z_groups={1: values[1:], 2: 0}).frames
    assert torch.equal(both[1:], alone)


def test_frames_of_every_usual_kind_are_the_same_frames(pipe):
    """uint8, arrays of both layouts, PIL images and lists of them: all as the tensor in [-1, 1] that they stand for."""
    uint8 = torch.randint(256, (2, 2, 1, 8, 16), dtype=torch.uint8, generator=seeded())
    expected = pipe(uint8.float() / 127.5 - 1, 2, generator=seeded(), output_type="latent").frames
    last, unit = uint8.movedim(-3, -1).numpy(), uint8.float() / 255
    images = [[PIL.Image.fromarray(frame[..., 0]) for frame in clip] for clip in last]
    kinds = {
        "uint8": uint8,
        "list of clips": list(uint8),
        "list of frames": [list(clip) for clip in uint8],
        "array": last,
        "array, channels first": uint8.numpy(),
        "array of floats": last / 255,
        "arrays": list(last),
        "images": images,
        "images in colour": [[image.convert("RGB") for image in clip] for clip in images],
    }
    for name, given in kinds.items():
        assert torch.equal(pipe(given, 2, generator=seeded(), output_type="latent").frames, expected), name
    given = pipe(unit, 2, generator=seeded(), output_type="latent", value_range=(0, 1)).frames
    assert torch.equal(given, expected)
    one = pipe(images[0], 2, output_type="latent").frames
    assert one.shape[0] == 1
    bright = torch.linspace(0, 1, 256).view(2, 1, 8, 16)
    assert pipe(bright, 1, value_range=(-1, 1)).frames.shape[0] == 1


def test_what_a_pipeline_gives_it_takes(pipe, frames):
    given = {kind: pipe(frames, 2, generator=seeded(), output_type=kind).frames for kind in ("np", "pil")}
    codes = [
        pipe(clips, 2, generator=seeded(1), output_type="latent").frames
        for clips in (given["np"][:, 0], [clip[0] for clip in given["pil"]])
    ]
    assert codes[0].shape == codes[1].shape


def test_latents_and_plain_tuples(pipe, frames):
    codes = pipe(frames, 2, 3, generator=seeded(), output_type="latent").frames
    assert torch.equal(codes, pipe.prior.sample(pipe.encode(frames), 2, num_samples=3, generator=seeded()))
    decoded = pipe(frames, 2, 3, generator=seeded(), return_dict=False)
    assert type(decoded) is tuple and len(decoded) == 1
    torch.testing.assert_close(decoded[0], pipe.decode(codes))


def test_the_context_is_encoded_once_and_decoding_is_bounded(pipe, frames, monkeypatch):
    encoded, decoded = [], []
    encode, decode = pipe.tokenizer.encode, pipe.tokenizer.decode
    monkeypatch.setattr(pipe.tokenizer, "encode", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr(pipe.tokenizer, "decode", lambda x: decoded.append(x.shape[0] * x.shape[1]) or decode(x))
    parts = pipe(frames, n_frames=3, num_samples=4, generator=seeded(), decode_batch=5).frames
    assert encoded == [2]
    assert max(decoded) == 5
    assert sum(decoded) == 2 * 4 * 3
    torch.testing.assert_close(parts, pipe(frames, n_frames=3, num_samples=4, generator=seeded()).frames)


def test_output_types(pipe, frames):
    tensor = pipe(frames, n_frames=2, num_samples=3, generator=seeded()).frames
    array = pipe(frames, n_frames=2, num_samples=3, generator=seeded(), output_type="np").frames
    images = pipe(frames, n_frames=2, num_samples=3, generator=seeded(), output_type="pil").frames
    assert array.shape == (2, 3, 2, 8, 16, 1)
    np.testing.assert_allclose(array, (tensor.permute(0, 1, 2, 4, 5, 3).numpy() + 1) / 2, atol=1e-6)
    assert (len(images), len(images[0]), len(images[0][0])) == (2, 3, 2)
    image = images[1][2][0]
    assert (image.size, image.mode) == ((16, 8), "L")
    np.testing.assert_allclose(np.asarray(image) / 255, array[1, 2, 0, ..., 0], atol=0.5 / 255 + 1e-6)
    grey = PixelTokenizer(3, 4, 6)
    rgb = VideoPredictionPipeline(transformer(grey.latent_spec).eval(), grey)
    rgb.set_progress_bar_config(disable=True)
    image = rgb(random_frames(grey), n_frames=1, output_type="pil").frames[0][0][0]
    assert isinstance(image, PIL.Image.Image)
    assert (image.size, image.mode) == ((6, 4), "RGB")


def test_models_in_training_are_sampled_in_eval_mode_and_left_as_they_were(frames):
    tokenizer = tiny_tokenizer("sliced_vqvae")
    pipe = VideoPredictionPipeline(transformer(tokenizer.latent_spec).train(), tokenizer.train())
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.prior.decoder.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    pipe.tokenizer.decoder.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    pipe.tokenizer.encoder.eval()
    weights = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    pipe(frames, n_frames=1)
    assert seen and not any(seen)
    assert pipe.prior.training and pipe.tokenizer.decoder.training and not pipe.tokenizer.encoder.training
    assert all(torch.equal(weights[name], value) for name, value in tokenizer.state_dict().items())


def test_pixels_as_codes_need_no_tokenizer():
    spec = PixelTokenizer(1, 4, 4).latent_spec
    prior = transformer(spec).eval()
    # The code of pixel i is drawn from the channel head; with one-hot biases the sample is known in advance.
    with torch.no_grad():
        for name, parameter in prior.head.named_parameters():
            parameter.zero_() if "bias" not in name else parameter.copy_(100.0 * (torch.arange(len(parameter)) == 51))
    bare, named = VideoPredictionPipeline(prior), VideoPredictionPipeline(prior, PixelTokenizer.from_spec(spec))
    frames = random_frames(bare.tokenizer)
    for pipe in (bare, named):
        pipe.set_progress_bar_config(disable=True)
        futures = pipe(frames, n_frames=2).frames
        torch.testing.assert_close(futures, torch.full_like(futures, 51 / 127.5 - 1))


def test_a_prior_over_latents_gets_latents_and_is_not_quantised():
    tokenizer = tiny_tokenizer("sliced_vqvae")
    frames = random_frames(tokenizer)
    pipe = VideoPredictionPipeline(Drift(tokenizer.latent_spec), tokenizer)
    futures = pipe(frames, n_frames=2, num_samples=2, generator=seeded()).frames
    latents = tokenizer.encode(frames).latents
    torch.testing.assert_close(pipe.prior.seen["context"], latents)
    drifted = pipe.prior.sample(latents, 2, num_samples=2, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(futures[:, 1], tokenizer.decode(drifted[:, 1]))
        assert not torch.allclose(futures[:, 1], tokenizer.decode(tokenizer.quantize(drifted[:, 1])))


def test_a_prior_over_frames_needs_no_tokenizer():
    spec = PixelTokenizer(3, 4, 6, levels=None).latent_spec
    pipe = VideoPredictionPipeline(Drift(spec, accepts="pixels", noise=3.0))
    frames = torch.rand(2, 3, 3, 4, 6) * 2 - 1
    futures = pipe(frames, n_frames=2, num_samples=2, generator=seeded()).frames
    expected = pipe.prior.sample(frames, 2, num_samples=2, generator=seeded())
    torch.testing.assert_close(futures, expected.clamp(-1, 1))
    with pytest.raises(ValueError, match=r"frames: expected H = 4, found"):
        pipe(torch.zeros(1, 2, 3, 5, 6))


def test_frame_times_and_scheduler_reach_the_priors_that_take_them():
    tokenizer = tiny_tokenizer("pixel")
    scheduler = DDPMScheduler()
    pipe = VideoPredictionPipeline(Drift(tokenizer.latent_spec), tokenizer, scheduler)
    frames = random_frames(tokenizer)
    assert pipe(frames, frame_times=[0.5, 1.0, 2.5]).frames.shape[2] == 3
    assert pipe.prior.seen["frame_times"].tolist() == [0.5, 1.0, 2.5]
    assert pipe.prior.seen["scheduler"] is scheduler
    with pytest.raises(ValueError, match="unknown sampler option 'scheduler'"):
        pipe(frames, n_frames=3, scheduler="ddim")
    VideoPredictionPipeline(pipe.prior, tokenizer)(frames, n_frames=3, scheduler="ddim")
    assert pipe.prior.seen["scheduler"] == "ddim"
    pipe(frames, n_frames=3, frame_times=torch.ones(2, 3))
    assert pipe.prior.seen["frame_times"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"frame_times: expected shape \(3,\) or \(2, 3\), found \(2,\)"):
        pipe(frames, n_frames=3, frame_times=[1.0, 2.0])


def test_the_progress_bar_follows_the_sampler(frames, capfd):
    tokenizer = tiny_tokenizer("sliced_vqvae")
    pipe = VideoPredictionPipeline(transformer(tokenizer.latent_spec).eval(), tokenizer)
    pipe.set_progress_bar_config(desc="futures")
    pipe(frames, n_frames=2)
    assert "futures: 100%" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(frames, n_frames=2)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": torch.zeros(2, 2, 3, 8, 16)}, "frames: expected C = 1"),
        ({"frames": torch.zeros(2, 2, 1, 16, 16)}, "frames: expected H = 8"),
        ({"frames": torch.zeros(1, 8, 16)}, r"frames: expected a tensor of shape \(B, T, C, H, W\)"),
        ({"frames": "video.mp4"}, "frames: expected a tensor"),
        ({"frames": [torch.zeros(2, 1, 8, 16), "b"]}, "frames: expected a tensor of shape .*, found list"),
        ({"frames": torch.zeros(2, 2, 1, 8, 16, dtype=torch.int32)}, "frames: expected floats"),
        ({"frames": np.zeros((2, 8, 16, 1), int)}, "frames: expected floats or uint8, found int64"),
        (
            {"frames": np.full((2, 8, 16, 1), -1.0)},
            r"frames: expected values in \[0, 1\], found \[-1, -1\]; value_range",
        ),
        ({"frames": [torch.zeros(2, 1, 8, 16), torch.zeros(3, 1, 8, 16)]}, "frames: expected one shape, found"),
        ({"frames": np.zeros((2, 8, 17, 1), np.uint8)}, r"frames: expected W = 16, found \(1, 2, 1, 8, 17\)"),
        (
            {"frames": torch.linspace(0, 1, 256).view(2, 1, 8, 16)},
            r"found none below 0, as in \[0, 1\]; give value_range",
        ),
        ({"value_range": (0, 255)}, r"value_range: expected \(-1, 1\), \(0, 1\) or None, found \(0, 255\)"),
        ({"value_range": (0, 1)}, r"frames: expected values in \[0, 1\], found \[-"),
        ({"frames": torch.full((2, 2, 1, 8, 16), 255.0)}, r"frames: expected values in \[-1, 1\]"),
        ({"frames": torch.zeros(0, 2, 1, 8, 16)}, "frames: expected at least one clip, found none"),
        ({"generator": [torch.Generator()]}, "generator: expected one for each of 2 contexts, found 1"),
        ({"generator": [torch.Generator(), 3]}, "generator: expected .* one for each context, found a list with int"),
        ({"generator": 3}, "generator: expected a torch.Generator, or a list .*, found int"),
        ({"num_inference_steps": 3}, "num_inference_steps: expected a prior with n_steps.*found a VideoTransformer"),
        ({"frame_times": "a"}, "frame_times: expected numbers, found 'a'"),
        ({"frames": torch.zeros(2, 0, 1, 8, 16)}, "n_context: expected at least 1, found 0"),
        ({"n_frames": 0}, "n_frames: expected a whole number of at least 1, found 0"),
        ({"n_frames": 2.5}, "n_frames: expected a whole number"),
        ({"num_samples": 0}, "num_samples: expected a whole number of at least 1, found 0"),
        ({"output_type": "npy"}, "output_type: expected one of pt, np, pil, latent, found 'npy'"),
        ({"frame_times": [1.0, 2.0]}, "VideoTransformer predicts whole frame steps: it takes no frame_times"),
        ({"temperatur": 1.0}, "unknown sampler option 'temperatur'; did you mean 'temperature'"),
        ({"steps": 3}, r"unknown sampler option 'steps' \(known: compile, temperature, top_k, top_p, use_cache\)"),
        ({"decode_batch": 0}, "decode_batch: expected a whole number of at least 1, found 0"),
    ],
)
def test_bad_calls_are_refused(pipe, frames, change, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"frames": frames, "n_frames": 2, **change})


def test_cpu_offload_brings_each_model_in_before_its_turn():
    pipe = VideoPredictionPipeline(small_sde_diffusion("kl_vae").eval(), tiny_tokenizer("kl_vae"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model_cpu_offload_seq == "tokenizer->prior"
    turns = []

    class Record(ModelHook):
        def pre_forward(self, module, *arguments, **options):
            turns.append(type(module).__name__)
            return arguments, options

    for model in (pipe.tokenizer, pipe.prior):
        add_hook_to_module(model, Record())
    pipe(random_frames(pipe.tokenizer, batch=1, n_frames=2), n_frames=1, n_steps=1)
    assert turns == ["KLVAE", "SDEDiffusion", "KLVAE"]


def test_models_that_do_not_belong_together_are_refused():
    tokenizer, other = tiny_tokenizer("sliced_vqvae"), tiny_tokenizer("vqvae")
    prior = transformer(tokenizer.latent_spec)
    with pytest.raises(ValueError, match=r"prior against tokenizer.*codebook_sizes \[6, 6, 6, 6\] against \[12\]"):
        VideoPredictionPipeline(prior, other)
    with pytest.raises(ValueError, match="VideoTransformer predicts codes: it needs the tokenizer they came from"):
        VideoPredictionPipeline(prior)
    with pytest.raises(ValueError, match="VideoTransformer: its sampler takes no scheduler"):
        VideoPredictionPipeline(prior, tokenizer, DDPMScheduler())
    continuous = tiny_tokenizer("continuous_pixel")
    with pytest.raises(ValueError, match="Drift predicts codes; PixelTokenizer has none"):
        VideoPredictionPipeline(Drift(continuous.latent_spec, accepts="codes"), continuous)


# Saving and loading -------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch
from latentcast import VideoPredictionPipeline
from latentcast.config import load_pipeline_config
from latentcast.pipelines.base import VideoPipeline
folder, frames_file = sys.argv[1:]
frames, expected = torch.load(frames_file, weights_only=True)
for option, dtype in (("dtype", torch.float32), ("torch_dtype", torch.bfloat16)):  # the new and the old name
    pipe = VideoPipeline.from_pretrained(folder, **{option: dtype})
    assert type(pipe) is VideoPredictionPipeline, type(pipe)
    assert "pytorch_lightning" not in sys.modules and "wandb" not in sys.modules
    assert pipe.prior.dtype == dtype
    assert not pipe.prior.training and not pipe.tokenizer.training
    codes = pipe.tokenizer.quantizer.state_dict().values()
    codebooks = {tensor.dtype for tensor in codes if tensor.is_floating_point()}
    assert codebooks == {torch.float32}, codebooks
    futures = pipe(frames, n_frames=3, num_samples=2, generator=torch.Generator().manual_seed(3)).frames
    assert futures.dtype == torch.float32 and futures.shape == expected.shape and futures.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(futures, expected)
    print(pipe.config.n_context, pipe.config.fps)
"""


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_pipeline_works_in_a_fresh_process(pipe, frames, saved, tmp_path):
    futures = pipe(frames, n_frames=3, num_samples=2, generator=seeded(3)).frames
    torch.save((frames, futures), tmp_path / "frames.pt")
    command = [sys.executable, "-c", FRESH, str(saved), str(tmp_path / "frames.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "12.5"] * 2


def test_the_index_names_public_classes(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "latentcast.VideoPredictionPipeline"
    assert index["prior"] == ["latentcast", "VideoTransformer"]
    assert index["tokenizer"] == ["latentcast", "VQVAE"]


def test_pixel_pipelines_are_saved_and_loaded(tmp_path):
    tokenizer = tiny_tokenizer("pixel")
    pipe = VideoPredictionPipeline(transformer(tokenizer.latent_spec).eval())
    pipe.save_pretrained(tmp_path / "pixels")
    loaded = VideoPredictionPipeline.from_pretrained(tmp_path / "pixels")
    loaded.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    frames = random_frames(tokenizer)
    futures = [p(frames, n_frames=2, generator=seeded()).frames for p in (pipe, loaded)]
    torch.testing.assert_close(*futures)


def test_components_can_be_replaced_on_loading_and_pipelines_moved(saved, pipe, frames):
    loaded = VideoPredictionPipeline.from_pretrained(saved, tokenizer=pipe.tokenizer)
    assert loaded.tokenizer is pipe.tokenizer
    assert loaded.to("meta").prior.device.type == "meta"
    shared = VideoPredictionPipeline(**pipe.components)
    assert shared.prior is pipe.prior


def refused(folder, cls=VideoPredictionPipeline):
    """The message of the error that loading raises; one line that names the folder."""
    with pytest.raises((OSError, ValueError)) as caught:
        cls.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert str(folder) in message
    return message


def test_a_folder_without_weights_is_refused(copy):
    next((copy / "prior").glob("*.safetensors")).unlink()
    assert "no safetensors weights" in refused(copy)


def test_a_folder_without_a_component_is_refused(copy):
    shutil.rmtree(copy / "tokenizer")
    assert "tokenizer" in refused(copy)


def test_damaged_weights_are_refused(copy):
    weights = next((copy / "prior").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert weights.name in refused(copy)


def test_weights_of_another_model_are_refused(copy):
    config = json.loads((copy / "prior/config.json").read_text())
    (copy / "prior/config.json").write_text(json.dumps(config | {"n_layers": 2}))
    assert "tensors are missing" in refused(copy)


def test_what_is_no_pipeline_is_refused(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("text")
    assert "not a folder" in refused(tmp_path / "file")
    assert "not a folder" in refused(tmp_path / "nowhere")
    assert "not a folder" in refused("runs/no_such_run/pipeline")
    (copy / "model_index.json").write_text("{")
    assert "not valid JSON" in refused(copy)
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "expected a VideoPipeline, found 'StableDiffusionPipeline'" in refused(copy, VideoPipeline)


def test_diffusers_own_class_names_the_one_to_use(saved, frames):
    with pytest.raises(AttributeError, match=r"latentcast\.VideoPredictionPipeline"):
        DiffusionPipeline.from_pretrained(saved)


def test_pipelines_saved_before_the_full_name_are_loaded(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "VideoPredictionPipeline"}))
    assert type(VideoPipeline.from_pretrained(copy)) is VideoPredictionPipeline


def test_push_to_hub_without_a_network_is_one_line(pipe, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")  # nobody listens there
    to = {"repo_id": "someone/videos", "token": "none"}
    for thing in (pipe, pipe.prior):
        saving = functools.partial(thing.save_pretrained, str(tmp_path), push_to_hub=True, **to)
        for push in (functools.partial(thing.push_to_hub, **to), saving):
            with pytest.raises(OSError, match=r"^push_to_hub someone/videos: failed \(") as caught:
                push()
            assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_fetched(saved, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = VideoPredictionPipeline.from_pretrained("someone/videos", revision="v1", dtype=torch.float32)
    assert type(loaded.prior) is VideoTransformer
    assert asked == {"name": "someone/videos", "revision": "v1", "allow_patterns": ["*.json", "*.safetensors"]}

    def unreachable(name, **options):
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert refused("someone/videos") == "pipeline someone/videos: not a folder, and not on the hub (offline)"


def test_a_runs_folder_is_told_where_its_models_are(tmp_path):
    tokenizer = tiny_tokenizer("vqvae")
    VideoPredictionPipeline(transformer(tokenizer.latent_spec), tokenizer, n_context=2).save_pretrained(
        tmp_path / "pipeline"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    both = f"{tmp_path / 'tokenizer'} or {tmp_path / 'pipeline/tokenizer'}"
    for load, hint in (
        (VideoPredictionPipeline.from_pretrained, f"no model_index.json in it; try {tmp_path / 'pipeline'}"),
        (VQVAE.from_pretrained, f"no config.json here; .*; try {both}"),
        (VideoTransformer.from_pretrained, f"no config.json here; .*; try {tmp_path / 'pipeline/prior'}"),
        (load_model, f"no config.json here; .*; try {both} or {tmp_path / 'pipeline/prior'}"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{hint}$"):
            load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"written by save_pretrained$"):
        VQVAE.from_pretrained(tmp_path.parent)


def test_a_protocol_that_follows_the_training_follows_a_pipeline(tmp_path):
    tokenizer = tiny_tokenizer("vqvae")
    VideoPredictionPipeline(transformer(tokenizer.latent_spec), tokenizer, n_context=3).save_pretrained(tmp_path / "p")
    config = load_pipeline_config(tmp_path / "p", "video_folder", ["protocol=video_folder", "data.root=x"])
    assert (config.protocol.n_context, config.protocol.frame_size) == (3, tokenizer.latent_spec["frame_height"])

"""README and docs: every block of shell and Python runs at tiny size, from the file itself; the site; the notebooks."""

import functools
import re
import shutil

import pytest
import torch
from digit_files import small_mnist
from doc_blocks import DIGITS, EVALUATION, PAGES, TRAINING, Block, blocks, calls, check, is_script, run, run_python
from video_files import counter_frames, encode

import latentcast
from latentcast import VideoPredictionPipeline, instantiate, load_config, probe

# Calls that are read but not run: page, beginning of the call -> why. All others run.
NOT_RUN = {
    ("README.md", "make"): "installs everything, or runs this",
    ("README.md", "python3 -m venv"): "of an installation",
    ("README.md", "pip"): "of an installation",
    ("README.md", "ruff"): "of make lint",
    ("README.md", "pyright"): "of make lint",
    ("README.md", "python -m pytest"): "runs this",
    ("README.md", "python tools/quickstart.py"): "four processes; its tools run on the experiment in the fixture below",
    ("README.md", "python tools/figures.py"): "the same in docs/figures.md",
    ("README.md", "python tools/play.py"): "serves until it is stopped: test_play.py",
    ("README.md", "python tools/playground.py"): "serves until it is stopped: test_playground.py",
    ("README.md", "python tools/fetch_weights.py"): "downloads: test_weights.py",
    ("README.md", "python tools/prepare_dataset.py bair"): "needs the archive: test_bair.py writes one",
    ("README.md", "python tools/prepare_dataset.py flow"): "simulates for minutes: test_flow_dataset.py",
    ("README.md", "python tools/prepare_dataset.py check"): "of the flow, which is not there",
    ("CONTRIBUTING.md", ""): "of an installation; what adds models is followed by test_contributing.py",
    ("docs/datasets.md", "pip"): "of an installation",
    ("docs/datasets.md", "python tools/prepare_dataset.py gym --env ALE/Pong"): "README's, which runs",
    ("docs/reliability.md", "python tests/stress"): "for tens of minutes, not part of make test",
    ("docs/matrix.md", ""): "test_swap_matrix.py runs every pair through the same tools",
    ("docs/results/README.md", ""): "trainings of hours, by the tools that run here, on data that are not ours to ship",
    ("docs/results/tokenizers.md", ""): "the same",
    ("docs/scaling.md", ""): "of clusters, and benchmarks at the papers' sizes: test_shares.py, test_ranks.py",
    ("docs/speed.md", ""): "benchmarks at the papers' sizes: test_training_benchmark.py, test_gpu_day.py",
    ("docs/wandb.md", "pip"): "of an installation",
    ("docs/wandb.md", "python tools/wandb_dashboard.py --project latentcast --lineage"): "needs W&B: test_wandb.py",
    (
        "docs/world_models.md",
        "python tools/train_prior.py EXPERIMENT",
    ): "the first is README's Pong; no data have labels",
    ("docs/world_models.md", "python tools/prepare_dataset.py gym --env ALE/Pong"): "README's, which runs",
    ("docs/world_models.md", "python tools/train_tokenizer.py pong_small"): "README's, which runs",
    ("docs/world_models.md", "python tools/encode_dataset.py pong_small"): "README's, which runs",
    ("docs/world_models.md", "python tools/train_prior.py pong_small"): "README's, which runs",
    ("docs/world_models.md", "python tools/evaluate.py pong_small"): "the next block is evaluated",
    ("docs/world_models.md", "python tools/play.py"): "serves until it is stopped: test_play.py",
    ("docs/world_models.md", "pip"): "of an installation",
    ("docs/world_models.md", "python tools/prepare_dataset.py gym --env CliffWalking"): "needs pygame, no extra's",
    ("docs/world_models.md", "python tools/train_tokenizer.py cliff_small"): "of the data before",
    ("docs/world_models.md", "python tools/encode_dataset.py cliff_small"): "of the data before",
    ("docs/world_models.md", "python tools/train_prior.py cliff_small"): "of the data before",
    ("docs/world_models.md", "python tools/evaluate.py cliff_small"): "of the data before",
}

CODE_PRIOR = "prior.dim=16 prior.embed_dim=8 prior.n_heads=2 prior.head_dim=8 prior.n_layers=1"
TINY = [  # what is added to calls that match, all that do
    (r"train_(tokenizer|prior)", TRAINING),
    (r"encode_dataset", "batch_size=2 num_workers=0 logger=none"),
    (r"evaluate", f"{EVALUATION} protocol.best_of=[] --device cpu"),
    (r"evaluate video_folder_small", "evaluation.sampler.n_steps=2"),
    (r"sample", "--n-frames 2 --num-samples 1 n_steps=2 --device cpu"),
    (r"figures", "--n-clips 1 --num-samples 2 --device cpu"),
    (r"prepare_dataset", "--workers 0"),
    (r"prepare_dataset gym", "--frames 120 max_frames=40 val_fraction=.25 test_fraction=.25"),
    (r"prepare_dataset gym .*CarRacing", "--env corridor:Corridor-v0 max_frames=6 --frames 20"),
    (r"prepare_dataset smmnist", "n_train=4 n_val=2 n_test=2 length=15"),
    (r"train_prior video_folder_small data.root=\S+$", "prior.width=16 prior.denoising_multipliers=[1]"),
    (r"(train_tokenizer|encode_dataset|train_prior) pong_small", f"tokenizer.batch_norm=true {CODE_PRIOR}"),
    (r"(train_tokenizer|encode_dataset|train_prior) quickstart", f"{DIGITS} {CODE_PRIOR}"),
    (r"(train_tokenizer|encode_dataset|train_prior) lvt_smmnist", CODE_PRIOR),
    (r"wandb_dashboard", "--dry-run"),
]

PLACEHOLDERS = {  # names in capitals that stand for what a reader has -> what the test has
    "FOLDER": "videos",
    "VIDEO_OR_FOLDER": "video.mp4",
    "MNIST_FOLDER": "mnist",
    "RUN_DIR": "runs/video_folder_small",
    "OTHER_RUN_DIR": "runs/second",
    "OWNER/NAME": "runs/quickstart/pipeline",
    "EXPERIMENT": "pong_small",
    "DIR": "robot",
    "LEROBOT": "lerobot",
    "STORE": "memory://docs",
}


def filled(call):
    """A call with what the test has in the place of what stands for the reader's."""
    stands = "|".join(PLACEHOLDERS)
    return [re.sub(rf"(?<![\w/])({stands})(?!\w)", lambda name: PLACEHOLDERS[name[0]], word) for word in call]


def reason_not_to_run(page, call):
    return next((why for (of, start), why in NOT_RUN.items() if of == page and " ".join(call).startswith(start)), None)


def tiny(call):
    said = " ".join([re.sub(r"tools/(\w+)\.py", r"\1", call[1]), *call[2:]])
    return [word for pattern, extra in TINY if is_script(call) and re.match(pattern, said) for word in extra.split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what README's reader has: videos, MNIST's files, robots' videos with tables of actions."""
    place = tmp_path_factory.mktemp("reader")
    for folder in ("videos", "robot", "lerobot/videos/chunk-000/top", "lerobot/data/chunk-000"):
        (place / folder).mkdir(parents=True)
    for n in range(4):
        encode(place / f"videos/{n}.mp4", counter_frames(16, first=20 * n))
    shutil.copy(place / "videos/3.mp4", place / "video.mp4")
    shutil.copy(place / "videos/3.mp4", place / "clip.mp4")
    for n in range(3):
        name = f"episode_00000{n}"
        for video in (f"robot/{name}.mp4", f"lerobot/videos/chunk-000/top/{name}.mp4"):
            shutil.copy(place / f"videos/{n}.mp4", place / video)
        rows = [[t / 16, -t / 16] for t in range(16)]
        (place / f"robot/{name}.csv").write_text("".join(f"{x},{y}\n" for x, y in rows))
        write_parquet(place / f"lerobot/data/chunk-000/{name}.parquet", rows)
    (steer,) = (block for block in blocks("docs/datasets.md") if block.kind == "python")
    (place / "drive.py").write_text(f"{steer.text}\n\ndef my_network(observation):\n    return 5\n")
    with pytest.MonkeyPatch.context() as patch:
        small_mnist(place / "mnist", patch)
        yield place


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra latentcast[parquet] is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"action": rows}), path)


def pipeline(place, run, n_frames, size, **names):
    """Names that blocks of Python take for known: a pipeline and frames for it."""
    pipe = VideoPredictionPipeline.from_pretrained(place / f"runs/{run}/pipeline")
    frames = torch.rand(1, n_frames, pipe.prior.config.latent_spec["frame_channels"], size, size) * 2 - 1
    known = {name: getattr(latentcast, name) for name in latentcast.__all__}
    return known | {"torch": torch, "pipe": pipe, "frames": frames} | names


def quickstart_names(place):
    config = load_config(place / "runs/quickstart/config_prior.yaml", [])
    return pipeline(place, "quickstart", 5, 16, dataset=instantiate(config.data)(split="test"))


def pong_names(place):
    return pipeline(place, "pong_small", 4, 64, actions=torch.zeros(1, 4 + 16, dtype=torch.int64))


NAMES = {  # page and section -> what its Python takes for known
    ("README.md", "World models"): pong_names,
    ("docs/world_models.md", "In Python"): pong_names,
    ("docs/architecture.md", "Interfaces"): quickstart_names,
    ("docs/figures.md", ""): quickstart_names,
    ("docs/datasets.md", "Actions"): lambda place: {"my_network": lambda observation: 5},
}
VIDEOS, PONG, DATA = (("README.md", heading) for heading in ("Your own videos", "World models", "Benchmark data"))
NEEDS = {  # page and section -> sections, and experiments to train, that go before
    ("README.md", "Seeing what a model does"): [VIDEOS],
    ("README.md", "Evaluation"): [DATA, "lvt_smmnist"],
    ("README.md", "In Python"): [VIDEOS],
    ("docs/world_models.md", "In Python"): [PONG],
    ("docs/architecture.md", "Interfaces"): ["quickstart"],
    ("docs/figures.md", ""): ["quickstart"],
}
FOLLOWED = [("CONTRIBUTING.md", f"Adding a {what}") for what in ("tokenizer", "prior")]  # by test_contributing.py
SECTIONS = {}
for page in PAGES:
    for block in blocks(page):
        if block.kind in ("sh", "python") and (page, block.heading) not in FOLLOWED:
            SECTIONS.setdefault((page, block.heading), []).append(block)


@pytest.fixture(scope="module")
def ran(place):
    """Run a section's blocks, once, after what it needs; an experiment's name: train that."""

    @functools.cache
    def ran(what):
        if isinstance(what, str):
            for tool in ("train_tokenizer", "encode_dataset", "train_prior"):
                call = ["python", f"tools/{tool}.py", what]
                run(call, place, tiny(call))
            return
        for needed in NEEDS.get(what, ()):
            ran(needed)
        names = None
        for block in SECTIONS[what]:
            if block.kind == "python":
                names = NAMES.get(what, lambda place: {})(place) if names is None else names
                run_python(block, names, place)
                continue
            for call in calls(block, place):
                if reason_not_to_run(what[0], call) is None:
                    run(filled(call), place, tiny(call))

    return ran


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_could_be(page, tmp_path):
    """Tools, experiments, protocols, keys and options of such calls are there."""
    for block in blocks(page):
        if block.kind == "sh" and (page, block.heading) not in FOLLOWED:
            for call in calls(block, tmp_path):
                try:
                    if reason_not_to_run(page, call):
                        check(filled(call))
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block}: {' '.join(call)}: {error}") from error


def test_a_call_that_could_not_be_run_is_found(tmp_path):
    for wrong, expected in {
        "python tools/train_priors.py quickstart": "train_priors.py",
        "latentcast train-priors quickstart": "train_priors.py",
        "latentcast train-prior quickstart prior.layers=2": "unknown key 'prior.layers'",
        "python tools/train_prior.py quickstarts": "did you mean 'quickstart'",
        "python tools/train_prior.py quickstart prior.layers=2": "unknown key 'prior.layers'",
        "python tools/evaluate.py quickstart protocol=two_digits": "no config named 'two_digits'",
        "python tools/sample.py --pipeline DIR --input DIR --frames 8": "unrecognized arguments: --frames",
        "python tools/prepare_dataset.py flow frame_sizes=64 --output data/flow": "frame_sizes",
        "python tools/figures.py DIR future": "'future'",
        "python benchmarks/gpu_day.py --minutes 8 --output gpu_day --train rvd_flow46": "did you mean 'rvd_flow64'",
        "pip install 'latentcast[gymnasium]'": "gymnasium",
        "make tests": "tests",
    }.items():
        (call,) = calls(Block("page", 1, "", "sh", wrong), tmp_path)
        with pytest.raises((Exception, SystemExit), match=expected):
            check(call)
    for wrong in ("for tool in a b; do python $tool.py", "rm -r runs", "python $UNSET"):
        with pytest.raises(AssertionError, match="page:1"):
            calls(Block("page", 1, "", "sh", wrong), tmp_path)


def test_each_exception_is_of_a_call_that_stands_there(tmp_path):
    said = {
        (block.page, " ".join(c))
        for found in SECTIONS.values()
        for block in found
        if block.kind == "sh"
        for c in calls(block, tmp_path)
    }
    for page, start in NOT_RUN:
        assert any(of == page and call.startswith(start) for of, call in said), (page, start)


@pytest.mark.parametrize("page, heading", SECTIONS)
def test_blocks_run(ran, page, heading):
    ran((page, heading))


def test_what_readmes_blocks_leave(ran, place):
    for section in SECTIONS:
        if section[0] == "README.md":
            ran(section)
    for name in ("runs/video_folder_small/metrics/video_folder.json", "runs/video_folder_small/samples/video.mp4"):
        assert (place / name).is_file()
    assert (place / "runs/video_folder_small/report.html").is_file()
    assert probe(place / "future_3.mp4").n_frames == 4 + 8

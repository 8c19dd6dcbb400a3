"""What a config from a stranger cannot do: run a program, write outside of run_dir, or take all time and memory."""

import inspect
import itertools
import os
import shutil
import sys
import time

import diffusers
import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.plugins.environments import ClusterEnvironment
from tiny_experiment import EXPERIMENT, TOOLS, Started, call_tool, write_experiment

import latentcast
from latentcast.cli import UserError
from latentcast.config import ConfigError, instantiate, load_config, to_container
from latentcast.data.base import VideoDataset
from latentcast.priors.base import Prior
from latentcast.targets import ELSEWHERE, PLACES
from latentcast.tokenizers.base import FrameTokenizer


def line_of(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 6000
    return message


def write(folder, content):
    """A stranger's experiment -> its path."""
    path = folder / "stranger.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(EXPERIMENT | content))
    return path


# What may stand where ------------------------------------------------------------------------------------------------

TORCH_OPTIMIZERS = {
    f"torch.optim.{name}"
    for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
}


def concrete(module, *bases):
    """Full names of the module's own public concrete subclasses."""
    return {
        f"{module.__name__}.{name}"
        for name in getattr(module, "__all__", dir(module))
        if inspect.isclass(found := getattr(module, name))
        and not name.startswith("_")
        and issubclass(found, bases)
        and found not in bases
        and not inspect.isabstract(found)
    }


def registered(base):
    found = {name: getattr(latentcast, name) for name in latentcast._EXPORTS}
    return {
        f"latentcast.{name}"
        for name, cls in found.items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base
    }


def intended():
    plugins = (pl.plugins.Precision, pl.plugins.CheckpointIO, pl.plugins.LayerSync)
    plugins = concrete(pl.plugins, *plugins) | concrete(pl.plugins.environments, ClusterEnvironment)
    accelerators = concrete(pl.accelerators, pl.accelerators.Accelerator)
    return {
        "tokenizer": registered(FrameTokenizer),
        "prior": registered(Prior),
        "data": registered(VideoDataset) | {"latentcast.prepared_videos"},
        "protocol": {"latentcast.Protocol"},
        "optimizer": TORCH_OPTIMIZERS,
        "trainer": {"pytorch_lightning.Trainer"},
        "trainer.callbacks": concrete(pl.callbacks, pl.Callback),
        "trainer.logger": {f"pytorch_lightning.loggers.{name}" for name in ("CSVLogger", "TensorBoardLogger")},
        "trainer.profiler": concrete(pl.profilers, pl.profilers.Profiler),
        "trainer.strategy": concrete(pl.strategies, pl.strategies.Strategy)
        - {"pytorch_lightning.strategies.DeepSpeedStrategy"},
        "trainer.plugins": plugins,
        "trainer.plugins.checkpoint_io": plugins,
        "trainer.accelerator": accelerators,
        "trainer.strategy.accelerator": accelerators,
        "trainer.strategy.cluster_environment": plugins,
        "trainer.strategy.checkpoint_io": plugins,
        "trainer.strategy.precision_plugin": plugins,
    }


def test_of_all_that_can_be_reached_only_what_is_meant_may_stand_at_a_place():
    packages = ("torch", "diffusers", "pytorch_lightning", "latentcast")
    reachable = {
        f"{package.__name__}.{name}" for package in (latentcast, diffusers) for name in package.__all__
    }  # lazy
    for name in latentcast._EXPORTS:
        getattr(latentcast, name)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages and module is not None:
            reachable |= {f"{name}.{attribute}" for attribute, found in list(vars(module).items()) if callable(found)}
    assert len(reachable) > 20_000 and "torch.package.PackageExporter" in reachable
    meant = intended()
    assert set(meant) == set(PLACES)
    for place, kind in PLACES.items():
        assert {path for path in reachable if kind.find(path) is not None} == meant[place], place
        assert set(kind.known()) == meant[place]
    schedulers, autoencoders = ({path for path in reachable if kind.find(path) is not None} for kind in ELSEWHERE)
    for path in schedulers:
        assert issubclass(getattr(diffusers, path.removeprefix("diffusers.")), diffusers.SchedulerMixin)
    assert "diffusers.DDIMScheduler" in schedulers
    assert autoencoders == {
        f"diffusers.{name}" for name in ("AsymmetricAutoencoderKL", "AutoencoderKL", "AutoencoderTiny", "VQModel")
    }


# Hostile configs -----------------------------------------------------------------------------------------------------

HANDLER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.SubprocessHandler"


def hostile_targets(canary):
    """Each makes the file ``canary`` when it is built."""
    path = str(canary)
    return {
        "program": {
            "_target_": HANDLER,
            "entrypoint": "/usr/bin/touch",
            "args": [path],
            "env": {},
            "stdout": None,
            "stderr": None,
            "local_rank_id": 0,
            "numa_options": None,
        },
        "package": {"_target_": "torch.package.PackageExporter", "f": path},
        "zip": {"_target_": "torch.serialization._open_zipfile_writer_file", "name": path},
        "ours": {"_target_": "latentcast.files.write_json", "path": path, "content": {}},
        "folder": {"_target_": "latentcast.cli.prepare_run_dir", "path": path},
        "curves": {"_target_": "latentcast.training.loggers.plot_curves", "curves": path, "image": path},
        "functools": {"_target_": "functools.partial", "func": "os.system"},
        "imported": {"_target_": "latentcast.config.functools.partial"},
        "system": {"_target_": "os.system", "command": f"touch {path}"},
        "import": {"_target_": "importlib.import_module", "name": "antigravity"},
        "submodule": {"_target_": "torch.utils.collect_env.run", "command": f"touch {path}"},
        "logger": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": path},
        "writer": {"_target_": "latentcast.LatentCacheWriter", "root": path},
    }


def test_the_hostile_targets_would_do_harm(tmp_path):
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from latentcast.files import write_json

    program = {name: value for name, value in hostile_targets(tmp_path / "a")["program"].items() if name != "_target_"}
    SubprocessHandler(**program).proc.wait()
    torch.package.PackageExporter(str(tmp_path / "b")).close()
    write_json(tmp_path / "c", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


PLACED = {
    "tokenizer": lambda target: {"tokenizer": target},
    "prior": lambda target: {"prior": target},
    "data": lambda target: {"data": target | {"_partial_": True}},
    "optimizer": lambda target: {"optimizer": target},
    "protocol": lambda target: {"protocol": target},
    "trainer": lambda target: {"trainer": target},
    "in the tokenizer": lambda target: {"tokenizer": {"codebook_size": target}},
    "in the data": lambda target: {"data": {"mnist_dir": target}},
    "in a list": lambda target: {"data": {"speeds": [1, [target]]}},
    "a strategy": lambda target: {"trainer": {"strategy": target}},
    "in a callback": lambda target: {
        "trainer": {"callbacks": [{"_target_": "pytorch_lightning.callbacks.LambdaCallback", "setup": target}]}
    },
    "the sampler": lambda target: {"preview": {"sampler": {"x": target}}},
    "a section": lambda target: {"evaluate": {"tokenizer": target}},
    "the name": lambda target: {"name": target},
}


def load_and_build(experiment, run_dir):
    config = load_config(experiment, [f"run_dir={run_dir}"], tool="evaluate")
    for place in ("data", "optimizer", "protocol", "trainer", "tokenizer", "prior"):
        instantiate(config[place])


@pytest.mark.parametrize("place", PLACED)
def test_a_hostile_target_is_refused_wherever_it_stands(place, tmp_path):
    canary = tmp_path / "canary"
    for name in ("program", "ours", "writer", "functools"):
        experiment = write(tmp_path, PLACED[place](hostile_targets(canary)[name]))
        message = line_of(load_and_build, experiment, tmp_path / "run")
        assert "expected" in message or "no class stands here" in message or "unknown key" in message, (name, message)
        assert {path.name for path in tmp_path.iterdir()} == {"stranger.yaml"}


@pytest.mark.parametrize("name", hostile_targets("x"))
def test_instantiate_refuses_hostile_targets_of_any_config(name, tmp_path):
    target = hostile_targets(tmp_path / "canary")[name]
    for config in (target, [target], {"x": [target]}, {"_target_": "latentcast.PixelTokenizer", "height": target}):
        assert "_target_" in line_of(instantiate, config) or name == "logger"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("tool, place", [("train_tokenizer", "tokenizer"), ("encode_dataset", "in the data")])
def test_the_tools_refuse_a_hostile_config_in_one_line(tool, place, tmp_path):
    canary = tmp_path / "canary"
    experiment = write(tmp_path, PLACED[place](hostile_targets(canary)["program"]))
    process = Started(TOOLS / f"{tool}.py", experiment, f"run_dir={tmp_path}/run", cwd=tmp_path)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 1 and out == ""
    assert [line for line in err.splitlines() if "_target_" in line and line.startswith("error: ")]
    assert "Traceback" not in err
    assert not canary.exists() and not (tmp_path / "run").exists()


def test_a_target_of_another_place_is_refused(tmp_path):
    wrong = {
        "tokenizer": "torch.optim.SGD",
        "optimizer": "latentcast.VQVAE",
        "data": "latentcast.STPixelCNN",
        "trainer": "pytorch_lightning.callbacks.Timer",
        "protocol": "latentcast.MovingDigits",
    }
    for place, path in wrong.items():
        config = {"name": "x", "defaults": EXPERIMENT["defaults"]}
        with pytest.raises(ConfigError, match=rf"^{place}\._target_: expected .*{path}"):
            instantiate(load_config(config | {place: {"_target_": path}})[place])
    line = line_of(load_config, {"name": "x"}, ["tokenizer={_target_: os.system}"])
    assert "no config named" in line
    line = line_of(load_config, "quickstart", ["tokenizer._target_=latentcast.VQVEA"])
    assert line.startswith("tokenizer._target_: ") and "did you mean 'latentcast.VQVAE'?" in line
    line = line_of(load_config, "quickstart", ["optimizer._target_=torch.optim.lr_scheduler.StepLR"])
    assert "expected an optimizer of torch.optim, found 'torch.optim.lr_scheduler.StepLR'" in line


def test_the_command_line_allows_more_by_full_name_and_no_file_does(tmp_path):
    (tmp_path / "mine.py").write_text("def tokenizer(size, other=None):\n    return size, other\n")
    experiment = write(tmp_path, {"tokenizer": {"_target_": "mine.tokenizer", "size": 3}})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert "expected a tokenizer, found 'mine.tokenizer'" in line_of(load_config, experiment)
        assert "expected a tokenizer" in line_of(load_config, experiment, ["allow_targets=[mine]"])
        assert "unknown key 'tokenizer.siz'" in line_of(
            load_config, experiment, ["allow_targets=[mine.tokenizer]", "tokenizer.siz=1"]
        )
        config = load_config(experiment, ["allow_targets=[mine.tokenizer]", "tokenizer.size=4"])
        assert instantiate(config.tokenizer) == (4, None)
        config = load_config(
            experiment, ["allow_targets=[mine.tokenizer]", "tokenizer.other={_target_: latentcast.PixelTokenizer}"]
        )
        assert instantiate(config.tokenizer)[1].config.height == 64
        line = line_of(
            load_config, experiment, ["allow_targets=[mine.tokenizer]", "tokenizer.other={_target_: os.system}"]
        )
        assert "found 'os.system'" in line
        # What a run saves allows nothing.
        assert "allow_targets" not in to_container(config)
        saved = write(tmp_path, yaml.safe_dump(to_container(config)))
        assert "expected a tokenizer" in line_of(load_config, saved)
    for content in ({"allow_targets": ["os.system"]}, {"train_prior": {"allow_targets": ["os.system"]}}):
        assert "allow_targets may stand on the command line alone" in line_of(load_config, write(tmp_path, content))
    assert "expected a list" in line_of(load_config, "quickstart", ["allow_targets=os.system"])
    assert "cannot be imported" in line_of(
        instantiate, load_config("quickstart", ["allow_targets=[no.such]", "tokenizer._target_=no.such"]).tokenizer
    )


CHECKPOINT = {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint"}


@pytest.mark.parametrize(
    "trainer, expected",
    [
        (
            {"callbacks": [CHECKPOINT | {"dirpath": "/tmp/elsewhere"}]},
            "trainer.callbacks.dirpath: expected a path inside",
        ),
        ({"callbacks": CHECKPOINT | {"dirpath": "elsewhere"}}, "trainer.callbacks.dirpath: expected a path inside"),
        ({"callbacks": [CHECKPOINT | {"dirpath": "~/x"}]}, "trainer.callbacks.dirpath: expected a path inside"),
        (
            {"callbacks": [CHECKPOINT | {"dirpath": "${run_dir}/../x"}]},
            "trainer.callbacks.dirpath: expected a path inside",
        ),
        ({"callbacks": [CHECKPOINT | {"filename": "../../x"}]}, "trainer.callbacks.filename: expected a path inside"),
        (
            {"callbacks": [CHECKPOINT | {"filename": "{step:c}{step:c}/x"}]},
            "trainer.callbacks.filename: expected names",
        ),
        ({"callbacks": [CHECKPOINT | {"dirpath": "file:///tmp/x"}]}, "trainer.callbacks.dirpath: expected a path"),
        (
            {
                "logger": {
                    "_target_": "pytorch_lightning.loggers.CSVLogger",
                    "save_dir": "${run_dir}",
                    "name": "../../x",
                }
            },
            "trainer.logger.name: expected a path inside",
        ),
        (
            {"profiler": {"_target_": "pytorch_lightning.profilers.SimpleProfiler", "dirpath": "/tmp/x"}},
            "trainer.profiler.dirpath: expected a path inside",
        ),
        (
            {"logger": {"_target_": "pytorch_lightning.loggers.WandbLogger"}},
            "trainer.logger._target_: expected a logger",
        ),
        ({"strategy": {"_target_": "pytorch_lightning.strategies.DeepSpeedStrategy"}}, "trainer.strategy._target_"),
    ],
)
def test_nothing_of_lightning_writes_outside_of_run_dir(trainer, expected, tmp_path):
    experiment = write(tmp_path, {"run_dir": str(tmp_path / "run"), "trainer": EXPERIMENT["trainer"] | trainer})
    assert expected in line_of(load_config, experiment)


def test_a_run_dir_that_is_somebody_elses_is_refused(tmp_path):
    """Training replaces the folders tokenizer, pipeline, ... of run_dir: not those that it did not make."""
    for name in ("tokenizer", "tokenizer_training", "previews/tokenizer", "pipeline"):
        source = tmp_path / name / "work/source.py"
        source.parent.mkdir(parents=True)
        source.write_text("print()")
        with pytest.raises(UserError, match=f"run/../{name}: expected nothing, or what an earlier training left"):
            call_tool("train_tokenizer", tmp_path, f"run_dir={tmp_path}/run/..", "overwrite=true")
        assert source.read_text() == "print()"
        shutil.rmtree(tmp_path / name)


def test_what_a_class_cannot_be_built_of_is_one_line_that_names_it(tmp_path):
    for override in ("tokenizer.n_codebooks=null", "tokenizer.height=null", "prior.subscale=null"):
        config = load_config(write(tmp_path, EXPERIMENT), [override])
        part = override.partition(".")[0]
        arguments = {"latent_spec": instantiate(config.tokenizer).latent_spec} if part == "prior" else {}
        line = line_of(instantiate, config[part], **arguments)
        assert line.startswith(f"{config[part]._target_}: cannot be built of its arguments ("), line


def test_callbacks_loggers_and_profilers_of_a_config_are_used(tmp_path, command):
    overrides = [
        "trainer.max_steps=2",
        "trainer.callbacks=[{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: '${run_dir}/more',"
        " filename: 'at-{step:03d}', every_n_train_steps: 1, save_top_k: -1},"
        " {_target_: pytorch_lightning.callbacks.ModelCheckpoint, every_n_train_steps: 2,"
        " filename: plain}]",
        "trainer.logger={_target_: pytorch_lightning.loggers.CSVLogger, save_dir: '${run_dir}/logs', name: mine}",
        "trainer.profiler={_target_: pytorch_lightning.profilers.SimpleProfiler, dirpath: '${run_dir}', filename: t}",
    ]
    status, _, err = command("train_tokenizer", write_experiment(tmp_path), *overrides)
    assert status == 0, err
    run = tmp_path / "run"
    assert {path.name for path in (run / "more").iterdir()} == {"at-step=001.ckpt", "at-step=002.ckpt"}
    assert list((run / "logs" / "mine").rglob("metrics.csv")) and (run / "fit-t.txt").is_file()
    assert list(run.rglob("plain.ckpt"))
    assert (run / "metrics" / "tokenizer.csv").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tiny.yaml"}


# Resolvers, tags and bombs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:HOME}",
        "name: a${oc.env:HOME}",
        "name: ${ oc.env:HOME }",
        "name: ${oc.env:${name}}",
        "seed: ${oc.decode:'1'}",
        "preview: {sampler: '${oc.create:{a: 1}}'}",
        "wandb: {tags: ['${oc.select:name}']}",
        "seed: ${${name}:x}",
        "name: 'a\\\\${oc.env:HOME}'",
        "train_prior: {name: '${oc.env:HOME}'}",
    ],
)
def test_resolvers_are_refused(text, tmp_path):
    assert "expected references like ${key.sub}" in line_of(load_config, write(tmp_path, text))
    override = "=".join(yaml.safe_load(text).popitem()) if text.startswith("name") else "name=${oc.env:HOME}"
    assert "expected references like ${key.sub}" in line_of(load_config, "quickstart", [override])
    # A group's file, given by its path.
    (tmp_path / "group.yaml").write_text("_target_: latentcast.PixelTokenizer\nheight: ${oc.env:HOME}")
    assert "expected references" in line_of(load_config, "quickstart", [f"tokenizer={tmp_path}/group"])


def test_references_to_other_keys_are_kept(tmp_path):
    config = load_config(
        write(tmp_path, "seed: 3\nname: x${seed}\npreview: {sampler: {a: 1, b: '${.a}', c: '${...seed}'}}")
    )
    assert (config.name, config.run_dir) == ("x3", "runs/x3")
    assert to_container(config.preview.sampler) == {"a": 1, "b": 1, "c": 3}
    assert load_config(write(tmp_path, r"name: 'a\${oc.env:HOME}'")).name == "a${oc.env:HOME}"


def lines(template, letters="abcdefghijk"):
    return "".join(template.format(old=old, new=new) for old, new in itertools.pairwise(letters))


SAMPLER = "preview:\n sampler:\n"
BOMBS = {
    "brackets": ("preview: " + "[" * 100_000, "nested more than"),
    "braces": ("preview: " + "{a: " * 20_000, "nested more than"),
    "dashes": ("- " * 50_000 + "a", "nested more than"),
    "aliases": (
        f"{SAMPLER}  a: &a [x, x, x, x, x, x, x, x]\n"
        + lines("  {new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"),
        "comes to more than",
    ),
    "merges": (
        f"{SAMPLER}  a: &a {{x: 1}}\n" + lines("  {new}: &{new} {{<<: [*{old}, *{old}, *{old}, *{old}, *{old}]}}\n"),
        "comes to more than",
    ),
    "an alias of itself": ("preview: {sampler: &a {x: *a}}", "nested more than"),
    "references": (
        f"{SAMPLER}  a: [x, x, x, x, x, x, x, x]\n"
        + lines("  {new}: ['${{..{old}}}', '${{..{old}}}', '${{..{old}}}', '${{..{old}}}', '${{..{old}}}']\n"),
        "comes to more than",
    ),
    "texts": (
        f"{SAMPLER}  a0: xxxxxxxxxxxxxxxx\n" + "".join(f"  a{i + 1}: ${{.a{i}}}${{.a{i}}}\n" for i in range(60)),
        "comes to more than",
    ),
    "a chain": (
        f"{SAMPLER}" + "".join(f"  a{i}: ${{.a{i + 1}}}\n" for i in range(900)) + "  a900: 1\n",
        "nested more than",
    ),
    "a circle": ("name: ${run_dir}", "refers to itself"),
    "a circle of two": (f"{SAMPLER}  a: ${{.b}}\n  b: ${{.a}}", "refers to itself"),
    "itself inside": ("preview: {sampler: {a: '${preview}'}}", "refers to itself"),
    "nowhere": ("run_dir: ${nowhere}", "run_dir: there is no key 'nowhere'"),
    "nowhere below": ("run_dir: ${preview.sampler.a.b}", "there is no key"),
    "digits": ("seed: " + "9" * 9000, "not valid YAML"),
    "size": ("name: " + "9" * 300_000, "at most 200000 bytes"),
    "python": ("name: !!python/object/apply:os.system [true]", "line 1: expected no tag"),
    "python path": ("run_dir: !!python/object/apply:pathlib.PosixPath [/tmp]", "line 1: expected no tag"),
    "set": ("wandb: {tags: !!set {a, b}}", "expected no tag"),
    "wrong tag": ("seed: !!bool 5", "not valid YAML"),
    "key of a number": ("seed: 1\n1: 2", "line 2: expected text as a key, found '1'"),
    "key that is true": ("on: 2", "expected text as a key, found 'on'"),
    "key that is a list": ("? [a]\n: 2", "expected text as a key, found a mapping or list"),
    "key twice": ("preview: {n_clips: 1, n_clips: 2}", "the key 'n_clips' stands twice"),
    "two documents": ("seed: 1\n---\nseed: 2", "not valid YAML"),
    "target by reference": ("tokenizer: {_target_: '${name}'}", "_target_: expected the full name of a class"),
    "group by reference": ("data: ${preview}", "data: expected a mapping with _target_"),
    "group that is a number": ("prior: 3", "prior: expected a mapping with _target_, found 3"),
    "section by reference": ("evaluate: ${preview}", "evaluate: expected a mapping"),
    "run_dir that is a list": ("run_dir: [1]", "run_dir: expected text, found ['1']"),
    "run_dir by reference": ("run_dir: ${cache.splits}", "run_dir: expected text"),
    "run_dir null": ("run_dir: null", "run_dir: expected text, found null"),
    "a long choice": ("defaults: {tokenizer: " + "a" * 5000 + "}", "tokenizer: no config named 'aaa"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_damaged_or_malicious_file_is_one_line_soon(name, tmp_path):
    text, expected = BOMBS[name]
    experiment = write(tmp_path, text)
    began = time.process_time()
    assert expected in line_of(load_config, experiment)
    assert time.process_time() - began < 5


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not found" in line_of(load_config, tmp_path / "pipe.yaml")
    assert "no config named" in line_of(load_config, "a" * 5000)
    assert "not found" in line_of(load_config, "a" * 5000 + ".yaml")
    assert "nested more than" in line_of(load_config, "quickstart", ["preview.sampler" + ".a" * 5000 + "=1"])

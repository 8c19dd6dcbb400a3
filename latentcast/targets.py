"""What may stand under ``_target_``: by the kind of the place and by name, for a config may come from a stranger.

Whole packages cannot be trusted: torch alone has classes that start programs or write files when they are built. So
PLACES says for each place which names of which public modules may stand there. None of them runs a program or writes
outside of ``run_dir`` when a tool uses it.
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import latentcast
from latentcast.yaml_text import ConfigError, short


@dataclass(frozen=True)
class Kind:
    """What may stand at a place.

    Attributes:
        what: how errors call it.
        names: full names.
        modules: whose public names may stand there too, where they are concrete subclasses of ``bases`` (full names).
        listed: module whose public names count, instead of those of each of ``modules``.
        without: public names that are left out.
        writes: whether arguments can name files that are written.
    """

    what: str
    names: tuple = ()
    modules: tuple = ()
    bases: tuple = ()
    listed: str = ""
    without: tuple = ()
    writes: bool = False

    def may_be(self, path):
        """Whether the name alone fits; imports nothing, and so cannot tell for modules that are not imported yet."""
        module, _, name = path.rpartition(".")
        if path in self.names or module not in self.modules or name in self.without:
            return path in self.names
        listed = self.listed or module
        return name.isidentifier() and (listed not in sys.modules or name in _public_names(listed))

    def find(self, path):
        """The class or function of that full name if it is of this kind, else None; builds nothing."""
        if not self.may_be(path):
            return None
        module, _, name = path.rpartition(".")
        if path not in self.names and name not in _public_names(self.listed or module):
            return None
        try:
            target = import_name(path)
        except ConfigError:
            return None
        if path in self.names:
            return target
        bases = tuple(import_name(base) for base in self.bases)
        concrete = inspect.isclass(target) and not inspect.isabstract(target) and target not in bases
        return target if concrete and issubclass(target, bases) else None

    def known(self):
        """The full names of all that may stand there."""
        public = [f"{module}.{name}" for module in self.modules for name in _public_names(self.listed or module)]
        return [path for path in (*self.names, *public) if self.find(path) is not None]


_PLUGIN = Kind(
    "a plugin of Lightning",
    modules=("pytorch_lightning.plugins", "pytorch_lightning.plugins.environments"),
    bases=(
        "pytorch_lightning.plugins.Precision",
        "pytorch_lightning.plugins.CheckpointIO",
        "pytorch_lightning.plugins.LayerSync",
        "pytorch_lightning.plugins.environments.ClusterEnvironment",
    ),
    writes=True,
)
_ACCELERATOR = Kind(
    "an accelerator of Lightning",
    modules=("pytorch_lightning.accelerators",),
    bases=("pytorch_lightning.accelerators.Accelerator",),
)
# The keys of a config, list indices left out. A mapping with _target_ stands nowhere else.
PLACES = {
    "tokenizer": Kind("a tokenizer", modules=("latentcast",), bases=("latentcast.tokenizers.base.FrameTokenizer",)),
    "prior": Kind("a prior", modules=("latentcast",), bases=("latentcast.priors.base.Prior",)),
    "data": Kind(
        "a data set",
        names=("latentcast.prepared_videos",),
        modules=("latentcast",),
        bases=("latentcast.data.base.VideoDataset",),
    ),
    "protocol": Kind("a protocol", names=("latentcast.Protocol",)),
    "optimizer": Kind("an optimizer of torch.optim", modules=("torch.optim",), bases=("torch.optim.Optimizer",)),
    "trainer": Kind("the trainer", names=("pytorch_lightning.Trainer",)),
    "trainer.callbacks": Kind(
        "a callback of Lightning",
        modules=("pytorch_lightning.callbacks",),
        bases=("pytorch_lightning.Callback",),
        writes=True,
    ),
    "trainer.logger": Kind(  # others send to servers that a config names; W&B has a section of its own
        "a logger of Lightning that writes to run_dir",
        names=("pytorch_lightning.loggers.CSVLogger", "pytorch_lightning.loggers.TensorBoardLogger"),
        writes=True,
    ),
    "trainer.profiler": Kind(
        "a profiler of Lightning",
        modules=("pytorch_lightning.profilers",),
        bases=("pytorch_lightning.profilers.Profiler",),
        writes=True,
    ),
    "trainer.strategy": Kind(
        "a strategy of Lightning",
        modules=("pytorch_lightning.strategies",),
        bases=("pytorch_lightning.strategies.Strategy",),
        without=("DeepSpeedStrategy",),  # its own config names files and folders
        writes=True,
    ),
    "trainer.plugins": _PLUGIN,
    "trainer.accelerator": _ACCELERATOR,
    "trainer.strategy.accelerator": _ACCELERATOR,
    "trainer.strategy.cluster_environment": _PLUGIN,
    "trainer.strategy.checkpoint_io": _PLUGIN,
    "trainer.strategy.precision_plugin": _PLUGIN,
    "trainer.plugins.checkpoint_io": _PLUGIN,
}
# What no tool reads from a config, but code of others may build.
ELSEWHERE = (
    Kind(
        "a scheduler of diffusers",
        modules=("diffusers",),
        listed="diffusers.schedulers",
        bases=("diffusers.SchedulerMixin",),
    ),
    Kind(
        "an autoencoder of diffusers",
        names=(
            "diffusers.AsymmetricAutoencoderKL",
            "diffusers.AutoencoderKL",
            "diffusers.AutoencoderTiny",
            "diffusers.VQModel",
        ),
    ),
)
ANYWHERE = None  # the place of what stands in no config, and of the arguments of classes that the user allowed


def find_target(path, place=ANYWHERE, allows=lambda path: False):
    """Import the class or function that a ``_target_`` names, if it may stand at ``place``; builds nothing.

    Args:
        path: full name, ``package.module.Name``.
        place: a key of PLACES, or ANYWHERE.
        allows: full name -> whether the user has allowed it, whatever PLACES says.
    Raises:
        ConfigError: it may not stand there; the message says what may.
    """
    if isinstance(path, str) and allows(path):
        return import_name(path)
    kinds = _kinds(place)
    for kind in kinds:
        if isinstance(path, str) and (target := kind.find(path)) is not None:
            return target
    raise _refused(path, place, kinds)


def parameters_of(target, required=False):
    """Names of the arguments that a class or function takes, or of those that it cannot do without."""
    return [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (required and parameter.default is not parameter.empty)
    ]


def takes_any(target):
    """Whether it takes arguments of other names, too."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(target).parameters.values())


def arguments_of(path, place=ANYWHERE, allows=lambda path: False):
    """What ``find_target(path, place, allows)`` takes -> (names, whether others too). Where the source says it plainly
    nothing is imported, which would take seconds: what may not stand there is then refused when it is built."""
    if isinstance(path, str) and not allows(path) and any(kind.may_be(path) for kind in _kinds(place)):
        names = _written_parameters(path)
        if names is not None:
            return names, False
    target = find_target(path, place, allows)
    return parameters_of(target), takes_any(target)


@functools.cache
def _written_parameters(path):
    """``parameters_of`` a class or function that is not imported yet, from its source; None where that is not plain."""
    module, _, name = path.rpartition(".")
    file = {"pytorch_lightning.Trainer": "trainer/trainer.py"}.get(path)
    if module == "torch.optim":
        file = f"optim/{name.lower()}.py"
    try:
        if module == "latentcast":
            source = Path(importlib.util.find_spec(latentcast._EXPORTS[name]).origin)
        elif file is None or module in sys.modules:
            return None
        else:
            source = Path(importlib.util.find_spec(module.partition(".")[0]).origin).parent / file
        body = ast.parse(source.read_bytes()).body
    except (KeyError, AttributeError, ImportError, OSError, SyntaxError):
        return None
    found = next((node for node in body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        found = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
    if not isinstance(found, ast.FunctionDef) or found.args.kwarg or found.args.vararg:
        return None
    names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
    return names[1:] if found.name == "__init__" else names


def check_targets(value, place, run_dir, allows):
    """Refuse what may not stand where it stands, by name, before anything is imported or built.

    Args:
        value: a config, or a part of it, as plain Python.
        place: of it, "" for a whole config, or ANYWHERE.
        run_dir: in which files may be written, or None.
        allows: see find_target.
    Raises:
        ConfigError: one line that names the place and what may stand there.
    """
    if isinstance(value, list):
        for item in value:
            check_targets(item, place, run_dir, allows)
    if not isinstance(value, dict):
        return
    path = value.get("_target_")
    if "_target_" in value and not (isinstance(path, str) and allows(path)):
        kinds = _kinds(place)
        fitting = [kind for kind in kinds if isinstance(path, str) and kind.may_be(path)]
        if not fitting:
            raise _refused(path, place, kinds)
        if fitting[0].writes:
            for name, argument in value.items():
                _check_written(f"{place or path}.{name}", name, argument, run_dir)
    for name, argument in value.items():
        check_targets(argument, inner_place(value, name, place, allows), run_dir, allows)


def inner_place(value, name, place, allows):
    """The place of what stands under ``name`` in a mapping."""
    path = value.get("_target_")
    if isinstance(path, str):
        if allows(path):
            return ANYWHERE
        if place is ANYWHERE:
            place = next((known for known, kind in PLACES.items() if kind.may_be(path)), "elsewhere")
    return ANYWHERE if place is ANYWHERE else f"{place}.{name}" if place else name


def import_name(path):
    """The object of a full name; raises ConfigError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:  # RuntimeError: diffusers' ImportError
        raise ConfigError(f"{short(path)}: cannot be imported ({error})") from None


def nearest(name, known, prefix=""):
    """The end of an error about a name: the known one that is like it, ``prefix`` before it, or all."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _kinds(place):
    if place is ANYWHERE:
        return [*PLACES.values(), *ELSEWHERE]
    return [PLACES[place]] if place in PLACES else []


def _public_names(module):
    module = importlib.import_module(module)
    return getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]


def _refused(path, place, kinds):
    where = f"{place}._target_" if place else "_target_"
    if not kinds:
        return ConfigError(f"{where}: no class stands here, found {short(path)}")
    expected = " or ".join(dict.fromkeys(kind.what for kind in kinds))
    known = nearest(path, kinds[0].known()) if len(kinds) == 1 else ""
    return ConfigError(
        f"{where}: expected {expected}, found {short(path)}{known} (allow_targets=[...] on the command line adds more)"
    )


FOLDERS = ("dirpath", "save_dir", "root_dir", "path_to_export_trace", "exclude_batches_path")
# Lightning fills {step} into file names; of what can stand after a colon, {step:c} could make a path of it.
PLAIN_FIELDS = re.compile(r"(?:[^{}]|\{[\w/. -]*(?::\d*(?:\.\d+)?[defg]?)?\})*")


def _check_written(where, name, value, run_dir):
    """Refuse arguments that name a place outside of ``run_dir``."""
    if isinstance(value, dict):
        if "_target_" in value:  # checked by itself
            return
        value = list(value.items())
    elif isinstance(value, list):
        value = [(name, item) for item in value]
    if isinstance(value, list):
        for inner, item in value:
            _check_written(where, inner, item, run_dir)
    if not isinstance(value, str):
        return
    strays = os.path.isabs(value) or value.startswith("~") or ".." in re.split(r"[/\\]", value)
    if name in FOLDERS or strays:
        inside = run_dir and Path(value).expanduser().resolve().is_relative_to(Path(run_dir).expanduser().resolve())
        if not inside or value.startswith("~"):
            raise ConfigError(f"{where}: expected a path inside of run_dir ({run_dir}), found {short(value)}")
    if re.search(r"::|^\w+:|://", value) and (name in FOLDERS or "://" in value):  # what fsspec takes for a protocol
        raise ConfigError(f"{where}: expected a path, found {short(value)}")
    if name == "filename" and not PLAIN_FIELDS.fullmatch(value):
        raise ConfigError(f"{where}: expected names and numbers in braces, like {{step:06d}}, found {short(value)}")

"""Experiment configs: composed from YAML groups, checked for misspelt keys, built from an allow-list of packages."""

import copy
import difflib
import functools
import importlib
import inspect
from numbers import Integral
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import latentcast
from latentcast.files import read_json
from latentcast.schemas import LatentSpec, check

ALLOWED_PACKAGES = ("latentcast", "torch", "diffusers", "pytorch_lightning")
TOOLS = ("train_tokenizer", "encode_dataset", "train_prior", "train_jointly", "evaluate")


class ConfigError(ValueError):
    """A config, an override or a target that cannot be used; the message is one line and names it."""


def config_root():
    """The folder ``configs/``, wherever latentcast is installed."""
    module = importlib.import_module("latentcast.configs")
    return Path(next(iter(module.__path__)))


def load_config(experiment, overrides=(), tool=None):
    """Compose an experiment.

    ``configs/base.yaml`` holds every root key. An experiment lists a file for each group under ``defaults`` and then
    overrides what it likes. A section named after a tool (``train_prior:``) is merged over the root when that tool
    runs; ``train_jointly:``, for ``train_prior.py joint=true``, on top of ``train_prior:``. Overrides come last:
    ``key.sub=value``, or ``group=name`` to swap a group's file (the experiment's own settings of that group, which were
    about another class, are then dropped; ``group=null`` empties it).

    Args:
        experiment: a name under ``configs/experiment/``, the path of a YAML file, or what would stand in it as a dict.
        overrides: strings ``key=value``; values are parsed as YAML.
        tool: name of the tool whose section applies, or None.
    Returns:
        DictConfig with interpolations intact.
    Raises:
        ConfigError: unknown experiment, group, key or unparsable override; names the nearest known one.
    """
    root = config_root()
    groups = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "experiment")
    if isinstance(experiment, dict):
        body, experiment = OmegaConf.create(experiment), experiment["name"]
    else:
        body = _load_yaml(_experiment_path(root, experiment))
    choices = body.pop("defaults", {})
    if not isinstance(choices, (dict, DictConfig)):
        raise ConfigError(f"{experiment}: expected a mapping group: name under defaults, found {choices}")
    choices = dict(choices)
    swapped, settings = {}, []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: expected key=value")
        if key in groups:
            if choices.get(key) != value:
                swapped[key] = None if value == "null" else value
        else:
            settings.append((key, value))

    config = _load_yaml(root / "base.yaml")
    for group in choices:
        if group not in groups:
            raise ConfigError(f"{experiment}: unknown group {group!r} under defaults{_nearest(group, groups)}")
    for group, choice in (choices | swapped).items():
        if choice is not None:
            config[group] = _load_yaml(_group_path(root, group, choice))
    sections = {name: OmegaConf.create(body.pop(name, None) or {}) for name in TOOLS}
    for part in (body, *sections.values()):
        for key in [key for key in part if key in swapped]:
            part.pop(key)
    _merge(config, body, "")
    applied = ("train_prior", tool) if tool == "train_jointly" else (tool,)
    for name, section in sections.items():  # those of other tools are only checked
        _merge(config if name in applied else copy.deepcopy(config), section, "")
    for key, value in settings:
        try:
            parsed = OmegaConf.from_dotlist([f"{key}={value}"])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override '{key}={value}': {' '.join(str(error).split())}") from None
        group = key.partition(".")[0]
        if group in groups and config[group] is None:
            raise ConfigError(f"override '{key}={value}': the experiment has no {group}; choose one by {group}=NAME")
        _merge(config, parsed, "")
    if not config.name:
        config.name = Path(str(experiment)).stem
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{experiment}: {str(error).splitlines()[0]}") from None
    return config


def load_pipeline_config(folder, data, overrides=(), **settings):
    """What ``tool="evaluate"`` needs for a saved pipeline and a data set, without the experiment that made it.

    Args:
        folder: of the pipeline. Its parent is the ``run_dir``, and names the config.
        data: a name under ``configs/data/``. overrides: see ``load_config``.
        **settings: root keys of ``configs/base.yaml``.
    Raises:
        ConfigError: no saved pipeline there, or as ``load_config``.
    """
    model = Path(folder) / "prior" / "config.json"
    if not model.is_file():
        raise ConfigError(f"{folder}: no saved pipeline here")
    spec = check(f"{model}: latent_spec", LatentSpec, read_json(model).get("latent_spec"))
    run_dir = Path(folder).resolve().parent
    experiment = {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "defaults": {"data": data},
        "frame_size": spec["frame_height"],
        "channels": spec["frame_channels"],
        **settings,
    }
    return load_config(experiment, overrides, tool="evaluate")


def is_whole(value, least=float("-inf")):
    """Whether ``value`` is a whole number (False and True are not) of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def check_counts(least=1, **counts):
    """Refuse counts (of frames, samples, layers, ...) that are no whole numbers of at least ``least``, by name."""
    for name, value in counts.items():
        if not is_whole(value, least):
            raise ValueError(f"{name}: expected a whole number of at least {least}, found {value!r}")


def instantiate(config, **kwargs):
    """Build the object that a config describes.

    ``_target_`` names the class or function, ``_partial_: true`` asks for a ``functools.partial``; every other key is
    an argument, built the same way. Lists and plain dicts are built element by element.

    Args:
        config: a DictConfig, dict or list.
        **kwargs: arguments that the config does not hold; they win over its own.
    Raises:
        ConfigError: a target outside latentcast, torch, diffusers and pytorch_lightning, one that does not exist,
            arguments that it does not take, or one that it needs and did not get.
    """
    if isinstance(config, (DictConfig, ListConfig)):
        config = to_container(config)
    if isinstance(config, list):
        return [instantiate(item) for item in config]
    if not isinstance(config, dict):
        return config
    arguments = {k: instantiate(v) for k, v in config.items() if k not in ("_target_", "_partial_")} | kwargs
    if "_target_" not in config:
        return arguments
    target = find_target(config["_target_"])
    unknown = [name for name in arguments if not _takes(target, name)]
    if unknown:
        raise ConfigError(
            f"{config['_target_']}: unknown argument {unknown[0]!r}{_nearest(unknown[0], _parameters(target))}"
        )
    if config.get("_partial_"):
        return functools.partial(target, **arguments)
    missing = [name for name in _parameters(target, required=True) if name not in arguments]
    if missing:
        raise ConfigError(f"{config['_target_']}: missing argument {missing[0]!r}")
    return target(**arguments)


def find_target(path):
    """Import the class ``package.module.Name`` from an allowed package.

    A config may come from a stranger, so functions are allowed from latentcast alone: torch and others have some that
    run shell commands.
    """
    package = str(path).partition(".")[0]
    if package not in ALLOWED_PACKAGES:
        raise ConfigError(f"_target_ {path!r}: only targets in {', '.join(ALLOWED_PACKAGES)} are built from configs")
    module, _, name = path.rpartition(".")
    if module == "latentcast" and name not in latentcast._EXPORTS:
        raise ConfigError(f"_target_ {path!r}: no such class{_nearest(name, latentcast._EXPORTS)}")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(f"_target_ {path!r}: no such class or function") from None
    if not (inspect.isclass(target) or (inspect.isfunction(target) and package == "latentcast")):
        raise ConfigError(f"_target_ {path!r}: expected a class")
    if target.__module__.partition(".")[0] not in ALLOWED_PACKAGES:  # something that the module only imports
        raise ConfigError(f"_target_ {path!r}: defined in {target.__module__}, which configs may not build from")
    return target


def to_container(config):
    """A DictConfig as plain, resolved Python (JSON-able): what models and Lightning's hyper-parameters need.

    Raises:
        ConfigError: a value that must be given (``???``) was not.
    """
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value must be given ({error.full_key}=...)") from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _parameters(target, required=False):
    """Names of the arguments that a class or function takes, or of those that it cannot do without."""
    return [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (required and parameter.default is not parameter.empty)
    ]


def _takes(target, name):
    return name in _parameters(target) or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(target).parameters.values()
    )


def _nearest(name, known):
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _load_yaml(path):
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:  # their messages have several lines
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(loaded).__name__}")
    return loaded


def _experiment_path(root, experiment):
    path = Path(str(experiment))
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"experiment file {path}: not found")
        return path
    return _group_path(root, "experiment", str(experiment))


def _group_path(root, group, choice):
    path = root / group / f"{choice}.yaml"
    if not path.is_file():
        known = [p.stem for p in (root / group).glob("*.yaml")]
        raise ConfigError(f"{group}: no config named {choice!r}{_nearest(choice, known)}")
    return path


def _is_mapping(node):
    return isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()


def _merge(config, part, prefix):
    """Merge ``part`` into ``config`` in place, refusing keys that nothing knows."""
    for key in part:
        name = f"{prefix}{key}"
        current, value = config._get_node(key), part._get_node(key)  # nodes keep interpolations as they are
        old, new = _is_mapping(current), _is_mapping(value)
        if current is None:
            target = config.get("_target_")
            known = list(config) if target is None else [*_parameters(find_target(target)), "_target_", "_partial_"]
            # An empty mapping with no target ({}) is open: it holds names that only its reader knows.
            if known and not (target is not None and _takes(find_target(target), key)) and key not in known:
                raise ConfigError(f"unknown key {name!r}{_nearest(key, known)}")
            config[key] = value
        elif old and new:
            if value.get("_target_") in (None, current.get("_target_")):
                _merge(current, value, f"{name}.")
            else:  # another class: its arguments replace the old one's
                partial = current.get("_partial_")
                config[key] = value
                if partial is not None:
                    config[key].setdefault("_partial_", partial)
        elif old and not value._is_none() and not value._is_interpolation():
            raise ConfigError(f"{name}: expected a mapping, found {value}")
        elif new and not current._is_none() and "_target_" not in value:
            raise ConfigError(f"{name}: expected a value like {current}, found a mapping")
        else:
            _check_kind(name, current, value)
            config[key] = value


def _check_kind(name, current, value):
    """Refuse a value of another kind than the default's, where that says which values there can be."""
    if current._is_missing() and value._is_none():
        raise ConfigError(f"{name}: a value must be given ({name}=...)")
    if value._is_none() or value._is_interpolation():
        return
    expected = _kind(current._maybe_dereference_node())
    if expected and _kind(value) != expected:
        found = value if isinstance(value, ListConfig) else repr(value._value())
        raise ConfigError(f"{name}: expected {expected}, found {found}")


def _kind(node):
    """What a default asks for. A string asks for nothing: ``auto`` and ``32-true`` stand for numbers."""
    if isinstance(node, ListConfig):
        return "a list"
    value = None if node is None else node._value()
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, (int, float)) else None

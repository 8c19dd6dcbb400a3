"""Experiment configs: composed from YAML groups, checked for misspelt keys, built from an allow-list of packages."""

import difflib
import functools
import importlib
import inspect
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import latentcast

ALLOWED_PACKAGES = ("latentcast", "torch", "diffusers", "pytorch_lightning")
TOOLS = ("train_tokenizer", "encode_dataset", "train_prior", "sample", "evaluate")


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
    runs. Overrides come last: ``key.sub=value``, or ``group=name`` to swap a group's file (the experiment's own
    settings of that group, which were about another class, are then dropped).

    Args:
        experiment: a name under ``configs/experiment/`` or the path of a YAML file.
        overrides: strings ``key=value``; values are parsed as YAML.
        tool: name of the tool whose section applies, or None.
    Returns:
        DictConfig with interpolations intact.
    Raises:
        ConfigError: unknown experiment, group, key or unparsable override; names the nearest known one.
    """
    root = config_root()
    groups = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "experiment")
    body = _load_yaml(_experiment_path(root, experiment))
    choices = dict(body.pop("defaults", {}))
    swapped, settings = {}, []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r}: expected key=value")
        if key in groups:
            swapped[key] = value
        else:
            settings.append((key, value))

    config = _load_yaml(root / "base.yaml")
    for group in choices:
        if group not in groups:
            raise ConfigError(f"{experiment}: unknown group {group!r} under defaults{_nearest(group, groups)}")
    for group, choice in (choices | swapped).items():
        config[group] = _load_yaml(_group_path(root, group, choice))
    sections = {name: body.pop(name, {}) for name in TOOLS}
    for part in (body, sections.get(tool, {})):
        for key in [key for key in part if key in swapped]:
            part.pop(key)
        _merge(config, part, "")
    for name in TOOLS:  # sections of other tools are only checked
        if name != tool:
            trial = OmegaConf.create(OmegaConf.to_container(config))
            _merge(trial, {k: v for k, v in sections[name].items() if k not in swapped}, "")
    for key, value in settings:
        try:
            parsed = OmegaConf.from_dotlist([f"{key}={value}"])
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"override '{key}={value}': {str(error).splitlines()[0]}") from None
        _merge(config, parsed, "")
    if not config.name:
        config.name = Path(str(experiment)).stem
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{experiment}: {str(error).splitlines()[0]}") from None
    return config


def instantiate(config, **kwargs):
    """Build the object that a config describes.

    ``_target_`` names the class or function, ``_partial_: true`` asks for a ``functools.partial``; every other key is
    an argument, built the same way. Lists and plain dicts are built element by element.

    Args:
        config: a DictConfig, dict or list.
        **kwargs: arguments that the config does not hold; they win over its own.
    Raises:
        ConfigError: a target outside latentcast, torch, diffusers and pytorch_lightning, one that does not exist, or
            arguments that it does not take.
    """
    if isinstance(config, (DictConfig, ListConfig)):
        config = OmegaConf.to_container(config, resolve=True)
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
    return target(**arguments)


def find_target(path):
    """Import ``package.module.Name`` from an allowed package."""
    package = path.partition(".")[0]
    if package not in ALLOWED_PACKAGES:
        raise ConfigError(f"_target_ {path!r}: only targets in {', '.join(ALLOWED_PACKAGES)} are built from configs")
    module, _, name = path.rpartition(".")
    if module == "latentcast" and name not in latentcast._EXPORTS:
        raise ConfigError(f"_target_ {path!r}: no such class{_nearest(name, latentcast._EXPORTS)}")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(f"_target_ {path!r}: no such class or function") from None
    if not (inspect.isclass(target) or inspect.isfunction(target)):
        raise ConfigError(f"_target_ {path!r}: expected a class or function")
    return target


def to_container(config):
    """A DictConfig as plain, resolved Python (JSON-able): what models and Lightning's hyper-parameters need."""
    return OmegaConf.to_container(config, resolve=True)


def _parameters(target):
    return [name for name in inspect.signature(target).parameters if name not in ("self", "args", "kwargs")]


def _takes(target, name):
    parameters = inspect.signature(target).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _nearest(name, known):
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _load_yaml(path):
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # PyYAML raises a family of errors with multi-line messages
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


def _merge(config, part, prefix):
    """Merge ``part`` into ``config`` in place, refusing keys that nothing knows."""
    items = part.items_ex(resolve=False) if isinstance(part, DictConfig) else part.items()
    for key, value in items:
        name = f"{prefix}{key}"
        current = config._get_node(key)
        if current is None:
            target = config.get("_target_")
            if target is not None:
                known = [*_parameters(find_target(target)), "_target_", "_partial_"]
            else:
                known = list(config)
            # An empty mapping with no target ({}) is open: it holds names that only its reader knows.
            if key not in known and (known or target is not None):
                raise ConfigError(f"unknown key {name!r}{_nearest(key, known)}")
            config[key] = value
        elif isinstance(current, DictConfig) and isinstance(value, (dict, DictConfig)) and not current._is_none():
            if value.get("_target_") not in (None, current.get("_target_")):
                config[key] = value  # another class: its arguments replace the old one's
            else:
                _merge(current, value, f"{name}.")
        elif isinstance(current, DictConfig) and not current._is_none() and "_target_" in current and value is not None:
            raise ConfigError(f"{name}: expected a mapping, found {value!r}")
        else:
            config[key] = value

"""Experiment configs: composed from YAML groups, checked for misspelt keys, built from what may stand at each place."""

import contextlib
import copy
import functools
import logging
import os
import re
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from latentcast.catalogue import config_root, names_below
from latentcast.files import MANIFEST_MB, read_json
from latentcast.saved import is_location, pipeline_settings, tokenizer_folder, tokenizer_settings, used_tokenizer
from latentcast.schemas import LatentSpec, check
from latentcast.sizes import as_size, is_whole
from latentcast.targets import (
    ANYWHERE,
    PLACES,
    arguments_of,
    check_targets,
    find_target,
    inner_place,
    nearest,
    parameters_of,
    takes_any,
)
from latentcast.urls import Url, folder_at
from latentcast.yaml_text import (
    MAX_DEPTH,
    MAX_SIZE,
    ConfigError,
    is_path,
    is_text,
    nested,
    override_value,
    parse,
    read_yaml,
    short,
    split_overrides,
)

logger = logging.getLogger("latentcast")

TOOLS = ("train_tokenizer", "encode_dataset", "train_prior", "train_jointly", "evaluate")
ALLOW = "allow_targets"  # of the command line alone
OPEN = "open"  # flag of mappings whose names only their reader knows: {} in base.yaml, and arguments that are mappings
WHERE = ("name", "run_dir", "tokenizer_dir", "cache.root")  # keys that say where what was trained is
NOT_KEPT = ("path", "subfolder")  # of a trained tokenizer: where its weights came from
SIZES = ("frame_size", "size")  # keys of what is a number or [height, width]
SIDES = ("height", "width")  # arguments that take the two apart
REFERENCE = re.compile(r"\$\{(\.*[\w-]+(?:\.[\w-]+|\[\w+\])*)\}")
OF_SIZE = re.compile(r"\$\{frame_size(\[[01]\])?\}")


class MisfitError(ValueError):
    """A prior's sizes, or its kind, and the latents that it is built for do not go together.

    Args:
        needs: "codes" or "positions" (more than one in a frame), which no sizes of the prior's can make up for; None:
            other sizes fit, which the message names.
    """

    def __init__(self, message, needs=None):
        super().__init__(message)
        self.needs = needs


def defaults():
    """``configs/base.yaml`` as plain Python: what each root key is where an experiment does not set it."""
    return read_yaml(config_root() / "base.yaml")


def load_config(experiment, overrides=(), tool=None, go_on=False):
    """Compose an experiment.

    ``configs/base.yaml`` holds every root key. An experiment lists a file for each group under ``defaults`` and then
    overrides what it likes. A section named after a tool (``train_prior:``) is merged over the root when that tool
    runs; ``train_jointly:``, for ``train_prior.py joint=true``, on top of ``train_prior:``. Overrides come last:
    ``key.sub=value``, or ``group=name`` to swap a group's file (the experiment's own settings of that group, which were
    about another class, are then dropped, with a prior's those of its sampler; ``group=null`` empties it). What an
    experiment says under ``when: {group: {name: ...}}``, keys and sections, counts where that file is chosen. Overrides
    of a section, ``train_prior.batch_size=8``, count when its tool runs, so that all tools can be given the same ones.

    ``tokenizer=PATH`` (or ``OWNER/NAME``, see ``saved.tokenizer_folder``) takes one that is trained already: it becomes
    ``tokenizer_dir``. The settings that it was trained with, frame size and channels too, then go before those of the
    files, and with ``go_on`` those of what stands in ``run_dir``, so that nobody needs to repeat them. Overrides may
    not contradict them.

    Nothing in a file runs a program: see ``targets.py`` for what ``_target_`` may name. The override
    ``allow_targets=[package.module.Name]`` allows more; no file can. Of references, ``${key.sub}`` to another key is
    read, and no resolver.

    Args:
        experiment: a name under ``configs/experiment/``, the path of a YAML file, or what would stand in it as a dict.
        overrides: strings ``key=value``; values are YAML, or text where the key is a path or a name.
        tool: name of the tool whose section applies, or None.
        go_on: whether the tool goes on from what an earlier one has trained: the run's tokenizer, of "evaluate" its
            pipeline.
    Returns:
        DictConfig with references intact.
    Raises:
        ConfigError: unknown experiment, group, key or unparsable override; names the nearest known one. A target that
            may not stand where it does. References to nowhere, in a circle, or too many.
        ValueError: overrides that contradict what was trained.
        OSError: nothing saved at ``tokenizer_dir``.
    """
    root, groups = config_root(), _groups()
    if isinstance(experiment, dict):
        body, experiment = copy.deepcopy(experiment), experiment["name"]
    else:
        body = read_yaml(_experiment_path(root, experiment))
    choices = body.pop("defaults", None) or {}
    if not isinstance(choices, dict):
        raise ConfigError(f"{experiment}: expected a mapping group: name under defaults, found {short(choices)}")
    swapped, settings, allowed, named = {}, [], (), None
    for key, text in split_overrides(overrides):
        if key in groups:
            if choices.get(key) != text:
                swapped[key] = None if text == "null" else text
            elif key == "tokenizer":
                named = text
        elif key == ALLOW:
            allowed = parse(text, f"override {ALLOW}", comments=False)
            if not isinstance(allowed, list) or not all(isinstance(path, str) for path in allowed):
                raise ConfigError(f"override {ALLOW}: expected a list like [package.module.Name], found {short(text)}")
        else:
            settings.append((key, override_value(key, text)))

    config = _to_config(defaults(), "base.yaml")
    for path in allowed:  # a flag, so that it is in no saved config
        config._set_flag(f"{ALLOW} {path}", True)
    for group in choices:
        if group not in groups:
            raise ConfigError(f"{experiment}: unknown group {group!r} under defaults{nearest(group, groups)}")
    for group, choice in (choices | swapped).items():
        if _is_saved(root, group, choice):
            config.tokenizer_dir = choice
        elif choice is not None:
            path = _group_path(root, group, choice)
            config[group] = _to_config(read_yaml(path), path)
    chosen = _chosen(root, body.pop("when", None), choices | swapped, experiment)
    sections = _pop_sections(body, experiment)
    for part in (body, *sections.values()):
        for key in (*swapped, *(["tokenizer_dir"] if "tokenizer" in swapped else [])):
            part.pop(key, None)
        for drawing in ("preview", "evaluation") if "prior" in swapped else ():
            if isinstance(part.get(drawing), dict):
                part[drawing].pop("sampler", None)  # options of the other prior's
    found = [(experiment, body, sections)]
    found += [(place, part, _pop_sections(part, place)) for place, part in chosen.items()]
    for place, part, _ in found:
        _merge(config, _to_config(part, place), "")
    applied = ("train_prior", tool) if tool == "train_jointly" else (tool,)
    merged = {}  # section -> what it is merged into; those of other tools are only checked
    for name in TOOLS:
        for place, _, parts in found:
            if parts[name]:
                _merge_section(merged, config, name, applied, parts[name], f"{place}: {name}")
    places = [pair for pair in settings if _in_section(pair[0], applied) in WHERE]
    _override(config, places, groups, merged, applied)
    _name(config, experiment)
    folder, trained = _find_trained(config, tool if go_on else None)
    if trained:
        choice = swapped.get("tokenizer", named)
        asked = _asked_tokenizer(root, choice, named, tool, merged.get("train_tokenizer", config))
        _take_trained(config, folder, trained)
        _merge(config, _to_config(asked, f"tokenizer={choice}"), "")
    if go_on and tool in ("train_prior", "train_jointly") and "data" not in swapped:
        _take_encoded(config)
    _override(config, [pair for pair in settings if pair not in places], groups, merged, applied)
    for name, other in merged.items():
        if other is not config:
            _check(other, f"{experiment}: {name}")
    _check(config, experiment)
    _check_trained(config, folder, trained)
    return config


def stage_config(experiment, overrides, stage):
    """An experiment as the tool that trains a stage composes it; see ``load_config``.

    Args:
        stage: "tokenizer", or "prior", with ``joint=true`` prior and decoder together.
    """
    if stage == "tokenizer":
        return load_config(experiment, overrides, tool="train_tokenizer")
    config = load_config(experiment, overrides, tool="train_prior", go_on=True)
    return load_config(experiment, overrides, tool="train_jointly", go_on=True) if config.joint else config


def _pop_sections(body, place):
    """Take the tools' sections out of what an experiment says -> tool -> its section."""
    sections = {name: body.pop(name, None) or {} for name in TOOLS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{place}: {name}: expected a mapping, found {short(section)}")
    return sections


def _chosen(root, when, choices, experiment):
    """Of ``when: {group: {name: settings}}`` the settings for the groups' chosen files, by what errors call them."""
    found = {}
    for group, names in (when or {}).items() if isinstance(when, dict | None) else [("", when)]:
        place = f"{experiment}: when" + (f".{group}" if group else "")
        if not isinstance(names, dict):
            raise ConfigError(f"{place}: expected a mapping, found {short(names)}")
        if group not in _groups():
            raise ConfigError(f"{experiment}: when: unknown group {group!r}{nearest(group, _groups())}")
        for name, settings in names.items():
            _group_path(root, group, name)
            if not isinstance(settings, dict):
                raise ConfigError(f"{place}.{name}: expected a mapping, found {short(settings)}")
            if choices.get(group) == name:
                found[f"{place}.{name}"] = settings
    return found


def _in_section(key, applied):
    """A key of the command line without the section of the tool that runs."""
    section, _, rest = key.partition(".")
    return rest if section in applied else key


def _override(config, settings, groups, merged, applied):
    """Merge what the command line sets, (key, value) pairs, into a config; see ``_merge_section``."""
    for key, value in settings:
        group, shown = key.partition(".")[0], f"override {short(f'{key}={value}')}"
        if group in TOOLS:
            section = nested(key, value)[group]
            if not isinstance(section, dict):
                raise ConfigError(f"{shown}: expected {group}.KEY=VALUE")
            _merge_section(merged, config, group, applied, section, shown)
            continue
        if group in groups and config._get_node(group)._is_none():
            raise ConfigError(f"{shown}: the experiment has no {group}; choose one by {group}=NAME")
        _merge(config, _to_config(nested(key, value), shown), "")


def _find_trained(config, tool):
    """What a config goes on from -> (its folder, its settings), (None, {}) where it begins from nothing.

    ``tool``: the one whose run goes on; None: none does, and ``tokenizer_dir`` alone counts.
    """
    run_dir, location = (_resolved(config, key) for key in ("run_dir", "tokenizer_dir"))
    if not isinstance(run_dir, str):
        return None, {}  # refused by _check
    if tool == "evaluate" and (Path(run_dir) / "pipeline" / "prior" / "config.json").is_file():
        return Path(run_dir) / "pipeline", pipeline_settings(Path(run_dir) / "pipeline")
    if tool is not None:
        folder = used_tokenizer(run_dir, location)
    else:
        folder = None if location is None else tokenizer_folder(location)
    return folder, {} if folder is None else tokenizer_settings(folder)


def _asked_tokenizer(root, choice, named, tool, config):
    """What the command line's ``tokenizer=CHOICE`` asks of the trained one -> settings. ``named``: the choice, if it is
    the experiment's own, whose settings there may have been others in training. ``config``: what it is trained with."""
    if choice is None:
        return {}
    if _is_saved(root, "tokenizer", choice):  # for the other tools it is the trained one
        return tokenizer_settings(tokenizer_folder(choice)) if tool == "evaluate" else {}
    group = OmegaConf.to_container(config.tokenizer)  # of the file, and what the experiment says of it
    return {"tokenizer": {"_target_": group["_target_"]} if choice == named else group}


def _take_trained(config, folder, trained):
    """Put the settings of what was trained in the place of the files', and say where they differ."""
    if "tokenizer" in trained:
        target = trained["tokenizer"]["_target_"]
        known = {"_target_", *arguments_of(target, "tokenizer")[0]}
        trained["tokenizer"] = {name: value for name, value in trained["tokenizer"].items() if name in known}
    _divide_size(config)
    before = {name: _resolved(config, name) for name in trained}
    changed = [
        f"{name}={one_line(new)} (the experiment says {one_line(old)})" for name, old, new in _unlike(before, trained)
    ]
    if changed:
        logger.info("%s: taken as it was trained: %s", folder, ", ".join(changed))
    for name, value in _to_config(trained, folder).items_ex(resolve=False):
        config[name] = value


def _take_encoded(config):
    """Take the settings of the data that the run's cache was made with (stride, rate, split, ...), in the place of the
    files', and say where they differ."""
    root, data = cache_root(config), _resolved(config, "data")
    if data is None or not (root / "train" / "manifest.json").is_file():
        return
    found = read_json(root / "train" / "manifest.json", MANIFEST_MB).get("data")
    kind = str(data.get("_target_")).rpartition(".")[2].replace("_", "")
    if not isinstance(found, dict) or str(found.get("type")).lower() != kind.lower():
        return
    encoded = {name: found[name] for name in found.keys() & data.keys() if not isinstance(found[name], dict)}
    changed = [
        f"data.{name}={one_line(value)}"
        for name, value in sorted(encoded.items())
        if data[name] not in (None, value)  # null: whatever the data are found to have
    ]
    if changed:
        logger.info("%s: taken as it was encoded: %s", root, ", ".join(changed))
    for name, value in _to_config(encoded, root).items_ex(resolve=False):
        config.data[name] = value


def _check_trained(config, folder, trained):
    """Refuse a config that contradicts what it goes on from."""
    for name, asked, found in _unlike({name: _resolved(config, name) for name in trained}, trained):
        raise ConfigError(
            f"{folder}: trained with {name}={found}, asked for {asked}; leave it out to take it as it is, train again "
            "with overwrite=true, or use another run_dir"
        )


def _unlike(asked, trained):
    """Settings whose values differ -> [(name, asked, trained)]; of unlike tokenizers the class alone."""
    found = []
    for name, value in trained.items():
        if isinstance(value, dict) and isinstance(asked[name], dict):
            inner = asked[name].get("_target_"), value["_target_"]
            if inner[0] != inner[1]:
                found.append((f"{name}._target_", *(str(target).rpartition(".")[2] for target in inner)))
                continue
            for key in value.keys() & asked[name].keys() - set(NOT_KEPT):
                new, old = value[key], asked[name][key]
                if isinstance(old, dict) and isinstance(new, dict):  # completed by the model
                    new = {part: new.get(part) for part in old}
                if new != old:
                    found.append((f"{name}.{key}", old, new))
        elif asked[name] is not None and asked[name] != value:
            found.append((name, asked[name], value))
    return sorted(found, key=lambda entry: entry[0])


def _resolved(config, name):
    """A value of a config that is not checked yet, as plain Python."""
    if name not in config:
        return None
    _measure(config._get_node(name), {})  # before anything is followed
    value = OmegaConf.select(config, name)
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def check_data(config):
    """Refuse a data set whose folder is not given or not there, before what takes seconds is loaded.

    Raises:
        ConfigError: no folder is given. FileNotFoundError: there is none.
    """
    data = to_container(config.data) or {}
    root = data.get("root")
    folder = folder_at(os.path.expanduser(root)) if isinstance(root, str) else None
    if folder is not None and not (folder.is_dir() if isinstance(folder, Url) else os.path.isdir(folder)):
        if str(data["_target_"]).startswith("latentcast.VideoFolder"):
            raise FileNotFoundError(f"data.root {root}: no such folder of videos")
        instantiate(config.data)(split="train")  # says what makes it


def cache_root(config):
    """The folder of an experiment's latents cache, with one folder a split: a Path, or a Url."""
    if config.cache.root is None:
        return Path(config.run_dir, "latents")
    return folder_at(config.cache.root, config.cache_dir, config.cache_gigabytes)


def _merge_section(merged, config, name, applied, section, source):
    """Merge a tool's section into the config where it applies, else into a copy of it that is kept in ``merged``."""
    if name not in merged:
        merged[name] = config if name in applied else copy.deepcopy(config)
    _merge(merged[name], _to_config(section, source), "")


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
    index = Path(folder) / "model_index.json"
    saved = read_json(index) if index.is_file() else {}
    n_context, crop = saved.get("n_context"), saved.get("crop")
    experiment = {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "defaults": {"data": data},
        **({"data": {"crop": crop}} if data == "video_folder" and isinstance(crop, str) else {}),
        "frame_size": [spec["frame_height"], spec["frame_width"]],
        "channels": spec["frame_channels"],
        **({"n_context": n_context} if is_whole(n_context, 1) else {}),
        **settings,
    }
    return load_config(experiment, overrides, tool="evaluate")


def check_counts(least=1, **counts):
    """Refuse counts (of frames, samples, layers, ...) that are no whole numbers of at least ``least``, by name."""
    for name, value in counts.items():
        if not is_whole(value, least):
            raise ValueError(f"{name}: expected a whole number of at least {least}, found {one_line(value)}")


def one_line(value, longest=100):
    """``repr`` of any value for a message: one line (that of a tensor has several), cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def instantiate(config, **kwargs):
    """Build the object that a config describes.

    ``_target_`` names the class or function, ``_partial_: true`` asks for a ``functools.partial``; every other key is
    an argument, built the same way. Lists and plain dicts are built element by element.

    Args:
        config: a part of what load_config returned, whose place says what may be built (see ``targets.PLACES``); or a
            dict or list, where all that may stand anywhere is built.
        **kwargs: arguments that the config does not hold; they win over its own, which are then not built.
    Raises:
        ConfigError: a target that may not stand there, arguments that it does not take, or one that it needs and did
            not get.
    """
    place, run_dir, root, sources = ANYWHERE, None, None, {}
    if isinstance(config, (DictConfig, ListConfig)):
        root = config._get_root()
        place = re.sub(r"\[\d+\]", "", config._get_full_key(None))
        if not place and (isinstance(config, ListConfig) or "_target_" in config):  # no part of an experiment
            place = ANYWHERE
        plain = to_container(config)
        sources, config = _sources(config), plain
        run_dir = OmegaConf.select(root, "run_dir") if place else None
    allows = functools.partial(_allows, root)
    check_targets(config, place, run_dir, allows)
    with _naming_keys(sources, config, place):
        built = _build(config, place, allows, kwargs)
    if isinstance(built, functools.partial):
        built = _Later(built)
        built.about = sources, config, place
    return built


class _Later(functools.partial):
    """What a config with ``_partial_`` builds: errors of the call name the config's keys, too."""

    def __call__(self, *args, **kwargs):
        with _naming_keys(*self.about):
            return super().__call__(*args, **kwargs)


@contextlib.contextmanager
def _naming_keys(sources, config, place):
    try:
        yield
    except ValueError as error:
        told = _of_its_key(error, sources, config, place)
        if told is error:
            raise
        raise told from error


def _sources(config):
    """Arguments that a config takes from another key (``height: ${frame_size[0]}``) -> that key and its value."""
    found = {}
    for name in config if _is_mapping(config) else ():
        node = config._get_node(name)
        reference = REFERENCE.fullmatch(str(node._value())) if node._is_interpolation() else None
        if reference and not reference[1].startswith("."):
            key = reference[1].partition("[")[0]
            found[name] = key, OmegaConf.select(config._get_root(), key)
    return found


def _of_its_key(error, sources, config, place):
    """An error about arguments as one about the keys of the config that change them; other errors as they are."""
    about, _, rest = str(error).partition(": ")
    named = about.split(", ")
    if not rest or type(error) not in (ValueError, ConfigError, MisfitError) or not isinstance(config, dict):
        return error
    if place in (None, ANYWHERE) or not {*named} <= config.keys():
        return error
    arguments = ", ".join(f"{place}.{name}" if place else name for name in named)
    key, value = sources.get(named[0], (None, None))
    if key == about:
        return error
    if key is None:
        return type(error)(f"{arguments}: {rest}")
    return type(error)(f"{key}={value} (as {arguments}): {rest}")


def call(target, arguments, name, partial=False):
    """Call a class or function, or make a partial of it, after a look at its arguments; errors call it ``name``.

    Raises:
        ConfigError: arguments that it does not take or cannot use, or one that it needs and did not get.
    """
    unknown = [] if takes_any(target) else [key for key in arguments if key not in parameters_of(target)]
    if unknown:
        raise ConfigError(f"{name}: unknown argument {unknown[0]!r}{nearest(unknown[0], parameters_of(target))}")
    if partial:
        return functools.partial(target, **arguments)
    missing = [argument for argument in parameters_of(target, required=True) if argument not in arguments]
    if missing:
        raise ConfigError(f"{name}: missing argument {missing[0]!r}")
    try:
        return target(**arguments)
    except (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        if "allocate memory" in str(error):
            raise ConfigError(f"{name}: its sizes ask for more memory than there is") from error
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name}: cannot be built of its arguments ({short(found)[1:-1]})") from error


def _build(config, place, allows, kwargs):
    if isinstance(config, list):
        return [_build(item, place, allows, {}) for item in config]
    if not isinstance(config, dict):
        return config
    arguments = {
        name: _build(value, inner_place(config, name, place, allows), allows, {})
        for name, value in config.items()
        if name not in ("_target_", "_partial_", *kwargs)
    } | kwargs
    if "_target_" not in config:
        return arguments
    target = find_target(config["_target_"], place, allows)
    return call(target, arguments, config["_target_"], config.get("_partial_"))


def _allows(root, path):
    """Whether the command line allowed a target for the config that ``root`` is the top of."""
    return root is not None and bool(root._get_flag(f"{ALLOW} {path}"))


def to_container(config, whole=True):
    """A DictConfig as plain, resolved Python (JSON-able): what models and Lightning need. None stays None.

    Args:
        whole: whether all values must have been given; else ``???`` stays.
    Raises:
        ConfigError: a value that must be given (``???``) was not.
    """
    if config is None:
        return None
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=whole)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value must be given ({error.full_key}=...)") from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None


def _groups():
    return sorted(p.name for p in config_root().iterdir() if p.is_dir() and p.name != "experiment")


def _to_config(content, source):
    """What a file or an override holds as a DictConfig, without anything that only the command line may say."""
    if ALLOW in content:
        raise ConfigError(f"{source}: {ALLOW} may stand on the command line alone ({ALLOW}=[package.module.Name])")
    _check_text(content, source)
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_text(value, where):
    """Refuse resolvers (``${oc.env:HOME}``), and targets that are no plain text."""
    if isinstance(value, dict):
        target = value.get("_target_", "")
        if not isinstance(target, str) or "$" in target or target == "???":
            raise ConfigError(f"{where}: _target_: expected the full name of a class, found {short(target)}")
        for item in value.values():
            _check_text(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, where)
    elif isinstance(value, str):
        _references(value, where)


def _references(text, where):
    """Keys that a text refers to: "runs/${name}" -> ["name"]; after an odd number of backslashes ``${`` is itself."""
    keys = []
    for found in re.finditer(r"(\\*)\$\{", text):
        if len(found[1]) % 2:
            continue
        reference = REFERENCE.match(text, found.end() - 2)
        if reference is None:
            raise ConfigError(f"{where}: expected references like ${{key.sub}} to another key, found {short(text)}")
        keys.append(reference[1])
    return keys


def _name(config, experiment):
    if config._get_node("name")._value() in (None, ""):
        config.name = Path(str(experiment)).stem


def _check(config, experiment):
    """Name a composed config, and make sure that it can be resolved and that its targets may stand where they do."""
    _name(config, experiment)
    try:
        _measure(config, {})
        _divide_size(config)
        found = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{experiment}: {str(error).partition(chr(10))[0]}") from None
    for name, value in found.items():
        if name in ("name", "run_dir") and not isinstance(value, str):
            raise ConfigError(f"{name}: expected text, found {short(value)}")
        if name in PLACES and value is not None and not (isinstance(value, dict) and "_target_" in value):
            raise ConfigError(f"{name}: expected a mapping with _target_, found {short(value)}")
    check_targets(found, "", found["run_dir"], functools.partial(_allows, config))


def _divide_size(config):
    """Bring ``frame_size`` into its one form, and where that is [height, width], give each argument ``height`` and
    ``width`` that is ``${frame_size}`` its own part."""
    size = _resolved(config, "frame_size")
    if size is None or size == "???":
        return
    size = as_size(size)
    if not config._get_node("frame_size")._is_interpolation():
        config.frame_size = size
    for group in _groups():
        node = config._get_node(group)
        for place, side in enumerate(SIDES) if _is_mapping(node) else ():
            inner = node._get_node(side)
            if inner is not None and OF_SIZE.fullmatch(str(inner._value())):
                node[side] = "${frame_size}" if isinstance(size, int) else f"${{frame_size[{place}]}}"


def _measure(node, sizes, level=0):
    """-> (values and characters, levels) that a node comes to where references are followed.

    ``sizes``: those of nodes by id, None while they are being measured. A few lines of references can come to billions
    of values, so nothing is resolved before.
    """
    if id(node) in sizes:
        if sizes[id(node)] is None:
            raise ConfigError(f"{node._get_full_key(None)}: it refers to itself")
        size, depth = sizes[id(node)]
    elif level > MAX_DEPTH:
        raise ConfigError(f"{node._get_full_key(None)}: nested more than {MAX_DEPTH} levels deep")
    else:
        sizes[id(node)] = None
        size, depth = 1, 0
        value = node._value()
        if isinstance(value, str):
            size += len(value)
            keys = _references(value, node._get_full_key(None)) if "$" in value else []
            inner = [_referred(node, key, sizes, level) for key in keys]
        elif isinstance(node, DictConfig | ListConfig) and value is not None:
            inner = [node._get_node(key) for key in (range(len(node)) if isinstance(node, ListConfig) else node)]
        else:
            inner = []
        for other in inner:
            other_size, other_depth = _measure(other, sizes, level + 1)
            size, depth = size + other_size, max(depth, 1 + other_depth)
        sizes[id(node)] = size, depth
    if level + depth > MAX_DEPTH:
        raise ConfigError(f"{node._get_full_key(None)}: nested more than {MAX_DEPTH} levels deep")
    if size > MAX_SIZE:
        name = node._get_full_key(None) or "config"
        raise ConfigError(f"{name}: it comes to more than {MAX_SIZE} values and characters")
    return size, depth


def _referred(node, key, sizes, level):
    """The node that ``${key}`` in ``node`` stands for."""
    path = key.lstrip(".")
    here = node._get_root()
    if path != key:  # .key: beside the node; ..key: one level up
        here = node
        for _ in range(len(key) - len(path)):
            here = here._get_parent() if here is not None else None
    for part in re.findall(r"[\w-]+", path):
        if here is not None and here._is_interpolation():
            _measure(here, sizes, level + 1)  # before it is followed
            here = here._dereference_node()
        if isinstance(here, ListConfig) and part.isdecimal() and int(part) < len(here):
            here = here._get_node(int(part))
        else:
            here = here._get_node(part) if _is_mapping(here) else None
        if here is None:
            raise ConfigError(f"{node._get_full_key(None)}: there is no key {key!r} for ${{{key}}} to stand for")
    return here


def _experiment_path(root, experiment):
    path = Path(str(experiment)).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not _is_file(path):
            raise ConfigError(f"experiment file {path}: not found")
        return path
    return _group_path(root, "experiment", str(experiment))


def _is_saved(root, group, choice):
    """Whether a group's choice is no name but says where a trained tokenizer is."""
    if group != "tokenizer" or choice is None:
        return False
    choice = str(choice)
    named = _is_file(root / group / f"{choice}.yaml") and not (
        choice.startswith((".", "/", "~")) and os.path.isdir(os.path.expanduser(choice))
    )
    return not named and is_location(choice)


def _group_path(root, group, choice):
    path = root / group / f"{choice}.yaml"
    if not _is_file(path):
        raise ConfigError(f"{group}: no config named {short(choice)}{nearest(choice, names_below(root / group))}")
    return path


def _is_file(path):
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def _is_mapping(node):
    return isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()


def _merge(config, part, prefix):
    """Merge ``part`` into ``config`` in place, refusing keys that nothing knows."""
    own = "_target_" not in config  # settings of the tools, not arguments of a class
    for key in part:
        name = f"{prefix}{key}"
        current, value = config._get_node(key), part._get_node(key)  # nodes keep references as they are
        old, new = _is_mapping(current), _is_mapping(value)
        if current is None:
            known, open_ended = list(config), config._get_flag(OPEN)
            if not own:
                known, open_ended = arguments_of(config["_target_"], prefix[:-1], functools.partial(_allows, config))
                known = [*known, "_target_", "_partial_"]
            if not open_ended and key not in known:
                homes = _homes(config._get_root(), key)
                hint = f"; did you mean {' or '.join(map(repr, homes))}?" if homes else nearest(key, known, prefix)
                raise ConfigError(f"unknown key {name!r}{hint}")
            config[key] = value
        elif old and new:
            if "_target_" not in current and (not current or not own):
                current._set_flag(OPEN, True)
            if "_target_" not in value or value["_target_"] == current.get("_target_"):
                _merge(current, value, f"{name}.")
            else:  # another class: its arguments replace the old one's
                partial = current._get_node("_partial_")
                config[key] = value
                if partial is not None and "_partial_" not in value:
                    config[key]["_partial_"] = partial
        elif old and not value._is_interpolation() and not (value._is_none() and (not own or _may_be_null(name))):
            raise ConfigError(f"{name}: expected a mapping, found {_shown(value)}")
        elif new and not current._is_none() and "_target_" not in value:
            raise ConfigError(f"{name}: expected a value like {_shown(current)}, found a mapping")
        else:
            _check_kind(name, current, value, own)
            config[key] = value
            if new:
                config[key]._set_flag(OPEN, True)


def _may_be_null(name):
    """Whether a mapping of base.yaml may be: there is none of the kind then."""
    return name in (*_groups(), "lr_scheduler")


def _homes(root, key):
    """Full names of the keys called ``key`` in the groups and sections of a config: ``lr`` -> ["optimizer.lr"]."""
    found = []
    for name in root:
        node = root._get_node(name)
        if not _is_mapping(node):
            continue
        known = list(node)
        with contextlib.suppress(ConfigError):
            if "_target_" in node:
                known += arguments_of(node["_target_"], name, functools.partial(_allows, root))[0]
        if key in known:
            found.append(f"{name}.{key}")
    return found


def _check_kind(name, current, value, own):
    """Refuse a value of another kind than the default's, where that or the key says which values there can be.

    ``own``: whether it is a setting of the tools, none of which is null unless that is its default.
    """
    if current._is_missing() and value._is_none():
        raise ConfigError(f"{name}: a value must be given ({name}=...)")
    if value._is_interpolation():
        return
    key = name.rpartition(".")[2]
    found = _kind(value, text=True)
    if (key in SIZES and found in ("a number", "a list")) or (key in SIDES and found == "a number"):
        return
    expected = _kind(current) or ("text" if is_text(key) and not isinstance(value, ListConfig) else None)
    if value._is_none():
        if own and not current._is_none() and (is_path(key) or expected not in (None, "text")):
            raise ConfigError(f"{name}: expected {expected}, found null")
    elif expected and found != expected:
        raise ConfigError(f"{name}: expected {expected}, found {_shown(value)}")


def _kind(node, text=False):
    """What a default asks for. A string asks for nothing, if not ``text``: ``auto`` and ``32-true`` are for numbers."""
    try:
        _measure(node, {})
        node = node._maybe_dereference_node()
    except (ConfigError, OmegaConfBaseException, RecursionError):  # a reference that _check refuses, if it stays
        return None
    if isinstance(node, ListConfig):
        return "a list"
    value = None if node is None else node._value()
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "text" if text and isinstance(value, str) else None


def _shown(node):
    """A node's value as errors show it."""
    value = OmegaConf.to_container(node) if isinstance(node, DictConfig | ListConfig) else node._value()
    return "null" if value is None else short(value)

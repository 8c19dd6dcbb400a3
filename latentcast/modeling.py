"""The base class of every network in latentcast, and how a saved one is loaded."""

import contextlib
import hashlib
import importlib
import inspect
import json
import warnings
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

import latentcast
from latentcast.command import named
from latentcast.config import instantiate
from latentcast.files import update_digest, writing
from latentcast.saved import CONFIG, MODELS, PRIORS, TOKENIZERS, ModelConfig, used_tokenizer, where_instead
from latentcast.schemas import Schema, Text, one_line, read_checked, short

STAGES = (TOKENIZERS, PRIORS)
MOST_UNSAVED = 2**27  # bytes of a model's masks and tables, which are not saved
LARGEST = 2**24  # of a whole number in a config: no size, step or codebook comes near


def adopt(cls):
    """Make an exported class report ``latentcast`` as its module, as NumPy does.

    Saved pipelines and pickles then record the public name, so moving a file never breaks a checkpoint.
    """
    if latentcast._EXPORTS.get(cls.__name__) == cls.__module__:
        cls.__module__ = "latentcast"


class SavedClearly:
    """Before a class of diffusers that is saved or uploaded: its errors are one line that names the place."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in diffusers, with errors that name the folder."""
        pushed = kwargs.get("push_to_hub")
        upload = _pushing(kwargs.get("repo_id", save_directory)) if pushed else contextlib.nullcontext()
        with writing(save_directory), upload:
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id, **kwargs):
        """As in diffusers, with an OSError of one line where the hub cannot be reached or refuses."""
        with _pushing(repo_id):
            return super().push_to_hub(repo_id, **kwargs)


@contextlib.contextmanager
def _pushing(repo_id):
    """Upload to ``repo_id`` in the block; what huggingface_hub and its network libraries raise becomes one line."""
    try:
        yield
    except Exception as error:
        raise OSError(f"push_to_hub {repo_id}: failed ({type(error).__name__}: {one_line(error, 200)})") from error


class VideoModel(SavedClearly, ModelMixin, ConfigMixin):
    """A torch module that saves and loads like a diffusers model.

    Subclasses decorate ``__init__`` with ``diffusers.configuration_utils.register_to_config`` and take JSON-able
    arguments only; ``save_pretrained(folder)`` writes ``config.json`` and safetensors weights.
    """

    config_name = CONFIG
    memory_format = torch.contiguous_format  # of the weights, also after loading

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        adopt(cls)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """As in diffusers, except that weights which do not fill the model are an error, not a random start."""
        want_info = kwargs.pop("output_loading_info", False)
        with _fitting(Path(path, kwargs.get("subfolder") or ""), cls):
            model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(
                f"{path}: the weights do not fit {cls.config_name}: {len(info['missing_keys'])} tensors are missing, "
                f"{info['missing_keys'][0]!r} among them"
            )
        model.to(memory_format=cls.memory_format)
        return (model, info) if want_info else model

    def to_json_string(self):
        """As in diffusers, without the place that it was loaded from: a copy has the same bytes wherever it is made."""
        found = json.loads(super().to_json_string())
        found.pop("_name_or_path", None)
        return json.dumps(found, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config=None, **kwargs):
        """As in diffusers; what the class cannot be built of is a ValueError, whatever Python called it."""
        try:
            return super().from_config(config, **kwargs)
        except (ValueError, OSError):
            raise
        except Exception as error:
            found = f"{type(error).__name__}: {one_line(error, 200)}"
            raise ValueError(
                f"expected the config of a {cls.__name__}, found one it cannot be built of ({found})"
            ) from error


@contextlib.contextmanager
def _fitting(folder, cls):
    """Load what a folder holds: errors name its config, which may not ask for more than its weights hold: it is built
    without memory first."""
    config = folder / VideoModel.config_name
    if folder.is_dir() and not config.is_file():
        raise _no_config(folder, lambda path: read_checked(path, ModelConfig)["_class_name"] == cls.__name__)
    if not config.is_file():  # on the hub, or not there
        yield
        return
    settings = read_checked(config, ModelConfig)
    _check_numbers(config, settings)
    for index in folder.glob("*.safetensors.index.json"):
        for name in read_checked(index, WeightMap)["weight_map"].values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: weight_map: expected safetensors files of this folder, found {short(name)}")
    most, most_bytes = 500, MOST_UNSAVED
    for path in folder.glob("*.safetensors"):
        most_bytes += 16 * path.stat().st_size  # weights in half precision, and what is made of them
        try:
            with safe_open(path, framework="pt") as file:
                most += 10 * len(file.keys())  # some are registered twice, or not saved
        except SafetensorError as error:
            raise OSError(f"{path}: not a readable safetensors file ({one_line(error, 200)})") from None
    n_registered = n_bytes = 0

    def count(module, name, tensor):
        nonlocal n_registered, n_bytes
        n_registered += 1
        n_bytes += 0 if tensor is None else tensor.numel() * tensor.element_size()
        if n_registered > most or n_bytes > most_bytes:
            found = f"{most} tensors" if n_registered > most else f"{most_bytes / 1e6:.0f} MB"
            raise ValueError(f"expected a model of its weights' size, found one of more than {found}")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        try:
            known = inspect.signature(cls.__init__).parameters
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                cls(**{name: value for name, value in settings.items() if name in known})
        except Exception:  # what else is wrong shows when it is loaded; some cannot be built without memory
            if n_registered > most or n_bytes > most_bytes:
                raise
        n_registered = n_bytes = 0
        yield
    except (ValueError, SafetensorError) as error:
        text = one_line(error, 400)
        raise ValueError(text if str(folder) in text else f"{config}: {text}") from error
    finally:
        for hook in hooks:
            hook.remove()


class WeightMap(Schema):
    """``*.safetensors.index.json`` of weights in several files."""

    weight_map: dict[Text, Text]


def _no_config(folder, fits=lambda path: True):
    name = VideoModel.config_name
    hint = where_instead(folder, name, MODELS, fits)
    return FileNotFoundError(f"{folder}: no {name} here; expected a folder written by save_pretrained{hint}")


def _check_numbers(where, value, name=""):
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(where, item, f"{name}.{one_line(key)}" if name else one_line(key))
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where}: {name}: expected at most {LARGEST}, found {short(value)}")


def load_model(path, **kwargs):
    """Load the tokenizer or prior saved in a folder by ``save_pretrained``, whatever its class.

    Args:
        path: a folder with ``config.json`` and safetensors weights.
        **kwargs: passed on to ``from_pretrained`` (``dtype=torch.bfloat16``, say).
    Returns:
        the model, in eval mode.
    Raises:
        FileNotFoundError: no ``config.json`` or no weights there.
        ValueError: the config is not JSON or names a class that latentcast does not export.
    """
    return saved_class(path).from_pretrained(path, use_safetensors=True, **kwargs)


def saved_class(path):
    """The class of the model saved in a folder; raises like ``load_model`` when the folder is not complete."""
    folder = Path(path)
    config = folder / VideoModel.config_name
    if not config.is_file():
        raise _no_config(folder)
    name = read_checked(config, ModelConfig)["_class_name"]
    if not latentcast._EXPORTS.get(name, "").startswith(STAGES):
        known = ", ".join(sorted(known_models()))
        raise ValueError(f"{config}: unknown model class {short(name)}; expected one of {known}")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no safetensors weights beside {config.name}")
    return getattr(latentcast, name)


def known_models():
    """Exported name -> class, for every tokenizer and prior."""
    return {
        name: getattr(importlib.import_module(module), name)
        for name, module in latentcast._EXPORTS.items()
        if module.startswith(STAGES) and not module.endswith(".base")
    }


def fingerprint(model):
    """The identity of a model: sha256 (hex) over its class, its config and the bytes of its weights and buffers.

    The same for a model in memory and for its copy saved and loaded again, on any device; another dtype is another
    model. Options at their defaults do not count, so that one which a later version adds changes no identity.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, argument in sorted(inspect.signature(type(model).__init__).parameters.items()):
        if name in model.config:
            value, default = model.config[name], argument.default
            if default is argument.empty or json.dumps(value) != json.dumps(default):
                digest.update(f"{name} {json.dumps(value, sort_keys=True)}".encode())
    update_digest(digest, model.state_dict())
    return digest.hexdigest()


@contextlib.contextmanager
def eval_mode(*models):
    """Switch models (or None) to eval mode, module by module, and back afterwards."""
    modules = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def find_tokenizer(config, run_dir):
    """The tokenizer of an experiment: a trained one (see ``saved.used_tokenizer``), else one that has nothing to learn.

    Args:
        config: the experiment, as ``load_config`` with ``go_on`` returns it, so that its settings are those of the
            trained one. Where none is trained, its ``tokenizer`` group is built if it needs no training
            (PixelTokenizer, a pretrained one).
        run_dir: folder of the experiment.
    Raises:
        FileNotFoundError: the tokenizer is to be trained first.
        ValueError, OSError: see ``saved.used_tokenizer``.
    """
    folder = used_tokenizer(run_dir, config.tokenizer_dir)
    if folder is not None:
        return load_model(folder)
    if config.tokenizer is not None:
        tokenizer = instantiate(config.tokenizer)
        if not tokenizer.needs_training:
            return tokenizer.eval()
    raise FileNotFoundError(
        f"{Path(run_dir) / 'tokenizer'}: no trained tokenizer here; run {named('train_tokenizer')} first, or give one "
        "by tokenizer=PATH"
    )

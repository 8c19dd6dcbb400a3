"""The base class of every network in latentcast, and how a saved one is loaded."""

import importlib
import json
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin

import latentcast


def adopt(cls):
    """Make an exported class report ``latentcast`` as its module, as NumPy does.

    Saved pipelines and pickles then record the public name, so moving a file never breaks a checkpoint.
    """
    if latentcast._EXPORTS.get(cls.__name__) == cls.__module__:
        cls.__module__ = "latentcast"


class VideoModel(ModelMixin, ConfigMixin):
    """A torch module that saves and loads like a diffusers model.

    Subclasses decorate ``__init__`` with ``diffusers.configuration_utils.register_to_config`` and take JSON-able
    arguments only; ``save_pretrained(folder)`` writes ``config.json`` and safetensors weights.
    """

    config_name = "config.json"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        adopt(cls)


def load_model(path, **kwargs):
    """Load the tokenizer or prior saved in a folder by ``save_pretrained``, whatever its class.

    Args:
        path: a folder with ``config.json`` and safetensors weights.
        **kwargs: passed on to ``from_pretrained`` (``torch_dtype=torch.bfloat16``, say).
    Returns:
        the model, in eval mode.
    Raises:
        FileNotFoundError: no ``config.json`` or no weights there.
        ValueError: the config is not JSON or names a class that latentcast does not export.
    """
    folder = Path(path)
    config = folder / VideoModel.config_name
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: no {config.name} here; expected a folder written by save_pretrained")
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from None
    if name not in latentcast._EXPORTS:
        known = ", ".join(sorted(known_models()))
        raise ValueError(f"{config}: unknown model class {name!r}; expected one of {known}")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no safetensors weights beside {config.name}")
    return getattr(latentcast, name).from_pretrained(folder, use_safetensors=True, **kwargs)


def known_models():
    """Exported name -> class, for every tokenizer and prior."""
    stages = ("latentcast.tokenizers.", "latentcast.priors.")
    return {
        name: getattr(importlib.import_module(module), name)
        for name, module in latentcast._EXPORTS.items()
        if module.startswith(stages) and not module.endswith(".base")
    }

"""Where saved models are: in a folder, or under a name on the Hub; found and described without loading them."""

import os
from pathlib import Path

from pydantic import Field

import latentcast
from latentcast.schemas import LatentSpec, Schema, Text, read_checked, short
from latentcast.sizes import as_size, is_whole
from latentcast.yaml_text import parse

CONFIG, INDEX = "config.json", "model_index.json"  # of a model, of a pipeline
STAGES = ("tokenizer", "prior", "joint")  # of training: a run has config_STAGE.yaml, metrics/STAGE.csv and so on
TOKENIZERS, PRIORS = "latentcast.tokenizers.", "latentcast.priors."  # modules
MODELS = ("tokenizer", "prior", "pipeline/tokenizer", "pipeline/prior", "joint/tokenizer", "joint/prior")  # in a run's
PLACES = ("", "tokenizer/", "pipeline/tokenizer/")  # of a tokenizer in its own folder, that of a run or of a pipeline
ALL = ("*.json", "*.safetensors")  # files of models and pipelines
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class ModelConfig(Schema):
    """``config.json`` of a tokenizer or prior, beside the arguments of its class."""

    class_name: Text = Field(alias="_class_name")
    latent_spec: LatentSpec | None = None


def is_location(text):
    """Whether text that may be a config group's name says where something is: an existing folder, or with a "/"."""
    return "/" in text or os.sep in text or os.path.isdir(os.path.expanduser(text))


def find_folder(location, what, patterns=ALL, **options):
    """The folder of something saved; of a name on the Hub, what was fetched from there.

    Args:
        location: a folder, or ``owner/name`` on the Hub.
        what: how errors call it.
        patterns: the files that are fetched.
        **options: of HUB_OPTIONS.
    Raises:
        OSError: no such folder, and nothing of that name on the Hub.
    """
    path = Path(os.path.expanduser(location))
    if path.is_dir():
        return path
    if path.exists() or str(location).startswith((".", "/", "~")) or str(location).count("/") != 1:
        raise NotADirectoryError(f"{what} {location}: not a folder")
    return download(str(location), what, patterns, **options)


def download(name, what, patterns=ALL, **options):
    """Fetch the files of ``owner/name`` that fit the patterns -> folder; see ``find_folder``."""
    from huggingface_hub import snapshot_download

    given = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **given))
    except (OSError, ValueError) as error:  # what huggingface_hub and its network libraries raise
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{what} {name}: not a folder, and not on the hub ({reason})") from None


def where_instead(folder, file, places, fits=lambda path: True):
    """The end of an error about a folder without ``file``: where in it, a run's or a pipeline's, one is.

    Args:
        folder: a path. file: a name. places: folders below it.
        fits: says of a file whether it is one that was asked for.
    """
    found = [folder / place for place in places if (folder / place / file).is_file() and fits(folder / place / file)]
    return f"; try {' or '.join(map(str, found))}" if found else ""


def pipeline_folder(location, **options):
    """The folder of a saved pipeline; see ``find_folder``. Raises OSError where there is none."""
    folder = find_folder(location, "pipeline", **options)
    if not (folder / INDEX).is_file():
        hint = where_instead(folder, INDEX, ("pipeline", "joint"))
        raise FileNotFoundError(f"pipeline {folder}: no {INDEX} in it{hint}")
    return folder


def tokenizer_folder(location):
    """The folder of the tokenizer that ``tokenizer=LOCATION`` means.

    Args:
        location: the folder of a saved tokenizer, of a run or of a pipeline, or ``owner/name`` of one on the Hub.
    Raises:
        OSError: nothing there, or no tokenizer.
    """
    files = [CONFIG, "*.safetensors.index.json", "diffusion_pytorch_model*.safetensors"]  # what save_pretrained writes
    folder = find_folder(location, "tokenizer", [f"{place}{file}" for place in PLACES for file in files])
    for place in PLACES:
        if (folder / place / CONFIG).is_file():
            return folder / place
    raise FileNotFoundError(
        f"tokenizer {location}: no saved tokenizer here; expected the folder of one, of a run or of a pipeline with one"
    )


def used_tokenizer(run_dir, location):
    """The folder of the tokenizer that a run goes on with: its own, trained in ``run_dir``, else that of ``location``.

    Args:
        run_dir: of the run.
        location: see ``tokenizer_folder``; or None.
    Returns:
        a Path; None where there is neither.
    Raises:
        ValueError: the run has a tokenizer of its own, which was not started from the one at ``location``.
        OSError: see ``tokenizer_folder``.
    """
    own = Path(run_dir) / "tokenizer"
    if not (own / CONFIG).is_file():
        return None if location is None else tokenizer_folder(location)
    if location is not None:
        config = own.parent / "config_tokenizer.yaml"  # of its training
        started = (parse(config.read_text(), config) or {}).get("tokenizer_dir") if config.is_file() else None
        same = [own, own.parent, own.parent / "pipeline", *([] if started is None else [started])]
        if _resolved(location) not in [_resolved(place) for place in same]:
            raise ValueError(
                f"tokenizer {location}: run_dir has a tokenizer of its own, {own}; leave this one out, or use another "
                "run_dir"
            )
    return own


def _resolved(place):
    return Path(os.path.expanduser(place)).resolve()


def tokenizer_settings(folder):
    """What a saved tokenizer fixes of an experiment: ``tokenizer``, with ``_target_`` and what its class was given (but
    for ``scaling_factor``, which training sets), and the ``frame_size`` and ``channels`` of its frames, where it is
    plain what they are.

    Raises:
        ValueError: the config is not one, or that of another kind of model.
    """
    path = Path(folder) / CONFIG
    found = read_checked(path, ModelConfig)
    name = found["_class_name"]
    if not latentcast._EXPORTS.get(name, "").startswith(TOKENIZERS):
        known = sorted(export for export, module in latentcast._EXPORTS.items() if module.startswith(TOKENIZERS))
        raise ValueError(
            f"{path}: expected a tokenizer ({', '.join(known)}), found {short(name)}; an autoencoder of diffusers is "
            "taken by tokenizer=diffusers tokenizer.path=..."
        )
    arguments = {key: value for key, value in found.items() if not key.startswith("_") and key != "scaling_factor"}
    settings = {"tokenizer": {"_target_": f"latentcast.{name}"} | arguments}
    inner = found.get("autoencoder")
    channels = found.get("in_channels", inner.get("in_channels") if isinstance(inner, dict) else None)
    return settings | _sizes(found.get("height"), found.get("width"), channels)


def pipeline_settings(folder):
    """What a saved pipeline fixes of an experiment: ``frame_size`` and ``channels``, and ``tokenizer`` where it has one
    that is saved; raises as ``tokenizer_settings``."""
    found = tokenizer_settings(folder / "tokenizer") if (folder / "tokenizer" / CONFIG).is_file() else {}
    spec = read_checked(folder / "prior" / CONFIG, ModelConfig).get("latent_spec") or {}
    return found | _sizes(*(spec.get(f"frame_{side}") for side in ("height", "width", "channels")))


def _sizes(height, width, channels):
    found = {"channels": channels} if is_whole(channels) else {}
    return found | ({"frame_size": as_size([height, width])} if is_whole(height, 1) and is_whole(width, 1) else {})

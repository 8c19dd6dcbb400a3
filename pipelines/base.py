"""The base class of pipelines: diffusers' DiffusionPipeline, made to load pipelines that diffusers does not know."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from pydantic import AfterValidator, Field

import latentcast
from latentcast.modeling import SavedClearly, adopt, saved_class
from latentcast.progress import Bar
from latentcast.saved import HUB_OPTIONS, INDEX, download, pipeline_folder
from latentcast.schemas import Schema, Text, check, one_line, read_checked, short

PUBLIC = "latentcast."  # before the class in model_index.json


def _is_component(found):
    # Nothing else is imported for a stranger's pipeline.
    named = isinstance(found, list) and len(found) == 2 and found[0] in ("latentcast", "diffusers")
    if found != [None, None] and not (named and isinstance(found[1], str)):
        raise ValueError(f"expected [latentcast or diffusers, a class] or [null, null], found {short(found)}")
    return found


Component = Annotated[Any, AfterValidator(_is_component)]


class PipelineIndex(Schema):
    """``model_index.json`` of any pipeline; a class names its own, with components and settings, as
    ``index_schema``."""

    class_name: Text = Field(alias="_class_name")


@contextlib.contextmanager
def _without_bars():
    """Two components are loaded in a moment; diffusers' bar for that says nothing."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class VideoPipeline(SavedClearly, DiffusionPipeline):
    """Saves, loads and moves as diffusers users expect; ``from_pretrained`` picks the class that was saved."""

    index_schema = PipelineIndex

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        adopt(cls)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: object) -> "VideoPipeline":
        """Load a pipeline from a folder written by ``save_pretrained``, or from the hub.

        Args:
            path: a folder, or ``owner/name`` on the hub.
            **kwargs: as in diffusers: ``dtype``, components that replace the saved ones, hub options.
        Raises:
            OSError: no such folder, no ``model_index.json``, or a component without weights or with damaged ones.
            ValueError: the folder holds another kind of pipeline.
        """
        folder = pipeline_folder(path, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        kwargs = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
        index_file = folder / INDEX
        index = read_checked(index_file, PipelineIndex)
        name = index["_class_name"].removeprefix(PUBLIC)
        if name != cls.__name__:
            saved = getattr(latentcast, name) if name in latentcast._EXPORTS else None
            if not (isinstance(saved, type) and issubclass(saved, cls)):
                raise ValueError(f"pipeline {folder}: expected a {cls.__name__}, found {short(name)}")
            return saved.from_pretrained(folder, **kwargs)
        check(index_file, cls.index_schema, index)
        for component, origin in index.items():
            # Only what is ours is checked; diffusers' schedulers have no weights.
            if component not in kwargs and isinstance(origin, list) and origin[:1] == ["latentcast"]:
                saved_class(folder / component)
        try:
            with _without_bars():
                return super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except OSError:
            raise
        except Exception as error:  # what diffusers, and the class, make of a damaged folder
            text = one_line(error, 400)
            if isinstance(error, ValueError):
                raise ValueError(text if str(folder) in text else f"pipeline {folder}: {text}") from error
            raise ValueError(f"pipeline {folder}: cannot be loaded ({type(error).__name__}: {text})") from error

    def to_json_string(self) -> str:
        """``model_index.json``. diffusers' own DiffusionPipeline, asked to load it, seeks the class in diffusers; its
        error repeats what stands here, so that is the full name of the class to use."""
        index = json.loads(super().to_json_string()) | {"_class_name": f"{PUBLIC}{type(self).__name__}"}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Bar:
        """As in diffusers (see ``set_progress_bar_config``), on a terminal; else a line now and then."""
        return Bar(
            iterable, total=total, **{"desc": "sampling", "unit": "step", **getattr(self, "_progress_bar_config", {})}
        )

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: object) -> Path:
        """Fetch ``owner/name`` from the hub -> folder. (diffusers refuses components of packages it does not know.)"""
        return download(pretrained_model_name, "pipeline", **kwargs)

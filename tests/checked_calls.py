"""While tests run, calls of the models' rooms are checked: jaxtyping's import hook, and beartype.

What a function refuses in its own words it goes on refusing so: arguments are looked at when it has returned, with what
it returns. A wrong shape then fails a test where a function took it without a word.

Holds for all that is imported after this, and in each test for the first calls of each function: what loops calls it a
thousand times alike. ``JAXTYPING_DISABLE=1`` runs tests without.
"""

import functools
import sys
from collections import Counter
from dataclasses import is_dataclass
from importlib.machinery import SourceFileLoader
from inspect import getattr_static
from numbers import Integral, Real
from typing import Annotated, Any
from unittest.mock import patch

from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from beartype.vale import Is
from jaxtyping import _import_hook, config, install_import_hook, jaxtyped

PACKAGES = ("data", "evaluation", "layers", "metrics", "pipelines", "priors", "tokenizers")

MOST_CALLS = 5  # of a function in a test
_calls, _paused = Counter(), []

# As in the functions' own words: NumPy's numbers are numbers, an int is a float, and 2.0 is a whole number.
_whole = Integral | Annotated[float, Is[lambda number: number.is_integer()]]
_beartype = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({int: _whole, float: Real})))


def check_what_returned(stand_in):
    """The type checker of the hook, which hands it two stand-ins for each function: one is called before it with its
    arguments, and returns Any; the other is called after it with what it returned as well, and looks at both."""
    if stand_in.__annotations__.get("return") is Any:
        return lambda *args, **kwargs: None
    checked = _beartype(stand_in)
    name = stand_in.__module__, stand_in.__qualname__

    @functools.wraps(checked)
    def called(*args, **kwargs):
        _calls[name] += 1
        if _calls[name] == MOST_CALLS:
            _pause(*name)
        return checked(*args, **kwargs)

    if stand_in.__name__ != "__init__":
        return called

    @functools.wraps(checked)
    def constructor(self, *args, **kwargs):  # options hold what they are given until they are asked to check that
        return None if is_dataclass(self) and hasattr(self, "check") else called(self, *args, **kwargs)

    return constructor


def _pause(module, qualname):
    """Functions inside of others, which are made anew, go on being checked."""
    found = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr_static(found, part, None)
    found = getattr(found, "__func__", getattr(found, "fget", found))  # of static methods and properties
    if getattr(found, "__globals__", None) is jaxtyped.__globals__:
        found.__no_type_check__ = True
        _paused.append(found)


def begin():
    """Of a test: all functions are checked again."""
    _calls.clear()
    while _paused:
        del _paused.pop().__no_type_check__


def stop(monkeypatch):
    """For torch.compile, which traces functions that are told not to check, but none of an object that it makes itself:
    classes get their plain methods back."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    for name, module in list(sys.modules.items()):
        if name.startswith("latentcast."):
            for found in [each for each in vars(module).values() if isinstance(each, type)]:
                for attribute, method in list(vars(found).items()):
                    if getattr(method, "__globals__", None) is jaxtyped.__globals__:
                        monkeypatch.setattr(found, attribute, method.__wrapped__)


class Loader(_import_hook._JaxtypingLoader):
    """Runs a module outside of what the hook changes while it compiles one: other libraries that the module imports
    would not find their bytecode, and be compiled anew, for some ten seconds."""

    exec_module = SourceFileLoader.exec_module

    def get_code(self, fullname):
        path = functools.partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
        with patch("importlib._bootstrap_external.cache_from_source", path):
            return super().get_code(fullname)


_import_hook._JaxtypingLoader = Loader
install_import_hook([f"latentcast.{name}" for name in PACKAGES], f"{__name__}.check_what_returned")

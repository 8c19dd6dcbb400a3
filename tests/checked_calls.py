"""While tests run, calls of the models' rooms are checked: jaxtyping's import hook, and beartype.

What a function refuses in its own words it goes on refusing so: arguments are looked at when it has returned, with what
it returns. A wrong shape then fails a test where a function took it without a word.

Holds for all that is imported after this. ``JAXTYPING_DISABLE=1`` runs tests without.
"""

import functools
import sys
from dataclasses import is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from beartype.vale import Is
from jaxtyping import config, install_import_hook, jaxtyped

PACKAGES = ("data", "evaluation", "layers", "metrics", "pipelines", "priors", "tokenizers")

# As in the functions' own words: NumPy's numbers are numbers, an int is a float, and 2.0 is a whole number.
_whole = Integral | Annotated[float, Is[lambda number: number.is_integer()]]
_beartype = beartype(conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({int: _whole, float: Real})))


def check_what_returned(stand_in):
    """The type checker of the hook, which hands it two stand-ins for each function: one is called before it with its
    arguments, and returns Any; the other is called after it with what it returned as well, and looks at both."""
    if stand_in.__annotations__.get("return") is Any:
        return lambda *args, **kwargs: None
    checked = _beartype(stand_in)
    if stand_in.__name__ != "__init__":
        return checked

    @functools.wraps(checked)
    def constructor(self, *args, **kwargs):  # options hold what they are given until they are asked to check that
        return None if is_dataclass(self) and hasattr(self, "check") else checked(self, *args, **kwargs)

    return constructor


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


install_import_hook([f"latentcast.{name}" for name in PACKAGES], f"{__name__}.check_what_returned")

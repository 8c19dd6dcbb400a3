"""What the files hold that latentcast reads back, as pydantic models: of strict types (no "5" for 5, no True for 1, no
NaN), with unknown keys let through. A file that does not fit is one line: ``FILE: key.path: expected ..., found ...``.
"""

import functools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from .files import read_json

LONGEST_TEXT = 65536  # characters
MOST = 2**48  # no file holds more of anything


def _text(found):
    """Any text: pydantic's own type refuses what Python makes of bytes that are no UTF-8."""
    if not isinstance(found, str):
        raise PydanticCustomError("string_type", "text")
    if len(found) > LONGEST_TEXT:
        raise PydanticCustomError("string_too_long", f"String should have at most {LONGEST_TEXT} characters")
    return found


Whole = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Rate = Annotated[float, Field(gt=0, le=1e9)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
FileText = Annotated[Any, AfterValidator(_text)]  # with names of files in it, whose bytes need not be UTF-8
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


class Schema(BaseModel):
    """The base of all of them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class LatentSpec(Schema):
    """What ``FrameTokenizer.latent_spec`` returns."""

    kind: Literal["discrete", "continuous", "pixels"]
    channels: Count
    height: Count
    width: Count
    codebook_sizes: list[Count]
    scaling_factor: Number
    frame_channels: Count
    frame_height: Count
    frame_width: Count


def read_checked(path, schema, **options):
    """The dict in a JSON file that fits ``schema``; raises as ``read_json`` and ``check`` do."""
    return check(path, schema, read_json(path, **options))


def check(where, schema, found):
    """Return ``found``, as it is, when it fits a schema: a Schema, or any type that pydantic knows.

    Raises:
        ValueError: one line that begins with ``where`` and names the key, what was expected there and what found.
    """
    try:
        _adapter(schema).validate_python(found)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None
    return found


def explain(error):
    """The first of a ValidationError's findings in one line."""
    problem = error.errors(include_url=False)[0]
    kind, place, found = problem["type"], list(problem["loc"]), problem["input"]
    where = ""
    for part in place:
        plain = isinstance(part, str) and part.isprintable() and 0 < len(part) < 80
        name = f"[{part}]" if isinstance(part, int) else part if plain else short(part)
        where += f".{name}" if where and name[0] != "[" else name
    prefix = f"{where}: " if where else ""
    if kind == "missing":
        return f"{prefix}expected, found nothing"
    if kind == "value_error":
        return f"{prefix}{problem['ctx']['error']}"
    if kind == "literal_error":
        expected = f"one of {problem['ctx']['expected'].replace(' or ', ', ')}".replace("'", "")
    elif kind == "greater_than_equal":
        expected = f"at least {problem['ctx']['ge']}"
    elif kind == "less_than_equal":
        expected = f"at most {problem['ctx']['le']}"
    elif kind in ("too_short", "too_long"):
        least, n = problem["ctx"].get("min_length"), problem["ctx"]["actual_length"]
        most = f"at most {problem['ctx'].get('max_length')}"
        return f"{prefix}expected {most if least is None else f'at least {least}'} entries, found {n}"
    elif kind == "extra_forbidden":
        expected = "no such key"
    else:
        expected = KINDS.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{prefix}expected {expected}, found {short(found)}"


def short(value, most=80):
    """``repr``, cut off, of what may be as large and as deep as a file allows."""
    if isinstance(value, int) and abs(value) >= 10**most:  # Python refuses to print the largest
        return "a huge number"
    text = repr(value if not isinstance(value, str) else value[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def one_line(value, most=80):
    """``str`` of anything without its line breaks, cut off."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}…"


@functools.cache
def _adapter(schema):
    return TypeAdapter(schema, config=None if isinstance(schema, type) and issubclass(schema, BaseModel) else _STRICT)


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)

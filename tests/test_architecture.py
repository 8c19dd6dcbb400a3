"""Imports go one way, as docs/architecture.md has it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From what knows nothing of the others to what knows all; rooms of one line do not know each other.
FLOORS = [
    ["layers", "figures"],
    ["data.video"],
    ["data.store"],
    ["data.sets"],
    ["metrics"],
    ["tokenizers"],
    ["priors"],
    ["inspection"],
    ["training", "pipelines"],
    ["evaluation"],
    ["reporting"],
    ["tools"],
]
HEIGHTS = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
MOUNTED = ("tokenizers", "priors", "pipelines", "tools")


def room_of(module):
    """Of a dotted name below latentcast; None where it is none of these rooms' (the glue, and the rest of data)."""
    parts = module.split(".")[1:]
    return next((name for name in (".".join(parts[:2]), *parts[:1]) if name in HEIGHTS), None)


def imported(path, module):
    """Dotted names below latentcast that a file imports, wherever in it."""
    package = module.split(".")[: None if path.stem == "__init__" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("latentcast."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            if name.startswith("latentcast"):
                yield from (f"{name}.{alias.name}" for alias in node.names)


def sources():
    for top in ("latentcast", *MOUNTED):
        for path in sorted((ROOT / top).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield path, module if top == "latentcast" else f"latentcast.{module}"


@pytest.mark.parametrize("room", HEIGHTS)
def test_a_room_knows_those_before_it_alone(room):
    seen = 0
    for path, module in sources():
        if room_of(module) == room:
            for name in imported(path, module):
                other = room_of(name)
                seen += 1
                assert other in (None, room) or HEIGHTS[other] < HEIGHTS[room], f"{module} imports {name}"
                if (room, other) == ("priors", "tokenizers"):  # the interface; models meet in pipelines alone
                    assert name.startswith("latentcast.tokenizers.base."), f"{module} imports {name}"
    assert seen

"""Shapes are types: every public function of the rooms says what it takes and gives, and tests hold it to that."""

import ast
import importlib.util

import pytest
import torch
from checked_calls import MOST_CALLS, PACKAGES, begin
from jaxtyping import TypeCheckError
from tiny_experiment import ROOT

from latentcast.layers import gaussian
from latentcast.layers.masked_convolutions import shifted
from latentcast.tokenizers.base import check_frames

ROOMS = [next(folder for folder in (ROOT / "latentcast" / name, ROOT / name) if folder.is_dir()) for name in PACKAGES]
MOMENTS = torch.zeros(1, 3, 2, 2)  # of one number and a half


def test_what_is_taken_without_a_word_is_refused():
    with pytest.raises(TypeCheckError, match="shifted"):
        shifted(torch.zeros(2, 3, 4), axis=0)


def test_so_is_what_does_not_fit_together():
    with pytest.raises(TypeCheckError, match="kl_of_numbers"):
        gaussian.kl_of_numbers(MOMENTS)


def test_functions_refuse_in_their_own_words():
    with pytest.raises(ValueError, match=r"frames: expected a tensor of shape \(B, T, C, H, W\), found \(2, 3\)"):
        check_frames(torch.zeros(2, 3))


def test_of_a_function_the_first_calls_of_a_test_are_checked():
    for _ in range(MOST_CALLS):
        shifted(torch.zeros(1, 1, 2, 2), axis=2)
    shifted(torch.zeros(2, 3, 4), axis=0)
    begin()
    with pytest.raises(TypeCheckError, match="shifted"):
        shifted(torch.zeros(2, 3, 4), axis=0)


def test_programs_do_not_check():
    spec = importlib.util.spec_from_file_location("as_in_programs", gaussian.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.kl_of_numbers(MOMENTS).shape == (1, 2, 2, 2)


def public_functions(body, inside=""):
    """(name, node) of what others call; of a class its constructor too."""
    for node in body:
        name = inside + getattr(node, "name", "")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield name, node


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_public_functions_are_annotated(room):
    lacking = []
    for path in sorted(room.rglob("*.py")):
        for name, node in public_functions(ast.parse(path.read_text(encoding="utf-8")).body):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            untyped = [
                each.arg for each in arguments if each and each.annotation is None and each.arg not in ("self", "cls")
            ]
            if untyped or node.returns is None:
                lacking.append(f"{path.relative_to(ROOT)}: {name}({', '.join(untyped)})")
    assert not lacking

"""The tree of errors: drawn as it is, and each class helps the operator."""

from __future__ import annotations

import inspect
import re

import pytest

from state import errors
from state.errors import DecodeError, SettingsError, SpringtideError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SpringtideError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_what_happened_and_what_to_do(kind: type[SpringtideError]) -> None:
    sentences = re.findall(r"[^.:;]{8,}[.:;]", kind.__doc__ or "")
    assert len(sentences) >= 2, f"{kind.__name__} needs two sentences: what it means, and what to do"


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawn_tree_names_every_error(kind: type[SpringtideError]) -> None:
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__ or "")


def test_wrong_use_ends_with_2_and_everything_else_with_1() -> None:
    assert SettingsError.exit_code == 2
    assert {kind.exit_code for kind in CLASSES if not issubclass(kind, SettingsError)} == {1}


def test_a_decode_error_carries_its_reason() -> None:
    error = DecodeError("missing_field", "item")
    assert error.reason == "missing_field"
    assert str(error) == "missing_field: item"

"""The tree of errors: drawn as it is, and each class helps the operator."""

from __future__ import annotations

import copy
import inspect
import re

import pytest

from state import errors
from state.errors import BadRequest, DecodeError, GapError, SettingsError, SpringtideError, StoreFull
from state.positions import Gap, Source

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SpringtideError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_what_happened_and_what_to_do(kind: type[SpringtideError]) -> None:
    sentences = re.findall(r"[^.:;]{8,}[.:;]", kind.__doc__ or "")
    assert len(sentences) >= 2, f"{kind.__name__} needs two sentences: what it means, and what to do"


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawn_tree_names_every_error(kind: type[SpringtideError]) -> None:
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__ or "")


def test_wrong_use_ends_with_2_and_everything_else_with_1() -> None:
    wrong_use = (SettingsError, BadRequest)
    assert {kind.exit_code for kind in CLASSES if issubclass(kind, wrong_use)} == {2}
    assert {kind.exit_code for kind in CLASSES if not issubclass(kind, wrong_use)} == {1}


@pytest.mark.parametrize("kind", CLASSES)
def test_only_a_bad_request_is_the_callers_fault(kind: type[SpringtideError]) -> None:
    of_callers, of_ours = (400, 401, 403, 404, 405, 408, 413, 431, 501), (429, 500, 503, 504)
    assert kind.http_status in (of_callers if issubclass(kind, BadRequest) else of_ours)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_without_advice_of_its_own_gives_that_of_its_class(kind: type[SpringtideError]) -> None:
    error = kind("something happened")
    assert (str(error), error.what) == ("something happened", "something happened")
    assert error.do in (kind.__doc__ or "")
    assert len(error.do) > 10


def test_an_error_says_both_parts_in_one_line_and_splits_nothing() -> None:
    error = StoreFull("a; b", "c; d")
    assert (str(error), error.what, error.do) == ("a; b; c; d", "a; b", "c; d")
    assert StoreFull("a; b").what == "a; b"


@pytest.mark.parametrize(
    "sent",
    [StoreFull("full", "free space; start again"), GapError("gone", "restore it", [Gap(Source("a" * 32, 1), 2, 3)])],
)
def test_an_error_from_another_process_keeps_its_parts(sent: SpringtideError) -> None:
    error = copy.copy(sent)  # by the same protocol as between processes
    assert str(error) == str(sent)
    assert vars(error) == vars(sent)


def test_a_decode_error_carries_its_reason() -> None:
    error = DecodeError("missing_field", "item")
    assert (error.reason, str(error)) == ("missing_field", "missing_field: item")

"""Every setting and every command is documented."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from pathlib import Path

import pytest

from deploy.cli import parser
from deploy.operate.settings_table import as_markdown
from state.config.sections import SECTIONS, Known, known_settings
from state.config.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "deploy" / "settings.md"
UNITS = {"_ms": {"ms"}, "_s": {"s"}, "_h": {"h"}, "_d": {"d"}, "_bytes": {"bytes"}, "_gb": {"GB", "GiB"}}


def name(known: Known) -> str:
    return known.name


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_the_document_is_the_one_the_declarations_make() -> None:
    assert DOCUMENT.read_text() == as_markdown() + "\n", "run: springtide config --markdown > deploy/settings.md"


def test_settings_have_the_declared_sections() -> None:
    assert [one.name for one in dataclasses.fields(Settings)] == [*SECTIONS, "origins"]


@pytest.mark.parametrize("known", list(known_settings()), ids=name)
def test_a_setting_explains_itself(known: Known) -> None:
    assert known.help.endswith(".")
    assert known.help[0].isupper() or known.help.startswith(("SASL", "TLS"))


@pytest.mark.parametrize("known", list(known_settings()), ids=name)
def test_the_unit_agrees_with_the_name(known: Known) -> None:
    units = {unit for ending, units in UNITS.items() if known.name.endswith(ending) for unit in units}
    if isinstance(known.default, (int, float)) or known.unit:
        assert not units or known.unit in units


@functools.cache
def sources() -> str:
    """All our code, declarations of settings left out."""
    packages = ("state", "streaming", "trainer", "deploy")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return "\n".join(path.read_text() for path in files if path.name != "sections.py")


@pytest.mark.parametrize("known", list(known_settings()), ids=name)
def test_some_code_uses_the_setting(known: Known) -> None:
    _, _, key = known.name.partition(".")
    assert re.search(rf"\.{key}\b|\"{known.name}\"|\"{key}\"", sources())


@pytest.mark.parametrize("command", sorted(commands()))
def test_a_command_explains_itself(command: str) -> None:
    text = commands()[command].format_help()
    assert len(commands()[command].description or "") > 20
    for action in commands()[command]._actions:
        assert action.help, f"{command} {action.option_strings or action.dest} has no help"
    assert "Exit codes" in " ".join(text.split())


@pytest.mark.parametrize("command", sorted(commands()))
def test_the_readme_names_the_command(command: str) -> None:
    assert re.search(rf"\b{command}\b", (ROOT / "README.md").read_text())

"""Every setting and every command is documented."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from deploy.command_line import parser
from state.config.settings import KnownSetting, known_settings

ROOT = Path(__file__).parents[2]
UNITS = {"_ms": {"ms"}, "_s": {"s"}, "_h": {"h"}, "_d": {"d"}, "_bytes": {"bytes"}, "_gb": {"GB", "GiB"}}


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_a_setting_explains_itself() -> None:
    def explained(known: KnownSetting) -> bool:
        return known.help.endswith(".") and (known.help[0].isupper() or known.help.startswith(("SASL", "TLS")))

    assert {known.name: known.help for known in known_settings() if not explained(known)} == {}


def test_the_unit_agrees_with_the_name() -> None:
    def agrees(known: KnownSetting) -> bool:
        units = {unit for ending, units in UNITS.items() if known.name.endswith(ending) for unit in units}
        measured = isinstance(known.default, (int, float)) or known.unit
        return not measured or not units or known.unit in units

    assert {known.name: known.unit for known in known_settings() if not agrees(known)} == {}


def test_some_code_uses_each_setting() -> None:
    packages = ("state", "streaming", "trainer", "deploy")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "sections.py"]
    # Attributes and strings are all that can name a setting.
    named = set(re.findall(r"\.\w+|\"[\w.]+\"", "\n".join(path.read_text() for path in files)))

    def used(known: KnownSetting) -> bool:
        key = known.name.partition(".")[2]
        return bool(named & {f".{key}", f'"{known.name}"', f'"{key}"'})

    assert [known.name for known in known_settings() if not used(known)] == []


def test_each_command_explains_itself() -> None:
    for command, itself in commands().items():
        assert len(itself.description or "") > 20, command
        for action in itself._actions:
            assert action.help, f"{command} {action.option_strings or action.dest} has no help"
        assert "Exit codes" in " ".join(itself.format_help().split()), command

"""Settings that are lists of `name=value`, whose elements may stand in the file as keys of their section: `name = "value"`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from state.config.sections import SECTIONS
from state.errors import SettingsError

NAMED = {"segments": "expressions"}
"""Section -> the setting that takes them."""


def listed(section: str, table: Mapping[str, Any], path: Path, lines: Mapping[str, int]) -> Mapping[str, Any]:
    """A section of the file with such keys in the list that they belong to.

    >>> listed("segments", {"busy": "events.visible > 20"}, Path(), {})
    {'expressions': ['busy=events.visible > 20']}

    Args:
        section: Its name.
        table: What the file says below it.
        path: The file.
        lines: The line of each key.

    Raises:
        SettingsError: Such a key is no text.
    """
    if section not in NAMED:
        return table
    settings = {declared.name for declared in dataclasses.fields(SECTIONS[section])}
    named = {key: value for key, value in table.items() if key not in settings}
    for key, value in named.items():
        if not isinstance(value, str):
            raise SettingsError(
                f"{path}:{lines.get(f'{section}.{key}', 1)}: {section}.{key} must be a text, not {value!r}",
                f"write it in quotes; the settings of [{section}] are {', '.join(sorted(settings))}",
            )
    if not named:
        return table
    others = {key: value for key, value in table.items() if key in settings}
    given = others.get(NAMED[section], [])
    more = [f"{key}={value}" for key, value in named.items()]
    return {**others, NAMED[section]: [*(given if isinstance(given, list) else [given]), *more]}

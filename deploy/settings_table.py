"""Shows the settings: the effective ones with their origin, and all of them as documentation."""

from __future__ import annotations

import json
from typing import Any

from state.config import Settings
from state.config_sources import MASK, as_text, variable
from state.sections import SECTIONS, Known, known_settings


def as_lines(settings: Settings) -> str:
    """The effective settings as springtide.toml would write them, each with its origin; secrets masked."""
    lines: list[str] = []
    section = ""
    for known in known_settings():
        part, _, name = known.name.partition(".")
        if part != section:
            lines += [*([""] if lines else []), f"[{part}]"]
            section = part
        written = f"{name} = {as_toml(shown(settings, known))}"
        lines.append(f"{written:<60}  # {settings.origins.get(known.name, 'default')}")
    return "\n".join(lines)


def as_json(settings: Settings) -> str:
    """The effective settings as a JSON list; secrets masked."""
    entries = [
        {
            "name": known.name,
            "value": shown(settings, known),
            "default": known.default,
            "unit": known.unit,
            "origin": settings.origins.get(known.name, "default"),
            "help": known.help,
        }
        for known in known_settings()
    ]
    return json.dumps(entries, indent=2)


def as_markdown() -> str:
    """Documentation of every setting, one table per section, made from their declarations."""
    lines = [
        "# Settings",
        "",
        "Made by `springtide config --markdown`. Each is written in `springtide.toml` under its section, "
        f"as a variable (`{variable('kafka.port')}`), or as a flag (`--kafka.port`); the later wins.",
    ]
    for section, kind in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            str(kind.__doc__),
            "",
            "| name | default | unit | what it does |",
            "|---|---|---|---|",
        ]
        for known in known_settings():
            part, _, name = known.name.partition(".")
            if part == section:
                choices = f" One of {', '.join(known.choices)}." if known.choices else ""
                secret = " Secret." if known.secret else ""
                default = f"`{as_text(known.default)}`" if as_text(known.default) else ""
                lines.append(f"| `{name}` | {default} | {known.unit} | {known.help}{choices}{secret} |")
    return "\n".join(lines)


def shown(settings: Settings, known: Known) -> Any:
    """A setting's value as it may be shown.

    >>> from state.config import Kafka
    >>> secret = next(known for known in known_settings() if known.name == "kafka.sasl_password")
    >>> shown(Settings(kafka=Kafka(sasl_password="hunter2")), secret)
    '********'
    """
    value = settings.value(known.name)
    return MASK if known.secret and value else value


def as_toml(value: Any) -> str:
    """A value as TOML writes it.

    >>> as_toml(("view", "cart")), as_toml(0.2), as_toml(7)
    ('["view", "cart"]', '0.2', '7')
    """
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)

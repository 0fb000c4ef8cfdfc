"""Reads the settings of every process: springtide.toml, then the environment, then flags.

    springtide.toml   [kafka] port = 9192           (or the file of --config)
    environment       SPRINGTIDE_KAFKA_PORT=9192
    flags             --kafka.port 9192

The later wins. A name or value that cannot be is a `SettingsError` that names
the file and line, the variable or the flag, and the nearest known name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from state.config.rules import check_together
from state.config.sections import SECTIONS, known_settings
from state.config.settings import Settings
from state.config.sources import PREFIX, checked, from_environment, from_file, from_flags
from state.errors import SettingsError

FILE = "springtide.toml"


def load(
    argv: Sequence[str] | None = None,
    env: Mapping[str, str] = os.environ,
    path: str | Path | None = None,
) -> Settings:
    """Reads file, environment and flags, in this order, and checks the result.

    Args:
        argv: Flags without the program's name; None reads none.
        env: The environment.
        path: The settings file; None takes `--config`, `SPRINGTIDE_CONFIG`, or springtide.toml where it exists.

    Raises:
        SettingsError: A name is unknown or a value impossible.

    >>> load(["--kafka.port", "9192"], env={"SPRINGTIDE_STREAM_CUT_MS": "50"}, path="/dev/null").stream.cut_ms
    50
    """
    known = {one.name: one for one in known_settings()}
    flags = list(from_flags(argv or [], known))
    chosen = [(text, f"{origin}: ") for name, text, origin in flags if name == "config"]
    text, origin = chosen[-1] if chosen else (env.get(PREFIX + "CONFIG", ""), f"variable {PREFIX}CONFIG: ")
    file = Path(path or text or FILE)
    if not file.exists() and (path or text):
        raise SettingsError(f"{'' if path else origin}{file}: no such settings file", "check the path")

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    # 1. file, 2. environment, 3. flags: the later wins.
    for name, value, origin in [*from_file(file, known), *from_environment(env, known), *flags]:
        if name != "config":
            values[name] = checked(known[name], value, origin)
            origins[name] = origin
    parts = {
        section: kind(
            **{name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}
        )
        for section, kind in SECTIONS.items()
    }
    if "kafka.bootstrap_servers" not in origins:
        # Without a cluster of the user's, every part looks for the local Kafka where kafka.port puts it.
        local = f"127.0.0.1:{parts['kafka'].port}"
        parts["kafka"] = replace(parts["kafka"], bootstrap_servers=local)
    if "events.action_weights" not in origins:
        # Where nobody gives weights each action weighs as much as any other.
        parts["events"] = replace(parts["events"], action_weights=(1.0,) * len(parts["events"].actions))
    settings = Settings(**parts, origins=origins)
    check_together(settings)
    return settings

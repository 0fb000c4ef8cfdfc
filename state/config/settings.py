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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from state import layout
from state.config.rules import check_together
from state.config.sections import (
    SECTIONS,
    Attributes,
    Bootstrap,
    Events,
    Features,
    Kafka,
    Labels,
    Model,
    Paths,
    Registry,
    Serving,
    Shoppers,
    Stream,
    Trainer,
    known_settings,
)
from state.config.sources import PREFIX, as_text, checked, from_environment, from_file, from_flags, variable
from state.errors import SettingsError

__all__ = ["Settings", "load", *(kind.__name__ for kind in SECTIONS.values())]

FILE = "springtide.toml"


@dataclass(frozen=True)
class Settings:
    """The effective settings, one attribute per section, and where each value came from.

    Attributes:
        origins: Dotted name -> where its value came from; names with their default value are absent.
    """

    paths: Paths = field(default_factory=Paths)
    kafka: Kafka = field(default_factory=Kafka)
    events: Events = field(default_factory=Events)
    labels: Labels = field(default_factory=Labels)
    attributes: Attributes = field(default_factory=Attributes)
    features: Features = field(default_factory=Features)
    stream: Stream = field(default_factory=Stream)
    model: Model = field(default_factory=Model)
    trainer: Trainer = field(default_factory=Trainer)
    registry: Registry = field(default_factory=Registry)
    serving: Serving = field(default_factory=Serving)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    shoppers: Shoppers = field(default_factory=Shoppers)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def state_dir(self) -> Path:
        """Directory of all durable state."""
        return Path(self.paths.state)

    @property
    def registry_dir(self) -> Path:
        """Directory of versions, programs, specs and control."""
        return Path(self.paths.registry) if self.paths.registry else self.state_dir / layout.REGISTRY

    @property
    def salt_path(self) -> Path:
        """File with the secret salt."""
        return Path(self.paths.salt_file) if self.paths.salt_file else self.state_dir / layout.SALT

    @property
    def stream_dir(self) -> Path:
        """Directory of this shard's histories."""
        return layout.stream(self.state_dir, self.stream.shard)

    @property
    def serving_dir(self) -> Path:
        """Directory of serving's rows and histories."""
        return self.state_dir / layout.SERVING

    @property
    def kafka_dir(self) -> Path:
        """Directory of the local Kafka's data."""
        return self.state_dir / layout.KAFKA

    @property
    def logs_dir(self) -> Path:
        """Directory of the processes' logs."""
        return self.state_dir / layout.LOGS

    def environment(self) -> dict[str, str]:
        """Variables that give a child process the same settings; secrets stay off its command line.

        >>> Settings(kafka=Kafka(port=9192, clicks_topic="shop")).environment()
        {'SPRINGTIDE_KAFKA_CLICKS_TOPIC': 'shop', 'SPRINGTIDE_KAFKA_PORT': '9192'}
        """
        return {
            variable(known.name): as_text(self.value(known.name))
            for known in known_settings()
            if self.value(known.name) != known.default
        }

    def value(self, name: str) -> Any:
        """The value of a dotted name.

        >>> Settings().value("stream.cut_rows")
        2048
        """
        section, _, key = name.partition(".")
        return getattr(getattr(self, section), key)


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
        raise SettingsError(f"{'' if path else origin}{file}: no such settings file; check the path")

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
    settings = Settings(**parts, origins=origins)
    check_together(settings)
    return settings

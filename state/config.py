"""Reads the settings of every process: springtide.toml, then the environment, then flags.

    springtide.toml   [kafka] port = 9192           (or the file of --config)
    environment       SPRINGTIDE_KAFKA_PORT=9192
    flags             --kafka.port 9192

The later wins. A name or value that cannot be is a `SettingsError` that names
the file and line, the variable or the flag, and the nearest known name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from state.config_sources import PREFIX, as_text, checked, from_environment, from_file, from_flags, variable
from state.errors import SettingsError
from state.sections import (
    SECTIONS,
    Bootstrap,
    Events,
    Features,
    Kafka,
    Model,
    Paths,
    Registry,
    Serving,
    Shoppers,
    Stream,
    Trainer,
    known_settings,
)

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
        return Path(self.paths.registry) if self.paths.registry else self.state_dir / "registry"

    @property
    def salt_path(self) -> Path:
        """File with the secret salt."""
        return Path(self.paths.salt_file) if self.paths.salt_file else self.state_dir / "salt"

    @property
    def stream_dir(self) -> Path:
        """Directory of this shard's histories."""
        return self.state_dir / f"stream-{self.stream.shard}"

    @property
    def serving_dir(self) -> Path:
        """Directory of serving's rows and histories."""
        return self.state_dir / "serving"

    @property
    def kafka_dir(self) -> Path:
        """Directory of the local Kafka's data."""
        return self.state_dir / "kafka"

    @property
    def logs_dir(self) -> Path:
        """Directory of the processes' logs."""
        return self.state_dir / "logs"

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
    chosen = [text for name, text, _ in flags if name == "config"] or [env.get(PREFIX + "CONFIG", "")]
    file = Path(path or chosen[-1] or FILE)
    if not file.exists() and (path or chosen[-1]):
        raise SettingsError(f"{file}: no such settings file; check the path")

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
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    """Refuses values that are possible alone and impossible together.

    Raises:
        SettingsError: Names the setting to change and where it came from.
    """

    def refuse(name: str, why: str) -> None:
        raise SettingsError(f"{settings.origins.get(name, 'default')}: {name} {why}")

    events, features, stream, kafka = settings.events, settings.features, settings.stream, settings.kafka
    if not 1 <= len(events.actions) <= 255 or len(set(events.actions)) != len(events.actions):
        refuse("events.actions", "must name 1 to 255 different actions")
    if len(events.action_weights) != len(events.actions):
        refuse("events.action_weights", f"must have one weight for each of the {len(events.actions)} actions")
    for name, values in (("windows_s", features.windows_s), ("half_lives_s", features.half_lives_s)):
        if not values or list(values) != sorted(set(values)):
            refuse(f"features.{name}", "must be ascending and not empty")
    leaks = {*events.outcomes, events.label} - {"", *events.allow_outcomes}
    for name in ("user", "item", "category", "action", "context"):
        leaking = leaks.intersection(events.context if name == "context" else (getattr(events, name),))
        if leaking:
            field_name = min(leaking)
            refuse(
                f"events.{name}",
                f"names {field_name!r}, an outcome: known only after the event, it would leak the label; "
                f"take it out, or say events.allow_outcomes {field_name}",
            )
    if stream.shard >= stream.shards:
        refuse("stream.shard", f"must be below stream.shards = {stream.shards}")
    if not settings.model.hidden:
        refuse("model.hidden", "must name at least one layer")
    for name in ("events.decoder", "model.tower", "model.preprocessing"):
        if not re.fullmatch(r"[\w.]+:\w+", settings.value(name)):
            refuse(name, "must be written module:name")
    for server in kafka.bootstrap_servers.split(","):
        if not re.fullmatch(r"\s*(\S+):\d+\s*", server):
            refuse("kafka.bootstrap_servers", f"must be HOST:PORT, separated by commas, not {server.strip()!r}")
    topics = (kafka.clicks_topic, kafka.dead_letters_topic, kafka.microbatches_topic)
    if len(set(topics)) != 3 or not all(topics):
        refuse("kafka.clicks_topic", "and the dead-letter and micro-batch topics must have three different names")
    if kafka.security_protocol.startswith("SASL") and not kafka.sasl_mechanism:
        refuse("kafka.security_protocol", "needs kafka.sasl_mechanism")

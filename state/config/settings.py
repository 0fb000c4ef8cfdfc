"""The effective settings of a process: one attribute per section, the paths on disk, and the list of all settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from state import layout
from state.config import sections

PREFIX = "SPRINGTIDE_"


@dataclass(frozen=True)
class Settings:
    """The effective settings, one attribute per section; `origins` has the source of each value that is no default."""

    paths: sections.Paths = field(default_factory=sections.Paths)
    kafka: sections.Kafka = field(default_factory=sections.Kafka)
    events: sections.Events = field(default_factory=sections.Events)
    labels: sections.LabelSettings = field(default_factory=sections.LabelSettings)
    attributes: sections.Attributes = field(default_factory=sections.Attributes)
    features: sections.Features = field(default_factory=sections.Features)
    stream: sections.Stream = field(default_factory=sections.Stream)
    model: sections.Model = field(default_factory=sections.Model)
    trainer: sections.TrainerSettings = field(default_factory=sections.TrainerSettings)
    guard: sections.GuardSettings = field(default_factory=sections.GuardSettings)
    churn: sections.ChurnSettings = field(default_factory=sections.ChurnSettings)
    privacy: sections.PrivacySettings = field(default_factory=sections.PrivacySettings)
    registry: sections.RegistrySettings = field(default_factory=sections.RegistrySettings)
    history: sections.HistorySettings = field(default_factory=sections.HistorySettings)
    serving: sections.ServingSettings = field(default_factory=sections.ServingSettings)
    export: sections.ExportSettings = field(default_factory=sections.ExportSettings)
    trials: sections.TrialSettings = field(default_factory=sections.TrialSettings)
    retrain: sections.RetrainSettings = field(default_factory=sections.RetrainSettings)
    storage: sections.StorageSettings = field(default_factory=sections.StorageSettings)
    logs: sections.LogSettings = field(default_factory=sections.LogSettings)
    metrics: sections.MetricsSettings = field(default_factory=sections.MetricsSettings)
    bootstrap: sections.Bootstrap = field(default_factory=sections.Bootstrap)
    validation: sections.Validation = field(default_factory=sections.Validation)
    segments: sections.SegmentSettings = field(default_factory=sections.SegmentSettings)
    rollout: sections.RolloutSettings = field(default_factory=sections.RolloutSettings)
    shoppers: sections.Shoppers = field(default_factory=sections.Shoppers)
    up: sections.Supervision = field(default_factory=sections.Supervision)
    console: sections.ConsoleSettings = field(default_factory=sections.ConsoleSettings)
    probe: sections.ProbeSettings = field(default_factory=sections.ProbeSettings)
    flink: sections.FlinkSettings = field(default_factory=sections.FlinkSettings)
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
    def privacy_key_path(self) -> Path:
        """File with the secret key of the noise."""
        return self.state_dir / layout.PRIVACY_KEY

    @property
    def privacy_ledger_path(self) -> Path:
        """File that records how much of the privacy budget is spent."""
        return self.registry_dir / layout.PRIVACY / layout.PRIVACY_LEDGER

    @property
    def tokens_dir(self) -> Path:
        """Directory of the clients' access tokens."""
        return Path(self.serving.tokens_dir) if self.serving.tokens_dir else self.state_dir / layout.TOKENS

    @property
    def stream_dir(self) -> Path:
        """Directory of the stream's histories."""
        return layout.stream(self.state_dir)

    @property
    def serving_dir(self) -> Path:
        """Directory of serving's rows and histories."""
        return self.state_dir / layout.SERVING

    @property
    def exports_dir(self) -> Path:
        """Directory of the SavedModels, one subdirectory per version."""
        return self.state_dir / layout.EXPORTS

    @property
    def kafka_dir(self) -> Path:
        """Directory of the local Kafka's data."""
        return self.state_dir / layout.KAFKA

    @property
    def validation_dir(self) -> Path:
        """Directory of the statistics of validation windows."""
        return self.state_dir / layout.VALIDATION

    @property
    def prometheus_dir(self) -> Path:
        """Directory of the data of `springtide up --prometheus`."""
        return self.state_dir / layout.PROMETHEUS

    @property
    def flink_dir(self) -> Path:
        """Directory of the local Flink: configuration, checkpoints, savepoints, logs."""
        return self.state_dir / layout.FLINK

    @property
    def logs_dir(self) -> Path:
        """Directory of the processes' logs."""
        return self.state_dir / layout.LOGS

    def environment(self) -> dict[str, str]:
        """Environment variables that give a child process the same settings; secrets stay off its command line.

        >>> Settings(kafka=sections.Kafka(port=9192, clicks_topic="shop")).environment()
        {'SPRINGTIDE_KAFKA_CLICKS_TOPIC': 'shop', 'SPRINGTIDE_KAFKA_PORT': '9192'}
        """
        return {
            variable(setting.name): as_text(self.value(setting.name))
            for setting in known_settings()
            if self.value(setting.name) != setting.default
        }

    def value(self, name: str) -> Any:
        """The value of a dotted name.

        >>> Settings().value("stream.cut_rows")
        4096
        """
        section, _, key = name.partition(".")
        return getattr(getattr(self, section), key)


SECTIONS = {
    section.name: cast(type[Any], section.default_factory) for section in fields(Settings) if section.name != "origins"
}
"""Section -> its class, in the order of `Settings`."""


@dataclass(frozen=True)
class KnownSetting:
    """One setting as declared.

    Attributes:
        name: The dotted name.
        least: The smallest allowed value; for a list, of each element. Likewise for the next three.
        above: An exclusive lower bound.
        filled: Whether an empty text is refused.
        choices: The only allowed values.
        auto: Whether a number may be written `auto`, which means 0.
    """

    name: str
    default: Any
    unit: str
    help: str
    secret: bool
    least: float | None = None
    most: float | None = None
    above: float | None = None
    filled: bool = False
    choices: tuple[str, ...] = ()
    auto: bool = False


def known_settings() -> Iterator[KnownSetting]:
    """Every setting, in order."""
    for section, kind in SECTIONS.items():
        for declared in fields(kind):
            yield KnownSetting(name=f"{section}.{declared.name}", default=declared.default, **declared.metadata)


def variable(name: str) -> str:
    """The environment variable of a dotted name.

    >>> variable("kafka.sasl_password")
    'SPRINGTIDE_KAFKA_SASL_PASSWORD'
    """
    return PREFIX + name.replace(".", "_", 1).upper()


def as_text(value: Any) -> str:
    """Formats a value for a variable or a flag.

    >>> as_text((3600, 86400)), as_text(0.2), as_text(("category=a,b",))
    ('3600,86400', '0.2', '["category=a,b"]')
    """
    if not isinstance(value, tuple):
        return str(value)
    words = [str(item) for item in value]
    plain = all("," not in word and word == word.strip("[] ") for word in words)
    return ",".join(words) if plain else json.dumps(value, ensure_ascii=False)

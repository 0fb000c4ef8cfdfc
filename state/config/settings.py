"""The effective settings of a process, one attribute per section, and the paths on disk that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state import layout
from state.config.sections import (
    SECTIONS,
    Attributes,
    Bootstrap,
    ChurnSettings,
    ConsoleSettings,
    Events,
    ExportSettings,
    Features,
    FlinkSettings,
    GuardSettings,
    Kafka,
    LabelSettings,
    LogSettings,
    MetricsSettings,
    Model,
    Paths,
    PrivacySettings,
    ProbeSettings,
    RegistrySettings,
    RetrainSettings,
    RolloutSettings,
    SegmentSettings,
    ServingSettings,
    Shoppers,
    StorageSettings,
    Stream,
    Supervision,
    TrainerSettings,
    TrialSettings,
    Validation,
    WebhookSettings,
    known_settings,
)
from state.config.sources import as_text, variable

__all__ = ["Settings", *(kind.__name__ for kind in SECTIONS.values())]


@dataclass(frozen=True)
class Settings:
    """The effective settings, one attribute per section, and where each value came from.

    Attributes:
        origins: Dotted name -> where its value came from; names with their default value are absent.
    """

    paths: Paths = field(default_factory=Paths)
    kafka: Kafka = field(default_factory=Kafka)
    events: Events = field(default_factory=Events)
    labels: LabelSettings = field(default_factory=LabelSettings)
    attributes: Attributes = field(default_factory=Attributes)
    features: Features = field(default_factory=Features)
    stream: Stream = field(default_factory=Stream)
    model: Model = field(default_factory=Model)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    churn: ChurnSettings = field(default_factory=ChurnSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    trials: TrialSettings = field(default_factory=TrialSettings)
    retrain: RetrainSettings = field(default_factory=RetrainSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    validation: Validation = field(default_factory=Validation)
    segments: SegmentSettings = field(default_factory=SegmentSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    shoppers: Shoppers = field(default_factory=Shoppers)
    up: Supervision = field(default_factory=Supervision)
    console: ConsoleSettings = field(default_factory=ConsoleSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    webhook: WebhookSettings = field(default_factory=WebhookSettings)
    flink: FlinkSettings = field(default_factory=FlinkSettings)
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
        return Path(self.privacy.key_file) if self.privacy.key_file else self.state_dir / layout.PRIVACY_KEY

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
        return Path(self.export.directory) if self.export.directory else self.state_dir / layout.EXPORTS

    @property
    def kafka_dir(self) -> Path:
        """Directory of the local Kafka's data."""
        return Path(self.paths.kafka) if self.paths.kafka else self.state_dir / layout.KAFKA

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

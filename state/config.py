"""Reads the settings of every process: springtide.toml, then the environment, then flags.

    springtide.toml   [kafka] port = 9192           (or the file of --config)
    environment       SPRINGTIDE_KAFKA_PORT=9192
    flags             --kafka.port 9192

The later wins. A name or value that cannot be is a `SettingsError` that names
the file and line, the variable or the flag, and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state.errors import SettingsError
from state.sections import (
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
)

FILE = "springtide.toml"
PREFIX = "SPRINGTIDE_"
NO_SETTINGS = ("SPRINGTIDE_CONFIG", "SPRINGTIDE_KILL_AT")
MASK = "********"
SHORT_FLAGS = {"bootstrap-servers": "kafka.bootstrap_servers", "state": "paths.state"}


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


@dataclass(frozen=True)
class Known:
    """One setting as declared: dotted name, default, unit, help, secrecy, bounds and choices."""

    name: str
    default: Any
    unit: str
    help: str
    secret: bool
    least: float | None
    most: float | None
    choices: tuple[str, ...]


def sections() -> dict[str, type[Any]]:
    """The sections by name, in order."""
    return {part.name: part.default_factory for part in dataclasses.fields(Settings) if part.name != "origins"}  # type: ignore[misc]


def known_settings() -> Iterator[Known]:
    """Every setting, in order.

    >>> next(known_settings()).name
    'paths.state'
    """
    for section, kind in sections().items():
        for declared in dataclasses.fields(kind):
            yield Known(name=f"{section}.{declared.name}", default=declared.default, **declared.metadata)


def variable(name: str) -> str:
    """The environment variable of a dotted name.

    >>> variable("kafka.sasl_password")
    'SPRINGTIDE_KAFKA_SASL_PASSWORD'
    """
    return PREFIX + name.replace(".", "_", 1).upper()


def as_text(value: Any) -> str:
    """A value as a variable or a flag writes it.

    >>> as_text((3600, 86400)), as_text(0.2)
    ('3600,86400', '0.2')
    """
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    flags = list(_flags(argv or [], known))
    chosen = [text for name, text, _ in flags if name == "config"] or [env.get(PREFIX + "CONFIG", "")]
    file = Path(path or chosen[-1] or FILE)
    if not file.exists() and (path or chosen[-1]):
        raise SettingsError(f"{file}: no such settings file; check the path")

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    # 1. file, 2. environment, 3. flags: the later wins.
    for name, value, origin in [*_file(file, known), *_environment(env, known), *flags]:
        if name != "config":
            values[name] = _checked(known[name], value, origin)
            origins[name] = origin
    parts = {
        section: kind(
            **{name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}
        )
        for section, kind in sections().items()
    }
    settings = Settings(**parts, origins=origins)
    _check_together(settings)
    return settings


def _file(path: Path, known: Mapping[str, Known]) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, value, origin) of a TOML file's settings."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: not readable as TOML: {error}; correct the file") from None
    lines = line_numbers(text)
    for section, table in document.items():
        if section not in sections():
            where = f"{path}:{lines.get(section, 1)}"
            raise SettingsError(
                f"{where}: unknown section [{section}]; the nearest is [{nearest(section, sections())}]"
            )
        if not isinstance(table, dict):
            raise SettingsError(
                f"{path}:{lines.get(section, 1)}: {section} is a section; write [{section}] and its settings below"
            )
        for key, value in table.items():
            name = f"{section}.{key}"
            origin = f"{path}:{lines.get(name, lines.get(section, 1))}"
            yield _known_name(name, known, origin), value, origin


def _environment(env: Mapping[str, str], known: Mapping[str, Known]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, origin) of the variables that begin with SPRINGTIDE_."""
    by_variable = {variable(name): name for name in known}
    for key in sorted(env):
        if not key.startswith(PREFIX) or key in NO_SETTINGS:
            continue
        if key not in by_variable:
            raise SettingsError(f"variable {key}: unknown setting; the nearest is {nearest(key, by_variable)}")
        yield by_variable[key], env[key], f"variable {key}"


def _flags(argv: Sequence[str], known: Mapping[str, Known]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, origin) of `--section.name VALUE`, `--section.name=VALUE` and `--config FILE`."""
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        if not flag.startswith("--"):
            raise SettingsError(f"argument {flag!r}: not a flag; settings are written --section.name VALUE")
        name = SHORT_FLAGS.get(flag[2:], flag[2:].replace("-", "_"))
        if name != "config":
            _known_name(name, known, f"flag {flag}", "--")
        if not equals:
            following = next(words, None)
            if following is None:
                raise SettingsError(f"flag {flag}: its value is missing; write {flag} VALUE")
            text = following
        yield name, text, f"flag {flag}"


def _known_name(name: str, known: Mapping[str, Known], origin: str, prefix: str = "") -> str:
    """Returns `name`, or raises with the nearest known one."""
    if name not in known:
        raise SettingsError(f"{origin}: unknown setting {name}; the nearest is {prefix}{nearest(name, known)}")
    return name


def nearest(name: str, candidates: Mapping[str, object]) -> str:
    """The candidate most like `name`.

    >>> nearest("kafka.prot", {"kafka.port": 1, "kafka.group": 2})
    'kafka.port'
    """
    return difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.0)[0]


def line_numbers(text: str) -> dict[str, int]:
    r"""The line of each `[section]` and of each key of a TOML text; tomllib keeps none.

    >>> line_numbers("[kafka]\n\nport = 9192\n")
    {'kafka': 1, 'kafka.port': 3}
    """
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*[\"']?([\w.-]+)[\"']?\s*\]", line)
        key = re.match(r"\s*[\"']?([\w-]+(?:\s*\.\s*[\w-]+)?)[\"']?\s*=", line)
        if header:
            section = header[1]
            lines.setdefault(section, number)
        elif key:
            name = re.sub(r"\s", "", key[1])
            lines.setdefault(f"{section}.{name}" if section else name, number)
            lines.setdefault((section or name).partition(".")[0], number)
    return lines


def _checked(known: Known, value: Any, origin: str) -> Any:
    """The value in the setting's type and bounds.

    Raises:
        SettingsError: It is not of the type, or out of bounds.
    """
    where = f"{origin}: {known.name}"
    if isinstance(known.default, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
        if not isinstance(value, list):
            raise SettingsError(f"{where} must be a list, not {_shown(known, value)}")
        kind = _element_kind(known)
        return tuple(_in_bounds(known, _scalar(known, kind, one, where), where) for one in value)
    return _in_bounds(known, _scalar(known, type(known.default), value, where), where)


def _element_kind(known: Known) -> type:
    """The type of a list's elements; an empty default is a list of strings."""
    return type(known.default[0]) if known.default else str


def _scalar(known: Known, kind: type, value: Any, where: str) -> Any:
    """One value as `kind`; text is parsed, other types must fit without loss."""
    try:
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    wanted = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise SettingsError(f"{where} must be {wanted}, not {_shown(known, value)}")


def _in_bounds(known: Known, value: Any, where: str) -> Any:
    if known.choices and value not in known.choices:
        raise SettingsError(f"{where} must be one of {', '.join(known.choices)}, not {_shown(known, value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{where} must be finite, not {_shown(known, value)}")
    if known.least is not None and value < known.least:
        raise SettingsError(f"{where} must be at least {known.least:g}, not {_shown(known, value)}")
    if known.most is not None and value > known.most:
        raise SettingsError(f"{where} must be at most {known.most:g}, not {_shown(known, value)}")
    return value


def _shown(known: Known, value: Any) -> str:
    return MASK if known.secret else repr(value)


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

"""Reads the settings of every process from springtide.toml, the environment and flags, and refuses conflicts.

    springtide.toml   [kafka] port = 9192           (or the file of --config)
    environment       SPRINGTIDE_KAFKA_PORT=9192
    flags             --kafka.port 9192

The later source wins. Each rule in `RULES` yields conflicts of settings that are valid alone. A conflict lists its
settings, the one to change first at the front. The error names the first of them that is set explicitly, because a
default is never the cause.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from state.config.sections import Model, TrainerSettings
from state.config.settings import PREFIX, SECTIONS, Settings, known_settings
from state.config.sources import checked, fields_of, from_environment, from_file, from_flags, span_ms
from state.errors import SettingsError
from state.user_shares import UserShares

MOST_ACTIONS = 255
MOST_WINDOWS = 16
TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})")
FILE = "springtide.toml"


class Conflict(NamedTuple):
    """Settings that contradict each other, the reason, and the advice if `why` does not contain it."""

    names: tuple[str, ...]
    why: str
    do: str = ""


def privacy(settings: Settings) -> Iterator[Conflict]:
    """No setting lets a user's rows reach others without clipping and noise: only TensorFlow's default ranker clips."""
    if not settings.privacy.epsilon:
        return
    wanted = {"model.ranker": Model().ranker, "model.tower": Model().tower}
    for name, only in wanted.items():
        if settings.value(name) != only:
            yield Conflict(
                (name, "privacy.epsilon"),
                f"{name} {settings.value(name)!r} cannot be learned with privacy.epsilon {settings.privacy.epsilon:g}: the "
                "loss of a row in custom code may read other rows",
                "remove it, or set privacy.epsilon to 0",
            )
    if settings.trainer.engine not in (TrainerSettings().engine, "tensorflow"):
        yield Conflict(
            ("trainer.engine", "privacy.epsilon"),
            f"trainer.engine {settings.trainer.engine} cannot clip gradients by row, which privacy.epsilon needs",
            "set trainer.engine to auto or tensorflow",
        )
    if settings.churn.days:
        yield Conflict(
            ("churn.days", "privacy.epsilon"),
            "churn.days is set: churn is learned from each user's rows without clipping and noise, which privacy.epsilon rules out",
            "set churn.days or privacy.epsilon to 0",
        )
    if settings.segments.lookalikes:
        yield Conflict(
            ("segments.lookalikes", "privacy.epsilon"),
            f"segments.lookalikes is {settings.segments.lookalikes}: lookalikes compare the exact rows of different users, "
            "so the list of one user reveals others, which privacy.epsilon rules out",
            "set segments.lookalikes or privacy.epsilon to 0",
        )


def retrain(settings: Settings) -> Iterator[Conflict]:
    """Time spans are valid, and no two trainers share a privacy budget."""
    every = settings.retrain.every
    if every and not span_ms(every):
        yield Conflict(("retrain.every",), f"retrain.every {every!r} is no span of time", "write 1d, 12h, 30m or 90s")
    if settings.retrain.every and settings.privacy.epsilon:
        yield Conflict(
            ("retrain.every", "privacy.epsilon"),
            f"retrain.every {settings.retrain.every} begins experiments, which privacy.epsilon {settings.privacy.epsilon:g} rules "
            "out: two trainers would use the same noise, and comparing them removes it",
            "remove retrain.every, or set privacy.epsilon to 0",
        )


Rule = Callable[["Settings"], Iterator[Conflict]]


def check_together(settings: Settings) -> None:
    """Refuses the first conflict: the SettingsError names the setting to change, its origin, and why."""
    for rule in RULES:
        for names, why, do in rule(settings):
            name = next((name for name in names if name in settings.origins), names[0])
            others = "".join(f", {key} from {settings.origins[key]}" for key in names[1:] if key in settings.origins)
            also = others if name == names[0] else ""
            problem = f"{settings.origins.get(name, 'default')}: {why}"
            raise SettingsError(problem, f"{do}{also}") if do else SettingsError(f"{problem}{also}")


def actions(settings: Settings) -> Iterator[Conflict]:
    """Each action has one name and one weight."""
    events = settings.events
    names, weights = ("events.actions", "events.action_weights"), events.action_weights
    if not 1 <= len(events.actions) <= MOST_ACTIONS:
        yield Conflict(names[:1], f"events.actions must name 1 to {MOST_ACTIONS} actions, not {len(events.actions)}")
    if twice := repeated(events.actions):
        yield Conflict(names[:1], f"events.actions names {twice!r} twice", "name each action once")
    if len(weights) != len(events.actions):
        listed = ", ".join(events.actions)
        yield Conflict(
            names[::-1],
            f"events.action_weights has {len(weights)} weights for {len(events.actions)} actions ({listed})",
            "give each action one weight, in the order of events.actions",
        )
    if not any(weights):
        yield Conflict(names[1:], "events.action_weights are all 0: nothing would be learned", "give one a weight")
    if not events.action and len(events.actions) > 1:
        yield Conflict(
            ("events.action", "events.actions"),
            f"events.action names no field, and events.actions has {len(events.actions)} actions",
            "name the field, or leave one action",
        )


def fields(settings: Settings) -> Iterator[Conflict]:
    """Fields are named once, and none of them reveals the label."""
    events = settings.events
    for name in ("context", "columns"):
        named = tuple(field for field in getattr(events, name) if field != "-")
        if twice := repeated(named):
            yield Conflict((f"events.{name}",), f"events.{name} names {twice!r} twice", "name each field once")
    known = {events.user, events.item, events.category, events.action, events.time, events.label, events.request}
    known |= {*events.context}
    for entry in events.constants:
        field, equals, _ = entry.partition("=")
        if not equals or not field:
            yield Conflict(
                ("events.constants",), f"events.constants {entry!r} must be FIELD=VALUE, such as action=view"
            )
        elif field not in known:
            listed = ", ".join(sorted(known - {""}))
            yield Conflict(
                ("events.constants",), f"events.constants {entry!r}: [events] names no field {field!r}, only {listed}"
            )
    if twice := repeated([entry.partition("=")[0] for entry in events.constants]):
        yield Conflict(("events.constants",), f"events.constants gives {twice!r} twice", "give each field one value")
    leaks = {*events.outcomes, events.label} - {""}
    for name in ("user", "item", "category", "action", "context"):
        leaking = leaks.intersection(events.context if name == "context" else (getattr(events, name),))
        if leaking:
            field = min(leaking)
            yield Conflict(
                (f"events.{name}", "events.outcomes", "events.label"),
                f"events.{name} names {field!r}, an outcome: known only after the event, it would leak the label",
                "remove it, or take it out of events.outcomes if it is known before the event",
            )


def labels(settings: Settings) -> Iterator[Conflict]:
    """Impressions and their outcomes are different actions, and both or neither are set."""
    section, names = settings.labels, ("labels.impressions", "labels.outcomes")
    for name in names:
        if unknown := [action for action in settings.value(name) if action not in settings.events.actions]:
            yield Conflict((name, "events.actions"), f"{name} names {unknown[0]!r}, which events.actions does not")
    if bool(section.impressions) != bool(section.outcomes):
        empty = names[bool(section.impressions)]
        yield Conflict(
            names[:: 1 if section.impressions else -1], f"{empty} must name an action too: the two go together"
        )
    if in_both := [action for action in section.outcomes if action in section.impressions]:
        yield Conflict(names[::-1], f"labels.outcomes names {in_both[0]!r}, which is an impression already")


def windows(settings: Settings) -> Iterator[Conflict]:
    """Windows and half-lives ascend, because their position is part of a feature's meaning."""
    for name in ("features.windows_s", "features.half_lives_s"):
        values = settings.value(name)
        if not values or list(values) != sorted(set(values)):
            yield Conflict((name,), f"{name} must be ascending and not empty, not {list(values)}")
        if len(values) > MOST_WINDOWS:
            yield Conflict((name,), f"{name} may have {MOST_WINDOWS} values, not {len(values)}")


def parts(settings: Settings) -> Iterator[Conflict]:
    """A tower has layers, and functions are named so that they can be imported."""
    if not settings.model.hidden:
        yield Conflict(("model.hidden",), "model.hidden must name at least one layer")
    for option in settings.model.options:
        if not re.fullmatch(r"\w+=.*", option):
            yield Conflict(("model.options",), f"model.options {option!r} must be NAME=VALUE, such as heads=4")
    if twice := repeated([option.partition("=")[0] for option in settings.model.options]):
        yield Conflict(("model.options",), f"model.options gives {twice!r} twice", "give each option one value")
    if settings.features.sequence > settings.features.history:
        yield Conflict(
            ("features.sequence", "features.history"),
            f"features.sequence {settings.features.sequence} must not be above features.history = "
            f"{settings.features.history}: no more events are stored",
        )
    for name in ("events.decoder", "model.ranker", "model.tower", "model.preprocessing"):
        if not re.fullmatch(r"[\w.]+:\w+", settings.value(name)):
            yield Conflict((name,), f"{name} must be written module:name, not {settings.value(name)!r}")


def topics(settings: Settings) -> Iterator[Conflict]:
    """Topics have names that Kafka accepts, and no two have the same name."""
    of_kafka = ("clicks", "dead_letters", "microbatches", "exposures")
    names = (*(f"kafka.{topic}_topic" for topic in of_kafka), "segments.topic")
    owners: dict[str, str] = {}
    for name in names:
        topic = settings.value(name)
        if not TOPIC.fullmatch(topic) or topic in (".", ".."):
            yield Conflict(
                (name,),
                f"{name} {topic!r} is no name of a topic: 1 to 249 letters, digits, dots, dashes and underscores",
            )
        if topic in owners:
            yield Conflict(
                (name, owners[topic]),
                f"{name} and {owners[topic]} are both {topic!r}",
                "they must be two different names",
            )
        owners[topic] = name


def attributes(settings: Settings) -> Iterator[Conflict]:
    """Attributes are well formed, have distinct names, and come from separate topics."""
    used = {settings.value(f"kafka.{name}_topic") for name in ("clicks", "dead_letters", "microbatches")}
    used.add(settings.segments.topic)
    known: list[str] = []
    for side in ("user", "item"):
        named_topic, named_fields = f"attributes.{side}_topic", f"attributes.{side}_fields"
        topic, written = settings.value(named_topic), settings.value(named_fields)
        try:
            known += [field.name for field in fields_of(written)]
        except ValueError as error:
            yield Conflict((named_fields,), f"{named_fields} {error}")
        if twice := repeated(known):
            yield Conflict(
                (named_fields,),
                f"{named_fields} names {twice!r} again",
                "give each attribute, of users and items, a name",
            )
        if not topic:
            continue
        if not TOPIC.fullmatch(topic) or topic in (".", ".."):
            yield Conflict((named_topic,), f"{named_topic} {topic!r} is no name of a topic")
        if not written:
            yield Conflict((named_topic,), f"{named_topic} needs {named_fields}: name the fields to read")
        if topic in used:
            yield Conflict((named_topic,), f"{named_topic} must be a topic of its own, not {topic}")
        used.add(topic)
    for name in settings.attributes.slices:
        if name not in known:
            listed = ", ".join(known) or "none"
            yield Conflict(
                ("attributes.slices",),
                f"attributes.slices names {name!r}, which is no attribute",
                f"name one of {listed}",
            )


def brokers(settings: Settings) -> Iterator[Conflict]:
    """Brokers have a host and a port; credentials and certificates exist and are used."""
    kafka = settings.kafka
    for server in kafka.bootstrap_servers.split(","):
        written = SERVER.fullmatch(server.strip())
        if not written or not 1 <= int(written[2]) <= 65535:
            yield Conflict(
                ("kafka.bootstrap_servers", "kafka.port"),
                f"kafka.bootstrap_servers must be HOST:PORT, separated by commas, not {server.strip()!r}",
            )
    protocol = kafka.security_protocol
    sasl = ("kafka.sasl_mechanism", "kafka.sasl_username")
    if protocol.startswith("SASL"):
        if not kafka.sasl_mechanism:
            yield Conflict(
                ("kafka.security_protocol",), f"kafka.security_protocol {protocol} needs kafka.sasl_mechanism"
            )
        if kafka.sasl_mechanism.startswith(("PLAIN", "SCRAM")):
            for name in ("kafka.sasl_username", "kafka.sasl_password"):
                if not settings.value(name):
                    yield Conflict((sasl[0],), f"kafka.sasl_mechanism {kafka.sasl_mechanism} needs {name}")
        if (kafka.sasl_mechanism == "OAUTHBEARER") != bool(kafka.sasl_token_provider):
            yield Conflict(
                ("kafka.sasl_token_provider", "kafka.sasl_mechanism"),
                "kafka.sasl_mechanism OAUTHBEARER and kafka.sasl_token_provider need each other",
                "set both, or neither",
            )
    else:
        yield from _unused(settings, (*sasl, "kafka.sasl_token_provider"), "SASL_SSL")
    files = ("kafka.ssl_cafile", "kafka.ssl_certfile", "kafka.ssl_keyfile")
    if not protocol.endswith("SSL"):
        yield from _unused(settings, files, "SSL")
    for name in files:
        if settings.value(name) and not Path(settings.value(name)).is_file():
            yield Conflict((name,), f"{name} {settings.value(name)!r}: no such file", "correct the path")
    if kafka.ssl_keyfile and not kafka.ssl_certfile:
        yield Conflict(files[2:], "kafka.ssl_keyfile needs kafka.ssl_certfile, the certificate of the key")


def replicas(settings: Settings) -> Iterator[Conflict]:
    """The required in-sync replicas do not exceed the replicas."""
    kafka = settings.kafka
    if kafka.replication and kafka.min_insync_replicas > kafka.replication:
        yield Conflict(
            ("kafka.min_insync_replicas", "kafka.replication"),
            f"kafka.min_insync_replicas {kafka.min_insync_replicas} is more than kafka.replication {kafka.replication}",
            "no record would ever be acknowledged: lower it",
        )


def certificates(settings: Settings) -> Iterator[Conflict]:
    """The certificate of serving has its key, and both files exist."""
    for name, other in (("serving.tls_cert", "serving.tls_key"), ("serving.tls_key", "serving.tls_cert")):
        path = settings.value(name)
        if path and not settings.value(other):
            yield Conflict((name,), f"{name} needs {other}: the two go together")
        if path and not Path(path).is_file():
            yield Conflict((name,), f"{name} {path!r}: no such file", "correct the path")


def _unused(settings: Settings, names: Sequence[str], wanted: str) -> Iterator[Conflict]:
    for name in names:
        if settings.value(name):
            yield Conflict(
                (name, "kafka.security_protocol"),
                f"{name} is set, and kafka.security_protocol {settings.kafka.security_protocol} does not use it",
                f"set kafka.security_protocol to {wanted}, or remove {name}",
            )


def repeated(values: Sequence[str]) -> str | None:
    """The first value that is repeated; None if all differ."""
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


def hosts(settings: Settings) -> Iterator[Conflict]:
    """A host's shares are numbers and ranges from 0 to 63, and its advertised address is a URL."""
    try:
        UserShares.parse(settings.serving.shares)
    except ValueError as error:
        yield Conflict(("serving.shares",), f"serving.shares: {error}")
    for name in ("serving.advertise", "rollout.address"):
        address = settings.value(name)
        if address and not re.fullmatch(r"https?://[^/\s]+", address):
            yield Conflict((name,), f"{name} must be http://HOST:PORT or https://HOST:PORT, not {address!r}")


RULES: tuple[Rule, ...] = (actions, fields, labels, windows, parts, topics, attributes, brokers, replicas, certificates, hosts, privacy, retrain)  # fmt: skip


def load(
    argv: Sequence[str] | None = None, env: Mapping[str, str] = os.environ, path: str | Path | None = None
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
    known = {setting.name: setting for setting in known_settings()}
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
        # Without a configured cluster, all processes connect to the local Kafka at kafka.port.
        local = f"127.0.0.1:{parts['kafka'].port}"
        parts["kafka"] = replace(parts["kafka"], bootstrap_servers=local)
    if "events.action_weights" not in origins:
        # Without weights all actions have the same weight.
        parts["events"] = replace(parts["events"], action_weights=(1.0,) * len(parts["events"].actions))
    settings = Settings(**parts, origins=origins)
    check_together(settings)
    return settings

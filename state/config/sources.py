"""Reads single settings from a TOML file, from environment variables and from flags, and checks each value.

Every reader yields (dotted name, value, origin). `RENAMED` maps settings of earlier releases to their present names;
those in `removed.toml` no longer have an effect. A setting that is a list of `name=value` may also be written in the file as
keys of its section: `name = "value"` (`NAMED`).

An attribute is declared in `[attributes]` as NAME, NAME=FIELD, NAME:log or NAME:10|50|100.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from state.config.settings import PREFIX, SECTIONS, KnownSetting, as_text, variable
from state.errors import SettingsError, reason_of

LOG_EDGES = tuple(float(f"{digit}e{power}") for power in range(-3, 10) for digit in (1, 2, 5))
"""The edges of `:log`: 1, 2, 5, 10, 20, 50 and so on, from a thousandth to 5e9."""


@dataclass(frozen=True, slots=True)
class Field:
    """One attribute.

    Attributes:
        name: Its name in answers, metrics and settings.
        path: The field of the JSON object.
        edges: Ascending edges of a number's bands; empty if values are used as they are.
    """

    name: str
    path: str
    edges: tuple[float, ...] = ()


def field_of(written: str) -> Field:
    """Parses one attribute; another form raises ValueError.

    >>> field_of("age=ageBand")
    Field(name='age', path='ageBand', edges=())
    >>> field_of("price:10|50").edges
    (10.0, 50.0)
    """
    head, colon, edges = written.partition(":")
    name, equals, path = head.partition("=")
    if not re.fullmatch(r"\w+", name) or (equals and not path):
        raise ValueError(f"has {written!r}: write NAME, NAME=FIELD, NAME:log or NAME:10|50|100")
    if edges == "log":
        return Field(name, path or name, LOG_EDGES)
    try:
        bounds = tuple(float(edge) for edge in edges.split("|")) if colon else ()
    except ValueError:
        bounds = (math.nan,)
    if not all(map(math.isfinite, bounds)) or list(bounds) != sorted(set(bounds)):
        raise ValueError(f"has {written!r}: edges are ascending numbers, as in NAME:10|50|100, or NAME:log")
    return Field(name, path or name, bounds)


def fields_of(written: Sequence[str]) -> tuple[Field, ...]:
    """Parses the attributes of one side, in order."""
    return tuple(field_of(text) for text in written)


MASK = "********"
NO_SETTINGS = ("SPRINGTIDE_CONFIG", "SPRINGTIDE_KILL_AT")
SHORT_FLAGS = {"bootstrap-servers": "kafka.bootstrap_servers", "state": "paths.state"}

NAMED = {"segments": "expressions"}
"""Section -> the list setting that collects the section's other keys."""

RENAMED = {"features.labels": "features.recent_categories"}
"""Former name -> present name."""

_logger = logging.getLogger(__name__)


def listed(section: str, table: Mapping[str, Any], path: Path, lines: Mapping[str, int]) -> Mapping[str, Any]:
    """A section of the file, with its unknown keys moved into the section's list of `name=value`.

    >>> listed("segments", {"busy": "events.visible > 20"}, Path(), {})
    {'expressions': ['busy=events.visible > 20']}
    """
    if section not in NAMED:
        return table
    settings = {declared.name for declared in fields(SECTIONS[section])}
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
    listed = others.get(NAMED[section], [])
    added = [f"{key}={value}" for key, value in named.items()]
    return {**others, NAMED[section]: [*(listed if isinstance(listed, list) else [listed]), *added]}


@cache
def removed() -> dict[str, dict[str, str]]:
    """Returns the settings that no longer exist, as `removed.toml` describes them."""
    return tomllib.loads(Path(__file__).with_name("removed.toml").read_text(encoding="utf-8"))


def is_gone(name: str, value: Any, origin: str, known: Mapping[str, KnownSetting]) -> bool:
    """Whether a setting no longer has an effect; if so, a warning is logged and its value is ignored.

    Raises:
        SettingsError: The setting requests a removed feature.
    """
    if name in known or (gone := removed().get(name)) is None:
        return False
    if str(value).strip() != gone.get("only", str(value).strip()):
        raise SettingsError(f"{origin}: {name} was removed in 0.2.0: {gone['why']}", gone["do"])
    _logger.warning("%s: %s was removed in 0.2.0 and is ignored: %s; leave it out", origin, name, gone["why"])
    return True


def as_list(text: str) -> list[Any]:
    """The elements of a list in text form: with commas, or as JSON if an element contains a comma."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            return list(json.loads(text))
    return [part.strip() for part in text.strip("[] ").split(",") if part.strip()]


def from_file(path: Path, known: Mapping[str, KnownSetting]) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, value, origin) of a TOML file's settings."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+)", str(error))
        where = f"{path}:{at[1]}" if at else str(path)
        raise SettingsError(f"{where}: not readable as TOML: {error}", "correct the file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{path}:{line}: not readable as TOML: no UTF-8", "correct the file") from None
    except OSError as error:
        raise SettingsError(reason_of(error), "correct the path or its access rights") from None
    lines = line_numbers(text)
    for section, table in document.items():
        where = f"{path}:{lines.get(section, 1)}"
        if section not in SECTIONS and not isinstance(table, dict):
            near = nearest_setting(section, known)
            raise SettingsError(
                f"{where}: {section} is outside any section",
                f"the nearest setting is {near}: write it below [{near.partition('.')[0]}]",
            )
        if section not in SECTIONS:
            raise SettingsError(
                f"{where}: unknown section [{section}]", f"the nearest is [{nearest(section, SECTIONS)}]"
            )
        if not isinstance(table, dict):
            raise SettingsError(f"{where}: {section} is a section", f"write [{section}] once, and its settings below")
        for key, value in listed(section, table, path, lines).items():
            name = f"{section}.{key}"
            origin = f"{path}:{lines.get(name, lines.get(section, 1))}"
            if not is_gone(name, value, origin, known):
                yield _known_name(name, known, origin), value, origin


def from_environment(env: Mapping[str, str], known: Mapping[str, KnownSetting]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, origin) of the variables that begin with SPRINGTIDE_."""
    by_variable = {variable(name): name for name in known}
    for key in sorted(env):
        if not key.startswith(PREFIX) or key in NO_SETTINGS:
            continue
        if key not in by_variable:
            former = next((name for name in removed() if variable(name) == key), "")
            if is_gone(former, env[key], f"variable {key}", known):
                continue
            near = variable(nearest_setting(key.removeprefix(PREFIX).replace("_", ".", 1).lower(), known))
            raise SettingsError(f"variable {key}: unknown setting", f"the nearest is {near}")
        yield by_variable[key], env[key], f"variable {key}"


def from_flags(argv: Sequence[str], known: Mapping[str, KnownSetting]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, text, origin) of `--section.name VALUE`, `--section.name=VALUE` and `--config FILE`."""
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        if not flag.startswith("--"):
            raise SettingsError(f"argument {flag!r}: not a flag", "settings are written --section.name VALUE")
        name = SHORT_FLAGS.get(flag[2:], flag[2:].replace("-", "_"))
        if name != "config" and name not in known and "." not in name:
            near = difflib.get_close_matches(name, [setting.partition(".")[2] for setting in known], n=1, cutoff=0.7)
            like = f" (the nearest is --{nearest_setting(near[0], known)})" if near else ""
            raise SettingsError(
                f"flag {flag}: no such option",
                f"settings are written --section.name VALUE{like}, and --help lists the options",
            )
        former = name not in known and name in removed()
        if not former and name != "config":
            _known_name(name, known, f"flag {flag}", "--")
            if known[name].secret:
                raise SettingsError(
                    f"flag {flag}: on a command line every user of this machine can read it",
                    f"give it in the variable {variable(name)}, or in the settings file",
                )
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise SettingsError(f"flag {flag}: its value is missing", f"write {flag} VALUE, or {flag}=VALUE")
            text = following
        if name == "config" or not is_gone(name, text, f"flag {flag}", known):
            yield name, text, f"flag {flag}"


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into flags of settings and the rest; removed settings are reported here, and left out.

    So a command reports them once, however often it loads its settings, also in a process that it becomes.

    >>> split_settings(["pin", "--paths.state", "here", "7", "--reason", "odd"])
    (['--paths.state', 'here'], ['pin', '7', '--reason', 'odd'])

    Raises:
        SettingsError: A setting requests a removed feature.
    """
    settings: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--")
        if not (word.startswith("--") and ("." in name or name == "config" or name in SHORT_FLAGS)):
            rest.append(word)
            continue
        value = text if equals else next(words, None)
        if value is None or not is_gone(name.replace("-", "_"), value, f"flag {flag}", {}):
            settings += [word] if equals or value is None else [word, value]
    return settings, rest


def _known_name(name: str, known: Mapping[str, KnownSetting], origin: str, prefix: str = "") -> str:
    """Returns `name`, or raises with the nearest known one."""
    if name not in known:
        raise SettingsError(
            f"{origin}: unknown setting {name}", f"the nearest is {prefix}{nearest_setting(name, known)}"
        )
    return name


def nearest_setting(name: str, known: Mapping[str, object]) -> str:
    """The setting that `name` probably means: the same key in another section, or else a similar name.

    >>> known = {"kafka.port": 1, "trainer.publish_s": 2, "stream.cut_ms": 3}
    >>> [nearest_setting(name, known) for name in ("stream.publish_s", "stream.pol_ms", "port")]
    ['trainer.publish_s', 'stream.cut_ms', 'kafka.port']
    """
    if name in RENAMED:
        return RENAMED[name]
    section, _, key = name.rpartition(".")
    same = [setting for setting in known if setting.partition(".")[2] == key]
    if same or section:
        return nearest(name, dict.fromkeys(same, 1) or known)
    near = nearest(name, {setting.partition(".")[2]: 1 for setting in known})
    return next(setting for setting in known if setting.partition(".")[2] == near)


def nearest(name: str, candidates: Mapping[str, object]) -> str:
    """The candidate most similar to `name`."""
    return difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.0)[0]


def line_numbers(text: str) -> dict[str, int]:
    r"""The line of each `[section]` and of each key of a TOML text, which tomllib does not keep."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[{1,2}\s*([\"']?)([\w.-]+)\1\s*\]", line)
        key = re.match(r"\s*([\"']?)([\w-]+(?:\s*\.\s*[\w-]+)?)\1\s*=", line)
        if header:
            section = header[2]
            lines.setdefault(section, number)
        elif key:
            name = re.sub(r"\s", "", key[2])
            lines.setdefault(f"{section}.{name}" if section else name, number)
            lines.setdefault((section or name).partition(".")[0], number)
    return lines


def checked(setting: KnownSetting, value: Any, origin: str) -> Any:
    """The value in the setting's type and bounds; SettingsError if it is not of the type, or out of bounds."""
    where = f"{origin}: {setting.name}"
    value = 0 if setting.auto and value == "auto" else value
    if isinstance(setting.default, tuple):
        if isinstance(value, str):
            value = as_list(value)
        if not isinstance(value, list):
            raise SettingsError(
                f"{where} must be a list, such as {as_text(setting.default) or 'one,two'}, not {_shown(setting, value)}"
            )
        # An empty default is a list of strings.
        kind = type(setting.default[0]) if setting.default else str
        return tuple(_in_bounds(setting, _scalar(setting, kind, element, where), where) for element in value)
    return _in_bounds(setting, _scalar(setting, type(setting.default), value, where), where)


def _scalar(setting: KnownSetting, kind: type, value: Any, where: str) -> Any:
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
    raise SettingsError(f"{where} must be {wanted}, not {_shown(setting, value)}")


def _in_bounds(setting: KnownSetting, value: Any, where: str) -> Any:
    if setting.choices and value not in setting.choices:
        raise SettingsError(
            f"{where} must be one of {', '.join(filter(None, setting.choices))}, not {_shown(setting, value)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{where} must be finite, not {_shown(setting, value)}")
    if setting.filled and value.strip() == "":
        raise SettingsError(f"{where} must not be empty")
    if setting.above is not None and value <= setting.above:
        raise SettingsError(f"{where} must be more than {setting.above:g}, not {_shown(setting, value)}")
    if setting.least is not None and value < setting.least:
        raise SettingsError(f"{where} must be at least {setting.least:g}, not {_shown(setting, value)}")
    if setting.most is not None and value > setting.most:
        raise SettingsError(f"{where} must be at most {setting.most:g}, not {_shown(setting, value)}")
    return value


def _shown(setting: KnownSetting, value: Any) -> str:
    return MASK if setting.secret else repr(value)


UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def span_ms(text: str) -> float | None:
    """The milliseconds of a time span such as `30m`; None if the text is no time span.

    >>> span_ms("30m"), span_ms("1.5s"), span_ms("30")
    (1800000.0, 1500.0, None)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    return float(match[1]) * UNITS_MS[match[2]] if match else None

"""Commands and settings that documents and messages show are taken as they are shown."""

from __future__ import annotations

import argparse
import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.command_line import OWN_HELP, parser, with_times
from docs.generate import own_helps
from state.config.loading import load
from state.config.settings import KnownSetting, known_settings
from state.config.sources import split_settings
from state.errors import SettingsError
from tests import runbook
from tests.laws.sources import ROOT, files, name, nodes

DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(part[0] == "." for part in path.relative_to(ROOT).parts)
)
REFUSED = "springtide: "
whole_parser = functools.cache(parser)
"""The parser of the command line; it takes some 20 ms to build."""


class Shown(NamedTuple):
    """A line of a fenced block.

    Attributes:
        document: Where it stands.
        words: What is typed, without a comment, with capitals filled in.
        said: The line below it.
    """

    document: str
    words: list[str]
    said: str


def shown(program: str) -> Iterator[Shown]:
    """The lines that call a program."""
    for path in DOCUMENTS:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            for line, said in zip(lines, [*lines[1:], ""], strict=True):
                if found := re.match(rf"(?:\$ )?(?:\.venv/bin/)?{program} (?!\.\.\.|\w+: )(.*)", line):
                    words = shlex.split(runbook.filled(found[1]), comments=True)
                    yield Shown(name(path), words, said)


def check(words: list[str]) -> None:
    """Refuses a line as `springtide` would, before anything starts."""
    flags, rest = split_settings(words)
    asked, unknown = whole_parser().parse_known_args(with_times(rest))
    if asked.command in OWN_HELP:
        options = set(re.findall(r"--?[a-z][a-z-]*", own_helps()[asked.command]))
        unknown = [word for word in unknown if word.startswith("-") and word.partition("=")[0] not in options]
    if unknown:
        raise SettingsError(f"unknown argument {unknown[0]}")
    load(flags, env={}, path="/dev/null")


def test_every_springtide_command_shown_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals that are shown are shown as they are; those of a file need that file and are not tried."""
    monkeypatch.chdir(ROOT)
    seen = 0
    for document, words, said in shown("springtide"):
        seen += 1
        if said.startswith(f"{REFUSED}flag "):
            with pytest.raises(SettingsError) as refused:
                check(words)
            assert str(refused.value) == said.removeprefix(REFUSED), document
        else:
            try:
                check(words)
            except SettingsError as error:
                pytest.fail(f"{document}: springtide {shlex.join(words)}: {error}")
    assert seen > 5


def test_every_make_target_shown_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [
        (document, word) for document, words, _ in shown("make") for word in words if re.fullmatch("[a-z-]+", word)
    ]
    inline = [
        (path.name, target) for path in DOCUMENTS for target in re.findall(r"`make ([a-z-]+)[` ]", path.read_text())
    ]
    assert asked
    assert [(document, target) for document, target in [*asked, *inline] if target not in targets] == []


def test_every_command_named_in_a_sentence_is_there() -> None:
    known = {name for action in whole_parser()._actions for name in (action.choices or ()) if action.dest == "command"}
    named = [
        (name(path), command)
        for path in DOCUMENTS
        for command in re.findall(r"`springtide ([a-z][a-z-]*)", path.read_text())
    ]
    assert named
    assert [(document, command) for document, command in named if command not in known] == []


def texts(path: Path) -> Iterator[str]:
    """The strings of a file; what is put into one is a version."""
    inside: set[int] = set()
    for node in nodes(path):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "V" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def test_every_command_that_a_message_says_to_type_is_taken() -> None:
    said = {
        (name(path), line)
        for path in files()
        for text in texts(path)
        for line in re.findall(r"`springtide ([a-z-]+ [^`]*--(?!help)[^`]*)`", text)
    }
    assert len(said) > 3
    for place, line in sorted(said):
        try:
            check(shlex.split(runbook.filled(line)))
        except SettingsError as error:
            pytest.fail(f"{place}: springtide {line}: {error}")


def test_every_module_named_as_a_process_is_there() -> None:
    named = [
        (name(path), module)
        for path in DOCUMENTS
        for module in re.findall(r"python -m ((?:deploy|state|streaming|trainer|tests)[\w.]*\w)", path.read_text())
    ]
    assert named
    places = {(document, module): ROOT.joinpath(*module.split(".")) for document, module in named}
    assert [one for one, place in places.items() if not place.with_suffix(".py").exists() and not place.is_dir()] == []


@pytest.mark.parametrize("words", [["pin", "x"], ["nothing"], ["replay", "--burts", "a"], ["up", "--kafka.prot=1"]])
def test_a_wrong_line_is_refused(words: list[str]) -> None:
    with pytest.raises(SettingsError):
        check(words)


DOCUMENT = ROOT / "docs" / "reference" / "settings.md"
UNITS = {"_ms": {"ms"}, "_s": {"s"}, "_h": {"h"}, "_d": {"d"}, "_bytes": {"bytes"}, "_gb": {"GB", "GiB"}}


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_a_setting_explains_itself() -> None:
    def explained(known: KnownSetting) -> bool:
        return known.help.endswith(".") and (known.help[0].isupper() or known.help.startswith(("SASL", "TLS")))

    assert {known.name: known.help for known in known_settings() if not explained(known)} == {}


def test_the_unit_agrees_with_the_name() -> None:
    def agrees(known: KnownSetting) -> bool:
        units = {unit for ending, units in UNITS.items() if known.name.endswith(ending) for unit in units}
        measured = isinstance(known.default, (int, float)) or known.unit
        return not measured or not units or known.unit in units

    assert {known.name: known.unit for known in known_settings() if not agrees(known)} == {}


def test_some_code_uses_each_setting() -> None:
    packages = ("state", "streaming", "trainer", "deploy")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "sections.py"]
    # Attributes and strings are all that can name a setting.
    named = set(re.findall(r"\.\w+|\"[\w.]+\"", "\n".join(path.read_text() for path in files)))

    def used(known: KnownSetting) -> bool:
        key = known.name.partition(".")[2]
        return bool(named & {f".{key}", f'"{known.name}"', f'"{key}"'})

    assert [known.name for known in known_settings() if not used(known)] == []


def test_each_command_explains_itself() -> None:
    for command, itself in commands().items():
        assert len(itself.description or "") > 20, command
        for action in itself._actions:
            assert action.help, f"{command} {action.option_strings or action.dest} has no help"
        assert "Exit codes" in " ".join(itself.format_help().split()), command

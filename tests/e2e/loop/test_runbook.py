"""Every command of docs/operate/runbook.md is typed while the loop runs, in the page's order, and does what the page says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deploy import cli, status
from deploy.command_line import PROCESSES
from deploy.watch import scrape
from state.config.settings import Settings
from state.experiments.experiment import GATE, By, Change, Experiment, Experiments
from state.log import Topics, topic_plan
from state.process.environment import wall_ms
from state.registry.registry import Registry
from tests import runbook
from tests.e2e.loop import lost_disk, new_release
from tests.e2e.loop.test_rollback import served
from tests.e2e.running import ROOT, Loop, counting, led_by, until
from tests.runbook import SECTIONS, Section

HONEST, POISON = "reading", "poison-of-the-drill"


@pytest.fixture(scope="module")
def terminal(one_loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    return Terminal(one_loop, tmp_path_factory.mktemp("terminal"))


def labels(answer: dict[str, Any]) -> list[str]:
    return [interest["label"] for interest in answer["interests"]]


def flood(loop: Loop, user: str) -> str:
    """A user's honest clicks, then a flood of one category, learned; returns the flood's span of time."""
    loop.answer_trained_on(user, loop.click([(user, "book", HONEST, "purchase")] * 5))
    begin_s = time.time()
    ends = loop.click([(user, f"bot-{n}", POISON, "purchase") for n in range(20)])
    loop.answer_trained_on(user, ends, led_by(POISON))
    end_s = time.time()
    return "..".join(datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds") for at_s in (begin_s, end_s))


def turn_back(terminal: Terminal, section: Section, user: str) -> str:
    """A flood is turned back with the section's commands; returns its span of time."""
    loop = terminal.loop
    span = flood(loop, user)
    _, epoch = served(loop)
    planned, done, *following = section.commands
    assert "nothing was changed" in terminal.type(planned, **{"A..B": span})
    assert served(loop)[1] == epoch
    began_s = time.monotonic()
    said = terminal.type(done, **{"A..B": span})
    base = int(re.findall(r"starts from version (\d+)", said)[0])
    answer = until(lambda: loop.profile(user), "no answer")
    answered_s = time.monotonic() - began_s
    assert answer["version"]["number"] == base
    assert POISON not in labels(answer)
    for command in following:
        terminal.type(command)
    until(lambda: served(loop)[1] == epoch + 1, "answers do not follow into the new epoch")
    followed_s = time.monotonic() - began_s
    ends = loop.click([(user, "book", HONEST, "view")])
    answer = loop.answer_trained_on(user, ends, led_by(HONEST), counting("purchase.count_1h", 5))
    assert POISON not in labels(answer)
    happened = re.findall(r"^generation \d+: .*$", terminal.type("springtide history"), re.MULTILINE)[-1]
    assert re.search(r"answers after .* caught up after .* (examples|clicks) read again", happened)
    print(f"{section.title}: {said}\nthe command took {answered_s:.2f} s, answers followed after {followed_s:.1f} s")
    print(happened)
    return span


def turn_back_fast(terminal: Terminal, section: Section) -> None:
    turn_back(terminal, section, "victim-of-the-drill")


def turn_back_exactly(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    before = loop.springtide("status")["accounting"]
    turn_back(terminal, section, "victim-of-the-second-drill")

    def balanced() -> dict[str, Any] | None:
        found: dict[str, Any] = loop.springtide("status")["accounting"]
        # Not compared where an earlier test deleted old records of the log and another one rebuilt the stream's store.
        return found if found["compared"] or not before["compared"] else None

    account = until(balanced, lambda: f"cannot be compared: {loop.springtide('status')['accounting']}")
    assert account["faults"] == []
    assert account["stream"]["masked"] >= before["stream"]["masked"] + 20


def a_mask_was_wrong(terminal: Terminal, section: Section) -> None:
    """What the drill before it left out comes back."""
    loop, user = terminal.loop, "victim-of-the-second-drill"
    masks, unmask, back, wait = section.commands
    number = re.findall(r"^(\d+) ", terminal.type(masks), re.MULTILINE)[-1]
    registry = Registry(loop.settings.registry_dir)
    control = registry.control()
    assert control is not None and control.mode == "exact"
    (version,) = re.findall(r"rollback --to (\d+) --mode exact", terminal.type(unmask, N=number))
    assert terminal.type(back, V=version)
    terminal.type(wait)
    assert served(loop)[1] == control.epoch + 1
    ends = loop.click([(user, "book", HONEST, "view")])
    assert POISON in labels(loop.answer_trained_on(user, ends, counting("purchase.count_1h", 25)))


def training_is_held(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    status, log, back, *going_on = section.commands
    assert "HOLDS" not in terminal.type(status)
    assert re.search("trainer|compactor", terminal.type(log))
    assert "starts from version" in terminal.type(back, N="1")
    for command in going_on:
        terminal.type(command)
    loop.springtide("follow", "--reason", "the drill goes on")


def an_operator_holds_something(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    history, *undone = section.commands
    held = re.findall(r"`(springtide (?:pin|pause|hold)[^`]*)`", "\n".join(section.lines))
    version = str(loop.kept()[0])
    for command in held:
        terminal.type(command, V=version)

    def told() -> bool:
        state = terminal.type("springtide status").splitlines()[0]
        return all(word in state for word in ("paused", "held by an operator", "pinned"))

    until(told, "status does not say all of it")
    assert all(word in terminal.type(history) for word in ("pin", "pause", "hold"))
    for command in undone:
        terminal.type(command)
    until(lambda: served(loop)[0] > int(version), "answers do not follow")
    assert len(held) == len(undone) == 3


def a_version_is_damaged(terminal: Terminal, section: Section) -> None:
    listed, pin = section.commands
    # The newest: the compactor may merge an older one in this moment.
    version = re.findall(r"^(\d+) ", terminal.type(listed), re.MULTILINE)[0]
    terminal.type(pin, V=version)
    until(lambda: served(terminal.loop)[0] == int(version), "the pin is not seen")
    terminal.loop.springtide("follow", "--reason", "the drill goes on")


def a_clock_is_wrong(terminal: Terminal, section: Section) -> None:
    status, back = section.commands
    terminal.type(status)
    source, end = max(terminal.loop.ends().items(), key=lambda one: one[1])
    place = f"{source.rpartition(':')[2]}:{end - 9}-{end - 2}"
    assert "nothing was changed" in terminal.type(back, **{"PARTITION:A-B": place})


def live_clicks_have_changed(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    diff, accept = section.commands
    url = f"http://127.0.0.1:{loop.settings.up.validation_port}/metrics"

    def judged() -> float | None:
        found = scrape.scrape({"validation": url})["validation"]
        return found.value("springtide_validation_windows_total", outcome="judged")

    until(judged, "no window was judged")
    assert "against baseline 0, of the bootstrap" in terminal.type(diff)
    assert "baseline 1: the next window is held against it" in terminal.type(accept)
    assert loop.springtide("history")[-1]["action"] == "accept"


def begun_rollout(settings: Settings, at_ms: int) -> tuple[Experiments, By]:
    """A rollout of an experiment without a trainer that the gate began, with no driver, and who decides about it."""
    with Topics(settings.kafka) as topics:
        topics.ensure(*topic_plan.exposures(settings))
        exposures, microbatches = (
            topics.ends(settings.kafka.exposures_topic),
            topics.ends(settings.kafka.microbatches_topic),
        )
    experiments, by = Experiments(settings), By(GATE, "it is worse", at_ms)
    name = f"drilled-{at_ms}"
    shadow = Experiment(name, "shadow", "nothing", None, 1, {}, (Change(at_ms, "shadow", None, 0.0, "ann", "see"),))
    running = shadow.start_rollout((1.0,), 60.0, exposures[0][1], microbatches[0][1], by).begin(by)
    experiments.edit(lambda now: now.with_experiment(running))
    return experiments, by


def a_rollout_was_stopped(terminal: Terminal, section: Section) -> None:
    status, report, back = section.commands
    experiments, by = begun_rollout(terminal.loop.settings, wall_ms())
    name = experiments.document().experiments[-1].name
    experiments.change(name, lambda now: now.back(by))
    stopped = rf"^experiment +BACK +{name} learns"
    assert re.search(stopped, terminal.type(status), re.MULTILINE)
    assert f"{name}: back" in terminal.type(report, NAME=name)
    terminal.type(back, NAME=name)
    assert not re.search(stopped, terminal.type(status), re.MULTILINE)
    experiments.change(name, lambda now: now.stop(by))


def nobody_watches_a_rollout(terminal: Terminal, section: Section) -> None:
    status, back = section.commands
    experiments, by = begun_rollout(terminal.loop.settings, wall_ms() - 120_000)
    name = experiments.document().experiments[-1].name
    unwatched = rf"^experiment +UNWATCHED +{name} learns"
    assert re.search(unwatched, terminal.type(status), re.MULTILINE)
    assert f"{name} back, 0 of the users" in terminal.type(back, NAME=name)
    assert not re.search(unwatched, terminal.type(status), re.MULTILINE)
    experiments.change(name, lambda now: now.stop(by))


def an_account_is_wrong(terminal: Terminal, section: Section) -> None:
    status, verify = section.commands
    assert "accounting      balances" in terminal.type(status)
    versions = [one for one in terminal.loop.springtide("versions") if one["kind"] == "delta"]
    assert "trainer.verify" in terminal.type(verify, V=str(versions[0]["version"]))


def the_disk_is_lost(terminal: Terminal, section: Section) -> None:
    loop, to = terminal.loop, str(terminal.directory / "backups")
    listed, restore, start = section.commands
    version = lost_disk.back_up(loop, Path(to), "one-before-the-loss")
    lost_disk.lose(loop)
    assert terminal.type(listed, TO=to).count("in it") == 2
    assert "restored backup" in terminal.type(restore, TO=to)
    terminal.type(start)
    loop.start()
    lost_disk.goes_on(loop, version, "one-before-the-loss")


def kafkas_disk_is_lost(terminal: Terminal, section: Section) -> None:
    loop, to = terminal.loop, str(terminal.directory / "backups")
    listed, restore, start = section.commands
    version = lost_disk.back_up(loop, Path(to), "one-before-kafka-was-lost")
    lost_disk.lose(loop, with_kafka=True)
    terminal.type(listed, TO=to)
    assert "restored backup" in terminal.type(restore, TO=to)
    terminal.type(start)
    loop.start()
    lost_disk.goes_on_in_a_new_log(loop, version, "one-before-kafka-was-lost")


def a_user_asks_to_be_forgotten(terminal: Terminal, section: Section) -> None:
    """What the commands do is proved by `test_erase.py`."""
    asked = terminal.directory / "asked.txt"
    erase, *others = section.commands
    asked.write_text("user-who-asks\n")
    assert "of 1 user;" in terminal.type(erase, **{"asked.txt": str(asked)})
    for command in others:
        if command not in terminal.typed:
            assert terminal.type(command)


def a_probe_does_not_come_through(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    probe, status = section.commands
    refused = loop.metrics("stream").total("springtide_stream_dead_letters_total")
    found = re.match(
        r"the click at offset (\d+) of partition (\d+) was in answers after [\d.]+ s", terminal.type(probe)
    )
    assert found is not None
    offset = int(found[1])
    (source,) = (one for one in loop.ends() if one.endswith(f":{found[2]}"))
    assert loop.ends()[source] > offset
    answer = until(lambda: loop.profile("anyone"), "no answer")
    assert answer["version"]["sources"][source] > offset
    assert loop.metrics("stream").total("springtide_stream_dead_letters_total") == refused
    terminal.type(status)


def a_release_goes_in(terminal: Terminal, section: Section) -> None:
    loop = terminal.loop
    look, start, wait = section.commands
    epoch = new_release.stopped(loop)
    planned = terminal.type(look)
    assert "starts from scratch:" in planned and "  table user: " in planned.partition("starts from scratch:")[0]
    terminal.type(start)
    with new_release.asking(loop) as seen:
        loop.start("--upgrade", "--reason", "the drill")
        terminal.type(wait)
        until(lambda: (epoch + 1, True) in seen, "answers do not follow into the new epoch")
    new_release.goes_on(loop, seen, epoch)


DRILLS: dict[str, Callable[[Terminal, Section], None]] = {
    "Roll back, fast": turn_back_fast,
    "Roll back, exactly": turn_back_exactly,
    "A mask was wrong": a_mask_was_wrong,
    "Training is held": training_is_held,
    "Held by an operator": an_operator_holds_something,
    "A rollout was stopped": a_rollout_was_stopped,
    "No command drives a rollout": nobody_watches_a_rollout,
    "Accounts do not balance": an_account_is_wrong,
    "A version is damaged": a_version_is_damaged,
    "A clock is wrong": a_clock_is_wrong,
    "Live clicks have changed": live_clicks_have_changed,
    "The disk is lost": the_disk_is_lost,
    "Kafka's disk is lost": kafkas_disk_is_lost,
    "A probe fails": a_probe_does_not_come_through,
    "Erase a user": a_user_asks_to_be_forgotten,
    "A new release": a_release_goes_in,
}

LONG = ("The disk is lost", "Kafka's disk is lost", "A new release")
"""Drills with a restart of their own. Short forms: `tests/e2e/test_backup_drill.py`, `tests/trainer/test_upgrade.py`."""


@pytest.fixture(autouse=True)
def following(loop: Loop) -> Iterator[None]:
    """Begins and ends with a loop that follows, learns and publishes."""
    yield
    for verb in ("follow", "resume", "release"):
        loop.springtide(verb, "--reason", "a drill is over")


@pytest.mark.parametrize(
    "section",
    [pytest.param(one, id=one.anchor, marks=[pytest.mark.nightly] * (one.title in LONG)) for one in runbook.ADVICE],
)
def test_what_the_runbook_says_is_typed_and_does_it(loop: Loop, terminal: Terminal, section: Section) -> None:
    if section.title in DRILLS:
        DRILLS[section.title](terminal, section)
    else:
        # Looks, which are typed once, and starts.
        for command in section.commands:
            if command not in terminal.typed:
                said = terminal.type(command)
                assert said or "compact" in command
    assert set(section.commands) <= terminal.typed


def test_each_drill_is_of_a_section() -> None:
    assert set(DRILLS) <= set(SECTIONS)


STARTING = ("up", "train-worker", "rebuild-history", "verify")
"""What cannot be done while the loop runs, or takes long: it is taken, and what it would become is looked at."""

OF_THEIR_OWN = ("compact", "probe", "upgrade")
"""What becomes a process: a nice one, one that may run on, or one with TensorFlow."""


class Terminal:
    """An operator's terminal, in a directory where the state is .springtide."""

    def __init__(self, loop: Loop, directory: Path) -> None:
        self.loop, self.directory = loop, directory
        self.typed: set[str] = set()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        (directory / ".springtide").symlink_to(loop.settings.state_dir)

    def type(self, command: str, **values: str) -> str:
        """Types one command of the page with its capitals filled in; returns what it says."""
        self.typed.add(command)
        line = runbook.filled(command, {**runbook.EXAMPLES, **values})
        line = line.replace("localhost:8501", f"localhost:{self.loop.settings.serving.port}")
        words = shlex.split(line)
        if words[0] == "springtide" and words[1] in STARTING:
            return self._take(words[1:])
        if words[0] == "springtide" and words[1] in OF_THEIR_OWN:
            line = shlex.join([sys.executable, "-m", "deploy.cli", *words[1:], *self.loop.flags])
        elif words[0] == "springtide":
            return self._do(words[1:])
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=600
        )
        # Files come and go while `du` looks at them; `grep` ends with 1 where no line matches.
        passed = (words[0] == "du" and done.stdout) or (words[0] == "grep" and done.returncode == 1)
        assert done.returncode == 0 or passed, f"{line}: {done.stderr}"
        return done.stdout

    def _do(self, words: list[str]) -> str:
        """What an operator's command says; here, for a process of its own would take a second each."""
        said, failed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            if words[0] == "status":
                code = status.main([*words[1:], *self.loop.flags])
            else:
                code = cli.main([*words, *self.loop.flags])
        # Without a condition, status says by its code whether something is wrong.
        looking = words[0] == "status" and "--wait-for" not in words
        assert code in ((0, 1) if looking else (0,)), f"{shlex.join(words)}: {failed.getvalue()}"
        return said.getvalue()

    def _take(self, words: list[str]) -> str:
        """The process that a command would become."""
        became: list[list[str]] = []
        cli.run([*words, *self.loop.flags], lambda module, flags: became.append([module, *flags]), 0, print)
        (line,) = became
        assert line[0] == PROCESSES[words[0]]
        return shlex.join(line)

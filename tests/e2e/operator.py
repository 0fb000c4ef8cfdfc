"""An operator who goes back again and again, in both modes, also while an earlier rollback is under way.

Each command is a process of its own, which may be killed at its kill points or
anywhere; then it is typed again. What is masked are clicks after the version
gone back to, some more each time. After a fast rollback the rows behind the
masked ones still carry them in their windows: before any later version is gone
back to, an exact rollback to the same version takes that away, so that at the
end the whole log is that of a stream which never saw a masked click.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from state.config.settings import Settings
from state.errors import RegistryError
from state.positions import Source
from state.registry import log_line
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from tests.e2e.client import Client
from tests.e2e.parts import Part

Mode = Literal["fast", "exact"]
Steps = Generator[None, None, None]
COMMAND = "command"
# What is done in a row; all but the first do not wait until the one before is done.
STORIES: Sequence[Sequence[Mode]] = (
    ("exact",),
    ("fast", "exact"),
    ("exact", "exact", "exact"),
    ("exact", "fast", "exact"),
    ("fast", "fast", "exact"),
)
PAUSE_S = (2.0, 5.0)
SOON_S = (0.0, 1.5)
LEAST_AGE_S, MOST_AGE_S = 1.5, 20.0
MOST_CLICKS = 60
SPAN_MS = 400
TWICE_SHARE, TWO_SHARE, SHOT_SHARE = 0.3, 0.3, 0.3
PATIENCE_S = 90.0


@dataclass
class Command:
    """One command line, typed until it has done its work.

    Attributes:
        words: The line after `springtide`.
        part: Its process; None before the first and between two.
        shoot_s: When it is killed; infinity where it is left alone.
        done: What it printed at last.
        tries: How often it was started.
    """

    words: list[str]
    part: Part | None = None
    shoot_s: float = float("inf")
    done: dict[str, Any] | None = None
    tries: int = 0


@dataclass
class Rollbacks:
    """What became of the rollbacks.

    Attributes:
        modes: How many of each mode.
        interrupting: Of them, those that came while another one was under way.
        conflicts: Commands that another one was faster than, and that were typed again.
        retyped: Commands typed again after they were killed, or while Kafka was away.
        unchanged: Commands whose work was done already.
        answered_s: Seconds from a command's first start until an answer is of its version.
    """

    modes: dict[str, int] = field(default_factory=lambda: {"fast": 0, "exact": 0})
    interrupting: int = 0
    conflicts: int = 0
    retyped: int = 0
    unchanged: int = 0
    answered_s: list[float] = field(default_factory=list)


class Operator:
    """One operator; `tick` is called all the time by the thread that looks after the parts."""

    def __init__(
        self,
        settings: Settings,
        seed: int,
        client: Client,
        arm: Callable[[], str],
        struck: Callable[[str], None],
    ) -> None:
        self._settings, self._client, self._arm, self._struck = settings, client, arm, struck
        self._chance = random.Random(seed + 2)
        self._registry = Registry(settings.registry_dir)
        self._commands: list[Command] = []
        self._unclean: int | None = None
        self._calm = False
        self._work: Steps | None = None
        self.found = Rollbacks()

    @property
    def idle(self) -> bool:
        """Whether nothing is half done."""
        return self._work is None

    def tick(self) -> None:
        """Goes on with what is being done, or begins something."""
        if self._work is None:
            if self._calm:
                return
            self._work = self._story(self._chance.choice(STORIES))
        if next(self._work, self) is self:
            self._work = None

    def finish(self) -> None:
        """From now on kills nothing and begins nothing; what a fast rollback left is taken away."""
        self._calm = True
        before = self._work

        def rest() -> Steps:
            if before is not None:
                yield from before
            if self._unclean is not None:
                yield from self._roll_back("exact", self._registry.manifest(self._unclean))
            yield from self._follow()

        self._work = rest()

    def close(self) -> None:
        """Ends the commands that run."""
        for one in self._commands:
            if one.part is not None:
                one.part.kill()

    def _story(self, modes: Sequence[Mode]) -> Steps:
        yield from self._wait(PAUSE_S)
        to = self._choose()
        if to is None:
            return
        for number, mode in enumerate(modes):
            self.found.interrupting += number > 0
            yield from self._roll_back(mode, to)
            yield from self._wait(SOON_S)
        if self._chance.random() < 0.5:
            # Once in a while answers follow long before all is learned again.
            yield from self._wait(PAUSE_S)
        yield from self._follow()

    def _choose(self) -> Manifest | None:
        """A version on the line of the newest one, some seconds old."""
        control = self._registry.control()
        assert control is not None
        if self._unclean is not None:
            return self._registry.manifest(self._unclean)
        newest = self._newest(control)
        now_s = time.time()
        found = []
        for number in reversed(self._registry.versions()):
            try:
                one = self._registry.manifest(number)
                if not any(low <= number <= high for low, high in newest.visible):
                    continue
                age_s = now_s - one.created_at_ms / 1000
                if age_s > MOST_AGE_S:
                    break
                if age_s >= LEAST_AGE_S and log_line.has(control.log, one.log.epoch, one.log.next):
                    self._registry.chain(number)
                    found.append(one)
            except RegistryError:
                # Retention was faster.
                continue
        return self._chance.choice(found) if found else None

    def _newest(self, control: Control) -> Manifest:
        number = self._registry.newest(control.epoch) or control.base
        assert number is not None, "answers were given"
        return self._registry.manifest(number)

    def _roll_back(self, mode: Mode, to: Manifest) -> Steps:
        """One command, or two at once, each with a mask of its own; done when answers are of the version."""
        begun_s = time.monotonic()
        self._client.may_turn_to(to.version)
        lines = [self._words(mode, to)]
        if self._chance.random() < TWO_SHARE and not self._calm:
            lines.append(self._words(mode, to))
        yield from self._do(lines)
        if self._chance.random() < TWICE_SHARE:
            [done] = yield from self._do(lines[-1:])
            assert done["changed"] is False, f"the same command again: {lines[-1]} made {done}"
            self.found.unchanged += 1
        self.found.modes[mode] += 1
        self._unclean = to.version if mode == "fast" else None
        self._client.stay_at(to.version)
        end_s = time.monotonic() + PATIENCE_S
        while self._client.answers.version != to.version:
            assert time.monotonic() < end_s, f"no answer by version {to.version} within {PATIENCE_S:.0f} s"
            yield
        self.found.answered_s.append(time.monotonic() - begun_s)

    def _words(self, mode: Mode, to: Manifest) -> list[str]:
        """A command that masks some clicks after `to`."""
        control = self._registry.control()
        assert control is not None
        marks, ends = to.marks, self._ends(control)
        words = ["rollback", "--to", str(to.version), "--mode", mode, "--reason", "bots"]
        for source, end in sorted(ends.items()):
            first = marks.get(source, 0)
            if end - first > 2 and self._chance.random() < 0.6:
                at = self._chance.randrange(first, end - 1)
                last = min(end - 1, at + self._chance.randint(0, MOST_CLICKS))
                words += ["--skip", f"{source.partition}:{at}-{last}"]
        at_ms = to.created_at_ms + self._chance.randint(SPAN_MS, 3 * SPAN_MS)
        if at_ms + SPAN_MS < time.time() * 1000 - SPAN_MS:
            words += ["--skip-time", f"{at_ms}..{at_ms + SPAN_MS}"]
        return words

    def _ends(self, control: Control) -> dict[Source, int]:
        """How far the clicks were ever learned, as far as versions are kept."""
        found: dict[Source, int] = {}
        for epoch in (control.epoch, control.epoch - 1):
            number = self._registry.newest(epoch)
            for source, mark in () if number is None else self._registry.manifest(number).marks.items():
                found[source] = max(mark, found.get(source, 0))
        return found

    def _follow(self) -> Steps:
        self._client.stay_at(None)
        yield from self._do([["follow", "--reason", "it is good"]])

    def _do(self, lines: Sequence[list[str]]) -> Generator[None, None, list[dict[str, Any]]]:
        """Types commands, all at once, each again until it is done; returns what they printed."""
        self._commands = [Command(words) for words in lines]
        while any(one.done is None for one in self._commands):
            for one in self._commands:
                if one.done is None:
                    self._look(one)
            yield
        return [one.done for one in self._commands if one.done is not None]

    def _look(self, one: Command) -> None:
        if one.part is None:
            kill_at = "" if self._calm else self._arm()
            one.tries += 1
            log = self._settings.logs_dir / f"command-{self._commands.index(one)}.log"
            one.part = Part(COMMAND, self._settings, log, kill_at, [*one.words, "-o", "json"])
            if not self._calm and not kill_at and self._chance.random() < SHOT_SHARE:
                one.shoot_s = time.monotonic() + self._chance.uniform(0.3, 2.5)
            return
        if time.monotonic() >= one.shoot_s:
            one.part.kill()
        end = one.part.end()
        if end is None:
            return
        said, one.part, one.shoot_s = one.part.said(), None, float("inf")
        if end.killed:
            self._struck(end.at.partition(":")[0])
            self.found.retyped += 1
        elif end.code == 0:
            one.done = json.loads(said)
        elif "springtide history" in said:
            self.found.conflicts += 1
        elif "no row of the training log is named" in said:
            # The crowd was held up at that time.
            at = one.words.index("--skip-time")
            del one.words[at : at + 2]
        else:
            # Kafka is away: the command said so, and changed nothing.
            assert "afka" in said and one.tries < 50, f"{one.words}: {said}"
            self.found.retyped += 1

    def _wait(self, span_s: tuple[float, float]) -> Steps:
        end_s = time.monotonic() + self._chance.uniform(*span_s)
        while time.monotonic() < end_s and not self._calm:
            yield

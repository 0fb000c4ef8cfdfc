"""Experiments: other settings tried in parallel with the live trainer, on a share of users, and live. One document.

Commands, the gate of a rollout and the retrain schedule write the desired state; the processes converge to it. Stages:

    shadow     its trainer learns in parallel and serves no users
    rollout    its trainer learns in parallel and answers a share of the users
    promoting  its trainer is shutting down
    promoted   the live trainer continues from it
    stopped    an operator stopped it
    ended      the live trainer was rolled back or upgraded, so the two learn different rows

Phases of its rollout:

    starting   it cannot answer yet, and has no users
    running    it has the share of the step; the gate advances to the next step
    halted     the share stays unchanged until an operator resumes the rollout
    done       the last step is over; its share stays until the experiment is promoted, rolled back or stopped
    back       the live versions answer all users again
    over       the live versions answer all users again, because the live trainer has taken over its weights
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from state import layout
from state.config.settings import Settings
from state.disk import documents
from state.disk import files as durable
from state.disk.lock import DirectoryLock
from state.errors import ControlConflict, RegistryError, SettingsError
from state.registry.directory import usable

DOCUMENT, REPORT = "experiments.json", "report.json"
MOST_RUNNING = 4
"""Maximum number of concurrent experiments. Each has a trainer, which needs as much memory as the live one."""

STEPS = (1.0, 5.0, 50.0, 100.0)
EVERY_S = 1800.0
GATE = "gate"
"""The actor of automatic decisions about a rollout."""

Stage = Literal["shadow", "rollout", "promoting", "promoted", "stopped", "ended"]
Phase = Literal["starting", "running", "halted", "done", "back", "over"]
Origin = Literal["live", "nothing", "clicks"]
Outcome = Literal["", "promoted", "dropped", "failed"]
"""Empty while the retrain is in progress; `failed` if it could not be judged."""
OUTCOMES = ("promoted", "dropped", "failed")

_GONE = ".gone."
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_LOCK_S = 5.0
Document = TypeVar("Document")


class By(NamedTuple):
    """The actor of a decision, the reason, and the wall clock time."""

    actor: str
    reason: str
    now_ms: int


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decision about an experiment: stage, phase of its rollout, and share of users (0 to 1) from then on."""

    at_ms: int
    stage: Stage
    phase: Phase | None
    share: float
    actor: str
    reason: str


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest rollout of an experiment.

    Attributes:
        steps: Shares of the users in percent, ascending.
        every_s: Minimum duration of a step.
        since_ms: When the current step began.
        exposures_from: Offset at which its exposures begin in their topic.
        log_from: Offset of the training log when the rollout began.
    """

    steps: tuple[float, ...]
    every_s: float
    step: int
    phase: Phase
    started_ms: int
    since_ms: int
    exposures_from: int
    log_from: int


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment. Its methods are pure and return the next state, or the same one if nothing changes.

    They raise `ControlConflict` if its stage or the phase of its rollout does not allow the change, and `start_rollout`
    raises `SettingsError` for invalid steps.

    Attributes:
        origin: The start of its trainer: the live version, nothing, or past clicks (`state/experiments/past.py`).
        version: The live version from which it started; None for the other origins.
        epoch: Epoch of the live trainer when the experiment began.
        overrides: Settings that differ from the live ones, by name, as text.
        history: All decisions about it, the newest last.
        rollout: Its newest rollout; None before the first.
        promoted_epoch: Epoch in which the live trainer continues from it; 0 for none.
    """

    name: str
    stage: Stage
    origin: Origin
    version: int | None
    epoch: int
    overrides: dict[str, str]
    history: tuple[Change, ...]
    rollout: Rollout | None = None
    promoted_epoch: int = 0

    @property
    def newest(self) -> Change:
        """The newest decision."""
        return self.history[-1]

    @property
    def staged(self) -> Change:
        """The decision that began its stage."""
        begun = self.newest
        for change in reversed(self.history):
            if change.stage != self.stage:
                break
            begun = change
        return begun

    @property
    def runs(self) -> bool:
        """Whether its trainer should run."""
        return self.stage in ("shadow", "rollout")

    @property
    def phase(self) -> Phase | None:
        """The phase of its rollout; None without one."""
        return None if self.rollout is None else self.rollout.phase

    @property
    def is_split(self) -> bool:
        """Whether users are split between it and the live versions; a promotion keeps the share until its end."""
        return self.stage in ("rollout", "promoting", "promoted") and self.phase in ("running", "halted", "done")

    @property
    def is_hosted(self) -> bool:
        """Whether a host should answer for it: users are split, or will be once it can answer."""
        return self.is_split or (self.stage == "rollout" and self.phase == "starting")

    @property
    def is_stopped_by_gate(self) -> bool:
        """Whether the gate halted its rollout or rolled it back, without a later decision."""
        return self.runs and self.phase in ("halted", "back") and self.newest.actor == GATE

    @property
    def share(self) -> float:
        """The share of users that it answers, 0 to 1."""
        return self.rollout.steps[self.rollout.step] / 100 if self.is_split and self.rollout is not None else 0.0

    @property
    def rollout_history(self) -> tuple[Change, ...]:
        """The decisions since its newest rollout began."""
        since_ms = self.history[-1].at_ms if self.rollout is None else self.rollout.started_ms
        return tuple(change for change in self.history if change.phase is not None and change.at_ms >= since_ms)

    def start_rollout(
        self, steps: tuple[float, ...], every_s: float, exposures_from: int, log_from: int, by: By
    ) -> Experiment:
        """Starts a rollout, which waits until the experiment can answer."""
        require_steps(steps)
        self._require(self.stage == "shadow", "be rolled out")
        rollout = Rollout(steps, every_s, 0, "starting", by.now_ms, by.now_ms, exposures_from, log_from)
        return self._changed(by, stage="rollout", rollout=rollout)

    def begin(self, by: By) -> Experiment:
        """Begins the first step, once the experiment can answer."""
        waits = self.stage == "rollout" and self.phase == "starting"
        return self._moved(by, phase="running", since_ms=by.now_ms) if waits else self

    def next_step(self, by: By) -> Experiment:
        """Advances to the next share, or to `done` after the last one."""
        self._require(self.stage == "rollout" and self.phase == "running", "continue")
        assert self.rollout is not None
        if self.rollout.step + 1 == len(self.rollout.steps):
            return self._moved(by, phase="done")
        return self._moved(by, step=self.rollout.step + 1, since_ms=by.now_ms)

    def halt(self, by: By) -> Experiment:
        """Halts the rollout at its share."""
        self._require(self.stage == "rollout" and self.phase in ("running", "halted"), "be halted")
        return self if self.phase == "halted" else self._moved(by, phase="halted")

    def resume(self, by: By) -> Experiment:
        """Resumes the rollout at the beginning of its step."""
        self._require(self.stage == "rollout" and self.phase in ("running", "halted"), "be resumed")
        return self if self.phase == "running" else self._moved(by, phase="running", since_ms=by.now_ms)

    def back(self, by: By) -> Experiment:
        """Rolls back to no users, or confirms a rollback by the gate."""
        self._require(self.runs and self.rollout is not None, "be rolled back")
        if self.phase == "back" and not (self.is_stopped_by_gate and by.actor != GATE):
            return self
        return self._moved(by, stage="shadow", phase="back")

    def promote(self, by: By) -> Experiment:
        """Requests that its trainer ends with a last durable version, so that the live trainer can continue from it."""
        self._require(self.runs or self.stage == "promoting", "be promoted: its weights are removed")
        return self._changed(by, stage="promoting")

    def cancel_promotion(self, by: By) -> Experiment:
        """Restarts its trainer, because the live trainer cannot continue from it."""
        return self._changed(by, stage="rollout" if self.is_split else "shadow")

    def promoted(self, epoch: int, by: By) -> Experiment:
        """Records that the live trainer continues from it in an epoch."""
        return self._changed(by, stage="promoted", promoted_epoch=epoch)

    def taken_over(self, by: By) -> Experiment:
        """Records that the live trainer has published its weights, so the live versions answer all users."""
        return self._moved(by, phase="over") if self.is_split else self

    def stop(self, by: By) -> Experiment:
        """Stops it; the live versions answer all users."""
        if self.stage == "promoted":
            raise ControlConflict(
                f"experiment {self.name} is promoted: the live trainer continues from it",
                "to undo that: `springtide rollback --to V --reason TEXT`",
            )
        return self if self.stage in ("stopped", "ended") else self._changed(by, stage="stopped")

    def end(self, by: By) -> Experiment:
        """Ends it without a command."""
        return self._changed(by, stage="ended") if self.runs else self

    def _require(self, allowed: bool, verb: str) -> None:
        if not allowed:
            rollout = "" if self.phase is None else f", its rollout is {self.phase}"
            raise ControlConflict(
                f"experiment {self.name} is {self.stage}{rollout} and cannot {verb}",
                "`springtide experiment status` lists what was decided; start another one if this one is over",
            )

    def _changed(self, by: By, **changes: object) -> Experiment:
        after = replace(self, **changes)
        change = Change(by.now_ms, after.stage, after.phase, after.share, by.actor, by.reason)
        return replace(after, history=(*self.history, change))

    def _moved(self, by: By, stage: Stage | None = None, **changes: object) -> Experiment:
        assert self.rollout is not None
        return self._changed(by, stage=stage or self.stage, rollout=replace(self.rollout, **changes))


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The retrain schedule and the newest retrain, which is an experiment of its name. Pure.

    The next retrain is due one interval after the last one began, or after the schedule was first read. It never
    begins while another is in progress. A missed retrain is skipped.

    Attributes:
        since_ms: When the schedule was first read, wall clock.
        name: Name of the newest retrain; empty before the first.
        begun_at_ms: When it began.
        outcome: Its outcome; `reason` has the reason.
        judged_at_ms: When a retrain was last judged, promoted or dropped; 0 for never.
    """

    since_ms: int
    name: str = ""
    begun_at_ms: int = 0
    outcome: Outcome = ""
    reason: str = ""
    judged_at_ms: int = 0

    @property
    def under_way(self) -> bool:
        """Whether a retrain is in progress.

        >>> schedule = Schedule(0)
        >>> schedule.under_way, schedule.begin(5).under_way, schedule.begin(5).end("dropped", "worse", 9).under_way
        (False, True, False)
        """
        return bool(self.name) and not self.outcome

    def due_ms(self, every_ms: float) -> int:
        """When the next retrain is due, if none is in progress.

        >>> Schedule(100).due_ms(1000), Schedule(100).begin(5000).end("dropped", "worse", 5900).due_ms(1000)
        (1100, 6000)
        """
        return max(self.since_ms, self.begun_at_ms) + round(every_ms)

    def is_due(self, every_ms: float, now_ms: int) -> bool:
        """Whether a retrain is due now."""
        return not self.under_way and now_ms >= self.due_ms(every_ms)

    def begin(self, now_ms: int) -> Schedule:
        """The state when a retrain begins; its name is its time.

        >>> Schedule(0).begin(1_795_737_600_000).name
        'retrain-20261127-000000'
        """
        name = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("retrain-%Y%m%d-%H%M%S")
        return replace(self, name=name, begun_at_ms=now_ms, outcome="", reason="")

    def end(self, outcome: Outcome, reason: str, now_ms: int) -> Schedule:
        """The state when the retrain is over."""
        judged_at_ms = self.judged_at_ms if outcome == "failed" else now_ms
        return replace(self, outcome=outcome, reason=reason, judged_at_ms=judged_at_ms)


class ExperimentsDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The desired state of all experiments, the newest last, and the retrain schedule; None before its first read."""

    experiments: tuple[Experiment, ...] = ()
    schedule: Schedule | None = None

    def find(self, name: str) -> Experiment | None:
        """Returns the experiment of a name; None if there is none."""
        return next((experiment for experiment in self.experiments if experiment.name == name), None)

    def get(self, name: str) -> Experiment:
        """Returns the experiment of a name.

        Raises:
            RegistryError: There is none.
        """
        if (experiment := self.find(name)) is None:
            names = ", ".join(experiment.name for experiment in self.experiments) or "there is none"
            raise RegistryError(
                f"there is no experiment {name}", f"take one of `springtide experiment status`: {names}"
            )
        return experiment

    @property
    def rolled_out(self) -> Experiment | None:
        """The experiment whose rollout is not over; there is one at most."""
        return next((experiment for experiment in self.experiments if experiment.is_hosted), None)

    def with_experiment(self, experiment: Experiment) -> ExperimentsDocument:
        """Returns the document with a new experiment, or with the next state of one.

        Raises:
            RegistryError: Too many experiments would run.
            ControlConflict: Another rollout is open.
        """
        before = self.find(experiment.name)
        running = [other.name for other in self.experiments if other.runs and other.name != experiment.name]
        if before is None and len(running) >= MOST_RUNNING:
            raise RegistryError(
                f"{len(running)} experiments run already: {', '.join(running)}", "stop one of them first"
            )
        other = self.rolled_out
        if experiment.is_hosted and other is not None and other.name != experiment.name:
            raise ControlConflict(
                f"the rollout of {other.name} is {other.phase} at {other.share:.0%} of the users",
                f"end it first: `springtide experiment back {other.name} --reason TEXT`, or promote or stop it",
            )
        if before is None:
            return replace(self, experiments=(*self.experiments, experiment))
        changed = (experiment if other.name == experiment.name else other for other in self.experiments)
        return replace(self, experiments=tuple(changed))


def require_name(name: str) -> None:
    """Refuses an invalid name of an experiment. The name is also that of a directory, a log and a label.

    Raises:
        SettingsError: The name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for an experiment",
            "use up to 32 small letters, digits and hyphens, such as wider-rows",
        )


def require_steps(steps: tuple[float, ...]) -> None:
    """Refuses steps that are empty, not ascending, or not percentages.

    >>> require_steps((1.0, 5.0, 50.0, 100.0))

    Raises:
        SettingsError: The steps are invalid.
    """
    if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] <= 100:
        shown = ",".join(f"{step:g}" for step in steps)
        raise SettingsError(f"--steps {shown} are no steps", "give ascending percentages above 0, such as 1,5,50,100")


class Experiments:
    """The experiments of a registry, and their directories. Not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._state = settings.state_dir
        self.path = self._state / layout.EXPERIMENTS
        self.shared = settings.registry_dir / layout.EXPERIMENTS
        self._cached: tuple[tuple[int, ...], ExperimentsDocument] = ((), ExperimentsDocument())

    def document(self) -> ExperimentsDocument:
        """Returns the newest document. Cheap enough to poll: it reads the file only if its inode, time or size changed.

        Raises:
            RegistryError: It is damaged or cannot be read.
        """
        path = self.shared / DOCUMENT
        with usable("be read"):
            try:
                status = path.stat()
            except FileNotFoundError:
                return ExperimentsDocument()
            mark = (status.st_ino, status.st_mtime_ns, status.st_size)
            if mark != self._cached[0]:
                try:
                    self._cached = (mark, documents.decode_sealed(path.read_bytes(), ExperimentsDocument))
                except ValueError as error:
                    raise RegistryError(
                        f"{path} is damaged: {error}",
                        f"restore it, or remove it: without it all experiments end, and {self.path} is cleared",
                    ) from error
        return self._cached[1]

    def get(self, name: str) -> Experiment:
        """Returns one experiment.

        Raises:
            RegistryError: There is none of this name, or the document cannot be read.
        """
        return self.document().get(name)

    def edit(self, transition: Callable[[ExperimentsDocument], ExperimentsDocument]) -> ExperimentsDocument:
        """Applies a pure transition to the document; durable when this returns.

        Raises:
            LockHeld: Other processes kept changing it.
            RegistryError: It is damaged, or the disk refused and it is unchanged.
            SpringtideError: Raised by the transition.
        """
        with self._locked():
            return self._replace(transition)

    def change(self, name: str, transition: Callable[[Experiment], Experiment]) -> Experiment:
        """Applies a pure transition to one experiment; otherwise like `edit`.

        Raises:
            RegistryError: There is no such experiment, or the document cannot be changed.
            LockHeld: Other processes kept changing the document.
            SpringtideError: Raised by the transition.
        """
        return self.edit(lambda now: now.with_experiment(transition(now.get(name)))).get(name)

    def add(self, experiment: Experiment, fill: Callable[[Path], None]) -> None:
        """Adds an experiment, completely or not at all; `fill` fills the directory of its registry.

        1. Its registry is built under a temporary name, and synced.
        2. One rename makes it visible.
        3. The experiment is added to the document. After a crash before this step, `sweep` removes the directory.

        Raises:
            RegistryError: An experiment of that name exists, too many run, or the document cannot be changed.
            LockHeld: Other processes kept changing the document.
            OSError: The disk refused.
        """
        final, temporary = self.folder(experiment.name), self.path / f".{experiment.name}~{durable.owner_mark()}"

        def added(now: ExperimentsDocument) -> ExperimentsDocument:
            if now.find(experiment.name) is not None:
                raise RegistryError(f"there was an experiment {experiment.name} before", "take another name")
            return now.with_experiment(experiment)

        added(self.document())
        try:
            # 1.
            (temporary / layout.REGISTRY).mkdir(parents=True)
            fill(temporary / layout.REGISTRY)
            durable.sync_tree(temporary)
            with self._locked():
                after = added(self.document())
                # 2.
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                durable.sync_directory(self.path)
                # 3.
                self._replace(lambda _: after)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def folder(self, name: str) -> Path:
        """Returns the directory of an experiment."""
        return self.path / name

    def registry(self, name: str) -> Path:
        """Returns the registry of an experiment, which exists as long as its weights may be needed."""
        return layout.experiment_registry(self._state, name)

    def open(self) -> list[str]:
        """Returns the names of experiments with a registry or a part of one, which must be run or removed."""
        leftovers = (path for name in (layout.REGISTRY, f"{_GONE}*") for path in self.path.glob(f"[!.]*/{name}"))
        return sorted({path.parent.name for path in leftovers})

    def drop_registry(self, name: str) -> None:
        """Removes the registry of an experiment, but not its comparison."""
        registry, folder = self.registry(name), self.folder(name)
        if registry.is_dir():
            # Uses one rename, so that a half-removed registry is never mistaken for a complete one.
            registry.rename(folder / f"{_GONE}{os.urandom(4).hex()}")
        for folder_of_removed in folder.glob(f"{_GONE}*"):
            shutil.rmtree(folder_of_removed)

    def sweep(self) -> None:
        """Removes the files of experiments whose addition was interrupted by a killed command.

        Raises:
            LockHeld: Other processes kept changing the document.
            RegistryError: The document is damaged.
        """
        for temporary in self.path.glob(".*~*"):
            if durable.is_dead(temporary.name.rpartition("~")[2]):
                shutil.rmtree(temporary)
        if any(self.document().find(name) is None for name in self.open()):
            with self._locked():
                document = self.document()
                for name in self.open():
                    if document.find(name) is None:
                        shutil.rmtree(self.folder(name))

    def write_report(self, report: object) -> None:
        """Replaces the newest report on a rollout, see `state/experiments/gate.py`; durable when this returns."""
        durable.replace(self.shared / REPORT, msgspec.json.encode(report))

    def read_report(self, kind: type[Document]) -> Document | None:
        """Reads the newest report on a rollout; None if there is none yet, or it cannot be read."""
        try:
            return documents.decode((self.shared / REPORT).read_bytes(), kind)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _replace(self, transition: Callable[[ExperimentsDocument], ExperimentsDocument]) -> ExperimentsDocument:
        before = self.document()
        after = transition(before)
        if after != before:
            with usable("record the decision"):
                durable.replace(self.shared / DOCUMENT, documents.encode_sealed(after))
        return after

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with DirectoryLock(self.shared).acquire(wait_s=_LOCK_S):
            yield

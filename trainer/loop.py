"""The trainer's process: `python -m trainer.loop [--section.name VALUE ...]`.

1. Claims the registry. A second trainer waits here as a standby, with its kernels and the model loaded.
2. Checks a custom tower, then waits until the bootstrap has analysed the feature spec of the settings.
3. Builds the trainer and lowers its program, checked against the model. In the environment of the newest version its
   program is used again, and the default model needs no TensorFlow. If the newest version no longer fits this release's
   model, an epoch begins from the parts that fit. If the settings differ, the trainer refuses to start.
4. Creates control generation 1 if there is no control.
5. Enters control's epoch: from its newest version, else from its base, else from scratch or with the past clicks of an
   experiment. If the training log was truncated to before that version, the trainer rewinds first (`recover`).
6. Reads, steps, publishes and converges to control until SIGTERM or SIGINT. Then it publishes its remaining work.

Two child processes run next to it from time to time (`Scheduled`): the compactor, and an export.
"""

from __future__ import annotations

import functools
import getpass
import importlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from state.config.loading import load
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import (
    CorruptVersion,
    ModelMismatch,
    ProcessFailed,
    SpringtideError,
    TruncatedLog,
    UnusableRegistry,
    WorkerLost,
)
from state.features.spec import FeatureSpec
from state.kernels import Kernels
from state.log import KERNELS as LOG_KERNELS
from state.log import Log
from state.log.accepted_gaps import Consent, in_words, take_options
from state.metrics import TrainerMetrics, serve
from state.process.environment import Holes, actor, freeze_objects, wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import Work, own_stderr, quiet_stderr, quiet_tensorflow, run_process, stop_on_signals
from state.registry import control as transitions
from state.registry.control import Control, start
from state.registry.directory import LEASE_S, claiming
from state.registry.model_fit import require_same_model, version_to_go_on_from
from state.registry.registry import Registry
from state.registry.sharing import owning
from state.storage import REGISTRY, Room, is_full, offer
from trainer import device
from trainer.checks import is_own
from trainer.gauges import Taken, TrainingLag
from trainer.intake import newest_before
from trainer.worker import begin, restore_handlers, waiting, workers_of

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.group import Group
    from trainer.learner import Learner, Surroundings

HURRY_S = 30.0

STANDBY = "standing by"
MODULES = "loading modules"
TENSORFLOW = "loading TensorFlow"
KERNELS = "compiling kernels"
WORKERS = "waiting for workers"
BOOTSTRAP = "waiting for the bootstrap"
MODEL = "building the model"
PROGRAM = "lowering the program"
VERSION = "loading the version"
CATCHING_UP = "catching up"
LEARNING = "learning"
PHASES = (STANDBY, MODULES, TENSORFLOW, KERNELS, WORKERS, BOOTSTRAP, MODEL, PROGRAM, VERSION, CATCHING_UP, LEARNING)

LOG_S = 5.0
WAIT_S = 0.05
POLL_S = 0.2
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


class Scheduled:
    """Runs a module at an interval in a child process, one run at a time, with the trainer's own settings.

    Args:
        every_s: Seconds from one start to the next; 0: never.
        on_end: Called with the exit code of a run that ended, and the number of failed runs in a row.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        every_s: float,
        on_end: Callable[[int, int], None],
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._every_s, self._on_end, self._elapsed = every_s, on_end, elapsed
        self._last_s, self._failures = elapsed(), 0
        self._next_s = self._last_s + every_s
        self._child: subprocess.Popen[bytes] | None = None

    def tick(self, hurry: bool = False) -> None:
        """Starts a run that is due, or with `hurry` one after `HURRY_S`; reports the end of one."""
        if self._child is not None:
            code = self._child.poll()
            if code is None:
                return
            self._child, self._failures = None, self._failures + 1 if code else 0
            self._on_end(code, self._failures)
        due_s = min(self._next_s, self._last_s + HURRY_S) if hurry else self._next_s
        if self._every_s and self._elapsed() >= due_s:
            self._last_s = self._elapsed()
            self._next_s = self._last_s + self._every_s
            self._child = subprocess.Popen(self._command)

    def close(self) -> None:
        """Ends a child; its unfinished work does not appear."""
        if self._child is not None:
            self._child.terminate()
            self._child.wait()


def doubt(registry: Registry, version: int) -> None:
    """Reads all parts of `version` while the trainer waits: versions built on a damaged part can never be restored.

    Raises:
        CorruptVersion: A part of it is damaged.
    """
    try:
        base, deltas = registry.chain(version)
        for part in (base, *deltas):
            registry.verify(part)
    except CorruptVersion as error:
        raise CorruptVersion(
            error.what,
            f"{error.do}, or start the trainer again: it sets the damaged one aside and learns what came after from the log",
        ) from error


def recover(registry: Registry, control: Control, lost: TruncatedLog, actor: str, now_ms: int) -> Control:
    """Writes control's next generation, which rewinds to before the loss; durable when this returns.

    A broker that loses power can lose the newest records, and others then get their offsets. Weights that learned the
    lost records are no longer a function of the log. The next epoch starts from the newest version without them.

    Raises:
        TruncatedLog: There is no version to continue from; the error says what to do.
        ControlConflict: Other processes kept changing control.
    """
    kept_end = lost.kept
    if control.log[-1].first > kept_end:
        raise _hopeless(
            lost,
            f"the last exact rollback begins at {control.log[-1].first}, which is gone: repeat it with "
            "`springtide rollback --to V --mode exact --reason TEXT`, and see `springtide history`",
        )
    (gap,) = lost.gaps
    newest = registry.newest_good(control.epoch)
    start = control.base if newest is None else newest
    target = None if start is None else newest_before(registry, registry.manifest(start), gap.source, kept_end)
    if target is None:
        raise _hopeless(
            lost,
            "every kept version learned clicks that the log lost: restore the training log, or learn it from its "
            "beginning: `springtide upgrade --from-scratch --reason TEXT`",
        )
    reason = f"the training log {in_words(lost)}; version {target.version} learned nothing beyond"
    logger.warning("%s: rewinding to version %d, epoch %d", lost.what, target.version, control.epoch + 1)
    return registry.change(
        lambda now: (
            now
            if now.epoch != control.epoch
            else transitions.recover(now, target.version, actor=actor, reason=reason, now_ms=now_ms)
        )
    )


def _hopeless(lost: TruncatedLog, do: str) -> TruncatedLog:
    return TruncatedLog(lost.what, do, lost.gaps)


class Phases:
    """The phase of a trainer's start, as a gauge and in the log: a slow restart shows its cause.

    Attributes:
        loaded: The phase that follows loading modules and compiling kernels.
    """

    def __init__(self, metrics: TrainerMetrics) -> None:
        self._metrics, self._phase = metrics, ""
        self.loaded = BOOTSTRAP
        self._since_s = self._logged_s = time.monotonic()

    def enter(self, phase: str) -> None:
        """Shows the phase, and logs how long the preceding one took; entering the present phase again does nothing."""
        if phase == self._phase:
            return
        now_s = time.monotonic()
        if self._phase:
            logger.info("%s: %.1f s; now %s", self._phase, now_s - self._since_s, phase)
        self._phase, self._since_s, self._logged_s = phase, now_s, now_s
        for name in PHASES:
            self._metrics.phase.labels(name).set(name == phase)

    def wait_for(self, addresses: Sequence[str]) -> Callable[[Sequence[int]], None]:
        """A function that shows which workers are missing."""
        say = SaidOnce(logger.info)

        def report(missing: Sequence[int]) -> None:
            for worker in range(1, len(addresses)):
                self._metrics.worker_missing.labels(str(worker)).set(worker in missing)
            say(waiting(missing, addresses))

        return report

    def follow(self, caught_up: bool, records_left: int | None) -> None:
        """Shows whether the trainer has read the log to its end; until then logs `records_left` every few seconds.

        None means an unknown number of records.
        """
        self.enter(LEARNING if caught_up else CATCHING_UP)
        if not caught_up and time.monotonic() >= self._logged_s + LOG_S:
            self._logged_s = time.monotonic()
            logger.info("catching up, %s records left", "unknown" if records_left is None else f"{records_left:,}")


def await_spec(registry: Registry, digest: str, model: Model, stopping: threading.Event) -> bool:
    """Waits for the bootstrap of feature spec `digest` and logs that; returns False if the process is to stop instead."""
    logged_s = float("-inf")
    while registry.specs.bootstrapped(digest, model) is None:
        if time.monotonic() - logged_s >= LOG_S:
            logged_s = time.monotonic()
            logger.info("waiting for the bootstrap of feature spec %s: `springtide bootstrap`", digest[:12])
        if stopping.wait(POLL_S):
            return False
    return True


def unused_kernels(settings: Settings) -> list[str]:
    """The modules with kernels that a trainer of these settings never calls."""
    engine, private = settings.trainer.engine, settings.privacy.epsilon > 0
    compiled = engine != "tensorflow" and not private and settings.model.ranker == Model().ranker
    unused = [] if compiled else ["trainer.engine.compiled.heads"]
    return unused if settings.churn.days else [*unused, "trainer.churn"]


def _import_model(settings: Settings, kernels: Kernels, phases: Phases, stopping: threading.Event) -> None:
    phases.enter(MODULES)
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    with quiet_stderr():
        importlib.import_module("trainer.learner")
        from trainer.versions.starting import starts_without_graph

        is_light = starts_without_graph(settings, Registry(settings.registry_dir))
        if not is_light:
            phases.enter(TENSORFLOW)
            importlib.import_module("trainer.versions.lowering")
    logger.info(
        "modules loaded in %.1f s, %.1f s of processor time, %s TensorFlow",
        time.monotonic() - began_s,
        time.process_time() - began_cpu_s,
        "without" if is_light else "with",
    )
    phases.enter(KERNELS)
    kernels.prepare(stopping.is_set)


def _check_own(settings: Settings) -> None:
    """Checks a custom ranker or tower; the preprocessing's width is not known yet, and both take any."""
    with quiet_stderr():
        from trainer.model_checks import check_own

        device.prepare(settings.trainer.device, settings.trainer.threads)
        result = check_own(settings, FeatureSpec.from_settings(settings))
    logger.info("%s", result)


def prepare(
    settings: Settings,
    registry: Registry,
    trainer: Trainer,
    metrics: TrainerMetrics,
    surroundings: Surroundings,
    phases: Phases,
) -> Learner:
    """Lowers the trainer's program, and enters control's epoch; learns past clicks first if that is requested."""
    with quiet_stderr():
        from trainer.learner import Learner
        from trainer.publications import ServedModel
        from trainer.versions import checkpoint
        from trainer.versions.starting import program_of

        # 3.
        spec = FeatureSpec.from_settings(settings)
        name = registry.specs.bootstrapped(spec.digest, settings.model) or spec.digest
        upgrade_to_this_release(registry, settings, spec, trainer)
        phases.enter(PROGRAM)
        # The environment does not show changes of custom code.
        version = None if is_own(settings.model) else version_to_go_on_from(registry)
        environment = checkpoint.environment(settings, trainer.device, trainer.engine.name)
        program = program_of(registry, version, spec.digest, environment, trainer)
    logger.info("program %s ready on %s", program[:12], trainer.device)
    device.show(trainer.device, metrics)
    # 4.
    control = registry.control()
    if control is None:
        control = registry.propose(start(actor=f"trainer:{getpass.getuser()}", reason="first start", now_ms=wall_ms()))

    model = ServedModel(program, spec.digest, registry.specs.spec(name), environment)
    learner = Learner(settings, registry, trainer, Log(settings.kafka), model, metrics, surroundings)
    # 5.
    phases.enter(VERSION)
    enter(learner, registry, control)
    return learner


def upgrade_to_this_release(registry: Registry, settings: Settings, spec: FeatureSpec, trainer: Trainer) -> None:
    """Begins an epoch automatically if only this release's own code keeps the newest version from being loaded."""
    from trainer.upgrade import planned_for, propose
    from trainer.versions.carrying import is_of_release, require_ranker_fits

    try:
        require_ranker_fits(registry, settings, spec, trainer.model)
    except ModelMismatch as other:
        version = version_to_go_on_from(registry)
        if version is None or not is_of_release(registry, settings, spec):
            raise
        planned = planned_for(registry, version, trainer)
        decision = transitions.Decision(
            actor=f"trainer:{getpass.getuser()}",
            reason=f"this release has another model than version {version.version}",
            now_ms=wall_ms(),
        )
        propose(registry, settings, version, planned.document(), **decision)
        logger.warning("%s; this release continues from it: %s", other.what, "; ".join(planned.lines()))


def enter(learner: Learner, registry: Registry, control: Control) -> None:
    """Enters control's epoch. If the log was truncated to before its version, a new epoch rewinds to the remaining log."""
    while True:
        try:
            learner.enter(control)
            return
        except TruncatedLog as lost:
            # Each round tries an older version, because the log may end before that version too.
            who = f"trainer:{getpass.getuser()}"
            control = recover(registry, control, lost, who, wall_ms())


def _join(
    imports: threading.Thread, settings: Settings, addresses: Sequence[str], joined: list[Group], phases: Phases
) -> None:
    """Joins the other workers into `joined`. It precedes any TensorFlow operation, such as a custom model's check."""
    imports.join()
    phases.enter(WORKERS)
    with quiet_stderr():
        from trainer.group import Group, await_others

        device.prepare(settings.trainer.device, settings.trainer.threads)
    await_others(addresses, 0, phases.wait_for(addresses))
    with quiet_stderr():
        joined.append(Group(addresses, 0))
    logger.info("%d workers have joined", len(addresses))
    phases.enter(phases.loaded)


def _await(imports: threading.Thread, children: Sequence[subprocess.Popen[bytes]], stopping: threading.Event) -> None:
    while imports.is_alive() and not stopping.is_set():
        imports.join(POLL_S)
        for index, child in enumerate(children, 1):
            if (code := child.poll()) is not None:
                raise ProcessFailed(f"worker {index} of the trainer ended with exit code {code}", "see its lines above")


def _sweep(registry: Registry) -> None:
    for name in registry.directory.sweep():
        logger.info("swept %s, left by a writer that was killed", name)
    if swept := registry.sweep_recent():
        logger.info("removed %d versions that were not kept; their clicks are learned again from the log", swept)


def run(settings: Settings, arguments: Sequence[str], stopping: threading.Event, consent: Consent = NO_CONSENT) -> None:
    """Runs the trainer until `stopping` is set."""
    collected = CollectorRegistry()
    metrics = TrainerMetrics(collected)
    phases = Phases(metrics)
    room = Room(REGISTRY, offer(collected, settings, [REGISTRY]), stopping.wait)
    kernels = Kernels(collected, logger, unused_kernels(settings), [LOG_KERNELS])

    @functools.cache
    def model(group: Group | None) -> Trainer:
        # Not at the top: TensorFlow reads its log level when it is loaded, and `main` sets it before.
        with quiet_stderr():
            from trainer.versions.starting import bootstrapped_trainer

            return bootstrapped_trainer(settings, Registry(settings.registry_dir).specs, group)

    def load() -> None:
        _import_model(settings, kernels, phases, stopping)
        specs, spec = Registry(settings.registry_dir).specs, FeatureSpec.from_settings(settings)
        alone = settings.trainer.workers == 1 and not is_own(settings.model)
        if phases.loaded == STANDBY and alone and specs.bootstrapped(spec.digest, settings.model):
            # A standby builds the model before it has the claim. It reports errors when it takes over, because the other
            # trainer's model may change until then.
            phases.enter(MODEL)
            with suppress(SpringtideError):
                model(None)
        phases.enter(phases.loaded)

    imports = threading.Thread(target=load, name="imports", daemon=True)
    serve(collected, settings.trainer.metrics_port, settings.metrics.host)

    def stand_by(holder: str) -> None:
        logger.info(
            "standing by: %s; this trainer takes over when that one ends, or is silent for %g s", holder, LEASE_S
        )
        metrics.standby.set(1)
        phases.loaded = STANDBY
        if imports.ident is None:
            imports.start()

    # 1.
    with (
        claiming(settings.registry_dir, stopping, stand_by) as claim,
        owning(settings, collected, stopping, claim, stand_by) as ownership,
        ExitStack() as others,
    ):
        metrics.standby.set(0)
        phases.loaded = BOOTSTRAP
        if imports.ident is not None:
            logger.warning("this trainer takes over")
            if not imports.is_alive():
                phases.enter(BOOTSTRAP)
        registry = Registry(settings.registry_dir, claim)
        # Check this before the imports: some settings alone show that the newest version cannot be loaded.
        require_same_model(settings)
        _sweep(registry)
        if ownership.took_over and registry.control() is not None:
            who, reason = f"trainer:{getpass.getuser()}", "the former trainer did not renew its claim"
            registry.change(lambda now: transitions.take_over(now, actor=who, reason=reason, now_ms=wall_ms()))
        # 2. Imports and the kernels take seconds: they overlap with the bootstrap.
        if imports.ident is None:
            imports.start()
        children: Sequence[subprocess.Popen[bytes]] = ()
        joined: list[Group] = []
        ready = imports
        if settings.trainer.workers > 1:
            addresses, children = others.enter_context(workers_of(settings))
            arguments_of_join = (imports, settings, addresses, joined, phases)
            ready = threading.Thread(target=_join, args=arguments_of_join, name="workers", daemon=True)
            ready.start()
        if is_own(settings.model):
            # Check this before waiting for clicks, so that a model that does not lower is refused at once.
            _await(ready, children, stopping)
            _check_own(settings)
        if not await_spec(registry, FeatureSpec.from_settings(settings).digest, settings.model, stopping):
            return
        _await(ready, children, stopping)
        if stopping.is_set():
            return
        group = joined[0] if joined else None
        if settings.trainer.workers > 1 and group is None:
            raise WorkerLost("the other workers could not be joined", "see the lines above")
        if group is not None:
            restore_handlers()
            begin(group, settings)
        phases.enter(MODEL)
        with quiet_stderr():
            from trainer.beginning import beginning_of
            from trainer.learner import Surroundings
        surroundings = Surroundings(consent, room, beginning_of(registry, arguments, stopping))
        learner = prepare(settings, registry, model(group), metrics, surroundings, phases)

        def compacted(code: int, failures: int) -> None:
            metrics.compactor_failures.set(failures)
            if code:
                logger.error(
                    "the compactor failed with exit code %d; versions use more disk space until one succeeds", code
                )
                doubt(registry, learner.place.durable)

        def exported(code: int, failures: int) -> None:
            if code:
                logger.error("an export failed with exit code %d; the next one starts at its usual time", code)

        compaction = Scheduled("trainer.compactor", arguments, settings.trainer.base_every_s, compacted)
        exports = Scheduled("trainer.exporting.command", arguments, settings.export.every_s, exported)
        lag = TrainingLag(settings.kafka, lambda: Taken(learner.place.next, learner.taken_ms), metrics)
        lag.start()
        holes = Holes()
        freeze_objects()
        # 6.
        try:
            while not stopping.is_set():
                claim.check()
                ownership.check()
                learner.tick(WAIT_S, stopping.is_set)
                phases.follow(learner.caught_up, lag.records)
                compaction.tick(hurry=room.waits)
                exports.tick()
                holes.tick()
            learner.close()
        except UnusableRegistry as error:
            if not (stopping.is_set() and is_full(error)):
                raise
            logger.warning(
                "the clicks after version %d are learned again from the log: %s", learner.place.parent, error
            )
        finally:
            lag.close()
            compaction.close()
            exports.close()
        logger.info("stopped at version %d, offset %d", learner.place.parent, learner.place.next)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the trainer; returns the exit code."""
    quiet_tensorflow(os.environ)
    stopping = stop_on_signals()

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        consent, flags = take_options(words, actor(), records=True)
        settings = load(flags, os.environ)
        return settings, lambda: run(settings, flags, stopping, consent)

    return run_process("trainer", start, argv, logger, own_stderr())


if __name__ == "__main__":
    sys.exit(main())

"""The trainer's process: `python -m trainer.loop [--section.name VALUE ...]`.

1. Takes the registry's trainer lock; a second trainer ends here.
2. Checks a tower of the user's own, then waits until the bootstrap has
   analysed the feature spec of the settings.
3. Builds the trainer and lowers its program, checked against the model. Where the newest version fits this release's
   model no longer, an epoch begins that goes on from what fits; where the settings are others, that is refused.
4. Creates control generation 1 where there is no control.
5. Enters control's epoch: its newest version, else its base, else nothing, or the past clicks that a trial is to learn
   first. Where the training log was cut back behind that, it goes back to the newest version that the log still leads to (`trainer/recovery.py`).
6. Reads, steps, publishes and converges to control until SIGTERM or SIGINT;
   then publishes what is left and ends with 0.

Where records of the training log, or clicks before it, are gone, it ends and
says which; with `--accept-gap P:A-B --reason TEXT` it counts them and goes on. Where
a record cannot be learned from, `--skip-record OFFSET --reason TEXT` leaves it
out likewise, here and in every replay.

A compactor runs beside it now and then, as a child, and so does an export where `export.every_s` asks for it. Everything else that ends
the process is one line on the standard error and exit code 1 (2 for a wrong
setting); started again, it goes on from the newest version.
"""

from __future__ import annotations

import getpass
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from state import layout
from state.compiled.preparing import Kernels
from state.config.loading import load
from state.config.sections import Model
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import ModelMismatch, TruncatedLog, UnusableRegistry
from state.features.spec import FeatureSpec
from state.log import KERNELS as LOG_KERNELS
from state.log import Reader
from state.log.gap_options import take_options
from state.log.gaps import Consent
from state.metrics import TrainerMetrics, serve
from state.process import log_lines
from state.process.actor import actor
from state.process.ending import reported, stop_on_signals
from state.process.garbage import Holes, keep_what_is_there
from state.process.private_files import keep_private
from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow
from state.process.wall_clock import wall_ms
from state.registry.control import Control, start
from state.registry.model_fit import require_same_model, version_to_go_on_from
from state.registry.registry import Registry
from state.registry.sharing.running import owning
from state.storage.measuring import offer
from state.storage.shares import REGISTRY
from state.storage.waiting import Room, is_full
from trainer.checks import check_own, is_own
from trainer.compaction import Compaction, doubt
from trainer.exporting.schedule import ScheduledExports
from trainer.lag import Taken, TrainingLag
from trainer.phases import BOOTSTRAP, IMPORTS, KERNELS, MODEL, PROGRAM, VERSION, Phases
from trainer.recovery import recover

if TYPE_CHECKING:
    from trainer.engine.step import Trainer
    from trainer.learner import Learner

WAIT_S = 0.02
PROGRESS_S = 5.0
LOOK_S = 0.2
NO_CONSENT = Consent()
logger = logging.getLogger(__name__)


def await_spec(registry: Registry, digest: str, model: Model, stopping: threading.Event) -> bool:
    """Waits for the bootstrap of feature spec `digest`, saying so; False where the process is to stop instead."""
    said = float("-inf")
    while registry.bootstrapped(digest, model) is None:
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            logger.info("waiting for the bootstrap of feature spec %s: `springtide bootstrap`", digest[:12])
        if stopping.wait(LOOK_S):
            return False
    return True


def unused_kernels(settings: Settings) -> list[str]:
    """The modules with kernels that a trainer of these settings never calls."""
    engine, private = settings.trainer.engine, settings.privacy.epsilon > 0
    compiled = engine != "tensorflow" and not private and settings.model.ranker == Model().ranker
    unused = [] if compiled else ["trainer.engine.compiled.heads"]
    return unused if settings.churn.days else [*unused, "trainer.churn.regression"]


def _import_model(kernels: Kernels, phases: Phases, stopping: threading.Event) -> None:
    """Imports TensorFlow and the model, and prepares the kernels of the engine."""
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    with quiet_stderr():
        importlib.import_module("trainer.learner")
        importlib.import_module("trainer.versions.program")
        importlib.import_module("trainer.engine.making")
    logger.info(
        "TensorFlow loaded in %.1f s, %.1f s of processor time",
        time.monotonic() - begun_s,
        time.process_time() - begun_cpu_s,
    )
    phases.enter(KERNELS)
    kernels.prepare(stopping.is_set)
    phases.enter(BOOTSTRAP)


def _check_own(settings: Settings) -> None:
    """Checks a ranker or tower of the user's own; the preprocessing's width is not known yet, and both take any.

    Raises:
        ProgramError: It is not what it has to be.
    """
    with quiet_stderr():
        from trainer import device

        device.prepare(settings.trainer.device, settings.trainer.threads)
        said = check_own(settings, FeatureSpec.from_settings(settings))
    logger.info("%s", said)


def prepare(
    settings: Settings,
    registry: Registry,
    metrics: TrainerMetrics,
    consent: Consent,
    room: Room,
    arguments: Sequence[str],
    stopping: threading.Event,
    phases: Phases,
) -> Learner:
    """Builds the trainer and its program, and enters control's epoch; where it is to begin with past clicks, learns them.

    Raises:
        ModelMismatch: The newest version was trained with another model.
        ProgramError: The model does not lower, or the program answers otherwise.
        SpringtideError: The registry or the training log cannot be used.
    """
    phases.enter(MODEL)
    # Not at the top: TensorFlow reads its log level when it is loaded, and `main` sets it before.
    with quiet_stderr():
        from trainer import device
        from trainer.beginning import beginning_of
        from trainer.engine.making import trainer_of
        from trainer.learner import Learner
        from trainer.versions.program import build, preprocessing_of

        # Threads are fixed before the first operation, which loading the graph is.
        device.prepare(settings.trainer.device, settings.trainer.threads)
        spec = FeatureSpec.from_settings(settings)
        name = registry.bootstrapped(spec.digest, settings.model) or spec.digest
        # 3.
        trainer = trainer_of(settings, spec, preprocessing_of(registry.transform(name)))
        go_on_in_this_release(registry, settings, spec, trainer)
        phases.enter(PROGRAM)
        program = registry.add_program(build(trainer.model))
    logger.info("program %s ready on %s", program[:12], trainer.device)
    device.show(trainer.device, metrics)
    # 4.
    control = registry.control()
    if control is None:
        control = registry.propose(start(actor=f"trainer:{getpass.getuser()}", reason="first start", now_ms=wall_ms()))

    def open_log(offset: int | None, leader: int = -1) -> Reader:
        partition = settings.trainer.partition
        positions = {} if offset is None else {partition: offset}
        topic = settings.kafka.microbatches_topic
        return Reader(settings.kafka, topic, [partition], positions, leaders={partition: leader} if positions else {})

    about, begins = registry.spec(name), beginning_of(registry, arguments, stopping)
    learner = Learner(
        *(settings, registry, trainer, open_log, program, spec.digest, about, metrics),
        consent=consent,
        room=room,
        begins=begins,
    )
    # 5.
    phases.enter(VERSION)
    enter(learner, registry, control)
    return learner


def go_on_in_this_release(registry: Registry, settings: Settings, spec: FeatureSpec, trainer: Trainer) -> None:
    """Begins an epoch by itself where only this release's own code keeps the newest version from being loaded.

    Raises:
        ModelMismatch: It is the settings, or code of the user's own, and nobody asked for an upgrade.
        SpringtideError: The registry cannot be used.
    """
    from trainer.upgrade import planned_for, propose
    from trainer.versions.fit import is_of_release, require_ranker_fits

    try:
        require_ranker_fits(registry, settings, spec, trainer.model)
    except ModelMismatch as other:
        version = version_to_go_on_from(registry)
        if version is None or not is_of_release(registry, settings, spec):
            raise
        planned = planned_for(registry, version, trainer)
        who, now_ms = f"trainer:{getpass.getuser()}", wall_ms()
        reason = f"this release has another model than version {version.version}"
        propose(registry, settings, spec, version, planned.document(), who, reason, now_ms)
        logger.warning("%s; this release goes on from it: %s", other.what, "; ".join(planned.lines()))


def enter(learner: Learner, registry: Registry, control: Control) -> None:
    """Enters control's epoch; where the log was cut back behind its version, one that goes back as far as that.

    Raises:
        TruncatedLog: No version can be learned on from.
        SpringtideError: See `Learner.enter`.
    """
    while True:
        try:
            learner.enter(control)
            return
        except TruncatedLog as lost:
            # Each time an older version: that one's end of the log may be gone too.
            who = f"trainer:{getpass.getuser()}"
            control = recover(registry, control, lost, who, wall_ms())


def _sweep(registry: Registry) -> None:
    for name in registry.sweep():
        logger.info("swept %s, left by a writer that died", name)
    if swept := registry.sweep_recent():
        logger.info("swept %d versions that were not kept: what they learned is learned again from the log", swept)


def run(settings: Settings, arguments: Sequence[str], stopping: threading.Event, consent: Consent = NO_CONSENT) -> None:
    """Runs the trainer until `stopping` is set.

    Raises:
        LockHeld: Another trainer uses this registry.
        SpringtideError: See `prepare` and `Learner.tick`.
    """
    collected = CollectorRegistry()
    metrics = TrainerMetrics(collected)
    room = Room(REGISTRY, offer(collected, settings, [REGISTRY]), stopping.wait)
    # 1.
    with DirectoryLock(settings.registry_dir, layout.TRAINER_LOCK), owning(settings, collected, stopping) as ownership:
        registry = Registry(settings.registry_dir)
        # Before TensorFlow: some settings alone tell that the newest version cannot be loaded.
        require_same_model(settings)
        _sweep(registry)
        kernels, phases = Kernels(collected, logger, unused_kernels(settings), [LOG_KERNELS]), Phases(metrics)
        serve(collected, settings.trainer.metrics_port, settings.metrics.host)
        # 2. TensorFlow's import and the kernels take seconds: they overlap with the bootstrap.
        phases.enter(IMPORTS)
        imports = threading.Thread(target=_import_model, args=(kernels, phases, stopping), name="imports", daemon=True)
        imports.start()
        if is_own(settings.model):
            # Before the wait for clicks: what cannot be lowered is refused at once.
            imports.join()
            _check_own(settings)
        if not await_spec(registry, FeatureSpec.from_settings(settings).digest, settings.model, stopping):
            return
        while imports.is_alive() and not stopping.is_set():
            imports.join(LOOK_S)
        if stopping.is_set():
            return
        learner = prepare(settings, registry, metrics, consent, room, arguments, stopping, phases)
        compaction = Compaction(
            arguments, settings.trainer.base_every_s, lambda: doubt(registry, learner.place.durable), metrics
        )
        exports = ScheduledExports(arguments, settings.export.every_s)
        lag = TrainingLag(
            settings.kafka, settings.trainer.partition, lambda: Taken(learner.place.next, learner.taken_ms), metrics
        )
        lag.start()
        holes = Holes()
        keep_what_is_there()
        # 6.
        try:
            while not stopping.is_set():
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
                "what was learned after version %d is learned again from the log: %s", learner.place.parent, error
            )
        finally:
            lag.close()
            compaction.close()
            exports.close()
        logger.info("stopped at version %d, offset %d", learner.place.parent, learner.place.next)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the trainer; returns the exit code."""
    keep_private()
    log_lines.begin("trainer", own_stderr())
    quiet_tensorflow(os.environ)
    stopping = stop_on_signals()

    def work() -> None:
        consent, flags = take_options(sys.argv[1:] if argv is None else argv, actor(), records=True)
        settings = load(flags, os.environ)
        log_lines.follow(settings.logs)
        run(settings, flags, stopping, consent)

    return reported(work, logger)


if __name__ == "__main__":
    sys.exit(main())

"""The processes of the loop on one machine: their commands, ports and the order of their ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from deploy.children.supervisor import ProcessPlan
from deploy.rollouts.process_plan import TRIAL_HOST
from deploy.startup import prometheus
from deploy.startup.checks import Port
from deploy.trials.process_plan import RETRAIN, TRIALS
from deploy.watch import scrape
from state.config.settings import Settings
from state.errors import CorruptStore

SHOPPERS = "shoppers"
STREAM = "stream"
BOOTSTRAP = "bootstrap"
REBUILD = "rebuild-history"
TRAINER = "trainer"
APPLIER = "applier"
WORKER = "worker"
CONSOLE = "console"
PROBE = "probe"
VALIDATION = "validation"
SEGMENTS = "segments"

# What the local Kafka acknowledged in its last second may be gone after a power cut; nobody has it then.
OF_LOCAL_KAFKA = ("--accept-cut-back", "--reason", "the local Kafka lost what was not on disk")

# Each is stopped before what it writes to, Kafka after all of them: nothing is cut in two.
STOP_ORDER = (
    CONSOLE,
    PROBE,
    SHOPPERS,
    BOOTSTRAP,
    REBUILD,
    STREAM,
    RETRAIN,
    TRIALS,
    TRAINER,
    VALIDATION,
    SEGMENTS,
    APPLIER,
    WORKER,
    TRIAL_HOST,
    prometheus.NAME,
)

# These need no Kafka: they answer from what an earlier run left on this machine, and prepare their kernels.
ANSWERING = (APPLIER, WORKER, TRIAL_HOST)

# Histories in memory, a gigabyte or so, are saved on a slow disk.
SAVING_S = 60.0


def process_plans(
    head_start: int = 0,
    python: str = sys.executable,
    accepted: Sequence[str] = (),
    accepted_by_trainer: Sequence[str] = (),
) -> dict[str, ProcessPlan]:
    """All processes by name; settings reach them by the environment.

    Args:
        head_start: Clicks that the shoppers send at once.
        python: The interpreter.
        accepted: Words for the stream: gaps that the operator accepts.
        accepted_by_trainer: Words for the trainer: gaps and bad records that the operator accepts.

    >>> process_plans(python="python")["stream"].command
    ('python', '-m', 'streaming.pipeline')
    """

    def plan(name: str, module: str, *arguments: str, stop_s: float = 10.0, lasting: bool = True) -> ProcessPlan:
        return ProcessPlan(name, (python, "-m", module, *arguments), stop_s, lasting)

    # It builds aside: cut short it leaves the old store, and begins again.
    rebuild = plan(REBUILD, "streaming.rebuild", stop_s=1.0, lasting=False)
    listed = (
        plan(SHOPPERS, "deploy.replay", "--synthetic", "--head-start", str(head_start), stop_s=3.0),
        replace(
            plan(STREAM, "streaming.pipeline", *accepted, stop_s=SAVING_S), remedies={CorruptStore.__name__: rebuild}
        ),
        rebuild,
        # Its work is repeated from the start at the next run: there is nothing to wait for.
        plan(BOOTSTRAP, "streaming.bootstrap", "--of-up", stop_s=1.0, lasting=False),
        plan(TRAINER, "trainer.loop", *accepted_by_trainer),
        plan(VALIDATION, "deploy.validation.process"),
        plan(SEGMENTS, "deploy.segments.process"),
        plan(APPLIER, "deploy.serving.applier", stop_s=SAVING_S),
        # With serving.workers above 1 it is the parent of them all.
        plan(WORKER, "deploy.serving.rest", stop_s=15.0),
        plan(CONSOLE, "deploy.console.server", stop_s=15.0),
        plan(PROBE, "deploy.probe", "--continuously", stop_s=3.0),
    )
    return {one.name: one for one in listed}


def left_out(settings: Settings) -> set[str]:
    """The processes that the settings ask to do without.

    >>> sorted(left_out(Settings()))
    ['probe', 'segments']
    """
    return {PROBE, SEGMENTS, VALIDATION} - scrape.urls_beside(settings).keys()


def ports(settings: Settings, local_kafka: bool, watched: bool = False) -> list[Port]:
    """The ports that the loop is going to listen on.

    >>> [port.setting for port in ports(Settings(), local_kafka=True)][:2]
    ['kafka.port', 'serving.port']
    """
    local, idle = "127.0.0.1", left_out(settings)
    offered = settings.metrics.host
    kafka = [Port("kafka.port", local, settings.kafka.port)] if local_kafka else []
    return [
        *kafka,
        Port("serving.port", settings.serving.host, settings.serving.port),
        *(
            [Port("serving.grpc_port", settings.serving.host, settings.serving.grpc_port)]
            if settings.serving.grpc_port
            else []
        ),
        Port("stream.metrics_port", offered, settings.stream.metrics_port),
        Port("trainer.metrics_port", offered, settings.trainer.metrics_port),
        Port("serving.metrics_port", offered, settings.serving.metrics_port),
        *(
            [Port("validation.metrics_port", offered, settings.validation.metrics_port)]
            if VALIDATION not in idle
            else []
        ),
        *([Port("segments.metrics_port", offered, settings.segments.metrics_port)] if SEGMENTS not in idle else []),
        *([Port("up.metrics_port", offered, settings.up.metrics_port)] if settings.up.metrics_port else []),
        *([Port("console.port", settings.console.host, settings.console.port)] if settings.console.port else []),
        *([Port("probe.metrics_port", offered, settings.probe.metrics_port)] if PROBE not in idle else []),
        *([Port("up.prometheus_port", local, settings.up.prometheus_port)] if watched else []),
    ]

"""Runs the steps of `springtide up`, from the first check to the last stop: processes, local Kafka and topics."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from prometheus_client import CollectorRegistry

from deploy.experiments.processes import EXPERIMENTS, RETRAIN, ROLLOUT_HOST
from deploy.experiments.status import ExperimentCollector
from deploy.local_kafka import Broker
from deploy.startup import hints, model_checks, prometheus
from deploy.startup.checks import LEAST_FREE_BYTES, require_directory, require_disk
from deploy.supervisor import HEALTHY_S, Backoff, ProcessPlan, Supervisor, shortened
from deploy.watch import scrape
from deploy.watch.figures import starting
from deploy.watch.panel import Screen, live_line, panel
from deploy.watch.scrape import serving_address
from deploy.watch.snapshot import Poller
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import CorruptStore, KafkaFailed, PortTaken
from state.events.identity import own_salt
from state.log import Topics, topic_plan
from state.metrics import StorageMetrics, SupervisorMetrics, serve
from state.process.network import Port, require_ports
from state.process.part import Signals
from state.registry.model_fit import require_same_salt
from state.registry.registry import Registry
from state.storage import KAFKA, LOGS, Room, is_full, offer

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

# A power cut may lose records that the local Kafka acknowledged in its last second, because there is no replica.
OF_LOCAL_KAFKA = ("--accept-cut-back", "--reason", "the local Kafka lost records that were not on disk")

# Each process stops before the ones it writes to, and Kafka stops last: no write is interrupted.
STOP_ORDER = (
    CONSOLE,
    PROBE,
    SHOPPERS,
    BOOTSTRAP,
    REBUILD,
    STREAM,
    RETRAIN,
    EXPERIMENTS,
    TRAINER,
    VALIDATION,
    SEGMENTS,
    APPLIER,
    WORKER,
    ROLLOUT_HOST,
    prometheus.NAME,
)

# These need no Kafka: they answer from an earlier run's data on this machine, and prepare their kernels.
ANSWERING = (APPLIER, WORKER, ROLLOUT_HOST)

# Time to save histories in memory, about a gigabyte, to a slow disk.
SAVING_S = 60.0
NAME, WHAT = "kafka", "Kafka"  # the local broker, as a process and in messages
ROOM_S = 1.0
PATIENCE_S = 0.5
"""Timeout of a request to a process; one that compiles may answer late."""
STEPS = 9
POLL_S = 0.1
REMIND_S = 30.0
PROGRESS_S = 5.0
Found = TypeVar("Found")


def process_plans(
    head_start: int = 0,
    python: str = sys.executable,
    accepted: Sequence[str] = (),
    accepted_by_trainer: Sequence[str] = (),
) -> dict[str, ProcessPlan]:
    """Returns all processes by name; settings reach them by the environment.

    Args:
        head_start: Clicks that the shoppers send at once.
        python: The interpreter.
        accepted: Arguments of the stream: gaps that the operator accepts.
        accepted_by_trainer: Arguments of the trainer: gaps and bad records that the operator accepts.

    >>> process_plans(python="python")["stream"].command
    ('python', '-m', 'streaming.pipeline')
    """

    def plan(name: str, module: str, *arguments: str, stop_s: float = 10.0, lasting: bool = True) -> ProcessPlan:
        return ProcessPlan(name, (python, "-m", module, *arguments), stop_s, lasting)

    # It builds a new store next to the old one. If interrupted, it keeps the old store and starts again.
    rebuild = plan(REBUILD, "streaming.rebuild", stop_s=1.0, lasting=False)
    plans = (
        plan(SHOPPERS, "deploy.replay", "--synthetic", "--head-start", str(head_start), stop_s=3.0),
        replace(
            plan(STREAM, "streaming.pipeline", *accepted, stop_s=SAVING_S), remedies={CorruptStore.__name__: rebuild}
        ),
        rebuild,
        # The next run repeats its work from the start, so there is no need to wait for it.
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
    return {plan.name: plan for plan in plans}


def left_out(settings: Settings) -> set[str]:
    """Returns the processes that the settings disable.

    >>> sorted(left_out(Settings()))
    ['probe', 'segments']
    """
    return {PROBE, SEGMENTS, VALIDATION} - scrape.targets(settings).keys()


def ports(settings: Settings, local_kafka: bool, watched: bool = False) -> list[Port]:
    """Returns the ports that the loop will listen on.

    >>> [port.setting for port in ports(Settings(), local_kafka=True)][:2]
    ['kafka.port', 'serving.port']
    """
    local, unwanted, metrics = "127.0.0.1", left_out(settings), settings.metrics.host
    serving, console = settings.serving, settings.console
    ports = (
        ("kafka.port", local, local_kafka),
        ("serving.port", serving.host, True),
        ("serving.grpc_port", serving.host, serving.grpc_port > 0),
        ("stream.metrics_port", metrics, True),
        ("trainer.metrics_port", metrics, True),
        ("serving.metrics_port", metrics, True),
        ("up.metrics_port", metrics, True),
        ("console.port", console.host, console.port > 0),
        ("up.prometheus_port", local, watched),
    )
    up = settings.up
    next_to_up = ((PROBE, up.probe_port), (VALIDATION, up.validation_port), (SEGMENTS, up.segments_port))
    return [
        *(Port(name, host, settings.value(name)) for name, host, wanted in ports if wanted),
        *(Port("up.metrics_port", metrics, port) for name, port in next_to_up if name not in unwanted),
    ]


class LocalKafka:
    """A broker that is restarted when it dies.

    A broker whose disk is full ends. It is restarted when there is free space; this wait does not count as a death.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        metrics: SupervisorMetrics,
        clock: Callable[[], float],
        storage: StorageMetrics,
    ) -> None:
        self._broker = Broker(settings.kafka_dir, settings.kafka.port, retention_h=settings.kafka.retention_h)
        self._say = say
        self._metrics = metrics
        self._clock = clock
        # `wait_for` need not wait, because `poll` is called again anyway.
        self._room = Room(KAFKA, storage, lambda _: True, lambda form, *words: say(form % words))
        self._started_at: float | None = None
        self._start_at: float | None = None
        self._came_up = False
        self._backoff = Backoff()

    @property
    def started(self) -> bool:
        """Whether a start was tried."""
        return self._started_at is not None

    def begin(self) -> None:
        """Starts it without waiting until it accepts requests.

        Raises:
            PortTaken: Another process listens on its port.
            KafkaFailed: It cannot run.
        """
        self._started_at, self._start_at = self._clock(), None
        self._metrics.starts.labels(NAME).inc()
        self._broker.begin()

    def is_up(self) -> bool:
        """Whether it accepts requests.

        Raises:
            KafkaFailed: It ended, or takes too long; the message quotes its last log lines.
        """
        self._came_up = self._broker.is_up()
        return self._came_up

    def poll(self) -> None:
        """Notices its death and restarts it once that is due; failures are reported."""
        if self._start_at is None:
            # `is_up` reports the end of a broker that never accepted requests.
            failure = self._broker.failure() if self._came_up else None
            if failure is not None:
                self._bury(failure)
            elif self._backoff.deaths and self._lived_s() >= HEALTHY_S:
                self._backoff = Backoff()
                self._metrics.deaths_in_a_row.labels(NAME).set(0)
        elif self._clock() >= self._start_at:
            try:
                self._broker.require_disk()
                self._room.found(WHAT)
                self.begin()
                self._broker.wait_until_up()
            except (KafkaFailed, PortTaken) as failure:
                if is_full(failure):
                    self._room.refused(failure, WHAT)
                    self._start_at = self._clock() + ROOM_S
                else:
                    self._bury(failure)

    def _bury(self, failure: KafkaFailed | PortTaken) -> None:
        self._backoff = self._backoff.after(self._lived_s())
        self._start_at = self._clock() + self._backoff.wait_s
        self._metrics.deaths.labels(NAME).inc()
        self._metrics.deaths_in_a_row.labels(NAME).set(self._backoff.deaths)
        self._say(f"{shortened(str(failure))}; {self._backoff.as_text()}")

    def _lived_s(self) -> float:
        return self._clock() - (self._started_at or 0.0)

    def stop(self, timeout_s: float) -> None:
        """Ends it, by force after `timeout_s`."""
        self._broker.stop(timeout_s)


def _trained_version(settings: Settings) -> int:
    return int(scrape.scrape_one(settings, TRAINER).value("springtide_trainer_version") or 0)


def _preparing(settings: Settings, running: Collection[str]) -> str:
    """Describes the phase of running processes that do not work yet; empty if all of them work."""
    urls = scrape.targets(settings)
    scrapes = scrape.scrape(
        {name: url for name, url in urls.items() if name in running}, lambda url: scrape.fetch(url, PATIENCE_S)
    )
    return ", ".join(f"{name} {text}" for name, text in starting(scrapes).items())


def _answered_version(settings: Settings) -> int:
    """Returns the version of an answer requested just now; 0 if a worker gives none or is not ready."""
    if scrape.fetch(serving_address(settings, "/readyz"))[0] != 200:
        return 0
    status, answer = scrape.fetch(scrape.profile_url(settings))
    return int(json.loads(answer)["version"]["number"]) if status == 200 else 0


def _ensure_topics(settings: Settings, say: Callable[[str], None], local: bool = False) -> str:
    """Creates missing topics and reports which topics the loss of one broker would harm; returns the topics as text."""
    kafka = settings.kafka
    wanted = [topic_plan.clicks(settings), topic_plan.dead_letters(settings), topic_plan.microbatches(settings)]
    with Topics(kafka) as topics:
        if settings.segments.expressions:
            wanted.append(topic_plan.segments(settings))
        for topic in [*wanted, *topic_plan.attributes(settings)]:
            topics.ensure(*topic)
            # The loop's own Kafka has only one broker, so there is nothing to check.
            if not local and (weakness := topics.copies(topic.name).weakness()):
                say(f"topic {topic.name}: {weakness}")
        for name, config in topic_plan.bounds(settings).items() if local else ():
            topics.bound(name, config)
        partitions = topics.describe(kafka.clicks_topic).partitions
    return f"{kafka.clicks_topic} ({partitions} partitions), {kafka.dead_letters_topic}, {kafka.microbatches_topic}"


class Stopped(Exception):
    """The operator asked to stop while a step waited."""


class Startup:
    """One run of the loop.

    Args:
        shoppers: Whether synthetic shoppers click.
        signals: Whether the operator asked to stop, once or again.
        accepted: Arguments of stream and trainer: losses that the operator accepts.
        others: Other processes to run, such as a Prometheus.
    """

    def __init__(
        self,
        settings: Settings,
        shoppers: bool,
        screen: Screen,
        signals: Signals,
        accepted: tuple[Sequence[str], Sequence[str]],
        others: Sequence[ProcessPlan],
    ) -> None:
        self._settings, self._shoppers, self._screen = settings, shoppers, screen
        self._signals = signals
        self._begin = time.monotonic()
        local = "kafka.bootstrap_servers" not in settings.origins
        self._collected = CollectorRegistry()
        self._metrics = SupervisorMetrics(self._collected)
        self._collected.register(ExperimentCollector(settings))
        storage = offer(self._collected, settings, [LOGS, KAFKA] if local else [LOGS])
        self._kafka = LocalKafka(settings, screen.say, self._metrics, time.monotonic, storage) if local else None
        # The first bootstrap waits for clicks. Shoppers with a head start shorten this wait.
        fresh, (stream, trainer) = not model_checks.has_spec(settings.registry_dir), accepted
        self._plans = process_plans(
            settings.bootstrap.min_rows if fresh else 0,
            accepted=[*(OF_LOCAL_KAFKA if local else ()), *stream],
            accepted_by_trainer=trainer,
        ) | {other.name: other for other in others}
        self._supervisor: Supervisor | None = None
        self._steps_done = self._answered = 0

    def run(self) -> int:
        """Starts the loop, watches it, and stops it when asked to; returns the exit code.

        Raises:
            SpringtideError: A step failed, or a process was used wrongly; everything is stopped then. Once the whole loop
                ran, only the operator ends it.
        """
        state = self._settings.state_dir
        require_disk(state, LEAST_FREE_BYTES)
        require_directory(state)
        with DirectoryLock(state):
            try:
                self._go_up()
                self._watch()
            except Stopped:
                pass
            finally:
                self._come_down()
        return 0

    def _go_up(self) -> None:
        settings = self._settings
        # 1. and 2. Nothing runs before what can be refused is refused.
        self._check()
        # 3. and 4. A Kafka of the user's is only contacted. The local one takes seconds to start. Parts that need no Kafka
        # start before it: serving answers from an earlier run's data. In a fresh state directory the first answers wait
        # for Kafka and the bootstrap, so these come first. The trainer imports TensorFlow meanwhile.
        self._say_whose_kafka()
        topics = _ensure_topics(settings, self._screen.say) if self._kafka is None else ""
        where = f"yours at {settings.kafka.bootstrap_servers}"
        goes_on = model_checks.is_bootstrapped(settings)
        self._supervisor = Supervisor.of(settings, self._screen.say, self._metrics)
        self._start(ANSWERING if goes_on else (BOOTSTRAP,))
        if self._kafka is not None:
            self._kafka.begin()
        self._start(() if goes_on else (TRAINER, *ANSWERING))
        if self._kafka is not None:
            self._wait(self._kafka.is_up, "starting Kafka")
            topics = _ensure_topics(settings, self._screen.say, local=True)
            where = f"local broker on {settings.kafka.bootstrap_servers}, data in {settings.kafka_dir}"
        self._step("Kafka", where)
        self._step("topics", topics)
        # 5. All others at once: each waits for what it needs; imports and compilers take most of the time.
        self._start_others(goes_on)
        # 6. to 8. become true one after another; if an earlier run's version answers, 8. came before Kafka.
        self._await_bootstrap()
        # No answer waits for the validation: it compares with what the bootstrap found, and reads what it missed.
        self._start({VALIDATION} - left_out(settings))
        version = self._wait(lambda: _trained_version(settings), "waiting for the trainer's first version")
        self._step("trainer", f"version {version}")
        self._wait(lambda: self._answered, "waiting for the first answer")
        # 9. What to try. The page comes last, because no other step waits for it.
        self._start((CONSOLE,) if settings.console.port else ())
        self._running().settled = True
        self._say_what_to_try()

    def _check(self) -> None:
        settings = self._settings
        watched = prometheus.NAME in self._plans
        if watched:
            prometheus.write_configuration(settings)
        require_ports(ports(settings, self._kafka is not None, watched))
        free = require_disk(settings.state_dir)
        serve(self._collected, settings.up.metrics_port, settings.metrics.host)
        # A custom model that cannot be served is refused before anything starts.
        if model_checks.is_own(settings):
            self._screen.say(f"checking {' and '.join(model_checks.own(settings))}, some ten seconds")
            model_checks.check(settings, self._screen.say)
        fresh, salt = not settings.salt_path.exists(), own_salt(settings)  # A lost salt too.
        require_same_salt(Registry(settings.registry_dir), salt)
        self._step(
            "checks",
            f"Python {sys.version.split()[0]}, {free / 2**30:.0f} GiB free, ports free, state in {settings.state_dir}",
        )
        self._step("salt", f"{'made' if fresh else 'found'} in {settings.salt_path}, fingerprint {salt.fingerprint}")

    def _say_whose_kafka(self) -> None:
        kafka, origin = self._settings.kafka, self._settings.origins.get("kafka.bootstrap_servers")
        if origin and kafka.bootstrap_servers in (f"{host}:{kafka.port}" for host in ("127.0.0.1", "localhost")):
            self._screen.say(
                f"kafka.bootstrap_servers is set ({origin}), so that no broker is started; for a local one at "
                f"{kafka.bootstrap_servers} leave it out and set kafka.port"
            )

    def _start(self, names: Iterable[str]) -> None:
        supervisor = self._running()
        for name in names:
            if name in self._plans and name not in supervisor.names():
                supervisor.start(self._plans[name])

    def _start_others(self, goes_on: bool) -> None:
        settings, unwanted = self._settings, {REBUILD, CONSOLE, VALIDATION}
        if goes_on:
            unwanted.add(BOOTSTRAP)
        if not self._shoppers:
            unwanted.add(SHOPPERS)
        unwanted |= left_out(settings)
        wanted = [name for name in self._plans if name not in unwanted]
        self._start(wanted)
        clicks = "no shoppers"
        if self._shoppers:
            clicks = f"{settings.shoppers.rate:g} clicks a second of {settings.shoppers.users} shoppers"
        started = ", ".join(name for name in wanted if self._plans[name].wanted is None)
        self._step("processes", f"{started} started; {clicks}; logs in {settings.logs_dir}")

    def _await_bootstrap(self) -> None:
        supervisor = self._running()
        if BOOTSTRAP not in supervisor.names():
            self._step("bootstrap", "done by an earlier run")
            return
        rows = self._settings.bootstrap.min_rows
        self._wait(
            lambda: supervisor.done(BOOTSTRAP),
            f"waiting for {rows} clicks in {self._settings.kafka.clicks_topic} and their analysis",
        )
        self._step("bootstrap", "preprocessing constants found on the first clicks")

    def _notice_answer(self) -> None:
        if self._answered or self._running().pid(WORKER) is None:
            return
        self._answered = _answered_version(self._settings)
        if self._answered:
            url, port = serving_address(self._settings), self._settings.serving.grpc_port
            where = f"{url} with version {self._answered}{f', gRPC on port {port}' if port else ''}"
            self._step("serving", f"answers on {where}, {time.monotonic() - self._begin:.1f} s after the start")

    def _say_what_to_try(self) -> None:
        self._step("running", "try, in another terminal:")
        for line in hints.commands(self._settings, self._shoppers, prometheus.NAME in self._plans):
            self._screen.say(f"      {line}")
        self._screen.say("Ctrl-C stops everything; the next run resumes from here.")

    def _watch(self) -> None:
        settings = self._settings
        poller = Poller(settings)
        due = time.monotonic()
        while True:
            self._poll()
            if time.monotonic() >= due:
                due = time.monotonic() + self._screen.every_s
                snapshot = poller.poll()
                if not self._signals.stop():
                    tries = hints.addresses(settings, self._shoppers)
                    self._screen.live(live_line(snapshot), panel(snapshot, tries, settings.serving.processes))
            time.sleep(POLL_S)

    def _wait(self, look: Callable[[], Found], task: str) -> Found:
        """Watches the processes until `poll` returns something, and returns that; reports what takes long."""
        remind, report = time.monotonic() + REMIND_S, time.monotonic() + PROGRESS_S
        while not (result := look()):
            self._poll()
            self._notice_answer()
            if time.monotonic() >= report:
                report = time.monotonic() + PROGRESS_S
                if progress := _preparing(self._settings, self._running().names()):
                    self._screen.say(f"{time.monotonic() - self._begin:7.1f} s       {progress}")
            if time.monotonic() >= remind:
                remind = time.monotonic() + REMIND_S
                self._screen.say(
                    f"{time.monotonic() - self._begin:7.1f} s  still {task}; see {self._settings.logs_dir}"
                )
            time.sleep(POLL_S)
        return result

    def _poll(self) -> None:
        """Raises `Stopped` if the operator asked for it; restarts what died."""
        if self._signals.stop():
            raise Stopped
        self._running().poll()
        if self._kafka is not None:
            self._kafka.poll()

    def _come_down(self) -> None:
        begin = time.monotonic()
        took: list[str] = []

        def timed(name: str, stop: Callable[[], None]) -> None:
            before = time.monotonic()
            stop()
            took.append(f"{name} {time.monotonic() - before:.1f} s")

        supervisor, kafka = self._supervisor, self._kafka
        if supervisor is not None:
            running = [name for name in STOP_ORDER if supervisor.pid(name) is not None]
            if TRAINER in running:
                self._screen.say("stopping: shoppers, stream, trainer, serving, Kafka")
            for name in running:
                timed(name, functools.partial(supervisor.stop, name, self._signals.hurry))
        if kafka is not None and kafka.started:
            timed("Kafka", functools.partial(kafka.stop, 1.0 if self._signals.hurry() else 20.0))
        if took:
            where = self._settings.state_dir
            self._screen.say(
                f"stopped after {time.monotonic() - begin:.1f} s ({', '.join(took)}); the state is in {where}"
            )

    def _running(self) -> Supervisor:
        assert self._supervisor is not None, "processes are started after the checks"
        return self._supervisor

    def _step(self, name: str, text: str) -> None:
        self._steps_done += 1
        self._screen.say(f"{time.monotonic() - self._begin:7.1f} s  {self._steps_done}/{STEPS}  {name:<10} {text}")

"""The steps of `springtide up`, from the first check to the last stop."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry

from deploy.children.supervisor import ProcessPlan, Supervisor
from deploy.rollouts import offered as rollouts
from deploy.startup import hints, own_model, prometheus, signs, upgrading
from deploy.startup.checks import LEAST_FREE_BYTES, require_directory, require_disk, require_ports
from deploy.startup.local_kafka import LocalKafka
from deploy.startup.process_plan import (
    ANSWERING,
    BOOTSTRAP,
    CONSOLE,
    OF_LOCAL_KAFKA,
    REBUILD,
    SHOPPERS,
    STOP_ORDER,
    TRAINER,
    VALIDATION,
    WORKER,
    left_out,
    ports,
    process_plans,
)
from deploy.startup.topics import ensure_topics
from deploy.trials import offered as trials
from deploy.watch import scrape
from deploy.watch.address import serving_address
from deploy.watch.figures import Watch
from deploy.watch.live import Screen, live_line
from deploy.watch.panel import panel
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.events.identity import own_salt
from state.metrics import SupervisorMetrics, serve
from state.registry.model_fit import require_same_salt
from state.registry.registry import Registry
from state.storage.measuring import offer
from state.storage.shares import KAFKA, LOGS

STEPS = 9
LOOK_S = 0.1
REMIND_S = 30.0
PROGRESS_S = 5.0

Found = TypeVar("Found")


class Stopped(Exception):
    """The operator asked to stop while a step waited."""


class Startup:
    """One run of the loop.

    Args:
        settings: The loop's settings.
        shoppers: Whether synthetic shoppers click.
        screen: Takes the lines.
        stop: Whether the operator asked to stop.
        hurry: Whether the operator asked again.
        accepted: Words for stream and for trainer: losses that the operator accepts.
        beside: What else runs, such as a Prometheus.
        clock: Monotonic seconds.
        sleep: Waits a number of seconds, or until a signal.
    """

    def __init__(
        self,
        settings: Settings,
        shoppers: bool,
        screen: Screen,
        stop: Callable[[], bool],
        hurry: Callable[[], bool],
        accepted: tuple[Sequence[str], Sequence[str]] = ((), ()),
        beside: Sequence[ProcessPlan] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._shoppers, self._screen = settings, shoppers, screen
        self._stop, self._hurry = stop, hurry
        self._clock, self._sleep = clock, sleep
        self._begin = clock()
        local = "kafka.bootstrap_servers" not in settings.origins
        self._collected = CollectorRegistry()
        self._metrics = SupervisorMetrics(self._collected)
        trials.offer(self._collected, settings)
        rollouts.offer(self._collected, settings.registry_dir)
        storage = offer(self._collected, settings, [LOGS, KAFKA] if local else [LOGS])
        self._kafka = LocalKafka(settings, screen.say, self._metrics, clock, storage) if local else None
        # The first bootstrap waits for clicks: shoppers that have clicked for a while spare it that.
        fresh, (stream, trainer) = not upgrading.has_spec(settings.registry_dir), accepted
        self._plans = process_plans(
            settings.bootstrap.min_rows if fresh else 0,
            accepted=[*(OF_LOCAL_KAFKA if local else ()), *stream],
            accepted_by_trainer=trainer,
        ) | {one.name: one for one in beside}
        self._supervisor: Supervisor | None = None
        self._steps_done = self._answered = 0

    def run(self) -> int:
        """Goes up, watches, and stops when asked to; returns the exit code.

        Raises:
            SpringtideError: A step cannot be done, or a process was used wrongly; everything is stopped then. Once
                all of it ran, nothing ends it but the operator.
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
        # 3. and 4. A Kafka of the user's is only reached. The local one takes seconds to start. What needs none of it
        # starts before: answers from what an earlier run left on this machine. In a fresh state directory, first answers
        # wait for Kafka and the bootstrap, so these come first. The trainer imports TensorFlow meanwhile.
        self._say_whose_kafka()
        topics = ensure_topics(settings, self._screen.say) if self._kafka is None else ""
        where = f"yours at {settings.kafka.bootstrap_servers}"
        goes_on = upgrading.is_bootstrapped(settings)
        self._supervisor = Supervisor.of(settings, self._screen.say, self._metrics, self._clock)
        self._start(ANSWERING if goes_on else (BOOTSTRAP,))
        if self._kafka is not None:
            self._kafka.begin()
        self._start(() if goes_on else (TRAINER, *ANSWERING))
        if self._kafka is not None:
            self._wait(self._kafka.is_up, "starting Kafka")
            topics = ensure_topics(settings, self._screen.say, local=True)
            where = f"local broker on {settings.kafka.bootstrap_servers}, data in {settings.kafka_dir}"
        self._step("Kafka", where)
        self._step("topics", topics)
        # 5. All others at once: each waits for what it needs, and imports and compilers take the longest.
        self._start_others(goes_on)
        # 6. to 8. come true one after another; where answers go on from an earlier run, 8. came before Kafka.
        self._await_bootstrap()
        # No answer waits for the validation: it compares with what the bootstrap found, and reads what it missed.
        self._start({VALIDATION} - left_out(settings))
        version = self._wait(lambda: signs.trained_version(settings), "waiting for the trainer's first version")
        self._step("trainer", f"version {version}")
        self._wait(lambda: self._answered, "waiting for the first answer")
        # 9. What to try. The page comes last: it is in nobody's way.
        self._start((CONSOLE,) if settings.console.port else ())
        self._running().settled = True
        self._say_what_to_try()

    def _check(self) -> None:
        """Refuses what cannot run, and finds or makes the salt."""
        settings = self._settings
        watched = prometheus.NAME in self._plans and prometheus.write_configuration(settings)
        require_ports(ports(settings, self._kafka is not None, watched))
        free = require_disk(settings.state_dir)
        if settings.up.metrics_port:
            serve(self._collected, settings.up.metrics_port, settings.metrics.host)
        # A model of the user's own that cannot be served is refused before anything starts.
        if own_model.is_own(settings):
            self._screen.say(f"checking {' and '.join(own_model.own(settings))}, some ten seconds")
            own_model.check(settings, self._screen.say)
        fresh, salt = not settings.salt_path.exists(), own_salt(settings)  # A lost salt too.
        require_same_salt(Registry(settings.registry_dir), salt)
        self._step(
            "checks",
            f"Python {sys.version.split()[0]}, {free / 2**30:.0f} GiB free, ports free, state in {settings.state_dir}",
        )
        self._step("salt", f"{'made' if fresh else 'found'} in {settings.salt_path}, fingerprint {salt.fingerprint}")

    def _say_whose_kafka(self) -> None:
        """Says why no broker starts where the one that is named is where the local one would be."""
        kafka, origin = self._settings.kafka, self._settings.origins.get("kafka.bootstrap_servers")
        if origin and kafka.bootstrap_servers in (f"{host}:{kafka.port}" for host in ("127.0.0.1", "localhost")):
            self._screen.say(
                f"kafka.bootstrap_servers is set ({origin}), so that no broker is started; for a local one at "
                f"{kafka.bootstrap_servers} leave it out and set kafka.port"
            )

    def _start(self, names: Iterable[str]) -> None:
        """Starts those that are to run and do not yet."""
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
        """Says once that serving answers, and with which version."""
        if self._answered or self._running().pid(WORKER) is None:
            return
        self._answered = signs.answered_version(self._settings)
        if self._answered:
            url, port = serving_address(self._settings), self._settings.serving.grpc_port
            where = f"{url} with version {self._answered}{f', gRPC on port {port}' if port else ''}"
            self._step("serving", f"answers on {where}, {self._clock() - self._begin:.1f} s after the start")

    def _say_what_to_try(self) -> None:
        self._step("running", "try, in another terminal:")
        for line in hints.commands(self._settings, self._shoppers, prometheus.NAME in self._plans):
            self._screen.say(f"      {line}")
        self._screen.say("Ctrl-C stops everything; the next run goes on from here.")

    def _watch(self) -> None:
        settings = self._settings
        addresses = scrape.watched_urls(settings)
        watch = Watch()
        due = self._clock()
        while True:
            self._look()
            if self._clock() >= due:
                due = self._clock() + self._screen.every_s
                figures = watch.look(scrape.scrape(addresses), self._clock(), time.time())
                if not self._stop():
                    tries = hints.addresses(settings, self._shoppers)
                    self._screen.live(live_line(figures), panel(figures, tries, settings.serving.processes))
            self._sleep(LOOK_S)

    def _wait(self, look: Callable[[], Found], what: str) -> Found:
        """Watches the processes until `look` finds something, and returns it; says what it waits for when that takes long."""
        remind, report = self._clock() + REMIND_S, self._clock() + PROGRESS_S
        while not (found := look()):
            self._look()
            self._notice_answer()
            if self._clock() >= report:
                report = self._clock() + PROGRESS_S
                if progress := signs.kernels_left(self._settings, self._running().names()):
                    self._screen.say(f"{self._clock() - self._begin:7.1f} s       {progress}")
            if self._clock() >= remind:
                remind = self._clock() + REMIND_S
                self._screen.say(f"{self._clock() - self._begin:7.1f} s  still {what}; see {self._settings.logs_dir}")
            self._sleep(LOOK_S)
        return found

    def _look(self) -> None:
        """Takes notice of stops and deaths.

        Raises:
            Stopped: The operator asked for it.
            ProcessFailed: A process says at its first start that it was used wrongly.
        """
        if self._stop():
            raise Stopped
        self._running().look()
        if self._kafka is not None:
            self._kafka.look()

    def _come_down(self) -> None:
        """Stops shoppers, stream, trainer, serving and Kafka, in this order."""
        begin = self._clock()
        took: list[str] = []

        def timed(name: str, stop: Callable[[], None]) -> None:
            before = self._clock()
            stop()
            took.append(f"{name} {self._clock() - before:.1f} s")

        supervisor, kafka = self._supervisor, self._kafka
        if supervisor is not None:
            running = [name for name in STOP_ORDER if supervisor.pid(name) is not None]
            if TRAINER in running:
                self._screen.say("stopping: shoppers, stream, trainer, serving, Kafka")
            for name in running:
                timed(name, functools.partial(supervisor.stop, name, self._hurry))
        if kafka is not None and kafka.started:
            timed("Kafka", functools.partial(kafka.stop, 1.0 if self._hurry() else 20.0))
        if took:
            where = self._settings.state_dir
            self._screen.say(
                f"stopped after {self._clock() - begin:.1f} s ({', '.join(took)}); the state is in {where}"
            )

    def _running(self) -> Supervisor:
        assert self._supervisor is not None, "processes are started after the checks"
        return self._supervisor

    def _step(self, name: str, text: str) -> None:
        self._steps_done += 1
        self._screen.say(f"{self._clock() - self._begin:7.1f} s  {self._steps_done}/{STEPS}  {name:<10} {text}")

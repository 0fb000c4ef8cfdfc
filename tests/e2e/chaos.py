"""Kills every part of a loop at random and at each step of the commit sequences, then proves that nothing was harmed.

    python -m tests.e2e.chaos --kills 200 --seed 7 [--labels]

1. A real Kafka, stream, bootstrap, trainer, applier, worker; a crowd that
   clicks, sometimes nonsense; a client that asks for profiles every 50 ms.
   With --labels most clicks are impressions, whose label comes seconds later
   or never, and attributes of users and items change all the time.
2. Kill -9 after kill -9, in any order, also of parts that have yet to come up
   and while the broker is away. Each part that is started again may have a
   kill point armed, until every kill point has struck. All the while an
   operator rolls back in both modes, whose commands are killed too.
3. The clicks end, and what is under way is finished.
4. An undisturbed stream reads the same clicks, with all that was masked left
   out from the beginning, and an undisturbed trainer the log that the disturbed
   stream left. Everything must be equal, bit for bit."""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deploy.watch import scrape
from deploy.watch.scrape import serving_address
from state import errors
from state.accounts import StreamAccount
from state.attributes.values import tables_of
from state.config.loading import load
from state.config.settings import Settings
from state.errors import RegistryError
from state.events.identity import load_salt
from state.layout import ATTRIBUTES
from state.log import Topics
from state.positions import UNPLACED
from state.process.environment import wall_ms
from state.registry.control import Control
from state.registry.registry import Registry
from tests.e2e.client import Answers, Client
from tests.e2e.crowd import Crowd
from tests.e2e.evidence import (
    LogDifference,
    accounts,
    attributes_differ,
    compare_logs,
    covers,
    doubled,
    known_differs,
    newest_state,
    read_log,
    read_up_to,
    serving_differs,
    serving_histories,
    state_at,
    stream_histories,
)
from tests.e2e.operator import COMMAND, Operator, Rollbacks
from tests.e2e.parts import End, Parts, quiet_ports
from tests.e2e.running import PORTS, ROOT, until
from tests.e2e.undisturbed import begin_stream, begin_trainer, finish_stream, finish_trainer

LASTING = ("stream", "trainer", "applier", "worker")
WORKING = {
    "stream": "springtide_stream_microbatches_total",
    "trainer": "springtide_trainer_steps_total",
    "applier": "springtide_serving_version",
}
OWN: Mapping[str, object] = {
    # Parts are killed all the time: an answer may come late, and none is refused for it.
    "serving.max_queue_ms": 60_000,
    "kafka.clicks_partitions": 3,
    "kafka.request_timeout_s": 20,
    "shoppers.users": 300,
    "shoppers.rate": 100,
    "bootstrap.min_rows": 300,
    "trainer.base_every_s": 15,
    "registry.durable_s": 1,
    "registry.delta_keep_s": 40,
    "history.snapshot_every_s": 5,
}
LABELS: Mapping[str, object] = {
    "labels.impressions": "view",
    "labels.outcomes": "purchase",
    "labels.wait_s": 5,
    "attributes.user_topic": "users",
    "attributes.user_fields": "user_change,user_tier",
    "attributes.item_topic": "items",
    "attributes.item_fields": "item_change,item_tier",
    "attributes.slices": "user_tier,item_tier",
}
TICK_S = 0.05
FIRST_ANSWER_S = 300.0
DRAIN_S = 180.0
# An armed part that never comes to its kill point dies like any other.
ARMED_S = 60.0
KAFKA_EVERY_S = 20.0
SPOT_CHECK_KILLS = 20
ANYWHERE = "anywhere"
BUILD = ROOT / "build" / "chaos"

Say = Callable[[str], None]


class Chaos:
    def __init__(
        self,
        directory: Path,
        seed: int,
        kills: int,
        rounds: int,
        thorough: bool,
        say: Say,
        labels: bool = False,
        rollbacks: int = 1,
    ) -> None:
        self._kills, self._rollbacks, self._thorough, self._say = kills, rollbacks, thorough, say
        ports = dict(zip(PORTS, quiet_ports(len(PORTS), random.Random()), strict=True))
        own = {**ports, "paths.state": directory / "state", **OWN, **(LABELS if labels else {})}
        self.settings: Settings = load([word for name, value in own.items() for word in (f"--{name}", str(value))], {})
        self.findings = Findings(seed)
        self.parts = Parts(self.settings, LASTING)
        self._directory = directory
        self._violence = Violence(seed, rounds, ATTRIBUTE_POINTS if labels else POINTS)
        self._tables = tables_of(self.settings.attributes)
        self._registry = Registry(self.settings.registry_dir)
        self._crowd = Crowd(self.settings, seed, wall_ms())
        self._client = Client(serving_address(self.settings), [f"shopper-{number}" for number in range(50)])
        self._operator = Operator(
            self.settings, seed, self._client, lambda: self._violence.arm(COMMAND), self._command_died
        )
        if not rollbacks:
            self._operator.finish()
        self.findings.rollbacks = self._operator.found
        self._died_s: dict[str, float] = {}
        self._broker_s = 0.0
        self._spot_checked = 0
        self._armed = True
        self._topic_id = ""
        self._ends: dict[int, int] = {}

    def run(self) -> Findings:
        """All four steps; whatever happens, nothing of it runs afterwards."""
        begun_s = time.monotonic()
        try:
            # 1.
            self._go_up()
            # 2.
            self._client.start()
            self._rage()
            # 3.
            self._drain()
            # 4.
            self._compare()
        finally:
            self._operator.close()
            self._crowd.finish()
            self.parts.close()
        self.findings.seconds = time.monotonic() - begun_s
        return self.findings

    def _go_up(self) -> None:
        settings, kafka = self.settings, self.settings.kafka
        self.parts.broker.start()
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, kafka.clicks_partitions)
            topics.ensure(kafka.dead_letters_topic, 1)
            topics.ensure(kafka.microbatches_topic, 1)
            for topic in self._attribute_topics().values():
                topics.ensure(topic, 1, {"cleanup.policy": "compact"})
        load_salt(settings.salt_path)
        self._crowd.start()
        for name in (*LASTING, "bootstrap"):
            self.parts.start(name)

        def answered() -> bool:
            for end in self.parts.reap():
                assert (end.part, end.code) == ("bootstrap", 0), f"{end}\n{self._logs()}"
            return scrape.fetch(serving_address(settings, "/v1/profiles/shopper-1"))[0] == 200

        until(answered, "no first answer", FIRST_ANSWER_S)
        self._say("the loop answers; now it is killed")

    def _attribute_topics(self) -> dict[str, str]:
        own = self.settings.attributes
        return {side: topic for side, topic in (("user", own.user_topic), ("item", own.item_topic)) if topic}

    def _rage(self) -> None:
        findings, violence = self.findings, self._violence
        due_s = time.monotonic()
        while not self._enough():
            self._look()
            self._operator.tick()
            if time.monotonic() < due_s:
                time.sleep(TICK_S)
                continue
            candidates = self._candidates()
            if findings.killed >= self._kills:
                # Only the kill points are left that have not struck: their parts need the others alive.
                violence.arms_always = True
                candidates = [part for part in candidates if violence.has_left(part)]
            victim = violence.victim(candidates, self._ready())
            if victim is not None:
                self._kill(victim)
            due_s = time.monotonic() + violence.wait_s()
            if findings.killed // SPOT_CHECK_KILLS > self._spot_checked:
                self._spot_checked += 1
                self._spot_check()
                self._say(
                    f"{findings.killed} kills, version {self._client.answers.version}, left: {', '.join(violence.left) or 'none'}"
                )

    def _enough(self) -> bool:
        """Whether all was killed, and rolled back, that was to be."""
        done = self.findings.killed >= self._kills and min(self._operator.found.modes.values()) >= self._rollbacks
        return done and not (self._thorough and self._violence.left)

    def _command_died(self, point: str) -> None:
        self.findings.kills[COMMAND, point or ANYWHERE] += 1
        if point:
            self._violence.struck(COMMAND, point)

    def _candidates(self) -> list[str]:
        """Whom the next kill may hit."""
        now_s = time.monotonic()
        found = [
            name for name, part in self.parts.running.items() if not part.kill_at or now_s - part.started_s > ARMED_S
        ]
        # Not while stream and trainer are both away: else nothing would ever be done.
        if not self._died_s.keys() >= {"stream", "trainer"} and now_s - self._broker_s > KAFKA_EVERY_S:
            found.append("kafka")
        if self._compactor() is not None:
            found.append("compactor")
        return found

    def _ready(self) -> set[str]:
        """The parts that work again after their last death."""
        found = {name for name in self.parts.running if name not in self._died_s} - {"worker"}
        return found | {"kafka", "compactor"} | ({"worker"} if self._client.back else set())

    def _kill(self, victim: str) -> None:
        if victim == "kafka":
            self.parts.await_kafka()
            self.parts.kill_kafka(self._violence.away_s())
            self._broker_s = time.monotonic()
            self.findings.kills["kafka", ANYWHERE] += 1
        elif victim == "compactor":
            child = self._compactor()
            if child is not None:
                child.kill()
                self.findings.kills["compactor", ANYWHERE] += 1
        elif victim in self.parts.running:
            part = self.parts.running[victim]
            if victim == "worker":
                self._client.worker_dies()
            part.kill()
            self._look()

    def _look(self) -> None:
        """Takes notice of deaths and starts again at once what died; notes who works again."""
        for end in self.parts.reap():
            self._bury(end)
            if end.part in LASTING:
                self.parts.start(end.part, self._violence.arm(end.part) if self._armed else "")
        for name in list(self._died_s):
            part = self.parts.running.get(name)
            if part is None or name not in WORKING:
                continue
            url = scrape.urls(self.settings)[name]
            done = scrape.scrape({name: url}, lambda where: scrape.fetch(where, 0.5))[name].value(WORKING[name])
            if done:
                self.findings.back_s[name].append(time.monotonic() - self._died_s.pop(name))

    def _bury(self, end: End) -> None:
        if (end.part, end.code) == ("bootstrap", 0):
            return
        if end.part == "worker":
            self._client.worker_dies()
            self._client.worker_is_dead()
        if end.part in LASTING:
            # Killed again before it worked: the time runs from the first death.
            self._died_s.setdefault(end.part, time.monotonic())
        if not end.killed:
            self.findings.ends[end.part, _error_in(end)] += 1
            self._say(f"{end.part} ended by itself with {end.code}: {end.said}")
            return
        point = end.at.partition(":")[0]
        self.findings.kills[end.part, point or ANYWHERE] += 1
        if point:
            self._violence.struck(end.part, point)

    def _compactor(self) -> psutil.Process | None:
        """The trainer's compactor, if one is at work."""
        trainer = self.parts.running.get("trainer")
        if trainer is None:
            return None
        try:
            for child in psutil.Process(trainer.pid).children():
                if "trainer.compactor" in child.cmdline():
                    return child
        except psutil.Error:
            return None
        return None

    def _spot_check(self) -> None:
        """Compares serving's rows with the trainer's in the middle of it."""
        try:
            differs = serving_differs(self.settings, self._registry)
        except RegistryError as error:
            # The version may have passed out of its retention meanwhile.
            self._say(f"no spot check: {error}")
            return
        self.findings.spot_checks += 1
        self.findings.differs.setdefault("serving's rows, in the middle of it", []).extend(differs)

    def _drain(self) -> None:
        """Ends the clicks and waits until every part is done with them; then stops stream and trainer as an operator does."""
        self._say("the killing is over; what is under way is finished")
        self._armed = False
        self.parts.await_kafka()
        self._look()
        for name, part in list(self.parts.running.items()):
            if part.kill_at:
                self._kill(name)
        self._operator.finish()
        self._until(self._rolled_back, "the operator is not done")
        self.findings.clicks = self._crowd.finish()
        kafka = self.settings.kafka
        with Topics(kafka) as topics:
            self._topic_id = topics.describe(kafka.clicks_topic).topic_id
            self._ends = {number: end for number, (_, end) in topics.ends(kafka.clicks_topic).items()}
            known = {side: topics.ends(topic)[0][1] for side, topic in self._attribute_topics().items()}

        def heard() -> bool:
            self._look()
            return all(read_up_to(path, known) for path in self._attribute_stores())

        def learned() -> bool:
            self._look()
            newest = self._newest()
            return newest is not None and covers(self._registry.manifest(newest).marks, self._ends, self._topic_id)

        def working() -> bool:
            self._look()
            return not self._died_s.keys() - {"worker"}

        self._until(learned, "the trainer has not learned from everything")
        self._until(working, "a part does not work again")
        if known:
            self._until(heard, "the attributes have not been read to their ends")
        for name in ("stream", "trainer"):
            part = self.parts.running.pop(name)
            code = part.stop()
            assert code == 0, f"{name} stopped with {code}:\n{part.said()[-3000:]}"

        def served() -> bool:
            self._look()
            return self._client.back and self._client.answers.version == self._newest()

        self._until(served, "serving has not come to the newest version")

    def _newest(self) -> int | None:
        """The newest version of control's epoch."""
        return self._registry.newest(self._control().epoch)

    def _control(self) -> Control:
        control = self._registry.control()
        assert control is not None
        return control

    def _rolled_back(self) -> bool:
        self._look()
        self._operator.tick()
        return self._operator.idle

    def _attribute_stores(self) -> list[Path]:
        return [self.settings.stream_dir / ATTRIBUTES, self.settings.serving_dir / ATTRIBUTES]

    def _compare(self) -> None:
        """Runs the undisturbed stream and trainer and compares all there is."""
        self._say("an undisturbed stream and trainer do the same work")
        findings, settings, kafka = self.findings, self.settings, self.settings.kafka
        control = self._control()
        log = read_log(kafka, kafka.microbatches_topic, control.log)
        trainer_run = begin_trainer(settings, self._directory / "undisturbed-trainer", control)
        stream_run = begin_stream(settings, self._directory / "undisturbed-stream", control)
        calm_log, calm_histories = finish_stream(*stream_run, self._topic_id, self._ends)
        calm = finish_trainer(*trainer_run, log)
        findings.answers = self._client.finish()
        for name in ("applier", "worker"):
            part = self.parts.running.pop(name)
            code = part.stop()
            assert code == 0, f"{name} stopped with {code}:\n{part.said()[-3000:]}"

        # The log.
        findings.rows, findings.records, findings.again = len(log.rows), log.records, log.again
        findings.differing, findings.gaps, findings.abandoned = log.differing, log.gaps, log.abandoned
        findings.log = compare_logs(log, calm_log)
        # The trainer.
        ours = newest_state(self._registry, control.epoch)
        account = accounts(ours.manifest)
        findings.doubled = doubled(account["trained"] + account["skipped"] + account["masked"], log)
        findings.versions = ours.manifest.version
        differs = findings.differs
        differs["trainer's rows, optimizer, weights, counters"] = ours.differs_in(calm)
        differs["trainer's base"] = self._base_differs(Registry(trainer_run[0].registry_dir))
        differs["trainer's positions"] = _unequal(
            marks=(ours.manifest.marks, calm.manifest.marks),
            log_marks=(ours.manifest.marks, log.marks),
            steps=(ours.manifest.steps, calm.manifest.steps),
            account=(account, accounts(calm.manifest)),
            everything_read=(ours.manifest.log.next >= log.seen, True),
        )
        # The histories.
        stream, serving = stream_histories(settings), serving_histories(settings)
        findings.masked = stream.totals.get("masked", 0)
        differs["stream's histories"] = _unequal(
            digest=(stream.digest, calm_histories.digest),
            positions=(stream.positions, calm_histories.positions),
            outcomes=(stream.totals, calm_histories.totals),
            rows=(StreamAccount(**stream.totals).learnable, log.learnable),
            waiting=(stream.waiting, calm_histories.waiting),
            waiting_rows=(StreamAccount(**stream.totals).waiting, len(stream.waiting)),
        )
        differs["serving's histories"] = _unequal(
            digest=(serving.digest, stream.digest),
            positions=(serving.positions, stream.positions),
            users=(serving.users, stream.users),
        )
        differs["serving's rows"] = serving_differs(settings, self._registry)
        if self._tables:
            knowledge, salt = self._crowd.knowledge, load_salt(settings.salt_path)
            findings.changes = sum(knowledge.changes.values())
            findings.labels = {name: stream.totals.get(name, 0) for name in UNPLACED} | {"waiting": len(stream.waiting)}
            differs["attributes of rows"] = attributes_differ(log, self._tables, knowledge, salt)
            for name, path in zip(("stream's", "serving's"), self._attribute_stores(), strict=True):
                differs[f"{name} attributes"] = known_differs(path, self._tables, knowledge, salt)
        differs["served version"] = _unequal(version=(findings.answers.version, ours.manifest.version))

    def _base_differs(self, calm: Registry) -> list[str]:
        """In what the first bases differ; the disturbed one's first base is kept, for it is younger than an hour."""
        return state_at(self._registry, self._registry.bases()[0]).differs_in(state_at(calm, calm.bases()[0]))

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            until(condition, what, DRAIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._logs()}") from None

    def _logs(self) -> str:
        paths = sorted(self.settings.logs_dir.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


def _unequal(**pairs: tuple[object, object]) -> list[str]:
    """The names of the pairs that are not equal, with both values where they are short.

    >>> _unequal(rows=(1, 1), steps=(2, 3))
    ['steps (2, 3)']
    """
    return [f"{name} {pair}"[:200] for name, pair in pairs.items() if pair[0] != pair[1]]


def _error_in(end: End) -> str:
    """The class of the error that a process named last; else its exit code."""
    found = [word for word in re.findall(r"\b[A-Z]\w+", end.said) if hasattr(errors, word)]
    return found[0] if found else f"exit code {end.code}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it and prints what was found; returns 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="kills at least (200)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each kill point must strike (2)")
    parser.add_argument("--rollbacks", type=int, default=5, help="rollbacks of each mode at least (5); 0 for none")
    parser.add_argument("--quick", action="store_true", help="stop after the kills, whatever points have not struck")
    parser.add_argument("--seed", type=int, default=7, help="of clicks and kills (7)")
    parser.add_argument("--labels", action="store_true", help="labels come later, and attributes change")
    parser.add_argument("--keep", action="store_true", help="keep the state afterwards")
    chosen = parser.parse_args(argv)
    begun_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun_s:7.1f} s  {text}", flush=True)

    BUILD.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{chosen.seed}-", dir=BUILD))
    findings = Chaos(
        directory, chosen.seed, chosen.kills, chosen.rounds, not chosen.quick, say, chosen.labels, chosen.rollbacks
    ).run()
    print("\n".join(findings.lines()))
    if findings.problems():
        print(f"the state is in {directory}")
        return 1
    if not chosen.keep:
        shutil.rmtree(directory)
    return 0


POINTS: Mapping[str, Sequence[str]] = {
    "stream": (
        "stream.fenced",
        "back.found",
        "back.committed",
        "stream.opened",
        "stream.taken",
        "stream.sent",
        "stream.acknowledged",
        "stream.committed",
        "stream.grouped",
    ),
    "trainer": (
        "enter.restored",
        "enter.opened",
        "caught.written",
        "loop.stepped",
        "publish.file",
        "publish.written",
        "publish.checked",
        "publish.renamed",
        "publish.synced",
    ),
    "applier": (
        "apply.steered",
        "apply.read",
        "apply.applied",
        "back.found",
        "back.committed",
        "follow.taken",
        "follow.committed",
        "snapshot.file",
        "snapshot.written",
        "snapshot.named",
    ),
    "command": ("control.written", "control.linked", "rollback.proposed", "rollback.answered"),
}
# Reached once by a part that is started, or with the next rollback.
ONCE = ("back.", "enter.", "caught.", "control.", "rollback.", "apply.steered", "stream.fenced", "stream.opened")
# Where attributes are followed, stream and applier have a sequence of their own for them.
ATTRIBUTE_POINTS: Mapping[str, Sequence[str]] = {
    part: (*points, *(("attributes.reported", "attributes.committed") if part in ("stream", "applier") else ()))
    for part, points in POINTS.items()
}
# A trainer needs seconds to come back; it would never train if it died as often as the others.
WEIGHTS: Mapping[str, float] = {
    "stream": 26,
    "trainer": 16,
    "applier": 22,
    "worker": 20,
    "kafka": 5,
    "compactor": 6,
}
SHORTEST_S, LONGEST_S = 0.1, 1.2
# How often one dies that has yet to come up, of the times that it is chosen.
EARLY_SHARES: Mapping[str, float] = {"worker": 0.4, "applier": 0.3, "stream": 0.15, "trainer": 0.04}
ARMED_SHARE = 0.6
MOST_TIMES = 3


class Violence:
    """A seeded plan.

    Attributes:
        arms_always: Whether each part that is started gets a kill point as long as it has one left.
    """

    def __init__(self, seed: int, rounds: int = 1, points: Mapping[str, Sequence[str]] = POINTS) -> None:
        self.arms_always = False
        self._chance = random.Random(seed)
        self._decks = {part: list(named) * rounds for part, named in points.items()}
        for deck in self._decks.values():
            self._chance.shuffle(deck)

    @property
    def left(self) -> list[str]:
        """The kill points that have yet to strike."""
        return [point for deck in self._decks.values() for point in deck]

    def has_left(self, part: str) -> bool:
        """Whether a kill point of a part has yet to strike."""
        return bool(self._decks.get(part))

    def wait_s(self) -> float:
        """How long until the next kill."""
        return self._chance.uniform(SHORTEST_S, LONGEST_S)

    def away_s(self) -> float:
        """How long the broker stays dead before it is started again."""
        return self._chance.uniform(0.0, 1.5)

    def victim(self, candidates: Collection[str], ready: Collection[str]) -> str | None:
        """Which part dies: mostly one that does its work, now and then one that has yet to come up; None for none."""
        chosen = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        early = self._chance.random() < EARLY_SHARES.get(chosen, 0.0)
        return chosen if chosen in candidates and (early or chosen in ready) else None

    def arm(self, part: str) -> str:
        """The kill point to arm in a part that is started; empty for none."""
        deck = self._decks.get(part)
        if not deck or (not self.arms_always and self._chance.random() >= ARMED_SHARE):
            return ""
        # Left in the deck until it has struck: the process may die of something else first.
        self._chance.shuffle(deck)
        return f"{deck[0]}:{1 if deck[0].startswith(ONCE) else self._chance.randint(1, MOST_TIMES)}"

    def struck(self, part: str, at: str) -> None:
        """Notes that a kill point (as `arm` gave it) has struck."""
        point = at.partition(":")[0]
        if point in self._decks[part]:
            self._decks[part].remove(point)


# A part may end by itself while the broker is away; its supervisor starts it again.
EXCUSED_ENDS = frozenset({"UnreachableBroker", "LogError"})


@dataclass
class Findings:
    """Filled in as a run goes on.

    Attributes:
        kills: (part, kill point or "anywhere") -> kill -9.
        ends: (part, class of error) -> ends that nobody caused.
        back_s: Part -> seconds from its death until it worked again.
        records: Micro-batches in it.
        again: Rows written again after a crash.
        differing: Of them, those with other bytes than the first time.
        gaps: Positions that no micro-batch covers.
        abandoned: Micro-batches that exact rollbacks left behind.
        masked: Clicks left out at the end.
        labels: Impressions by what became of them, where labels come later.
        changes: Changes of attributes, where there are any.
        log: In what the log differs from an undisturbed stream's.
        doubled: Rows that the trainer learned twice; negative where some were never learned.
        differs: (what is compared) -> in what it differs; empty lists are proofs.
        spot_checks: How often serving's rows were compared in the middle of it.
    """

    seed: int
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    back_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    clicks: int = 0
    rows: int = 0
    records: int = 0
    again: int = 0
    differing: int = 0
    gaps: int = 0
    abandoned: int = 0
    masked: int = 0
    rollbacks: Rollbacks = field(default_factory=Rollbacks)
    labels: dict[str, int] = field(default_factory=dict)
    changes: int = 0
    log: LogDifference = field(default_factory=lambda: LogDifference(0, 0, 0))
    doubled: int = 0
    versions: int = 0
    differs: dict[str, list[str]] = field(default_factory=dict)
    spot_checks: int = 0
    answers: Answers = field(default_factory=Answers)
    seconds: float = 0.0

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    def problems(self) -> list[str]:
        """What must not be; empty where all promises were kept."""
        found = [f"{what}: {', '.join(names[:8])}" for what, names in self.differs.items() if names]
        for name, count in (
            ("rows lost from the log", self.log.lost),
            ("rows in the log that no undisturbed stream makes", self.log.invented),
            ("rows with other bytes than an undisturbed stream's", self.log.changed),
            ("rows written again with other bytes", self.differing),
            ("positions that no micro-batch covers", self.gaps),
            ("rows learned twice (negative: never)", self.doubled),
            ("answers by an older version than the one before", self.answers.went_back),
            ("answers by another version than the one they were to stay at", self.answers.strayed),
            ("answers that mixed versions", self.answers.mixed),
        ):
            if count:
                found.append(f"{count} {name}")
        found += [f"{count} questions failed: {reason}" for reason, count in self.answers.failed.items()]
        found += [
            f"{part} ended by itself {count} times: {error}"
            for (part, error), count in self.ends.items()
            if error not in EXCUSED_ENDS
        ]
        return found

    def times_s(self) -> dict[str, list[float]]:
        """What took how long, each time that it happened."""
        found = {f"back after a kill: {part}": times for part, times in self.back_s.items()}
        found["back after a kill: worker"] = self.answers.away_s
        found["rollback: until an answer is of its version"] = self.rollbacks.answered_s
        return {what: times for what, times in found.items() if times}

    def lines(self) -> list[str]:
        """The findings for people."""
        apart = ("kills", "ends", "back_s", "differs", "answers")
        kills = [f"{part} at {point}: {count} kills" for (part, point), count in sorted(self.kills.items())]
        figures = [f"{name}: {value}" for name, value in vars(self).items() if name not in apart]
        compared = [
            f"{what}: {'equal' if not names else 'DIFFERS in ' + ', '.join(names[:8])}"
            for what, names in self.differs.items()
        ]
        times = [
            f"{what}: {len(took)} times, median {statistics.median(took):.1f} s, most {max(took):.1f} s"
            for what, took in self.times_s().items()
        ]
        ends = [f"{part} ended by itself {count} times: {error}" for (part, error), count in sorted(self.ends.items())]
        problems = [f"PROBLEM: {problem}" for problem in self.problems()] or ["every promise was kept"]
        load = f"{self.killed} kills on {os.cpu_count()} processors under a load of {os.getloadavg()[1]:.0f}"
        answers = f"answers: {self.answers.given} given, {self.answers.excused} missing while the worker was away"
        return [load, *kills, *figures, answers, *compared, *times, *ends, *problems]


if __name__ == "__main__":
    sys.exit(main())

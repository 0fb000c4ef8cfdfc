"""The driver of a rollout has the evidence of the two topics, also after a restart, and writes what the gate decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from deploy.experiments.rollout import HOLD_MS, RolloutDriver, evaluate
from deploy.serving.applier import ExposureForwarder
from deploy.serving.host_files import FILE_MS, SETTLED_MS, ExposureSpool, make_room
from state.config.loading import load
from state.config.settings import Settings
from state.errors import UnknownTopic
from state.experiments import evidence
from state.experiments.evidence import LIVE, TRIAL, Arm, Exposure
from state.experiments.experiment import By, Change, Experiment, Experiments
from state.experiments.gate import RolloutReport
from state.microbatch.batch import NAMES
from state.microbatch.codec import decode, encode
from state.process.environment import wall_ms
from tests.deploy.serving.test_clicks import Clock, record
from tests.memory_log import MemoryLog

EXPOSURES, LOG = Settings().kafka.exposures_topic, Settings().kafka.microbatches_topic


@dataclass
class World:
    """Two topics, a registry, a spool and a clock."""

    folder: Path
    log: MemoryLog
    clock: Clock
    experiments: Experiments
    settings: Settings
    spool: ExposureSpool
    forwarder: ExposureForwarder
    written: int = 0

    def driver(self) -> RolloutDriver:
        return RolloutDriver(self.settings, self.log, self.experiments, self.experiments.get("wider"), self.clock)

    def expose(self, arm: Arm, users: range, step: int = 0, failed: bool = False) -> None:
        """As workers do it, through files and the forwarder."""
        for user in users:
            self.spool.write(
                evidence.encode_exposure(Exposure(f"{user:016x}", "wider", step, 0.5, arm, self.clock(), 900, failed))
            )
        self.clock.now_ms += FILE_MS + SETTLED_MS
        assert self.forwarder.step() == len(users)

    def engage(self, users: range, label: float = float("nan")) -> None:
        first, self.written = self.written, self.written + len(users)
        made = decode(record(first, self.written, label=label))
        columns = {name: getattr(made, name) for name in NAMES} | {"user": np.array(users, np.uint64)}
        value = encode(replace(made.header, created_ms=self.clock()), columns)
        with self.log.writer() as writer:
            writer.send(LOG, 0, None, value)
            # After a crash the stream writes it again.
            writer.send(LOG, 0, None, value)

    def later(self, ms: int) -> None:
        self.clock.now_ms += ms


@pytest.fixture
def world(tmp_path: Path) -> World:
    log, clock, folder = MemoryLog(), Clock(), tmp_path / "exposures"
    for topic in (EXPOSURES, LOG):
        log.topics().ensure(topic, 1)
    settings, by = load([f"--paths.state={tmp_path}"], {}, "/dev/null"), By("ann", "try it", clock())
    shadow = Experiment("wider", "shadow", "live", 1, 1, {}, (Change(0, "shadow", None, 0.0, "ann", "see"),))
    experiments = Experiments(settings)
    running = shadow.start_rollout((50.0, 100.0), 60.0, 0, 0, by).begin(by)
    experiments.edit(lambda now: now.with_experiment(running))
    spool = ExposureSpool(folder, clock, lambda form, line: pytest.fail(form % line))
    forwarder = ExposureForwarder(folder, log, EXPOSURES, clock)
    return World(folder, log, clock, experiments, settings, spool, forwarder)


def counted(driver: RolloutDriver) -> dict[str, tuple[int, int]]:
    """By arm answers and engagements."""
    return {arm: (driver.evidence.answers(arm), driver.evidence.engagements(arm)) for arm in (TRIAL, LIVE)}


def test_a_restart_knows_what_was_known(world: World) -> None:
    driver = world.driver()
    world.expose(TRIAL, range(1, 300))
    world.expose(LIVE, range(300, 600))
    world.engage(range(200, 400))
    world.engage(range(900, 950))
    for _ in range(2):
        driver.step()
        world.later(2 * HOLD_MS)
    assert driver.caught_up
    # With a larger share some come into the other arm.
    world.expose(TRIAL, range(350, 400), step=1)
    world.engage(range(340, 360))
    for _ in range(2):
        driver.step()
        world.later(2 * HOLD_MS)
    again = world.driver()
    for _ in range(2):
        again.step()
        world.later(2 * HOLD_MS)
    for one in (driver, again):
        assert counted(one) == {TRIAL: (349, 110), LIVE: (300, 110)}
    driver.close()
    again.close()


def test_the_report_is_stored_for_status_and_metrics(world: World) -> None:
    driver = world.driver()
    assert world.experiments.read_report(RolloutReport) is None
    world.expose(TRIAL, range(1, 101))
    world.expose(LIVE, range(101, 201))
    for _ in range(2):
        driver.step()
        world.later(2 * HOLD_MS)
    found = Experiments(world.settings).read_report(RolloutReport)
    assert found is not None and found.arms[TRIAL].users == 100 and found.arms[LIVE].answers == 100
    assert found.finding == "too early" and found.difference.low is None
    newest = world.experiments.get("wider")
    by = By("ann", "again", world.clock())
    assert found.is_of(newest) and not found.is_of(newest.back(by).start_rollout((5.0,), 60.0, 0, 0, by))
    driver.close()


def test_an_engagement_waits_for_the_exposure_before_it(world: World) -> None:
    """The exposure comes through files and the applier, and is read after the click that followed it."""
    driver = world.driver()
    shown_ms = world.clock()
    world.later(100)
    world.engage(range(7, 8))
    driver.step()
    late = Exposure(f"{7:016x}", "wider", 0, 0.5, LIVE, shown_ms, 900)
    with world.log.writer() as writer:
        writer.send(EXPOSURES, None, b"7", evidence.encode_exposure(late))
    driver.step()
    world.later(HOLD_MS)
    driver.step()
    assert counted(driver)[LIVE] == (1, 1)
    driver.close()


def test_a_report_has_the_engagements_of_the_moment_before_it(world: World) -> None:
    world.clock.now_ms = wall_ms() - FILE_MS - SETTLED_MS
    world.expose(LIVE, range(1, 101))
    world.engage(range(1, 41))
    found = evaluate(world.settings, world.experiments.get("wider"), world.log)
    assert found.arms[LIVE].rate == 0.4


def test_in_a_log_with_labels_positive_rows_are_engagements(world: World) -> None:
    world.settings = replace(world.settings, events=replace(world.settings.events, label="liked"))
    driver = world.driver()
    world.expose(LIVE, range(1, 100))
    world.engage(range(1, 50), label=0.0)
    world.engage(range(50, 60), label=1.0)
    for _ in range(2):
        driver.step()
        world.later(2 * HOLD_MS)
    assert counted(driver)[LIVE] == (99, 10)
    driver.close()


def test_the_gate_decides_once_all_is_read_and_a_step_is_over(world: World) -> None:
    driver = world.driver()
    world.expose(TRIAL, range(1, 300))
    world.expose(LIVE, range(300, 600))
    assert driver.step().newest.actor == "ann"
    world.later(60_000)
    second = driver.step()
    assert (second.share, second.newest.actor) == (1.0, "gate")
    assert world.experiments.get("wider") == second
    world.expose(TRIAL, range(1, 100), step=1, failed=True)
    driver.step()
    gone = driver.step()
    assert (gone.phase, gone.share) == ("back", 0.0) and "it fails in 100.0% of its answers" in gone.newest.reason
    driver.close()


def test_exposures_wait_on_the_disk_while_the_topic_is_away(world: World, tmp_path: Path) -> None:
    away = ExposureForwarder(world.folder, MemoryLog(), EXPOSURES, world.clock)
    world.spool.write(evidence.encode_exposure(Exposure(f"{7:016x}", "wider", 0, 0.5, LIVE, 1, 900)))
    world.later(SETTLED_MS)
    with pytest.raises(UnknownTopic):
        away.step()
    assert len(list(world.folder.iterdir())) == 1
    assert world.forwarder.step() == 1 and list(world.folder.iterdir()) == []


def test_the_oldest_exposures_make_room(world: World) -> None:
    for _ in range(5):
        world.spool.write(b"x" * 999)
        world.later(FILE_MS)
    oldest = sorted(world.folder.iterdir())[:3]
    assert make_room(world.folder, 2500) == 3 and not any(path.exists() for path in oldest)
    assert make_room(world.folder, 2500) == 0

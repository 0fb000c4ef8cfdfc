"""A trial that learned past clicks, and then the log behind the cut, is the live trainer to the last bit, wherever it was killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.experiments.commands import first_control
from state.config.sections import RetrainSettings
from state.errors import RegistryError
from state.events.identity import load_salt
from state.experiments.experiment import By
from state.experiments.past import Past, past_until, read_past, write_past
from state.registry.registry import Registry
from streaming.past import run
from tests.e2e import small_loop
from tests.e2e.small_loop import BATCH, Dead, SmallLoop, kill_at, lowered
from tests.streaming.streams import BEGIN_MS, click
from tests.trainer.clicks import small_settings
from tests.trainer.logs import ABOUT, bits_of, learner, run_to_end, trainer_of
from trainer.beginning import FromPast
from trainer.learner import Learner

pytestmark = pytest.mark.usefixtures("no_plan")
BEFORE, BEHIND = 6 * BATCH, 3 * BATCH
POINTS = ("past.learned", "publish.written")
RARE_POINTS = ("past.stepped:3", "publish.renamed", "loop.stepped:2")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, salt: Path) -> Iterator[tuple[SmallLoop, Past]]:
    """A loop that learned clicks, the past up to a version of it, and more clicks behind that."""
    made = SmallLoop(tmp_path_factory.mktemp("past") / "loop", salt)
    for first, count in ((0, BEFORE), (BEFORE, BEHIND)):
        numbers = range(first, first + count)
        made.click([click(number) for number in numbers], [BEGIN_MS + number * 1000 for number in numbers])
        made.settle()
        if not first:
            past = past_until(made.newest, RetrainSettings(days=3650))
    yield made, past
    made.close()


class PastTrial:
    """A trial beside a loop."""

    def __init__(self, loop: SmallLoop, folder: Path, past: Past) -> None:
        self.loop, self.registry, self.past, self.deaths = loop, Registry(folder), past, list[str]()
        self.registry.propose(first_control(loop.control, None, None, By("ann", "to see", 5)))
        write_past(folder, past)
        places = ("--paths.state", loop.settings.paths.state, "--paths.registry", str(folder))
        self.flags = (*places, "--stream.metrics_port", "0", "--stream.cut_rows", str(BATCH))

    @contextmanager
    def records(self) -> Iterator[Iterator[bytes]]:
        """What the child writes, made in this process."""
        found: list[bytes] = []
        run(small_settings(*self.flags), self.past, self.loop.log, found.append)
        yield iter(found)

    def start(self) -> Learner:
        """The trial's trainer, in its epoch."""
        about = {**ABOUT, "salt": load_salt(self.loop.settings.salt_path).fingerprint}
        begins = FromPast(self.past, self.records)
        program = self.registry.specs.add_program(lowered())
        return learner(
            self.registry,
            self.loop.log,
            *self.flags[:4],
            about=about,
            program=program,
            begins=begins,
        )

    def run(self) -> Learner:
        """Learns all that there is, again where it is killed."""
        while True:
            try:
                with small_loop.armed_for("trial"):
                    made = self.start()
                    run_to_end(made)
                    return made
            except Dead as death:
                self.deaths.append(str(death))


@pytest.mark.parametrize(
    "point", ["", *POINTS, *(pytest.param(point, marks=pytest.mark.nightly) for point in RARE_POINTS)]
)
def test_each_click_is_learned_once_and_the_result_is_the_live_trainer(
    loop: tuple[SmallLoop, Past], tmp_path: Path, point: str
) -> None:
    live, past = loop
    trial = PastTrial(live, tmp_path / "trial", past)
    if point:
        kill_at("trial", point)
    made = trial.run()
    assert trial.deaths == [point] * bool(point)
    training = live.parts["trainer"]
    assert isinstance(training, small_loop.Training)
    theirs = training._learner
    assert (made.place.marks, made.place.next) == (theirs.place.marks, theirs.place.next)
    assert trainer_of(made).counters.trained == trainer_of(theirs).counters.trained == BEFORE + BEHIND
    assert bits_of(made) == bits_of(theirs)
    # The first version is the past, and the log goes on from it where the live one stood.
    first = trial.registry.manifest(trial.registry.versions()[0])
    assert (first.rows, first.marks, first.log.next) == (BEFORE, past.marks, past.log.next)
    made.close()


def test_before_anything_was_learned_there_is_no_cut(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no version that learned anything yet"):
        past_until(None, RetrainSettings())
    assert read_past(tmp_path) is None

"""A trial begins from the live version or from nothing, forgets whom the live trainer forgets, and what it learned can go live and back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from deploy.experiments.commands import copied_control, experiment
from deploy.experiments.shadow import is_taken_over
from deploy.operate.erase import of_experiments
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import LockHeld, RegistryError, SettingsError
from state.experiments.comparison import ComparisonFigures, LossReader, PairedComparison, want
from state.experiments.experiment import Experiments
from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import Decision, erase, roll_back
from state.registry.registry import Registry
from tests.memory_log import MemoryLog
from tests.trainer.clicks import SMALL, SPEC, TOPIC, microbatch, small_settings
from tests.trainer.logs import ABOUT, append, learner, run_to_end, settle, started, write_transform, written
from trainer import compactor
from trainer.engine.step import Trainer
from trainer.learner import Learner
from trainer.verify import verify
from trainer.versions import checkpoint, content

HIDDEN = ("--model.hidden", "24,8")
RECORDS = [microbatch(number) for number in range(16)]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def trainers(state: Path) -> dict[str, Trainer]:
    """Traced once: the live one, another of the same model, and one with a wider layer."""
    return {
        "live": Trainer(small_settings("--paths.state", str(state)), SPEC),
        "same": Trainer(small_settings("--paths.state", str(state)), SPEC),
        "hidden": Trainer(small_settings("--paths.state", str(state), *HIDDEN), SPEC),
    }


class Live:
    """A live trainer that learned some records, and an operator beside it."""

    def __init__(self, state: Path, trainers: dict[str, Trainer]) -> None:
        self.state, self.trainers = state, trainers
        self.experiments = Experiments(self.settings())
        self.registry = started(state / "registry")
        about = {**ABOUT, "spec": SPEC.to_json(), "preprocessing": small_settings().model.preprocessing}
        if not self.registry.specs.names():
            self.registry.specs.add_spec(SPEC.digest, about, write_transform)

    def settings(self, *flags: str) -> Settings:
        return small_settings("--paths.state", str(self.state), *flags)

    def asks(
        self, what: str, name: str, *flags: str, set: tuple[str, ...] = (), origin: str | None = None
    ) -> dict[str, Any]:
        said: list[str] = []
        asked = argparse.Namespace(
            what=what, name=name, set=list(set), origin=origin, steps=None, every=None, reason="to see", output="json"
        )
        experiment(self.settings(*flags), asked, 7, said.append)
        found: dict[str, Any] = json.loads("".join(said))
        return found

    def learn(self, log: MemoryLog, *flags: str, trainer: str = "live", of: Registry | None = None) -> Learner:
        running = learner(of or self.registry, log, *flags, trainer=self.trainers[trainer])
        run_to_end(running)
        return running

    def own(self, name: str) -> Registry:
        return Registry(self.experiments.registry(name))


@pytest.fixture
def live(tmp_path: Path, state: Path, trainers: dict[str, Trainer]) -> Live:
    # The trainers know the state directory, in which a promoted trial is looked for; each test has it empty.
    for one in state.iterdir():
        one.rename(tmp_path / one.name)
    return Live(state, trainers)


def compared(live: Live, name: str) -> ComparisonFigures:
    """The comparison of all that both wrote."""
    one, readers = (
        PairedComparison(0.05, 10_000),
        [LossReader(path) for path in (live.registry.path, live.own(name).path)],
    )
    while any(found := [reader.read() for reader in readers]):
        one.add(*found)
    return one.figures()


def test_a_trial_with_the_live_settings_and_version_has_the_same_bits(live: Live) -> None:
    log = written(RECORDS[:6])
    live.learn(log).close()
    made = live.asks("start", "again")
    assert (made["stage"], made["origin"], made["epoch"]) == ("shadow", "live", 1)
    assert made["version"] == live.registry.newest(1)
    for registry in (live.registry, live.own("again")):
        want(registry.path, "again")
    append(log, RECORDS[6:])
    live.learn(log).close()
    live.learn(log, trainer="same", of=live.own("again")).close()
    assert checkpoint.digest(live.trainers["same"]) == checkpoint.digest(live.trainers["live"])
    figures = compared(live, "again")
    assert figures.records == 10 and figures.rows > 300
    assert (figures.differing, figures.difference, figures.verdict) == (0, 0.0, "the same")
    assert (figures.alone, figures.unlike) == (0, 0)


def test_a_trial_of_another_model_goes_live_with_its_settings_and_back(live: Live) -> None:
    log = written(RECORDS[:6])
    live.learn(log).close()
    live.asks("start", "wider", set=("model.hidden=24,8",))
    append(log, RECORDS[6:12])
    live.learn(log).close()
    before, old = live.registry.newest(1), checkpoint.digest(live.trainers["live"])
    assert before is not None
    with pytest.raises(RegistryError, match="no version of its own yet"):
        live.asks("promote", "wider", *HIDDEN)
    assert live.experiments.get("wider").stage == "shadow"
    live.learn(log, trainer="hidden", of=live.own("wider")).close()
    own = live.own("wider")
    learned, place = checkpoint.digest(live.trainers["hidden"]), own.manifest(own.newest(2) or 0).log.next
    assert live.trainers["hidden"].counters.steps == 12
    # The settings come first, then the live trainer rests, for it has another model.
    with pytest.raises(SettingsError, match=r"--model.hidden 24,8"):
        live.asks("promote", "wider")
    with (
        DirectoryLock(live.registry.path, "trainer.lock"),
        pytest.raises(LockHeld, match="stop `springtide up`, give this command again"),
    ):
        live.asks("promote", "wider", *HIDDEN)
    done = live.asks("promote", "wider", *HIDDEN)
    assert (done["experiment"]["stage"], done["control"]["epoch"], done["control"]["base"]) == ("promoted", 2, before)
    assert not is_taken_over(live.registry, live.experiments.get("wider"))

    # The live trainer goes on from it, and its first version holds it bit for bit.
    append(log, RECORDS[12:])
    running = learner(live.registry, log, *HIDDEN, trainer=live.trainers["hidden"])
    assert (checkpoint.digest(live.trainers["hidden"]), running.place.next) == (learned, place)
    first = live.registry.manifest(running.place.parent)
    assert (first.epoch, first.parent, first.kind) == (2, before, "delta")
    base, deltas = live.registry.chain(first.version)
    kept = content.merge(checkpoint.tensors_of(live.registry, part) for part in (base, *deltas))
    ours = checkpoint.full(live.trainers["hidden"])
    assert content.digest({name: kept[name] for name in ours}) == content.digest(ours) == learned
    assert is_taken_over(live.registry, live.experiments.get("wider"))
    run_to_end(running)
    running.close()
    assert live.trainers["hidden"].counters.steps == 16
    newest = live.registry.newest(2)
    assert newest is not None
    settings = live.settings(*HIDDEN)
    recomputed = verify(settings, live.registry, newest, None, lambda: live.trainers["hidden"], log)
    assert (recomputed.outcome, recomputed.steps) == ("equal", 4)

    # And back: the version before is as it was.
    live.registry.change(lambda now: roll_back(now, before, Mask.NONE, actor="ann", reason="worse", now_ms=9))
    back = learner(live.registry, log, trainer=live.trainers["live"])
    assert (back.place.parent, checkpoint.digest(live.trainers["live"])) == (before, old)
    back.close()


def test_a_trial_of_the_same_model_goes_live_while_the_live_trainer_runs(live: Live) -> None:
    log = written(RECORDS[:8])
    running = live.learn(log)
    settle(running)
    # It learned less, and otherwise: all rows that only the live one has go.
    live.asks("start", "anew", origin="nothing", set=("trainer.rows_per_update=16",))
    own = learner(
        live.own("anew"), written(RECORDS[:4]), "--trainer.rows_per_update", "16", trainer=live.trainers["same"]
    )
    own.tick(0.0)
    own.close()
    learned = checkpoint.digest(live.trainers["same"])
    append(log, RECORDS[8:10])
    with DirectoryLock(live.registry.path, "trainer.lock"):
        live.asks("promote", "anew", "--trainer.rows_per_update", "16")
    entered: list[str] = []
    enter = running.enter

    def look(control: Any) -> None:
        enter(control)
        entered.append(checkpoint.digest(live.trainers["live"]))

    running.enter = look  # type: ignore[method-assign]  # of this trainer alone
    run_to_end(running)
    running.close()
    assert entered == [learned]
    kept = live.registry.newest(2)
    assert kept is not None
    restored = checkpoint.digest(live.trainers["live"])
    checkpoint.restore(live.registry, kept, live.trainers["live"], SPEC.digest)
    assert checkpoint.digest(live.trainers["live"]) == restored


def test_an_erasure_reaches_a_trial_and_is_reported_as_pending_until_then(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(RECORDS[:6])
    live.learn(log).close()
    live.asks("start", "again")
    user = next(int(one) for one in decode(RECORDS[4]).user if (decode(RECORDS[7]).user == one).any())
    until = [(Source(TOPIC, part).topic, part, 20 * 16) for part in (0, 1)]
    who: Decision = {"actor": "ann", "reason": "asked to", "now_ms": 9}
    control = live.registry.change(lambda now: erase(now, MaskedUsers.of([user]), until, **who))
    settings, own = live.settings(), live.own("again")
    assert {one.where for one in of_experiments(settings, control)} >= {"experiment again: the trainer"}
    own.change(lambda mine: copied_control(mine, control))
    append(log, RECORDS[6:10])
    live.learn(log, trainer="same", of=own).close()
    assert user not in live.trainers["same"].tables["user"].known().tolist()
    newest = own.newest(2)
    assert newest is not None and own.manifest(newest).erased == 1
    left = [one.where for one in of_experiments(settings, control)]
    assert left and all("kept versions" in one for one in left)
    # As its trainer starts it; the process of the tests stays as it is.
    monkeypatch.setattr("os.nice", lambda _: 0)
    compactor.main([*SMALL, "--paths.state", str(live.state), "--paths.registry", str(own.path)])
    assert of_experiments(settings, control) == []
    # What the live registry keeps is its own compactor's to rewrite: links do not reach it.
    live.experiments.drop_registry("again")
    assert of_experiments(settings, control) == [] and live.registry.versions()


def test_wrong_arguments_are_refused_with_what_to_do(live: Live) -> None:
    live.learn(written(RECORDS[:4])).close()
    for words, refusal in {
        ("features.history=8",): "cannot be tried",
        ("model.hidden",): "there is no value",
        ("model.hiden=8",): "unknown setting model.hiden",
        ("model.preprocessing=mine:build",): "run `springtide bootstrap`",
    }.items():
        with pytest.raises(SettingsError, match=refusal):
            live.asks("start", "odd", set=words)
    with pytest.raises(SettingsError, match="is no name for an experiment"):
        live.asks("start", "../odd")
    with pytest.raises(RegistryError, match="there is no experiment odd"):
        live.asks("stop", "odd")
    assert live.experiments.document().experiments == () and list(live.experiments.path.glob("*")) == []
    live.asks("start", "odd")
    with pytest.raises(RegistryError, match="there was an experiment odd before"):
        live.asks("start", "odd")
    assert live.asks("stop", "odd")["stage"] == live.asks("stop", "odd")["stage"] == "stopped"
    with pytest.raises(RegistryError, match="is stopped and cannot be promoted"):
        live.asks("promote", "odd")

"""The budget of a trainer that is a process, on a real log: killed it spends nothing twice, at its end it holds, and `verify` knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy import status
from deploy.watch import scrape
from state.errors import SettingsError
from state.log import Log
from state.process.network import free_port
from state.registry import privacy_ledger
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.e2e.small_loop import Applying
from tests.trainer.clicks import SALT, SMALL, SPEC, microbatch
from tests.trainer.logs import write_transform
from tests.trainer.privacy.batches import at, settings
from trainer import verify

RECORDS = [microbatch(number, step_ms=21_600_000) for number in range(10)]
DEADLINE_S = 900.0
LEARNED = 6
"""Of the first two periods, which the budget is for: six hours of log time each, the first ones 14 hours into a period."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test started."""
    with ExitStack() as made:
        yield made


def said(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    """What `springtide status` says, as JSON and as text; it is not well: most of the loop is not there."""
    assert status.main([*flags, "-o", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert status.main(flags) == 1
    return document, capsys.readouterr().out


@pytest.fixture(autouse=True)
def _short_periods() -> None:
    """Replaces that of the other tests: the trainer's process has periods of a day, so its version is verified with them."""


@pytest.mark.nightly
def test_a_killed_trainer_spends_nothing_twice_holds_at_the_end_of_its_budget_and_answers_go_on(
    kafka_settings: KafkaFactory, tmp_path: Path, stack: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka, state = kafka_settings(), tmp_path / "state"
    names = ("bootstrap_servers", "clicks_topic", "microbatches_topic", "dead_letters_topic", "group", "port")
    more = [word for name in names for word in (f"--kafka.{name}", str(getattr(kafka, name)))]
    more += ["--trainer.metrics_port", str(free_port()), "--trainer.publish_s", "0.05", "--registry.durable_s", "0.05"]
    own = settings(state, *more)
    registry, log = Registry(own.registry_dir), Log(own.kafka)
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    with log.topics() as topics, log.writer(kafka.microbatches_topic) as writer:
        topics.ensure(kafka.microbatches_topic, 1)
        for value in RECORDS:
            with writer.transaction():
                writer.send(kafka.microbatches_topic, 0, None, value)

    # 1. Killed in the second period, which is paid for by then.
    killed = Part("trainer", own, tmp_path / "killed.log", kill_at="loop.stepped:5")
    stack.callback(killed.kill)
    until(lambda: killed.end(), killed.said, DEADLINE_S)
    paid = privacy_ledger.read(own.privacy_ledger_path)
    assert paid is not None and len(paid.periods) == 2 and not paid.held, killed.said()

    # 2. Started again it learns what was left of both, and holds.
    again = Part("trainer", own, tmp_path / "again.log")
    stack.callback(again.kill)

    def held() -> bool:
        assert again.end() is None, again.said()
        found = privacy_ledger.read(own.privacy_ledger_path)
        return found is not None and found.held

    until(held, again.said, DEADLINE_S)
    spent = privacy_ledger.read(own.privacy_ledger_path)
    assert spent is not None and (spent.periods, spent.spent) == (paid.periods, paid.spent)
    assert spent.spent == pytest.approx(own.privacy.epsilon)
    newest = until(lambda: with_steps(registry, LEARNED), again.said)

    # 3. Status says so, and what the page and alerts read.
    document, text = said([*SMALL, *at(state), *more], capsys)
    told = document["privacy"]
    assert isinstance(told, dict) and told["held"] and told["left"] == pytest.approx(0.0, abs=1e-4)
    assert "training holds: the privacy budget is spent" in text and "SPENT" in text
    figures = document["figures"]
    assert isinstance(figures, dict) and figures["budget"]["spent"] and figures["budget"]["epsilon"] == 8.0
    metrics = scrape.scrape({"trainer": scrape.urls(own)["trainer"]})["trainer"]
    assert metrics.value("springtide_trainer_privacy_held") == 1.0
    assert metrics.value("springtide_trainer_privacy_epsilon_spent") == spent.spent

    # 4. Answers go on: with its newest version, and with the clicks that it does not learn from.
    applying = Applying(own, log)
    stack.callback(applying.close)
    ends = {len(RECORDS) * 20}

    def answering() -> bool:
        applying.step()
        return applying.served == newest and set(applying._histories.positions().values()) == ends

    until(answering, "serving does not come to the end of the log")
    assert again.end() is None and with_steps(registry, LEARNED) == newest

    # 5. With the key the version is what was learned, without it nobody can tell, and it is said what is missing.
    assert again.stop() == 0
    assert verify.run(own, newest, None, lambda line: None).outcome == "equal"
    key = own.privacy_key_path
    key.rename(tmp_path / "elsewhere.key")
    with pytest.raises(SettingsError, match="no key of the noise") as missing:
        verify.run(own, newest, None, lambda line: None)
    assert "restore the file" in missing.value.do
    other = settings(state, *more, key="cd" * 32)
    found = verify.run(other, newest, None, lambda line: None)
    assert found.outcome == "not comparable" and "privacy.key" in found.text()


def with_steps(registry: Registry, steps: int) -> int:
    """The newest version, where so many steps were taken for it; else 0."""
    version = registry.newest(1)
    return version if version is not None and registry.manifest(version).steps == steps else 0

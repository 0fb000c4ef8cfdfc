"""A trainer that is started again, as a process on a real log: it continues from the newest version without TensorFlow."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil

from state import probe
from state.log import Log
from state.process.ports import free_port
from state.registry.registry import Registry
from tests import forked
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.e2e.running import until
from tests.trainer.clicks import SALT, SPEC, microbatch, small_settings
from tests.trainer.logs import write_transform
from trainer import verify
from trainer.model.default_model import DefaultModel
from trainer.versions import checkpoint
from trainer.versions.program import Program

RECORDS = [microbatch(number) for number in range(24)]
PACE = ("--trainer.publish_s", "0.05", "--registry.durable_s", "0.3")
DEADLINE_S = 300.0


def has_tensorflow(part: Part) -> bool:
    """Whether the process has mapped TensorFlow's libraries."""
    maps = psutil.Process(part.pid).memory_maps()
    return any("/tensorflow/" in library.path for library in maps)


def test_a_second_start_learns_and_publishes_without_tensorflow(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    flags = (*PACE, "--paths.state", str(tmp_path / "state"), "--trainer.metrics_port", str(free_port()))
    settings = replace(small_settings(*flags), kafka=kafka_settings())
    registry, log = Registry(settings.registry_dir), Log(settings.kafka)
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    topic = settings.kafka.microbatches_topic
    with log.topics() as topics:
        topics.ensure(topic, 1)

    def steps() -> int:
        newest = registry.newest(1)
        return 0 if newest is None else registry.manifest(newest).steps

    with ExitStack() as stack:

        def trained(name: str, count: int, start: type[subprocess.Popen[bytes]]) -> Part:
            """A trainer that is given the records up to `count`, and has published what it learned of them."""
            learned, began_s = steps(), time.monotonic()
            part = Part("trainer", settings, tmp_path / f"{name}.log", start=start)
            stack.callback(part.kill)
            with log.writer(topic) as writer:
                for value in RECORDS[learned:count]:
                    with writer.transaction():
                        writer.send(topic, 0, None, value)
            until(lambda: steps() == count, part.said, DEADLINE_S)
            times = psutil.Process(part.pid).cpu_times()
            took = f"{time.monotonic() - began_s:.1f} s, {times.user + times.system:.1f} s of processor time"
            print(f"{name}: {took}, {psutil.Process(part.pid).memory_info().rss >> 20} MiB")
            return part

        first = trained("first", 12, forked.Popen)
        assert has_tensorflow(first) and "with TensorFlow" in first.said()
        assert first.stop() == 0
        second = trained("second", 24, subprocess.Popen)
        assert not has_tensorflow(second) and "without TensorFlow" in second.said(), second.said()
        assert second.stop() == 0
    manifests = [registry.manifest(number) for number in registry.versions()]
    assert len({(manifest.program, *sorted(manifest.environment.items())) for manifest in manifests}) == 1
    # Its versions are what one trainer learns of the whole log, and serving accepts their answers.
    newest = manifests[-1]
    comparison = verify.run(settings, newest.version, None, lambda line: None)
    assert comparison.outcome == "equal", comparison.text()
    tensors = checkpoint.tensors_of(registry, newest)
    program = Program(registry.specs.program(newest.program))
    program.load({name.removeprefix("dense."): weight for name, weight in tensors.items() if name.startswith("dense.")})
    asked = probe.inputs(DefaultModel(settings.model, SPEC, len(SPEC.names)).shapes())
    assert probe.check(newest.version, probe.answers_in(tensors), program.predict(asked)) < probe.TOLERANCE

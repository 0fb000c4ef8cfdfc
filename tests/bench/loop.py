"""The whole loop on one machine: sustained events/s, weight freshness, memory and bytes written of each process.

    python -m tests.bench.loop [--sustained-s 180] [--bursts 200] [--memory-s 600] [--written-s 120]

Everything runs at once on the cores there are: Kafka, shoppers, stream, trainer,
applier, worker, and the client that measures. Freshness is what a client sees:
from Kafka's acknowledgement of a burst of one user's clicks to the first answer
by a version that was trained on them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from state.config.sections import Kafka
from state.log import Topics, Writer, partition_of
from state.process.wall_clock import wall_ms
from state.registry import control
from state.registry.registry import Registry
from tests.bench.report import Figure, Stages, report
from tests.disks import forget_memory
from tests.e2e.running import MODULES, Loop, until
from tests.written import Written

CLICKS = 3  # of one burst
POLL_S = 0.005
PATIENCE_S = 30.0
WARM_S = 60.0  # before bytes are counted: a start writes more
MOST_WRITTEN_GB = {200: 2, 5000: 6}  # an hour, by clicks/s
MEBI = 1024 * 1024

progress = Stages("loop")


@contextmanager
def loop_at(directory: Path, rate: float) -> Iterator[Loop]:
    """A running loop whose shoppers click `rate` times a second."""
    loop = Loop(directory, {"shoppers.rate": rate, "shoppers.users": 20_000, "bootstrap.min_rows": 2000})
    try:
        progress.say(f"start at {rate:,.0f} clicks/s")
        loop.start()
        yield loop
    finally:
        if loop.process is not None:
            loop.stop()
        forget_memory(directory)


def parts(loop: Loop) -> dict[str, psutil.Process]:
    """The processes of the loop by name."""
    pids = {name: loop.pid(name) for name in MODULES}
    pids["kafka"] = next((process.pid for process in loop.processes() if "java" in process.name()), None)
    return {name: psutil.Process(pid) for name, pid in pids.items() if pid is not None}


def memory(loop: Loop) -> dict[str, float]:
    """Resident MiB of each process."""
    return {name: process.memory_info().rss / MEBI for name, process in parts(loop).items()}


def settle(loop: Loop) -> float:
    """Waits until the clicks from before the first answer are trained on; returns the seconds it took."""
    begin = time.monotonic()

    def behind() -> bool:
        stream, trainer = loop.metrics("stream"), loop.metrics("trainer")
        return (stream.value("springtide_stream_lag_events") or 0.0) > loop.settings.shoppers.rate or (
            trainer.value("springtide_trainer_lag_records") or 0.0
        ) > 5

    while behind():
        progress.say("catching up with the start")
        if time.monotonic() - begin > 120:
            raise RuntimeError(f"the loop does not catch up with its start\n{loop.logs()}")
        time.sleep(0.5)
    return time.monotonic() - begin


def freshness(kafka: Kafka, host: str, port: int, bursts: int, fields: str = "?fields=sources") -> list[float]:
    """Seconds from acknowledged to answered by a version trained on it, one for each burst.

    Args:
        kafka: Of the clicks.
        host: Of a worker.
        port: Its port.
        bursts: How many, of `CLICKS` clicks each.
        fields: What makes an answer name its sources; a query.

    Raises:
        RuntimeError: No answer had learned a burst after `PATIENCE_S`.
    """
    worker = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    measured = []
    with Topics(kafka) as topics, Writer(kafka) as writer:
        about = topics.describe(kafka.clicks_topic)
        for number in range(bursts):
            progress.say("weight freshness", f"burst {number} of {bursts}")
            user = f"bench-shopper-{number % 50}"
            click = {"user": user, "item": f"item-{number}", "category": f"category-{number % 64}", "action": "view"}
            for _ in range(CLICKS):
                value = json.dumps(click | {"time": wall_ms()}).encode()
                writer.send(kafka.clicks_topic, None, user.encode(), value)
            writer.flush()
            acknowledged_s = time.monotonic()
            partition = partition_of(user.encode(), about.partitions)
            # Others write too: the end is at or after the burst, never before it.
            end = topics.ends(kafka.clicks_topic)[partition][1]
            source = f"{about.topic_id}:{partition}"
            while True:
                worker.request("GET", f"/v1/profiles/{user}{fields}")
                answer = json.loads(worker.getresponse().read())
                if answer["version"]["sources"].get(source, 0) >= end:
                    break
                if time.monotonic() - acknowledged_s > PATIENCE_S:
                    raise RuntimeError(f"burst {number}: no version covers {source} to {end}")
                time.sleep(POLL_S)
            measured.append(time.monotonic() - acknowledged_s)
    worker.close()
    return measured


def rollback(loop: Loop) -> float:
    """Seconds from a rollback's writing to the first answer with the version rolled back to; answers follow again afterwards."""

    def served() -> int:
        answer = loop.profile("anyone")
        return int(answer["version"]["number"]) if answer else 0

    registry, (version, _) = Registry(loop.settings.registry_dir), loop.kept()
    until(lambda: served() > version + 3, "no newer version", PATIENCE_S)
    begin = time.monotonic()
    registry.change(
        lambda now: control.roll_back(now, version, now.mask, actor="bench", reason="measured", now_ms=wall_ms())
    )
    until(lambda: served() == version, f"version {version} is not served", PATIENCE_S)
    seen_s = time.monotonic() - begin
    loop.springtide("follow", "--reason", "measured")
    return seen_s


def sustained(loop: Loop, seconds: float) -> dict[str, Figure]:
    """Events/s through stream and trainer, and how the lags move."""
    times, lags, records, events, trained = [], [], [], [], []
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        progress.say("sustained", f"{time.monotonic() - begin:.0f} of {seconds:.0f} s")
        stream, trainer = loop.metrics("stream"), loop.metrics("trainer")
        times.append(time.monotonic() - begin)
        lags.append(stream.value("springtide_stream_lag_events") or 0.0)
        records.append(trainer.value("springtide_trainer_lag_records") or 0.0)
        events.append(stream.total("springtide_stream_events_total") or 0.0)
        trained.append(trainer.total("springtide_trainer_rows_total") or 0.0)
        time.sleep(1.0)
    span_s = times[-1] - times[0]
    return {
        "stream": Figure((events[-1] - events[0]) / span_s, "events/s", ">= 19800"),
        "trainer": Figure((trained[-1] - trained[0]) / span_s, "rows/s", ">= 19800"),
        "stream lag, slope (flat: below 1 % of the rate)": Figure(
            float(np.polyfit(times, lags, 1)[0]), "events/s", "<= 200"
        ),
        "stream lag, p50": Figure(float(np.percentile(lags, 50)), "events"),
        "stream lag, p99": Figure(float(np.percentile(lags, 99)), "events"),
        "trainer lag, slope": Figure(float(np.polyfit(times, records, 1)[0]), "records/s", "<= 0.1"),
        "trainer lag, p99": Figure(float(np.percentile(records, 99)), "records"),
    }


def wait(stage: str, seconds: float) -> None:
    """Lets the loop run on."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        progress.say(stage, f"{left:.0f} s to go")
        time.sleep(min(1.0, left))


def written(loop: Loop, rate: int, seconds: float) -> dict[str, Figure]:
    """GB an hour that each process writes, all of them, and the disk, whoever else writes to it."""
    running, directory = parts(loop), loop.settings.state_dir
    before = Written.now(running, directory)
    wait(f"bytes written at {rate:,} clicks/s,", seconds)
    found = Written.now(running, directory).gb_per_hour(before)
    most = {"all of them": f"<= {MOST_WRITTEN_GB[rate]}"}
    return {
        f"written at {rate:,}/s, {name}": Figure(value, "GB/h", most.get(name, "")) for name, value in found.items()
    }


def shares(loop: Loop, seconds: float = 20.0) -> dict[str, float]:
    """CPU seconds per second of each process: where two cores go."""
    running = parts(loop)
    before = {name: sum(process.cpu_times()[:2]) for name, process in running.items()}
    time.sleep(seconds)
    return {name: (sum(process.cpu_times()[:2]) - before[name]) / seconds for name, process in running.items()}


def main() -> None:
    """Takes the figures and writes build/bench/loop.json."""
    parser = argparse.ArgumentParser(description="Figures of the whole loop.")
    parser.add_argument("--sustained-s", type=float, default=180.0)
    parser.add_argument("--bursts", type=int, default=200)
    parser.add_argument("--memory-s", type=float, default=600.0)
    parser.add_argument("--written-s", type=float, default=120.0)
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    notes: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="springtide-loop-") as directory:
        quiet = Path(directory, "quiet")
        quiet.mkdir()
        with loop_at(quiet, 200) as loop:
            wait("warm-up,", WARM_S)
            figures |= written(loop, 200, options.written_s)
        with loop_at(Path(directory), 5000) as loop:
            begin = time.monotonic()
            figures["first start: first answer"] = Figure(loop.first_answer_s, "s")
            first = memory(loop)
            figures["first start: caught up after"] = Figure(settle(loop), "s")
            serving = loop.settings.serving
            measured = freshness(loop.settings.kafka, serving.host, serving.port, options.bursts)
            notes["cpu at 5k events/s"] = shares(loop)
            figures |= written(loop, 5000, options.written_s)
            wait("memory,", options.memory_s - (time.monotonic() - begin))
            last = memory(loop)
            notes["memory taken after s"] = time.monotonic() - begin
            figures["rollback: answered with the version after"] = Figure(rollback(loop), "s", "<= 1")
        p50, p99 = np.percentile(measured, [50, 99])
        figures[f"weight freshness at 5k events/s, p50 of {len(measured)}"] = Figure(1000 * float(p50), "ms", "<= 400")
        figures[f"weight freshness at 5k events/s, p99 of {len(measured)}"] = Figure(1000 * float(p99), "ms", "<= 1500")
        for name, size in first.items():
            figures[f"memory, {name}, at the first answer"] = Figure(size, "MiB")
            figures[f"memory, {name}, later"] = Figure(last.get(name, 0.0), "MiB")
        with loop_at(Path(directory), 20_000) as loop:
            figures["second start: first answer"] = Figure(loop.first_answer_s, "s")
            figures["second start: caught up after"] = Figure(settle(loop), "s")
            notes["cpu at 20k events/s"] = shares(loop)
            figures |= sustained(loop, options.sustained_s)
    report("loop", figures, notes)


if __name__ == "__main__":
    main()

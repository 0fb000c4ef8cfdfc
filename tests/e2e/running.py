"""A whole loop as its operator and its clients see it: `up` with its own Kafka, in a state directory of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from deploy import cli, status
from deploy.command_line import PROCESSES
from deploy.watch import scrape
from deploy.watch.scrape import serving_address
from state.config.loading import load
from state.config.settings import Settings
from state.log import Topics, Writer
from state.process.environment import wall_ms
from state.process.network import free_ports
from state.registry.registry import Registry

ROOT = Path(__file__).parents[2]
PORTS = (
    "kafka.port",
    "serving.port",
    "serving.grpc_port",
    "stream.metrics_port",
    "trainer.metrics_port",
    "serving.metrics_port",
    "up.metrics_port",
    "console.port",
    "up.prometheus_port",
)
SHORT: Mapping[str, object] = {
    "shoppers.rate": 40,
    "shoppers.users": 200,
    "bootstrap.min_rows": 120,
    "trainer.base_every_s": 60,
    "registry.durable_s": 1,
    # Most of what an idle loop takes is the cost of micro-batches and versions.
    "stream.cut_ms": 500,
    "trainer.publish_s": 1,
    # A machine that has other things to do is no reason to refuse an answer; what is has tests of its own.
    "serving.max_queue_ms": 60_000,
    # Only where they are looked at: each takes a second of a core to start.
    "console.port": 0,
    "validation.window_s": 0,
}
FIRST_ANSWER_S = 240.0
DEADLINE_S = 240.0
PATIENCE_S = 30.0
"""Of one question: a busy machine answers late."""
STOP_S = 240.0
MODULES = {
    "shoppers": "deploy.replay",
    "stream": "streaming.pipeline",
    "trainer": "trainer.loop",
    "applier": "deploy.serving.applier",
    "worker": "deploy.serving.rest",
    "segments": "deploy.segments.process",
    "console": "deploy.console.server",
    "kafka": "kafka.Kafka",
}

Found = TypeVar("Found")


def led_by(label: str) -> Callable[[dict[str, Any]], bool]:
    """Whether an answer's first interest is `label`."""
    return lambda answer: bool(answer["interests"][0]["label"] == label)


def counting(feature: str, count: int) -> Callable[[dict[str, Any]], bool]:
    """Whether an answer has this feature."""
    return lambda answer: bool(answer["features"][feature] == count)


def until(look: Callable[[], Found | None], what: str | Callable[[], str], deadline_s: float = DEADLINE_S) -> Found:
    """Polls until `look` finds something, or fails after `deadline_s` and says `what`, looked up then where it is called."""
    end = time.monotonic() + deadline_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"after {deadline_s:.0f} s: {what() if callable(what) else what}"
        time.sleep(0.05)


class Loop:
    """One loop; `start` may be called again after `stop`."""

    def __init__(self, directory: Path, own: Mapping[str, object] = SHORT, words: Sequence[str] = ()) -> None:
        values = free_ports(PORTS) | {"paths.state": directory / "state"} | dict(own)
        self.flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        self.settings: Settings = load(self.flags, env={})
        self.output, self._words = directory / "up.log", words
        self.process: subprocess.Popen[bytes] | None = None
        self.first_answer_s = 0.0
        self._begun_s, self._already = 0.0, 0

    def start(self, *words: str) -> None:
        """Starts `up`, with more words, and returns once it says that everything runs; notes when a client got its first answer."""
        self.begin(*words)
        self.wait_until_up()

    def begin(self, *words: str) -> None:
        """Starts `up`, with more words."""
        self._begun_s, self.first_answer_s = time.monotonic(), 0.0
        self._already = len(self.said())
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.up", *self.flags, *self._words, *words],
                cwd=ROOT,
                env={name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_up(self) -> None:
        """Returns once `up` says that everything runs."""
        process = self.process
        assert process is not None

        def is_up() -> bool:
            assert process.poll() is None, f"up ended with {process.returncode}:\n{self.said()}\n{self.logs()}"
            if not self.first_answer_s and self.profile(scrape.SAMPLE_USER):
                self.first_answer_s = time.monotonic() - self._begun_s
            return "9/9" in self.said_since_start()

        try:
            until(is_up, "the loop is not up", FIRST_ANSWER_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}\n{self.logs()}") from None

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stops `up` as Ctrl-C does; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    @property
    def running(self) -> bool:
        """Whether `up` runs."""
        return self.process is not None and self.process.poll() is None

    def said(self) -> str:
        """All lines of `up`."""
        return self.output.read_text() if self.output.exists() else ""

    def said_since_start(self) -> str:
        """The lines of `up` since its last start."""
        return self.said()[self._already :]

    def logs(self) -> str:
        """The ends of all processes' logs."""
        paths = sorted(self.settings.logs_dir.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)

    def processes(self) -> list[psutil.Process]:
        """`up` and everything below it."""
        assert self.process is not None
        try:
            up = psutil.Process(self.process.pid)
            return [up, *up.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pid(self, name: str) -> int | None:
        """The process id of one part; None while it does not run."""
        for process in self.processes():
            try:
                if MODULES[name] in process.cmdline():
                    return int(process.pid)
            except psutil.Error:
                continue
        return None

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET to a worker; status 0 where none answers."""
        status, body = scrape.fetch(serving_address(self.settings, path), timeout_s=PATIENCE_S)
        return status, json.loads(body) if status and body.startswith("{") else body

    def profile(self, user: str, **query: str) -> dict[str, Any] | None:
        """A profile with all that it can have; None where it cannot be had now."""
        asked = {"fields": "features,vector,attributes,sources", "top": "1000"} | query
        status, body = self.get(f"/v1/profiles/{user}?{urllib.parse.urlencode(asked)}")
        return body if status == 200 else None

    def kept(self) -> tuple[int, int]:
        """Version and epoch of an answer that one can go back to; not older than the answers of now."""
        registry = Registry(self.settings.registry_dir)
        version = until(lambda: self.profile("anyone"), "no answer")["version"]

        def look() -> tuple[int, int] | None:
            number, answer = registry.newest(version["epoch"]), self.profile("anyone")
            if number is None or number < version["number"] or answer is None or answer["version"]["number"] < number:
                return None
            return number, version["epoch"]

        return until(look, f"no durable version from {version['number']} on is answered from")

    def metrics(self, name: str) -> scrape.Scrape:
        """The metrics of one process, `up` among them."""
        urls = scrape.watched_urls(self.settings)
        return scrape.scrape({name: urls[name]}, lambda url: scrape.fetch(url, PATIENCE_S))[name]

    def springtide(self, command: str, *words: str) -> Any:
        """Does what an operator's command does; returns its JSON."""
        if command in PROCESSES and command != "status":
            # The command line becomes that process: it would take the test's away.
            line = [sys.executable, "-m", "deploy.cli", command, *words, "-o", "json", *self.flags]
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{command} failed: {done.stderr}"
            return json.loads(done.stdout)
        said, failed = io.StringIO(), io.StringIO()
        arguments = [*words, "-o", "json", *self.flags]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            code = status.main(arguments) if command == "status" else cli.main([command, *arguments])
        # 1 of status is that something is wrong, which it says.
        assert code == 0 or (command, code) == ("status", 1), f"{command} failed: {failed.getvalue()}"
        return json.loads(said.getvalue())

    def click(self, clicks: Sequence[tuple[str, str, str, str]]) -> dict[str, int]:
        """Sends clicks (user, item, category, action) of this moment."""
        kafka = self.settings.kafka
        now_ms = wall_ms()
        with Writer(replace(kafka, request_timeout_s=DEADLINE_S)) as writer:
            for user, item, category, action in clicks:
                click = {"user": user, "item": item, "category": category, "action": action, "time": now_ms}
                writer.send(kafka.clicks_topic, None, user.encode(), json.dumps(click).encode())
            writer.flush()
        return self.ends()

    def know(self, side: str, key: str, record: Mapping[str, object]) -> None:
        """Sends the attributes of a user or an item; acknowledged when it returns."""
        with Writer(self.settings.kafka) as writer:
            topic = self.settings.value(f"attributes.{side}_topic")
            writer.send(str(topic), 0, key.encode(), json.dumps(record).encode())
            writer.flush()

    def ends(self) -> dict[str, int]:
        """The end of each partition of the clicks."""
        with Topics(self.settings.kafka) as topics:
            topic_id = topics.describe(self.settings.kafka.clicks_topic).topic_id
            ends = topics.ends(self.settings.kafka.clicks_topic)
        return {f"{topic_id}:{partition}": end for partition, (_, end) in ends.items()}

    def if_trained_on(self, user: str, ends: dict[str, int], **query: str) -> dict[str, Any] | None:
        """An answer by a version that has learned from everything before `ends`; None as long as there is none."""
        answer = self.profile(user, **query)
        sources = answer["version"]["sources"] if answer else {}
        return answer if answer and all(sources.get(source, 0) >= end for source, end in ends.items()) else None

    def answer_trained_on(
        self, user: str, ends: dict[str, int], *wanted: Callable[[dict[str, Any]], bool], **query: str
    ) -> dict[str, Any]:
        """Waits for an answer by a version that has learned from everything before `ends`."""

        def look() -> dict[str, Any] | None:
            answer = self.if_trained_on(user, ends, **query)
            return answer if answer and all(one(answer) for one in wanted) else None

        return until(look, lambda: f"no answer of {ends} as wanted; the newest is {self.profile(user, **query)}")

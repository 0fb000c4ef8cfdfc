"""A local Flink cluster as its operator runs it, and jobs that are handed in to it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from state.config.loading import load
from state.config.settings import Settings
from state.process.part import die_with
from tests.e2e.parts import quiet_ports
from tests.e2e.running import ROOT, until

PORTS = ("flink.rest_port",)
UP_S = 240.0
# By what a process of the cluster is known.
MAINS: Mapping[str, str] = {
    "job-manager": "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
    "task-manager": "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
    "job-server": "org.apache.beam.runners.flink.FlinkJobServerDriver",
    "workers": "deploy.flink.worker_pool",
    "worker": "worker",
}


class LocalFlink:
    """One cluster, `springtide flink up` in a process of its own."""

    def __init__(self, directory: Path) -> None:
        ports = zip(PORTS, quiet_ports(len(PORTS), random.Random()), strict=True)
        values = {**dict(ports), "paths.state": directory / "state", "flink.heap_mb": 400}
        self.flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        self.settings: Settings = load(self.flags, env={})
        self.output = directory / "flink.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once a job can be handed in."""
        with self.output.open("ab") as output:
            self.process = process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "flink", "up", *self.flags],
                cwd=ROOT,
                env=clean_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with(os.getpid()),
            )

        def is_up() -> bool:
            assert process.poll() is None, f"flink up ended with {process.returncode}:\n{self.said()}"
            return "Flink runs after" in self.said()

        until(is_up, lambda: f"the cluster is not up:\n{self.said()}\n{self.logs()}", UP_S)

    def close(self) -> None:
        """Whatever still runs of it does not any more."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def springtide(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Does what the operator types: `springtide flink`, then the words."""
        line = [sys.executable, "-m", "deploy.cli", "flink", *words, *self.flags]
        return subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)

    def status(self) -> dict[str, Any]:
        """What `springtide flink status` knows."""
        done = self.springtide("status", "-o", "json")
        assert done.returncode in (0, 1), done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def submit(self, settings: Settings, log: Path, words: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Hands the stream in, as its command does; the process follows the job, and its end is not the job's."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "stream", "--runner", "flink", *words],
                cwd=ROOT,
                env=clean_environment() | replace(settings, flink=self.settings.flink).environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with(os.getpid()),
            )

    def pids(self, name: str) -> list[int]:
        """The processes of one of `MAINS`."""
        assert self.process is not None
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                words = process.cmdline()
                if MAINS[name] in words and (name == "worker" or "worker" not in words):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def said(self) -> str:
        """What `flink up` has said."""
        return self.output.read_text() if self.output.exists() else ""

    def logs(self) -> str:
        """The ends of all processes' logs."""
        paths = sorted((self.settings.flink_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


def clean_environment() -> dict[str, str]:
    """The environment without settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")}

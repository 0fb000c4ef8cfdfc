"""An operator's terminal beside the running loop, where commands of the runbook are typed."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

from deploy import cli, status
from deploy.command_line import PROCESSES
from tests import runbook
from tests.e2e.running import ROOT, Loop

STARTING = ("up", "rebuild-history", "verify")
"""What cannot be done while the loop runs, or takes long: it is taken, and what it would become is looked at."""

OF_THEIR_OWN = ("compact", "probe", "upgrade")
"""What becomes a process: a nice one, one that may run on, or one with TensorFlow."""


class Terminal:
    """An operator's terminal, in a directory where the state is .springtide.

    Args:
        loop: The running loop.
        directory: Where to type.
    """

    def __init__(self, loop: Loop, directory: Path) -> None:
        self.loop, self.directory = loop, directory
        self.typed: set[str] = set()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        (directory / ".springtide").symlink_to(loop.settings.state_dir)

    def type(self, command: str, **values: str) -> str:
        """Types one command of the page with its capitals filled in; returns what it says."""
        self.typed.add(command)
        line = runbook.filled(command, {**runbook.EXAMPLES, **values})
        line = line.replace("localhost:8501", f"localhost:{self.loop.settings.serving.port}")
        words = shlex.split(line)
        if words[0] == "springtide" and words[1] in STARTING:
            return self._take(words[1:])
        if words[0] == "springtide" and words[1] in OF_THEIR_OWN:
            line = shlex.join([sys.executable, "-m", "deploy.cli", *words[1:], *self.loop.flags])
        elif words[0] == "springtide":
            return self._do(words[1:])
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=600
        )
        # Files come and go while `du` looks at them; `grep` ends with 1 where no line matches.
        passed = (words[0] == "du" and done.stdout) or (words[0] == "grep" and done.returncode == 1)
        assert done.returncode == 0 or passed, f"{line}: {done.stderr}"
        return done.stdout

    def _do(self, words: list[str]) -> str:
        """What an operator's command says; here, for a process of its own would take a second each."""
        said, failed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            if words[0] == "status":
                code = status.main([*words[1:], *self.loop.flags])
            else:
                code = cli.main([*words, *self.loop.flags])
        # Without a condition, status says by its code whether something is wrong.
        looking = words[0] == "status" and "--wait-for" not in words
        assert code in ((0, 1) if looking else (0,)), f"{shlex.join(words)}: {failed.getvalue()}"
        return said.getvalue()

    def _take(self, words: list[str]) -> str:
        """The process that a command would become."""
        became: list[list[str]] = []
        cli.run([*words, *self.loop.flags], lambda module, flags: became.append([module, *flags]), 0, print)
        (line,) = became
        assert line[0] == PROCESSES[words[0]][0]
        return shlex.join(line)

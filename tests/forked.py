"""Processes that start where their imports end: one process imports a module of ours once and forks itself for each start.

`Popen` is `subprocess.Popen` for commands like `[sys.executable, "-m", MODULE, ...]`. The new process has its own id,
environment, arguments, directory and files, runs the module's `main` and ends as any other. Use `subprocess` where a
test is about imports, or sets what Python or Numba read when they start.

1. The first use starts the server, `python -m tests.forked ADDRESS`; test processes of one run share it.
2. A connection sends one command with its three files. The server imports the module, forks and sends the process id.
3. The child leaves the server's loop, takes the files and runs `main`. At its end the server sends the status.
4. A connection that closes earlier, such as that of a test process that ends, kills its child.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
LENGTH, NUMBER = struct.Struct("!I"), struct.Struct("!i")
FILES = 3
KILLPOINTS = "state.process.killpoints"
"""The only module of ours that reads the environment when it is imported."""


class Server:
    """The process that forks.

    Attributes:
        address: What `use` takes in other test processes.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="springtide-tests-forks-"))
        self.address = str(self._directory / "server")
        # It ends when this end of the pipe is closed, however this process ends.
        reading, self._alive = os.pipe()
        command = [sys.executable, "-m", "tests.forked", self.address]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=reading, start_new_session=True)
        os.close(reading)

    def stop(self) -> None:
        """Ends it."""
        os.close(self._alive)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


_address = ""
_own: Server | None = None


def use(address: str) -> None:
    """Uses the server of another test process."""
    global _address
    _address = address


def stop() -> None:
    """Ends the server, if this process started one."""
    global _own
    if _own is not None:
        _own.stop()
        _own = None


def _connect() -> socket.socket:
    global _own
    if not _address and _own is None:
        _own = Server()
    address, until_s = _address or (_own.address if _own else ""), time.monotonic() + PATIENCE_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            assert time.monotonic() < until_s, "the server of forks does not answer"
            time.sleep(0.02)


class Popen(subprocess.Popen[Any]):
    """A process that is forked; see the module."""

    _connection: socket.socket

    def _execute_child(
        self, args: Sequence[str], executable: object, preexec_fn: object, close_fds: object, pass_fds: object, cwd: Any,
        env: Mapping[str, str] | None, startupinfo: object, creationflags: object, shell: object, p2cread: int,
        p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int, *_: object,
    ) -> None:  # fmt: skip
        interpreter, option, module, *words = map(str, args)
        assert (interpreter, option) == (sys.executable, "-m"), f"not a module of ours: {args}"
        try:
            files = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
            request = {"module": module, "words": words, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
            data = json.dumps(request).encode()
            self._connection = _connect()
            socket.send_fds(self._connection, [LENGTH.pack(len(data))], files)
            self._connection.sendall(data)
            self.pid = _received(self._connection)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]  # private in Popen

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        self._connection.settimeout(0.0 if wait_flags & os.WNOHANG else None)
        try:
            status = _received(self._connection)
        except BlockingIOError:
            return 0, 0
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]  # private in Popen
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]  # private in Popen
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]  # private in Popen
        return self.returncode


def run(arguments: Sequence[str], **more: Any) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`, of a process that is forked."""
    timeout, check = more.pop("timeout", None), more.pop("check", False)
    if more.pop("capture_output", False):
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, **more) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(arguments, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


def _received(connection: socket.socket) -> int:
    data = connection.recv(NUMBER.size, socket.MSG_WAITALL)
    assert len(data) == NUMBER.size, "the server of forks has ended"
    return int(NUMBER.unpack(data)[0])


class Forking:
    """The server's loop."""

    def __init__(self, address: str) -> None:
        self._children: dict[int, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector = selectors.DefaultSelector()
        for file in (self._listener, self._woken, sys.stdin.fileno()):
            self._selector.register(file, selectors.EVENT_READ)

    def run(self) -> dict[str, Any] | None:
        """Returns the command in a child, and None in the server when nobody needs it any more."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    if request := self._fork():
                        return request
                elif key.fileobj == self._woken:
                    os.read(self._woken, 4096)
                    self._reap()
                elif isinstance(key.fileobj, socket.socket):
                    self._kill(key.fileobj)
                else:
                    return None

    def _fork(self) -> dict[str, Any] | None:
        connection, _ = self._listener.accept()
        try:
            head, files, _, _ = socket.recv_fds(connection, LENGTH.size, FILES)
            data = connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL)
            request: dict[str, Any] = json.loads(data)
        except (OSError, struct.error, ValueError):
            connection.close()
            return None
        if request["module"] not in sys.modules:
            # What cannot be imported is reported by the child, which tries again.
            with contextlib.suppress(Exception):
                importlib.import_module(request["module"])
            # A collection in a child would copy all pages.
            gc.collect()
            gc.freeze()
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            connection.sendall(NUMBER.pack(pid))
            self._children[pid] = connection
            self._selector.register(connection, selectors.EVENT_READ)
            return None
        self._leave([connection, *self._children.values()], files)
        return request

    def _leave(self, connections: Sequence[socket.socket], files: Sequence[int]) -> None:
        """Makes the new process what a program of its own would be."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for one in (self._listener, *connections):
            one.close()
        for own, file in enumerate(files):
            os.dup2(file, own)
        for file in (*files, self._woken, self._wakes):
            os.close(file)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection = self._children.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with connection, contextlib.suppress(OSError):
                connection.sendall(NUMBER.pack(status))

    def _kill(self, connection: socket.socket) -> None:
        """Kills the child of a connection whose other end is closed; it is reaped like any other."""
        self._selector.unregister(connection)
        for pid, other in self._children.items():
            if other is connection:
                os.kill(pid, signal.SIGKILL)


def main(address: str) -> Any:
    """The server, and in its children the module's `main`."""
    request = Forking(address).run()
    if request is None:
        return 0
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [
        path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)
    ]
    sys.stdout.reconfigure(write_through=bool(request["env"].get("PYTHONUNBUFFERED")))  # type: ignore[union-attr]  # Python opened it as a TextIOWrapper
    if KILLPOINTS in sys.modules:
        importlib.reload(sys.modules[KILLPOINTS])
    sys.argv = [request["module"], *request["words"]]
    return importlib.import_module(request["module"]).main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

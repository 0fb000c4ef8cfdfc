"""The workers of one trainer, connected by TensorFlow's collective runtime."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.errors import PortTaken, WorkerLost
from state.positions import share_of
from state.process.network import listens
from state.user_shares import SHARES

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

TIMEOUT_S = 8.0
"""The longest wait for another worker within a step."""

JOIN_S = 15
"""The longest wait, in whole seconds, for the others to join; on two idle cores it takes 1 s."""

SENT, GATHERED = 1024, 8192
"""Values of the first frame of a message and of an exchange of bytes; longer ones need a second frame."""

_POLL_S = 0.2
_KEY = 29
_LEAST = 1024


def padded(size: int) -> int:
    """The length to which an exchange of `size` elements is padded: each length has its own collective.

    >>> padded(3), padded(1025), padded(2000)
    (1024, 1152, 2048)
    """
    size = max(_LEAST, size)
    step = 1 << (size - 1).bit_length() - 4
    return -(-size // step) * step


def await_others(addresses: Sequence[str], index: int, report: Callable[[Sequence[int]], object]) -> None:
    """Waits until every other worker listens on its address, so that `Group` need not wait.

    TensorFlow holds the interpreter's lock while it waits for workers, and the process could not answer on /metrics.

    Args:
        addresses: `host:port` of each worker, in order.
        index: Of this process.
        report: Takes the indices of the missing workers at each poll, and none at the end.

    Raises:
        PortTaken: Another process listens on this worker's port.
    """
    port = int(addresses[index].rpartition(":")[2])
    others = [other for other in range(len(addresses)) if other != index]
    try:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        own = socket.create_server(("", port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise PortTaken(
            f"worker {index} of the trainer cannot listen on port {port}: {error}",
            "stop its owner or set trainer.worker_addresses",
        ) from error
    with own:
        own.settimeout(_POLL_S)
        while missing := [other for other in others if not _listens(addresses[other])]:
            report(missing)
            for _ in others:
                try:
                    own.accept()[0].close()
                except TimeoutError:
                    break
    report([])


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return listens(int(port), host.strip("[]"), _POLL_S)


class Group:
    """This process and the other workers. Not thread-safe.

    The constructor waits until all workers have joined; call `await_others` first. If they have not joined after `JOIN_S`,
    SIGALRM ends this process: one of them ended meanwhile, and TensorFlow would wait for an hour.

    Args:
        addresses: `host:port` of each worker, in order.
        index: Of this process.

    Attributes:
        index: Of this process.
        size: The number of workers.
        exchanged_s: Monotonic time of the end of the last exchange.
    """

    def __init__(self, addresses: Sequence[str], index: int) -> None:
        self.index, self.size, self.exchanged_s = index, len(addresses), time.monotonic()
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(addresses)}), task_type="worker", task_id=index, rpc_layer="grpc"
        )
        # TensorFlow holds the interpreter's lock while it waits, so only a signal without a handler ends it.
        signal.alarm(JOIN_S)
        # It starts this process's server, waits for the others and watches them. Its variables are not used.
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        signal.alarm(0)

    @property
    def leads(self) -> bool:
        """Whether this is worker 0."""
        return self.index == 0

    def owners(self, users: U64) -> I64:
        """The worker that holds each of `[n]` users, `[n]` int64."""
        return share_of(users) * self.size // SHARES

    def gather(self, values: F32, timeout_s: float = TIMEOUT_S) -> F32:
        """Exchanges `[n]` float32, with the same n on each worker; returns `[size, n]`, a row for each worker.

        Args:
            values: Of this worker.
            timeout_s: The longest wait for the others; 0: no limit.

        Raises:
            WorkerLost: A worker ended, or did not answer in time.
        """
        length = padded(values.size)
        sent = np.zeros(length, np.float32)
        sent[: values.size] = values
        with _reported():
            received = tf.raw_ops.CollectiveGatherV2(
                input=tf.constant(sent),
                **self._collective(2, length, timeout_s),
                ordering_token=[],
            ).numpy()
        self.exchanged_s = time.monotonic()
        gathered: F32 = received.reshape(self.size, length)[:, : values.size]
        return gathered

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Exchanges bytes of any length; returns those of each worker. Raises as `gather`."""
        frames = [_frame(part) for part in self.gather(_framed(data, GATHERED).view(np.float32))]
        longest = max(length for length, _ in frames)
        if longest <= 4 * (GATHERED - 1):
            return [content for _, content in frames]
        padded_data = _padded_bytes(data, longest).view(np.float32)
        return [part.tobytes()[:length] for part, (length, _) in zip(self.gather(padded_data), frames, strict=True)]

    def send(self, data: bytes, timeout_s: float = TIMEOUT_S) -> None:
        """Sends bytes from the leader to the others; see `gather` about the time limit.

        Raises:
            WorkerLost: A worker ended, or did not answer in time.
        """
        parts = [_framed(data, SENT)]
        if len(data) > 4 * (SENT - 1):
            parts.append(_padded_bytes(data, len(data)))
        for part in parts:
            with _reported():
                tf.raw_ops.CollectiveBcastSendV2(
                    input=tf.constant(part), **self._collective(1, part.size, timeout_s)
                ).numpy()

    def receive(self) -> bytes:
        """The bytes that the leader sends next; waits for them as long as the leader lives.

        Raises:
            WorkerLost: The leader ended.
        """
        length, data = _frame(self._received(SENT).view(np.float32))
        if length <= 4 * (SENT - 1):
            return data
        return self._received(padded((length + 3) // 4)).tobytes()[:length]

    def wait(self) -> None:
        """Waits until every worker calls this: the leader once it has entered an epoch for the first time."""
        self.gather(np.zeros(1, np.float32), timeout_s=0.0)

    def _received(self, length: int) -> I32:
        with _reported():
            received: I32 = tf.raw_ops.CollectiveBcastRecvV2(
                shape=[length], T=tf.int32, **self._collective(1, length, 0.0)
            ).numpy()
        return received

    def _collective(self, kind: int, length: int, timeout_s: float) -> dict[str, Any]:
        return {
            "group_size": self.size,
            "group_key": _KEY,
            "instance_key": kind << 16 | length.bit_length() << 4 | length >> length.bit_length() - 4,
            "communication_hint": "ring" if kind == 2 else "auto",
            "timeout_seconds": timeout_s,
        }


def _padded_bytes(data: bytes, length: int) -> I32:
    """`data` in an array with room for `length` bytes."""
    values = np.zeros(padded((length + 3) // 4), np.int32)
    values.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    return values


def _framed(data: bytes, size: int) -> I32:
    """The length of `data` and as much of it as fits, `[size]`."""
    values = np.zeros(size, np.int32)
    values[0] = len(data)
    part = data[: 4 * (size - 1)]
    values[1:].view(np.uint8)[: len(part)] = np.frombuffer(part, np.uint8)
    return values


def _frame(values: F32) -> tuple[int, bytes]:
    """The length and the data of a frame, which is cut off if it does not fit."""
    length = int(values.view(np.int32)[0])
    return length, values[1:].tobytes()[:length]


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        text = re.sub(r"{{.*?}}\s*|\s*\[Op:.*", "", str(error.message).splitlines()[0])
        raise WorkerLost(
            f"a worker of the trainer ended or does not answer: {text}",
            "see its log; the group starts again from the newest version",
        ) from error

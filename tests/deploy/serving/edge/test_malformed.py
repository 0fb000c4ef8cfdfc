"""Whatever a client sends, a worker answers that the client is wrong, and goes on: no failure, no end, nothing held.

`MALFORMED=10000` in the environment sends so many of each kind together, `SEED=8` others.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from deploy.kafka.configuration import free_port
from tests.deploy.serving.edge.malformed import grpc_call, grpc_request, http2_bytes, http_request
from tests.deploy.serving.grpc_api.test_profiles import call, of
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import answers, until, worker

COUNT = int(os.environ.get("MALFORMED", "2000"))
SEED = int(os.environ.get("SEED", "7"))
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)
OURS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS}
"""Codes that say that the server is at fault."""


def answered(port: int, data: bytes, wait_s: float = 30.0) -> bytes:
    """What comes back until the worker ends the connection, whose other half ends with what is sent."""
    found = b""
    # It may be refused before all of it is sent.
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=wait_s) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while more := client.recv(1 << 16):
            found += more
    return found


def answers_over_grpc(port: int) -> bool:
    """Whether a user's profile is answered."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        question = of("GetProfileRequest")(question={"user_id": "ann"})
        try:
            return bool(call(channel, "GetProfile", question, "Profile").user_id == "ann")
        except grpc.RpcError:
            return False


def failures(port: int) -> Iterator[str]:
    """The series of /metrics that count failures of the worker."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30.0).text
    for line in text.splitlines():
        code = re.match(r'springtide_requests_total\{code="(\w+)"', line)
        if code and (code[1].startswith("5") or code[1] in {one.name for one in OURS}):
            yield line


def test_malformed_requests_end_no_worker_and_are_no_failure_of_it(stores: Stores) -> None:
    """Half of them over HTTP; of the others half are messages of gRPC, half frames."""
    chance, port, grpc_port = random.Random(SEED), free_port(), free_port()
    with worker(stores, port, 1, grpc_port, timeout_s="30") as process:
        until(lambda: answers(port, "/readyz"))
        # While it prepares its first answers, /readyz is 503.
        preparing = list(failures(port))
        statuses: dict[int, int] = {}
        for _ in range(COUNT // 2):
            sent = http_request(chance)
            for status in map(int, STATUS.findall(answered(port, sent))):
                statuses[status] = statuses.get(status, 0) + 1
                assert status < 500, sent
        codes = set()
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            for _ in range(COUNT // 4):
                path, data = grpc_call(chance)
                try:
                    channel.unary_unary(path)(data, timeout=30, wait_for_ready=True)
                    codes.add(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    codes.add(error.code())
                    assert error.code() not in OURS, (path, data, error.details())
        for _ in range(COUNT // 4):
            answered(grpc_port, http2_bytes(chance), wait_s=1.0)
        # What was sent reached what it should: answers, and refusals of each kind.
        assert {200, 400, 404, 405} <= statuses.keys() and sum(statuses.values()) > COUNT // 4, statuses
        assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED} <= codes
        assert list(failures(port)) == preparing
        assert answers(port, "/v1/profiles/ann")
        until(lambda: answers_over_grpc(grpc_port))
        until(lambda: len(psutil.Process(process.pid).net_connections()) < 20)
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and "a request for" not in log and "ASGI" not in log, log[-3000:]


def test_grpc_goes_on_after_a_path_that_its_server_ends_at(stores: Stores) -> None:
    """grpc.aio's server may end at a path that is not UTF-8. The worker starts it again, also while a client watches its health."""
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 1, grpc_port) as process:
        until(lambda: answers(port, "/readyz") and answers_over_grpc(grpc_port))
        for _ in range(3):
            with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                watched = HealthStub(channel).Watch(HealthCheckRequest(), timeout=60, wait_for_ready=True)
                # gRPC's health follows /readyz within a second.
                assert any(health.status == HealthCheckResponse.SERVING for health in watched)
                answered(grpc_port, grpc_request(b"/springtide.v1.Profiles/\xa1", b"", stream=1), wait_s=1.0)
                # Not only once the call that is open ends.
                until(lambda: answers_over_grpc(grpc_port), 30)
                watched.cancel()
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log


@pytest.mark.parametrize("seed", [1, 2])
def test_malformed_requests_are_the_same_for_the_same_seed(seed: int) -> None:
    """So that what was found can be found again."""
    first, second = (random.Random(seed) for _ in range(2))
    for make in (http_request, grpc_call, http2_bytes):
        assert [make(first) for _ in range(50)] == [make(second) for _ in range(50)]

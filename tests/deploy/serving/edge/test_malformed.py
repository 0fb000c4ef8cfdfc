"""Malformed requests, the same for the same seed, harm no worker."""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import psutil
from google.protobuf.json_format import ParseDict
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from deploy.serving.requests.grpc_server import message
from deploy.watch import scrape
from state.process.network import free_port
from tests.deploy.serving.grpc_api.test_server import call, of
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import answers, until, worker

COUNT = int(os.environ.get("MALFORMED", "300"))
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
    status, text = scrape.fetch(f"http://127.0.0.1:{port}/metrics", timeout_s=30.0)
    assert status == 200, text
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
        # Of most of them gRPC waits for more, longer than the client does.
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(answered, grpc_port, wait_s=1.0), [http2_bytes(chance) for _ in range(COUNT // 4)]))
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


GETS = (
    "/v1/profiles/ann?item=i1&top=3&at=1800000000000",
    "/v1/recommendations/ann?n=5",
    "/v1/models/profile/metadata",
    "/healthz",
    "/readyz",
    "/metrics",
)
POSTS: dict[str, Any] = {
    "/v1/profiles:batch": {
        "profiles": [{"user_id": "ann", "item": "i1", "at": 5, "context": {"device": "tv"}}],
        "top": 3,
    },
    "/v1/rank": {"user_id": "ann", "items": ["i1", {"item": "i2", "category": "hats"}], "at": "2026-01-01"},
    "/v1/models/profile:predict": {"instances": [{"user_id": "ann", "item": "i1"}, {"user_id": "bob", "item": ""}]},
    "/v1/models/profile/versions/1:predict": {"inputs": {"user_id": ["ann"], "at": [5]}, "signature_name": ""},
    "/v1/models/profile/labels/stable:predict": {"instances": ["ann"]},
}
HEADERS = (
    "transfer-encoding: chunked", "connection: upgrade\r\nupgrade: websocket", "expect: 100-continue", "x: " + "y" * 40_000,
    "content-length: 3", "no colon", ": no name", "host: a", "authorization: Bearer \xff", "connection: close", "x:\ty\r\n z: 1",
)  # fmt: skip
TRAILERS = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
QUESTION = {"userId": "ann", "item": "i1", "atMs": "1800000000000"}
MODEL = {"name": "profile"}
TENSOR = {"dtype": "DT_STRING", "tensorShape": {"dim": [{"size": "1"}]}, "stringVal": ["YW5u"]}
RPCS: dict[str, tuple[str, Any]] = {
    "springtide.v1.Profiles/GetProfile": ("GetProfileRequest", {"question": QUESTION, "fields": ["vector"]}),
    "springtide.v1.Profiles/BatchGetProfiles": ("BatchGetProfilesRequest", {"questions": [QUESTION], "top": 1}),
    "springtide.v1.Profiles/Rank": ("RankRequest", {"userId": "ann", "items": [{"item": "i1", "bid": 2.0}]}),
    "springtide.v1.Profiles/Recommend": ("RecommendRequest", {"userId": "ann", "n": 5}),
    "tensorflow.serving.PredictionService/Predict": (
        "PredictRequest",
        {"modelSpec": MODEL, "inputs": {"user_id": TENSOR}},
    ),
    "tensorflow.serving.PredictionService/GetModelMetadata": (
        "GetModelMetadataRequest",
        {"modelSpec": MODEL, "metadataField": ["signature_def"]},
    ),
    "tensorflow.serving.ModelService/GetModelStatus": ("GetModelStatusRequest", {"modelSpec": MODEL}),
}


def http_request(chance: random.Random) -> bytes:
    """The bytes of one HTTP request, most of them changed; the types of values are those of `test_api_document`."""
    path = chance.choice([*GETS, *POSTS])
    body = json.dumps(POSTS[path]).encode() if path in POSTS else b""
    method = ("POST" if body else "GET") if chance.random() < 0.8 else "PUT"
    path += "" if chance.random() < 0.9 else "x"
    headers = ["host: 127.0.0.1", f"content-length: {len(body)}", *(one for one in HEADERS if chance.random() < 0.06)]
    whole = "\r\n".join((f"{method} {path} HTTP/1.1", *headers, "", "")).encode("latin-1") + body
    return mutated(chance, whole) if chance.random() < 0.5 else whole


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with some changed, taken out, put in, said twice, or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(changed) or 1)
        kind = chance.randrange(5)
        if kind == 0:
            changed[at : at + 1] = chance.randbytes(1)
        elif kind == 1:
            del changed[at : at + chance.randrange(8)]
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.randrange(1, 8))
        elif kind == 3:
            changed += changed[at:]
        else:
            del changed[at:]
    return bytes(changed)


def grpc_call(chance: random.Random) -> tuple[str, bytes]:
    """A method, known or not, and the bytes of its message, or of what is none."""
    path, (name, document) = chance.choice(list(RPCS.items()))
    whole = ParseDict(document, message(f"{path.rpartition('.')[0]}.{name}")()).SerializeToString(deterministic=True)
    whole = mutated(chance, whole) if chance.random() < 0.7 else whole
    return "/" + path + ("" if chance.random() < 0.9 else chance.choice(["x", "/"])), whole


def http2_bytes(chance: random.Random) -> bytes:
    """The bytes of a connection of gRPC: frames that do not belong there, or that are written wrongly."""
    sent = b""
    for _ in range(chance.randrange(1, 5)):
        path, data = grpc_call(chance)
        call = grpc_request(path.encode(), data, chance.choice([1, 3, 0, 2, 2**31 - 1]))
        # Only a connection begins with the preface.
        sent += call.removeprefix(PREFACE) if sent else call
        if chance.random() < 0.4:
            sent += frame(chance.randrange(11), chance.randrange(256), 1, chance.randbytes(chance.randrange(30)))
    return mutated(chance, sent) if chance.random() < 0.6 else sent


def grpc_request(path: bytes, data: bytes, stream: int) -> bytes:
    """The bytes of a connection that makes one call, rightly written."""
    names = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"a"), *TRAILERS]
    head = b"".join(literal(name, value) for name, value in names)
    body = b"\x00" + len(data).to_bytes(4, "big") + data
    return PREFACE + frame(0x4, 0, 0, b"") + frame(0x1, 0x4, stream, head) + frame(0x0, 1, stream, body)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header of HTTP/2 that no table has; shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name + bytes([min(len(value), 126)]) + value[:126]

"""Malformed requests, the same for the same seed, harm no worker."""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from deploy.serving.requests.grpc_server import message
from state.process.ports import free_port
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
    first, second = (random.Random(seed) for _ in range(2))
    for make in (http_request, grpc_call, http2_bytes):
        assert [make(first) for _ in range(50)] == [make(second) for _ in range(50)]


PATHS = (
    "/v1/profiles/ann",
    "/v1/profiles:batch",
    "/v1/rank",
    "/v1/recommendations/ann",
    "/v1/models/profile",
    "/v1/models/profile/metadata",
    "/v1/models/profile:predict",
    "/v1/models/profile/versions/1:predict",
    "/v1/models/profile/labels/stable:predict",
    "/healthz",
    "/readyz",
    "/metrics",
)
METHODS = ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "get", "BREW", "", "CONNECT", "TRACE")
PARAMETERS = ("item", "category", "at", "fields", "top", "n", "exclude_seen", "context", "context.device", "x", "")
NAMES = (
    "user_id", "users", "profiles", "items", "item", "category", "context", "at", "fields", "top", "instances", "inputs",
    "signature_name", "b64", "device", "",
)  # fmt: skip
TEXTS = (
    "ann", "i1", "", "-1", "0", "1e400", "nan", "9" * 400, "true", "1800000000000", "2026-13-99", "é", "\x00", "\ud800",
    "../..", "vector,features", "vektor", " ", "a" * 3000, "%", "１５", "+",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1.5, -0.0, 1e308)
BODIES: dict[str, Any] = {
    "/v1/profiles:batch": {
        "profiles": [{"user_id": "ann", "item": "i1", "at": 5, "context": {"device": "tv"}}],
        "top": 3,
    },
    "/v1/rank": {"user_id": "ann", "items": ["i1", {"item": "i2", "category": "hats"}], "at": "2026-01-01"},
    "/v1/models/profile:predict": {"instances": [{"user_id": "ann", "item": "i1"}, {"user_id": "bob", "item": ""}]},
    "/v1/models/profile/versions/1:predict": {"inputs": {"user_id": ["ann"], "at": [5]}, "signature_name": ""},
    "/v1/models/profile/labels/stable:predict": {"instances": ["ann"]},
}
FRAMES = (0x0, 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x8, 0x9, 0xFF)
"""DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION; none."""

TRAILERS = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
RPCS = {
    "/springtide.v1.Profiles/GetProfile": "springtide.v1.GetProfileRequest",
    "/springtide.v1.Profiles/BatchGetProfiles": "springtide.v1.BatchGetProfilesRequest",
    "/springtide.v1.Profiles/Rank": "springtide.v1.RankRequest",
    "/springtide.v1.Profiles/Recommend": "springtide.v1.RecommendRequest",
    "/tensorflow.serving.PredictionService/Predict": "tensorflow.serving.PredictRequest",
    "/tensorflow.serving.PredictionService/GetModelMetadata": "tensorflow.serving.GetModelMetadataRequest",
    "/tensorflow.serving.ModelService/GetModelStatus": "tensorflow.serving.GetModelStatusRequest",
}


def http_request(chance: random.Random) -> bytes:
    """The bytes of one HTTP request: odd in what it says, or broken in how it is written."""
    kind = chance.randrange(10)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 200))
    whole = _head_and_body(chance)
    return mutated(chance, whole) if kind < 4 else whole


def _head_and_body(chance: random.Random) -> bytes:
    path = chance.choice(PATHS)
    fit = "POST" if path in BODIES else "GET"
    method = fit if chance.random() < 0.7 else chance.choice(METHODS)
    target = _spoiled(chance, path) if chance.random() < 0.2 else path
    if chance.random() < 0.3:
        pairs = [f"{chance.choice(PARAMETERS)}={_quoted(chance)}" for _ in range(chance.randrange(1, 4))]
        target += "?" + "&".join(pairs)
    body = b""
    if method != "GET":
        document = _with_one_other(chance, BODIES[path]) if path in BODIES else _document(chance, 0)
        body = json.dumps(document).encode() if chance.random() < 0.8 else chance.randbytes(40)
        if chance.random() < 0.3:
            body = mutated(chance, body or b"{}")
    length = len(body) if chance.random() < 0.9 else chance.choice([-1, 0, 1, 10**20, "x", len(body) + 5])
    headers = [f"content-length: {length}"] if body or chance.random() < 0.1 else []
    odd = (
        "transfer-encoding: chunked", "connection: upgrade\r\nupgrade: websocket", "expect: 100-continue", "x: " + "y" * 40_000,
        "content-length: 3", "no colon", ": no name", "host: a", "authorization: Bearer \xff", "connection: close", "x:\ty\r\n z: 1",
    )  # fmt: skip
    headers += [one for one in odd if chance.random() < 0.06]
    headers += ["host: 127.0.0.1"] if chance.random() < 0.95 else []
    version = "HTTP/1.1" if chance.random() < 0.9 else chance.choice(["HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "FTP/1", ""])
    return (
        f"{method} {target} {version}\r\n".encode("utf-8", "surrogatepass")
        + b"".join(one.encode("latin-1") + b"\r\n" for one in [*headers, ""])
        + body
    )


def _spoiled(chance: random.Random, path: str) -> str:
    at = chance.randrange(len(path))
    return path[:at] + chance.choice(["%ff", "%", "//", "%2F", "\x01", "é", "{user_id}", ":", "?"]) + path[at:]


def _quoted(chance: random.Random) -> str:
    """A value in a query that may stand on a request's first line, rightly percent-encoded or not."""
    text = chance.choice(TEXTS)
    return chance.choice([text.replace(" ", "+"), "%ff", "%zz", "".join(f"%{ord(one) & 0xFF:02x}" for one in text)])


def _document(chance: random.Random, depth: int) -> Any:
    """JSON with names that are known and values that are not what belongs there, or are."""
    kind = chance.randrange(7 if depth < 4 else 4)
    if kind == 0:
        return chance.choice([None, True, False])
    if kind == 1:
        return chance.choice(NUMBERS)
    if kind in (2, 3):
        return chance.choice(TEXTS)
    if kind == 4:
        return [_document(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(NAMES): _document(chance, depth + 1) for _ in range(chance.randrange(1, 5))}


def _with_one_other(chance: random.Random, document: Any) -> Any:
    """The document with another value somewhere, or as it is."""
    if chance.random() < 0.2:
        return _document(chance, 2)
    if isinstance(document, dict):
        at = chance.choice(list(document))
        name = at if chance.random() < 0.9 else chance.choice(NAMES)
        return document | {name: _with_one_other(chance, document[at])}
    if isinstance(document, list):
        changed = chance.randrange(len(document))
        return [_with_one_other(chance, one) if at == changed else one for at, one in enumerate(document)]
    return document


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
    path, name = chance.choice(list(RPCS.items()))
    whole = filled(chance, message(name)(), 0).SerializeToString(deterministic=True)
    if chance.random() < 0.5:
        whole = mutated(chance, whole) if whole else chance.randbytes(9)
    return (path if chance.random() < 0.9 else path + chance.choice(["x", "/", ""])), whole


def filled(chance: random.Random, made: Any, depth: int) -> Any:
    """The message with some of its fields set to values of their types, the least and largest among them."""
    for field in made.DESCRIPTOR.fields:
        if chance.random() < 0.4 or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            at = _scalar(chance, key)
            if value.message_type is None:
                getattr(made, field.name)[at] = _scalar(chance, value)
            else:
                filled(chance, getattr(made, field.name)[at], depth + 1)
        elif field.message_type is not None:
            inner = getattr(made, field.name)
            for one in [inner.add() for _ in range(chance.randrange(3))] if field.is_repeated else [inner]:
                filled(chance, one, depth + 1)
        elif field.is_repeated:
            getattr(made, field.name).extend(_scalar(chance, field) for _ in range(chance.randrange(3)))
        else:
            setattr(made, field.name, _scalar(chance, field))
    return made


def _scalar(chance: random.Random, field: Any) -> Any:
    if field.enum_type is not None:
        return chance.choice(list(field.enum_type.values_by_number))
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return chance.randbytes(chance.randrange(12))
        known = ("profile", "serving_default", "raw", "stable", "user_id", "signature_def")
        return chance.choice([*(one for one in TEXTS if one.isprintable()), *known])
    wide = 64 if "64" in str(field.type) or field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        return chance.choice([0, 1, 2**wide - 1])
    if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64):
        return chance.choice([0, 1, -1, 2 ** (wide - 1) - 1, -(2 ** (wide - 1))])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return chance.random() < 0.5
    return chance.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])


def http2_bytes(chance: random.Random) -> bytes:
    """The bytes of a connection of gRPC: frames that do not belong there, or that are written wrongly."""
    sent = PREFACE + frame(0x4, 0, 0, b"") if chance.random() < 0.9 else b""
    for _ in range(chance.randrange(1, 5)):
        path, data = grpc_call(chance)
        stream = chance.choice([1, 3, 0, 2, 2**31 - 1])
        head = b"".join(
            literal(name, value)
            for name, value in ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"a"),
                                *TRAILERS)
            if chance.random() < 0.95
        )  # fmt: skip
        length = len(data) if chance.random() < 0.6 else chance.choice([0, 2**32 - 1, len(data) + 7])
        body = bytes([chance.choice([0, 0, 0, 1, 255])]) + length.to_bytes(4, "big") + data
        sent += frame(0x1, 0x4, stream, head) + frame(0x0, chance.choice([0, 1]), stream, body)
        if chance.random() < 0.4:
            sent += frame(chance.choice(FRAMES), chance.randrange(256), stream, chance.randbytes(chance.randrange(30)))
    return mutated(chance, sent) if chance.random() < 0.4 else sent


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

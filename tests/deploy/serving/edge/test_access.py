"""Who is let in: tokens by role, certificates, both taken up again when their files change; over HTTP and gRPC."""

from __future__ import annotations

import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.serving.requests.access import (
    OPEN,
    OPERATE,
    READ,
    Access,
    Certificate,
    Tokens,
    are_wanted,
    make_missing,
    tokens_in,
)
from deploy.watch import scrape
from deploy.watch.scrape import serving_address
from state.config.sections import ServingSettings
from state.config.settings import Settings
from state.errors import Forbidden, SettingsError, Unauthorized
from state.process.network import free_port
from tests.deploy.serving.edge.certificates import write_certificate
from tests.deploy.serving.grpc_api.test_server import call, of
from tests.deploy.serving.http_api.test_app import app_of, ask
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import until, worker


def made_in(folder: Path) -> dict[str, str]:
    """The token of each role."""
    make_missing(folder)
    return {role: tokens_in(folder / role)[0] for role in (READ, OPERATE)}


def write_token(path: Path, text: str) -> None:
    """A file of tokens in place of the one that is there."""
    new = path.with_name("new")
    new.write_text(text)
    new.chmod(0o600)
    new.rename(path)


def test_tokens_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    first = made_in(tmp_path / "tokens")
    assert len({*first.values()}) == 2 and made_in(tmp_path / "tokens") == first
    assert make_missing(tmp_path / "tokens") == []
    assert {one.stat().st_mode & 0o777 for one in (tmp_path / "tokens").iterdir()} == {0o600}
    (tmp_path / "tokens" / READ).unlink()
    assert make_missing(tmp_path / "tokens") == [tmp_path / "tokens" / READ]


def test_a_role_may_do_what_it_is_for(tmp_path: Path) -> None:
    of_role = made_in(tmp_path)
    tokens = Tokens(tmp_path)
    for role in (OPEN, READ, OPERATE):
        tokens.require(f"Bearer {of_role[OPERATE]}", role)
    tokens.require(f"bearer  {of_role[READ]} ", READ)
    tokens.require(None, OPEN)
    with pytest.raises(Forbidden):
        tokens.require(f"Bearer {of_role[READ]}", OPERATE)
    for wrong in (None, "", "Bearer", "Bearer ", of_role[READ], f"Basic {of_role[READ]}", "Bearer \xff\udcff"):
        with pytest.raises(Unauthorized):
            tokens.require(wrong, READ)


def test_files_of_tokens_are_taken_up_while_they_change(tmp_path: Path) -> None:
    """Old and new beside each other, then the new one alone; a file that cannot be used changes nothing."""
    of_role, new = made_in(tmp_path), "a-new-token-of-some-length"
    access = Access(tokens=Tokens(tmp_path))
    assert access.tokens is not None

    def may(token: str) -> bool:
        access.reload()
        assert access.tokens is not None
        try:
            access.tokens.require(f"Bearer {token}", READ)
        except Unauthorized:
            return False
        return True

    write_token(tmp_path / READ, f"{of_role[READ]}\n{new}\n")
    assert may(of_role[READ]) and may(new)
    write_token(tmp_path / READ, f"{new}\n")
    assert may(new) and not may(of_role[READ])
    for unusable in ("", "short\n", "\u00e9" * 40):
        write_token(tmp_path / READ, unusable)
        assert may(new)


def test_tokens_that_others_can_read_are_refused(tmp_path: Path) -> None:
    made_in(tmp_path)
    (tmp_path / READ).chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        Tokens(tmp_path)


@pytest.mark.parametrize(
    ("host", "tokens", "wanted"),
    [
        ("127.0.0.1", "auto", False),
        ("::1", "auto", False),
        ("localhost", "auto", False),
        ("0.0.0.0", "auto", True),
        ("::", "auto", True),
        ("10.0.0.7", "auto", True),
        ("shop.example", "auto", True),
        ("0.0.0.0", "off", False),
        ("127.0.0.1", "on", True),
    ],
)
def test_tokens_are_wanted_where_others_reach_the_port(host: str, tokens: str, wanted: bool) -> None:
    assert are_wanted(Settings(serving=ServingSettings(host=host, tokens=tokens))) is wanted


def test_every_endpoint_but_health_and_documents_asks_for_a_token(stores: Stores, tmp_path: Path) -> None:
    """401 without one, with the header that HTTP asks for; 403 for metrics with that of a reader."""
    of_role = made_in(tmp_path / "tokens")
    app = app_of(stores, tokens=Tokens(tmp_path / "tokens"))
    open_to_all = set()
    for endpoint in app.endpoints:
        method = endpoint.methods[0] if endpoint.methods else "GET"
        answer = ask(app, method, endpoint.path.replace("{", "").replace("}", ""))
        if answer.status_code != 401:
            open_to_all.add(endpoint.name)
        else:
            assert answer.headers["www-authenticate"] == "Bearer" and answer.json()["do"]
    assert open_to_all == {"healthz", "readyz", "openapi", "docs"}
    reader, operator = ({"authorization": f"Bearer {of_role[role]}"} for role in (READ, OPERATE))
    assert ask(app, "GET", "/v1/profiles/ann", headers=reader).status_code == 200
    assert ask(app, "GET", "/metrics", headers=reader).status_code == 403
    assert ask(app, "GET", "/metrics", headers=operator).status_code == 200
    app.close()


def test_a_certificate_that_cannot_be_used_is_refused_and_the_one_before_goes_on(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(cert, key)
    access = Access(Certificate(cert, key))
    write_certificate(cert, tmp_path / "other.pem")
    access.reload()  # says so
    with pytest.raises(SettingsError, match=r"serving\.tls_key"):
        Certificate(cert, key)
    with pytest.raises(SettingsError, match="cannot be used"):
        Certificate(tmp_path / "none.pem", key)


def served_certificate(port: int) -> bytes:
    """That a new connection is shown (DER)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as client:
        return client.getpeercert(binary_form=True) or b""


def test_a_worker_asks_for_tokens_over_tls_and_takes_up_new_files(stores: Stores, tmp_path: Path) -> None:
    """HTTP and gRPC; the operator's own look at metrics is let in; nothing is restarted."""
    cert, key, port, grpc_port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port(), free_port()
    write_certificate(cert, key)
    more: dict[str, Any] = {"tokens": "on", "tls_cert": str(cert), "tls_key": str(key)}
    settings = replace(stores.settings, serving=replace(stores.settings.serving, port=port, **more))
    with worker(stores, port, 1, grpc_port, **more) as process:
        until(lambda: scrape.fetch(serving_address(settings, "/readyz"))[0] == 200)
        reader = {"authorization": f"Bearer {tokens_in(settings.tokens_dir / READ)[0]}"}
        # 1. HTTP.
        url, trusted = f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=url, verify=trusted, timeout=30.0) as client:
            assert client.get("/v1/profiles/ann").status_code == 401
            assert client.get("/v1/profiles/ann", headers=reader).status_code == 200
        assert scrape.fetch(serving_address(settings, "/metrics"))[0] == 200
        assert (settings.tokens_dir / OPERATE).stat().st_mode & 0o777 == 0o600
        # 2. gRPC.
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{grpc_port}", credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            asked = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
            assert asked.status == health_pb2.HealthCheckResponse.SERVING
            question = of("GetProfileRequest")(question={"user_id": "ann"})
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, "GetProfile", question, "Profile")
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert call(channel, "GetProfile", question, "Profile", list(reader.items())).user_id == "ann"
        # 3. Other files.
        newer = write_certificate(cert, key)
        until(lambda: served_certificate(port) == newer)
        until(lambda: served_certificate(grpc_port) == newer)
        write_token(settings.tokens_dir / READ, "another-token-for-readers\n")
        until(
            lambda: httpx.get(f"{url}/v1/profiles/ann", headers=reader, verify=False, timeout=30.0).status_code == 401
        )
        assert process.poll() is None

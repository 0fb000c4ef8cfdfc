"""Who is let in, from which page, with which token; and what a browser is told with every answer."""

from __future__ import annotations

from typing import Any

import httpx

from deploy.serving.requests.access import OPERATE, READ
from tests.deploy.console.conftest import Reached
from tests.deploy.operating import Operator

HOLD = {"generation": 1, "reason": "look first"}


def path_of(endpoint: Any) -> str:
    return str(endpoint.path).replace("{user_id}", "ann")


def test_without_a_token_only_the_page_itself_is_had_where_tokens_are_wanted(closed_console: Reached) -> None:
    with closed_console.client() as client:
        answered = {
            one.name for one in closed_console.app.endpoints
            if client.request(one.methods[0], path_of(one), json=HOLD if "POST" in one.methods else None).status_code != 401
        }  # fmt: skip
    assert answered == {"page", "session"}


def test_a_reader_reads_and_changes_nothing(reading: httpx.Client, operator: Operator) -> None:
    assert reading.get("/api/session").json() == {"open_to_read": False, "role": "read"}
    assert [one["version"] for one in reading.get("/api/versions").json()] == [1, 2, 3, 4, 5]
    for verb in ("plan", "rollback", "pin", "follow", "hold", "release", "pause", "resume", "unmask"):
        answer = reading.post(f"/api/{verb}", json=HOLD)
        assert (answer.status_code, answer.json()["do"]) == (403, "send one of the role operate")
    assert len(operator.registry.controls()) == 1


def test_changing_needs_the_token_also_where_reading_does_not(console: Reached, operator: Operator) -> None:
    with console.client() as client:
        assert client.get("/api/history").status_code == 200
        assert client.post("/api/hold", json=HOLD).status_code == 401
    with console.client(READ) as client:
        assert client.post("/api/hold", json=HOLD).status_code == 403
    assert len(operator.registry.controls()) == 1
    with console.client(OPERATE) as client:
        assert client.get("/api/session").json()["role"] == "operate"
        assert client.post("/api/hold", json=HOLD).status_code == 200
    assert [one.action for one in operator.registry.controls()] == ["start", "hold"]


def test_nothing_is_changed_by_get(operating: httpx.Client, console: Reached, operator: Operator) -> None:
    changing = [one.path for one in console.app.endpoints if "POST" in one.methods]
    assert len(changing) == 9
    for path in changing:
        answer = operating.get(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert len(operator.registry.controls()) == 1


def test_what_another_page_or_a_form_could_send_changes_nothing(operating: httpx.Client, operator: Operator) -> None:
    foreign = (
        ({"origin": "https://shop.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 400),
        ({"content-type": "application/x-www-form-urlencoded"}, 400),
    )
    for headers, status in foreign:
        sent = {"content-type": "application/json"} | headers
        answer = operating.post("/api/hold", content=b'{"generation": 1, "reason": "x"}', headers=sent)
        assert answer.status_code == status, headers
    assert len(operator.registry.controls()) == 1


def test_its_own_page_is_let_in(operating: httpx.Client, console: Reached) -> None:
    answer = operating.post("/api/hold", json=HOLD, headers={"origin": console.url, "sec-fetch-site": "same-origin"})
    assert answer.status_code == 200


def test_a_name_that_leads_here_from_elsewhere_is_refused_where_anybody_may_read(
    console: Reached, closed_console: Reached
) -> None:
    """A page of somebody else's whose name was made to mean this machine."""
    with console.client() as client:
        assert client.get("/api/history", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/api/history", headers={"host": "localhost:8502"}).status_code == 200
    with closed_console.client(READ) as client:
        assert client.get("/api/history", headers={"host": "ops.example"}).status_code == 200


def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere_and_runs_nothing_inline(
    console: Reached,
) -> None:
    with console.client() as client:
        for path, status in (("/", 200), ("/api/history", 200), ("/none", 404), ("/api/hold", 405)):
            answer = client.get(path)
            assert answer.status_code == status
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "set-cookie" not in answer.headers
            assert answer.headers["cache-control"] == ("no-cache" if path == "/" else "no-store")

"""Items over HTTP: what is asked in the documented form is answered, all else is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.serving.answers.query import MOST_ITEMS
from deploy.serving.rest import App
from state.events.identity import public_id
from tests.deploy.serving.http_api.test_app import app as app
from tests.deploy.serving.http_api.test_app import ask


def test_items_are_ranked_for_a_user(app: App) -> None:
    body = {"user_id": 7, "items": [3, {"item": "i1"}, {"item": "i2", "category": "hats"}], "at": 1500}
    answer = ask(app, "POST", "/v1/rank", json=body).json()
    assert list(answer) == ["user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "items"]
    assert (answer["user_id"], answer["cold_start"], answer["at_ms"], answer["clock"]) == ("7", True, 1500, "request")
    assert sorted((one["item"], one["category"]) for one in answer["items"] if one["category"]) == [
        ("i1", "hats"),
        ("i2", "hats"),
    ]
    assert all(0 < one["probability"] < 1 for one in answer["items"])


def test_items_are_ranked_by_bids_without_those_over_their_caps(app: App) -> None:
    cap = {"count": 1, "within_s": 3600}
    items = [{"item": "i1", "bid": 9, "cap": cap}, {"item": "i2", "bid": 0}, {"item": "i3", "bid": 0.5, "cap": cap}]
    answer = ask(app, "POST", "/v1/rank", json={"user_id": "ann", "items": items}).json()
    assert list(answer) == ["user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "items", "left_out"]
    assert [(one["item"], one["bid"]) for one in answer["items"]] == [("i3", 0.5), ("i2", 0.0)]
    assert all(list(one) == ["item", "category", "probability", "bid", "expected_value"] for one in answer["items"])
    assert answer["left_out"] == [{"item": "i1", "reason": "cap", "seen": 1}]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "-1e400"])
def test_a_bid_that_is_no_finite_number_is_refused(app: App, number: str) -> None:
    body = f'{{"user_id": "ann", "items": [{{"item": "a", "bid": {number}}}]}}'
    response = ask(app, "POST", "/v1/rank", content=body)
    assert response.status_code == 400 and response.json()["do"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ([], "expected `object`"),
        ({"user_id": "ann"}, "missing required field `items`"),
        ({"user_id": "ann", "items": []}, "/items: expected `array` of length >= 1"),
        ({"user_id": "ann", "items": ["a"] * (MOST_ITEMS + 1)}, "/items: expected `array` of length <= 1000"),
        ({"user_id": "ann", "items": ["a", None]}, "/items/1: "),
        ({"user_id": "ann", "items": [{"item": "a", "colour": "red"}]}, "/items/0: object contains unknown field"),
        ({"user_id": "ann", "items": ["a"], "at": "soon"}, "soon"),
        ({"user_id": "ann", "items": [{"item": "a", "bid": -1}]}, "/items/0/bid: expected `float` >= 0"),
        ({"user_id": "ann", "items": [{"item": "a", "bid": 1}, "b"]}, "item 1 has no bid"),
        (
            {"user_id": "ann", "items": [{"item": "a", "cap": {"count": 3}}]},
            "/items/0/cap: object missing required field `within_s`",
        ),
        (
            {"user_id": "ann", "items": [{"item": "a", "cap": {"count": 0, "within_s": 3}}]},
            "/items/0/cap/count: expected `int` >= 1",
        ),
        ({"user_id": "ann", "items": [{"item": "a", "cap": {"count": 300, "within_s": 9}}]}, "cap of 300 times"),
        ({"user_id": "ann", "items": [{"item": "a", "cap": {"count": 1, "within_s": 1e7}}]}, "within 10000000.0 s"),
    ],
)
def test_what_is_not_of_the_documented_form_is_refused(app: App, body: Any, what: str) -> None:
    response = ask(app, "POST", "/v1/rank", json=body)
    assert response.status_code == 400 and what in response.json()["error"] and response.json()["do"]


def test_items_are_recommended_to_a_user(app: App) -> None:
    """In the form of the document; what the user clicked is left out where that is asked for."""
    answer = ask(app, "GET", "/v1/recommendations/ann").json()
    assert list(answer) == ["user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "items"]
    assert all(list(one) == ["item", "id", "category", "probability", "reason"] for one in answer["items"])
    again = {one["id"] for one in answer["items"] if one["reason"] == "again"}
    assert again == {f"{public_id(item):016x}" for item in ("i1", "i2")}
    for exclude in ("clicked", "shown,clicked"):
        others = ask(app, "GET", f"/v1/recommendations/ann?exclude={exclude}").json()["items"]
        assert not again & {one["id"] for one in others}
    assert again <= {one["id"] for one in ask(app, "GET", "/v1/recommendations/ann?exclude=shown").json()["items"]}
    assert len(ask(app, "GET", "/v1/recommendations/ann?n=1").json()["items"]) == 1


def test_the_items_nearest_to_a_user_are_answered(app: App) -> None:
    items: list[Any] = []
    while not items:
        answer = ask(app, "GET", "/v1/similar/ann?n=5").json()
        items = answer["items"]
    assert list(answer) == ["user_id", "known", "cold_start", "version", "at", "at_ms", "clock", "items"]
    assert [list(one) for one in items] == [["item", "id", "category", "similarity"]]
    assert (items[0]["id"], items[0]["category"]) == (f"{public_id('i1'):016x}", "hats")
    assert ask(app, "GET", "/v1/similar/ann?exclude=clicked").json()["items"] == []
    assert ask(app, "GET", "/v1/similar/nobody").json()["cold_start"]


@pytest.mark.parametrize("path", ["recommendations", "similar"])
@pytest.mark.parametrize(
    "query", ["n=0", "n=101", "n=x", "exclude=seen", "exclude=clicked,", "exclude_seen=true", "at=soon"]
)
def test_what_cannot_be_recommended_is_refused(app: App, path: str, query: str) -> None:
    response = ask(app, "GET", f"/v1/{path}/ann?{query}")
    found = response.json()
    assert response.status_code == 400 and query.split("=")[0] in found["where"] and found["error"] and found["do"]
    assert not query.startswith("exclude") or "exclude" in found["do"]

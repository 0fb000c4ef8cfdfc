"""The service `springtide.v1.Profiles` answers what HTTP answers, to a client of its own messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import httpx
import pytest

from deploy.serving.requests.grpc_server import message
from state.events.identity import public_id
from state.process.ports import free_port
from tests.deploy.serving.grpc_api.test_server import channel_to
from tests.deploy.serving.stocked import Stores
from tests.deploy.serving.test_rest import answers, until, worker


def of(name: str) -> Any:
    return message(f"springtide.v1.{name}")


def call(
    channel: grpc.Channel, method: str, request: Any, response: str, metadata: Sequence[tuple[str, str]] = ()
) -> Any:
    """One call, as a generated stub makes it."""
    ask = channel.unary_unary(
        f"/springtide.v1.Profiles/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=of(response).FromString,
    )
    return ask(request, timeout=60, wait_for_ready=True, metadata=metadata)


def test_answers_are_those_of_http_and_what_is_wrong_is_an_invalid_argument(stores: Stores) -> None:
    """Profiles alone and together, ranked items, recommendations, reasons; and the errors of each."""
    port, grpc_port = free_port(), free_port()
    with worker(stores, port, 1, grpc_port), channel_to(grpc_port) as channel:
        until(lambda: answers(port, "/readyz"), 120)
        url = f"http://127.0.0.1:{port}"
        # 1. One profile, with all that it can have.
        fields = ["features", "vector", "attributes", "sources"]
        asked = of("GetProfileRequest")(
            question={"user_id": "ann", "item": "i1", "at_ms": 1_800_000_000_000}, fields=fields
        )
        one = call(channel, "GetProfile", asked, "Profile")
        path = f"/v1/profiles/ann?item=i1&at=1800000000000&fields={','.join(fields)}"
        same = httpx.get(url + path, timeout=60, verify=False).json()
        assert (one.user_id, one.known, one.cold_start, one.at, one.clock) == (
            "ann",
            True,
            False,
            same["at"],
            "request",
        )
        assert dict(one.version.sources) == same["version"]["sources"] and one.version.number == 1
        assert [(each.label, each.id) for each in one.interests] == [
            (each["label"], each["id"]) for each in same["interests"]
        ]
        assert one.engagement.probability == pytest.approx(same["engagement"]["probability"], rel=1e-6)
        assert list(one.vector) == pytest.approx(same["vector"], rel=1e-5) and dict(one.features) == same["features"]
        # 2. Lean ones together, in order.
        many = of("BatchGetProfilesRequest")(questions=[{"user_id": name} for name in ("bob", "ann", "nobody")], top=1)
        found = call(channel, "BatchGetProfiles", many, "BatchGetProfilesResponse").profiles
        assert [each.user_id for each in found] == ["bob", "ann", "nobody"] and found[2].cold_start
        assert all(len(each.interests) == 1 and not each.features and not each.vector for each in found)
        # 3. Items.
        ranking = of("RankRequest")(
            user_id="ann", items=[{"item": "i1"}, {"item": "new", "category": "shoes"}, {"item": "x"}]
        )
        ranked = call(channel, "Rank", ranking, "RankResponse").items
        body = {"user_id": "ann", "items": ["i1", {"item": "new", "category": "shoes"}, "x"]}
        wanted = httpx.post(f"{url}/v1/rank", json=body, timeout=60, verify=False).json()["items"]
        assert [each.item for each in ranked] == [each["item"] for each in wanted]
        assert [each.category for each in ranked if each.HasField("category")] == [
            each["category"] for each in wanted if each["category"]
        ]
        ads = [{"item": "i1", "bid": 2.0, "cap": {"count": 1, "within_s": 3600}}, {"item": "x", "bid": 0.5}]
        bidding = call(
            channel, "Rank", of("RankRequest")(user_id="ann", items=ads, at_ms=1_800_000_000_000), "RankResponse"
        )
        body = {"user_id": "ann", "items": ads, "at": 1_800_000_000_000}
        same = httpx.post(f"{url}/v1/rank", json=body, timeout=60, verify=False).json()
        assert [(each.item, each.bid, each.expected_value) for each in bidding.items] == [
            (each["item"], each["bid"], each["expected_value"]) for each in same["items"]
        ]
        assert [(each.item, each.reason, each.seen) for each in bidding.left_out] == [("i1", "cap", 1)]
        assert not any(each.HasField("bid") for each in ranked)
        items = call(channel, "Recommend", of("RecommendRequest")(user_id="ann", n=5), "RecommendResponse").items
        assert {f"{public_id(item):016x}" for item in ("i1", "i2")} <= {each.id for each in items}
        assert {each.reason for each in items} >= {"again"}
        # 4. Why.
        question = {"user_id": "ann", "item": "i1", "at_ms": 1_800_000_000_000}
        why = call(channel, "Explain", of("ExplainRequest")(question=question, top=3), "Explanation")
        same = httpx.get(
            f"{url}/v1/profiles/ann/explain?item=i1&at=1800000000000&top=3", timeout=60, verify=False
        ).json()
        assert (why.item, why.HasField("label"), why.probability) == ("i1", False, pytest.approx(same["probability"]))
        assert [(each.kind, each.words) for each in why.reasons] == [
            (each["kind"], each["words"]) for each in same["reasons"]
        ]
        assert [len(each.events) for each in why.reasons] == [len(each["events"]) for each in same["reasons"]]
        # 5. Near.
        near: list[Any] = []
        until(
            lambda: (
                near.extend(call(channel, "Similar", of("SimilarRequest")(user_id="ann"), "SimilarResponse").items)
                or near
            )
        )
        (nearest,) = httpx.get(f"{url}/v1/similar/ann", timeout=60, verify=False).json()["items"]
        assert (near[0].id, near[0].category) == (nearest["id"], "hats")
        assert near[0].similarity == pytest.approx(nearest["similarity"], rel=1e-5)
        # 6. What is wrong.
        wrong = [
            ("GetProfile", of("GetProfileRequest")(), "user_id"),
            ("GetProfile", of("GetProfileRequest")(question={"user_id": "a"}, fields=["vektor"]), "vektor"),
            ("GetProfile", of("GetProfileRequest")(question={"user_id": "a", "at_ms": -1}), "no time"),
            ("BatchGetProfiles", of("BatchGetProfilesRequest")(), "profiles: expected"),
            ("Rank", of("RankRequest")(user_id="ann"), "items: expected"),
            ("Rank", of("RankRequest")(user_id="ann", items=[{"item": "a", "bid": -1.0}]), "items/0/bid: expected"),
            ("Rank", of("RankRequest")(user_id="ann", items=[{"item": "a", "cap": {"count": 1}}]), "within_s"),
            ("Recommend", of("RecommendRequest")(user_id="ann", n=101), "n: expected"),
            ("Explain", of("ExplainRequest")(question={"user_id": "ann"}, label="tractors"), "tractors"),
            ("Similar", of("SimilarRequest")(user_id="ann", n=0), "n: expected"),
        ]
        for method, request, what in wrong:
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, method, request, "Profile")
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method
            assert what in refused.value.details(), method

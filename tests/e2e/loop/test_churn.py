"""Who leaves, on the running loop: in profiles over HTTP, in batches and over gRPC, on /metrics, in `springtide status` and in versions."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import grpc

from deploy.serving.requests.grpc_server import message
from deploy.watch.address import serving_address
from state.registry.registry import Registry
from tests.e2e.running import Loop, until

USER = "shopper-1"


def test_profiles_say_how_probable_it_is_that_the_user_leaves(loop: Loop) -> None:
    def said() -> dict[str, Any] | None:
        found = loop.profile(USER)
        return found if found is not None and "churn" in found else None

    answer = until(said, "nothing is learned of who leaves")
    assert 0.0 <= answer["churn"] <= 1.0
    unknown = loop.profile("nobody-who-ever-came")
    assert unknown is not None and "churn" not in unknown
    asked = urllib.request.Request(
        serving_address(loop.settings, "/v1/profiles:batch"),
        json.dumps({"users": [USER, "nobody-who-ever-came"]}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30.0) as response:
        both = json.load(response)["profiles"]
    assert 0.0 <= both[0]["churn"] <= 1.0 and "churn" not in both[1]
    with grpc.insecure_channel(f"127.0.0.1:{loop.settings.serving.grpc_port}") as channel:
        kinds = [message(f"springtide.v1.{name}") for name in ("GetProfileRequest", "Profile")]
        ask = channel.unary_unary("/springtide.v1.Profiles/GetProfile", kinds[0].SerializeToString, kinds[1].FromString)
        told = ask(kinds[0](question={"user_id": USER}), timeout=60)
    assert told.HasField("churn") and 0.0 <= told.churn <= 1.0


def test_its_measures_are_on_metrics_in_status_and_in_versions(loop: Loop) -> None:
    def learned() -> float | None:
        return loop.metrics("trainer").value("springtide_trainer_churn_examples")

    until(lambda: (learned() or 0.0) > 100.0, "too little is learned of who leaves")
    found = loop.springtide("status")["churn"]
    assert found["examples"] > 100 and found["waiting"] > 0
    assert 0.0 < found["log_loss"] < 2.0 and 0.0 < found["auc"] < 1.0 and 0.0 < found["left"] < 1.0
    registry = Registry(loop.settings.registry_dir)

    def kept() -> bool:
        return registry.manifest(loop.kept()[0]).metrics.get("churn.total.rows", 0.0) > 100

    until(kept, "no version says what was learned of who leaves")

"""Overlays applied one over the other: what differs between them is what an API server changes in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import FOLDER, KUBECTL, WHY_NOT, Document, boxes, built, of_kind, quantity

pytestmark = pytest.mark.skipif(KUBECTL is None, reason=WHY_NOT)
EVERY = ("small", "large", "full", "flink", "shared", "standby", "halves", "workers")
# Fields of `spec` that may change: of a StatefulSet as its validation lists them, of a claim its size alone.
MUTABLE = {
    "StatefulSet": {
        "minReadySeconds",
        "ordinals",
        "persistentVolumeClaimRetentionPolicy",
        "replicas",
        "revisionHistoryLimit",
        "template",
        "updateStrategy",
    },
    "PersistentVolumeClaim": {"resources"},
}
IMMUTABLE = {"Job": {"completionMode", "selector", "template"}, "Deployment": {"selector"}}


def refused(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """The fields of `spec` whose change the API server refuses."""
    differing = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    wrong = differing - MUTABLE[kind] if kind in MUTABLE else differing & IMMUTABLE.get(kind, set())
    if kind == "PersistentVolumeClaim" and _size(new) < _size(old):
        wrong.add("resources")
    return wrong


def _size(claim: Mapping[str, Any]) -> float:
    return quantity(claim["resources"]["requests"]["storage"])


def objects(overlay: str) -> dict[tuple[str, str], Document]:
    return {(one["kind"], one["metadata"]["name"]): one for one in built(f"overlays/{overlay}")}


@pytest.mark.parametrize("overlay", EVERY)
def test_a_second_apply_keeps_the_hosts_and_disks_that_an_autoscaler_added(overlay: str) -> None:
    """`kubectl apply` leaves a field alone that the manifest does not name."""
    found = objects(overlay)
    scalers = of_kind(list(found.values()), "HorizontalPodAutoscaler")
    targets = [scaler["spec"]["scaleTargetRef"] for scaler in scalers]
    assert ("StatefulSet", "springtide-serving") in {(target["kind"], target["name"]) for target in targets}
    for target in targets:
        assert "replicas" not in found[target["kind"], target["name"]]["spec"]


@pytest.mark.parametrize("overlay", EVERY)
def test_a_new_release_is_applied_to_every_container(overlay: str, tmp_path: Path) -> None:
    base = os.path.relpath(FOLDER / "overlays" / overlay, tmp_path.resolve())
    content = {"resources": [base], "images": [{"name": "springtide", "newTag": "9.9.9"}]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    assert {box.told["image"] for box in boxes(built(str(tmp_path)))} == {"springtide:9.9.9"}


@pytest.mark.parametrize("larger", ["large", "full", "flink", "standby"])
def test_a_small_deployment_becomes_a_larger_one_in_place(larger: str) -> None:
    small, found = objects("small"), objects(larger)
    both = small.keys() & found.keys()
    assert any(small[key] != found[key] for key in both)
    wrong = {key: refused(key[0], small[key].get("spec", {}), found[key].get("spec", {})) for key in both}
    assert {key: fields for key, fields in wrong.items() if fields} == {}

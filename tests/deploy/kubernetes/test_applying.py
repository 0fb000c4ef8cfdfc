"""The rendered manifests applied by the real kubectl to a stub of the API: again, with a new release, in another size."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.kubernetes_api import Cluster, Key, cluster
from tests.manifests import FOLDER, KUBECTL, WHY_NOT, Document, boxes, built

pytestmark = pytest.mark.skipif(KUBECTL is None, reason=WHY_NOT)
EVERY = ("small", "large", "full", "flink", "shared", "standby", "halves", "workers")
SERVING = "springtide-serving"


Applied = Callable[[str], Cluster]


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Applied]:
    """Returns the cluster with one overlay applied. Each overlay is applied once and copied for each test."""
    stored: dict[str, dict[Key, Document]] = {}
    with cluster() as stub:

        def apply(overlay: str) -> Cluster:
            if overlay not in stored:
                stub.objects = {}
                done = stub.apply(FOLDER / "overlays" / overlay, tmp_path_factory.mktemp("cache"))
                assert done.returncode == 0, done.stderr
                stored[overlay] = stub.objects
            stub.objects = copy.deepcopy(stored[overlay])
            return stub

        yield apply


def release(folder: Path, overlay: str, tag: str) -> Path:
    """An overlay over one of ours, with another image."""
    folder.mkdir()
    base = os.path.relpath(FOLDER / "overlays" / overlay, folder.resolve())
    content = {"resources": [base], "images": [{"name": "springtide", "newTag": tag}]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


def replicas(stub: Cluster) -> int:
    return int(stub.objects["StatefulSet", SERVING]["spec"]["replicas"])


@pytest.mark.parametrize("overlay", EVERY)
def test_a_second_apply_changes_nothing_and_keeps_hosts_and_disks_that_the_autoscaler_added(
    overlay: str, applied: Applied, tmp_path: Path
) -> None:
    stub = applied(overlay)
    scaler = stub.objects["HorizontalPodAutoscaler", SERVING]["spec"]
    assert replicas(stub) == scaler["minReplicas"]
    stub.scale(SERVING, scaler["minReplicas"] + 2)
    before = copy.deepcopy(stub.objects)
    assert ("PersistentVolumeClaim", f"state-{SERVING}-{scaler['minReplicas'] + 1}") in before
    done = stub.apply(FOLDER / "overlays" / overlay, tmp_path)
    assert done.returncode == 0, done.stderr
    assert stub.objects == before


@pytest.mark.parametrize("overlay", EVERY)
def test_a_new_release_is_applied_to_every_container(overlay: str, applied: Applied, tmp_path: Path) -> None:
    stub = applied(overlay)
    done = stub.apply(release(tmp_path / "next", overlay, "9.9.9"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert {box.told["image"] for box in boxes(list(stub.objects.values()))} == {"springtide:9.9.9"}


@pytest.mark.parametrize("larger", ["large", "full", "flink", "standby"])
def test_a_small_deployment_becomes_a_larger_one_in_place(larger: str, applied: Applied, tmp_path: Path) -> None:
    stub = applied("small")
    done = stub.apply(FOLDER / "overlays" / larger, tmp_path)
    assert done.returncode == 0, done.stderr
    stored = {(one["kind"], one["metadata"]["name"]) for one in built(f"overlays/{larger}")}
    assert stored <= stub.objects.keys()


def test_what_must_not_change_is_refused_by_the_stub(applied: Applied, tmp_path: Path) -> None:
    stub = applied("small")
    folder = release(tmp_path / "wrong", "small", "0.1.0")
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    path = "/spec/volumeClaimTemplates/0/spec/resources/requests/storage"
    change = json.dumps([{"op": "replace", "path": path, "value": "1Gi"}])
    content["patches"] = [{"target": {"kind": "StatefulSet"}, "patch": change}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    done = stub.apply(folder, tmp_path)
    assert done.returncode == 1 and "field is immutable" in done.stderr

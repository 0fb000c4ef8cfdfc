"""What kustomize makes is valid for the current minors of Kubernetes, whole, and as large as the sizes say."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PortableOptions

from deploy.capacity import RESERVE, Load, Sizing
from deploy.watch import scrape
from springtide_client import __version__
from state import layout, storage
from state.config.sections import SegmentSettings
from streaming.distributed.job import FLINK, FlinkJob, beam_options
from streaming.pipeline import take_runner
from tests.manifests import (
    BASE,
    FOLDER,
    KUBECTL,
    OVERLAYS,
    PAGE,
    WHY_NOT,
    Box,
    Document,
    boxes,
    built,
    documents,
    of_kind,
    quantity,
    selects,
    sizes_of,
)

DISK_BYTES_S = 1e8
"""What a block device writes and reads at least, one that is worth the name."""
MINORS = ("1.35", "1.36", "1.37")
# Kinds of others, which have no place in Kubernetes' own schemas.
OTHERS = {"ServiceMonitor", "HTTPRoute", "VirtualService"}
with_kubectl = pytest.mark.skipif(KUBECTL is None, reason=WHY_NOT)
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def found(overlay: str) -> list[Document]:
    return list(built(f"overlays/{overlay}"))


def sizes(overlay: str) -> dict[str, str]:
    return sizes_of(BASE / "kustomization.yaml") | sizes_of(FOLDER / "overlays" / overlay / "kustomization.yaml")


@functools.cache
def validate(document: str, minor: str) -> None:
    """Most objects are the same in several overlays; each is checked once, because a check parses all schemas."""
    kubernetes_validate.validate(json.loads(document), minor, strict=True)


def require_valid(found: Sequence[Document], minor: str) -> None:
    ours = [one for one in found if one["kind"] not in OTHERS]
    assert len(ours) > 15
    for one in ours:
        validate(json.dumps(one), minor)


def test_each_object_as_it_stands_is_valid() -> None:
    """Without kubectl, too: what stands in the base has all that Kubernetes asks for."""
    require_valid(documents(BASE), MINORS[-1])


@with_kubectl
@pytest.mark.parametrize(
    ("overlay", "minor"),
    [
        ("small", MINORS[-1]),
        *((name, MINORS[-1]) for name in ("flink", "full", "shared", "standby", "halves", "workers")),
        *(("large", minor) for minor in MINORS),
    ],
)
def test_each_object_of_an_overlay_is_valid(overlay: str, minor: str) -> None:
    require_valid(built(f"overlays/{overlay}"), minor)


def test_what_is_not_valid_is_found() -> None:
    (trainer,) = (
        one for one in documents(BASE) if one["kind"] == "Deployment" and "trainer" in one["metadata"]["name"]
    )
    wrong = trainer | {"spec": trainer["spec"] | {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, MINORS[-1], strict=True)


@with_kubectl
@each_overlay
def test_an_overlay_has_every_object_once_in_its_namespace(overlay: str) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in found(overlay)]
    assert len(names) == len({*names})
    spaces = {one["metadata"].get("namespace") for one in found(overlay) if one["kind"] != "Namespace"}
    assert spaces == {"springtide"}
    images = {one.told["image"] for one in boxes(found(overlay))}
    assert images == {f"springtide:{__version__}"}
    sets = {one["metadata"]["name"]: one["spec"] for one in of_kind(found(overlay), "StatefulSet")}
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in of_kind(found(overlay), "HorizontalPodAutoscaler")}
    assert not any("replicas" in sets[name] for name in scaled), "an apply would undo what the autoscaler decided"


@with_kubectl
@each_overlay
def test_what_a_pod_names_is_there_or_made_by_the_readme(overlay: str) -> None:
    made = {(one["kind"], one["metadata"]["name"]) for one in found(overlay)}
    secrets = set(re.findall(r"create secret generic (\S+)", PAGE.read_text()))
    made |= {("Secret", name) for name in secrets}
    for box in boxes(found(overlay)):
        for volume in box.pod["volumes"]:
            wanted = {
                ("ConfigMap", volume.get("configMap", {}).get("name")),
                ("Secret", volume.get("secret", {}).get("secretName")),
                ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
            }
            assert {one for one in wanted if one[1]} <= made, (box.owner, volume)


@with_kubectl
def test_canary_hosts_are_a_set_of_their_own() -> None:
    """Its pods are in no service, budget or scaling of the stable set, and the other way round."""
    large = found("large")
    sets = {one["metadata"]["name"]: one for one in of_kind(large, "StatefulSet")}
    services = {one["metadata"]["name"]: one["spec"]["selector"] for one in of_kind(large, "Service")}
    for track, suffix in (("stable", ""), ("canary", "-canary")):
        hosts = sets[f"springtide-serving{suffix}"]
        labels = hosts["spec"]["template"]["metadata"]["labels"]
        assert labels["springtide/track"] == track
        assert hosts["spec"]["serviceName"] == f"springtide-serving-hosts{suffix}"
        taken = {name for name, selector in services.items() if selects({"matchLabels": selector}, labels)}
        both = {f"springtide-serving{suffix}", f"springtide-serving-hosts{suffix}"}
        assert taken == both | ({"springtide-one-host"} if track == "stable" else set())
    assert sets["springtide-serving-canary"]["spec"]["replicas"] == 1
    (budget,) = of_kind(large, "PodDisruptionBudget")
    canary = sets["springtide-serving-canary"]["spec"]["template"]["metadata"]["labels"]
    assert not selects(budget["spec"]["selector"], canary)


@with_kubectl
def test_the_overlay_of_the_readme_gives_every_claim_a_storage_class(tmp_path: Path) -> None:
    """The default class of most clusters has no ReadWriteMany: the registry's claim would wait for ever."""
    text = PAGE.read_text()
    (block,) = (one for one in re.findall(r"```yaml\n(.*?)```", text, re.S) if "kind: Kustomization" in one)
    overlay = yaml.safe_load(block)
    overlay["resources"] = [
        os.path.relpath(FOLDER / "overlays" / "mine" / one, tmp_path.resolve()) for one in overlay["resources"]
    ]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    found = built(str(tmp_path))
    claims = {one["metadata"]["name"]: one["spec"] for one in of_kind(found, "PersistentVolumeClaim")}
    classes = {name: spec["storageClassName"] for name, spec in claims.items()}
    assert claims["springtide-registry"]["accessModes"] == ["ReadWriteMany"]
    for owner in of_kind(found, "StatefulSet"):
        for template in owner["spec"]["volumeClaimTemplates"]:
            classes[owner["metadata"]["name"]] = template["spec"]["storageClassName"]
    assert len(classes) == 4 and [name for name in classes if classes[name] == "nfs"] == ["springtide-registry"]


@with_kubectl
def test_on_flink_the_stream_is_a_job_that_is_submitted_once() -> None:
    flink = found("flink")
    streams = [one for one in boxes(flink) if one.labels["app.kubernetes.io/component"] == "stream"]
    assert [one.owner for one in streams] == ["CronJob springtide-stream-submit"]
    (submit,) = streams
    assert submit.told["image"] == f"springtide:{__version__}"
    assert submit.document["spec"]["suspend"] is True
    job = submit.document["spec"]["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 0 and submit.pod["restartPolicy"] == "Never"
    settings = submit.settings(sizes("large"))
    runner, words = take_runner(submit.told["command"][2:])
    options = beam_options(runner, words, settings)
    asked, master = options.view_as(PortableOptions), options.view_as(FlinkRunnerOptions).flink_master
    _, port = asked.job_endpoint.rsplit(":", 1)
    assert runner == FLINK and asked.environment_type == "EXTERNAL"
    assert (int(port), asked.environment_config) == (settings.flink.job_port, f"localhost:{settings.flink.worker_port}")
    assert options.get_all_options()["parallelism"] >= settings.stream.sources
    # Without it nobody cancels a job that no restart mends.
    assert FlinkJob.of(options, settings, local=False) is not None
    assert master.rpartition(":")[2] == str(settings.flink.rest_port)
    (service,) = (one for one in of_kind(flink, "Service") if one["metadata"]["name"] == "springtide-stream")
    assert [one["targetPort"] for one in service["spec"]["ports"]] == [settings.stream.metrics_port]


@with_kubectl
def test_segments_are_kept_on_one_host_of_their_own_and_are_asked_there() -> None:
    full = found("full")
    sets = {one["metadata"]["name"]: one for one in of_kind(full, "StatefulSet")}
    hosts = sets["springtide-serving-segments"]
    assert hosts["spec"]["replicas"] == 1
    names = {name: [one.name for one in boxes([made]) if not one.is_first] for name, made in sets.items()}
    keeping = [name for name, containers in names.items() if "segments" in containers]
    assert keeping == ["springtide-serving-segments"], "the topic of memberships has one writer"
    assert {*names[keeping[0]]} == {*names["springtide-serving"], "segments"}
    services = {one["metadata"]["name"]: one["spec"]["selector"] for one in of_kind(full, "Service")}
    labels = hosts["spec"]["template"]["metadata"]["labels"]
    leading = {name for name, selector in services.items() if selects({"matchLabels": selector}, labels)}
    assert leading == {
        "springtide-serving-segments", "springtide-serving-hosts-segments", "springtide-segments"
    }  # fmt: skip
    assert services["springtide-segments"]["springtide/track"] == "segments"
    # `springtide status` in the console's pod finds the keeper.
    own = sizes("large") | sizes_of(FOLDER / "components" / "segments" / "kustomization.yaml")
    console = next(one for one in boxes(full) if one.name == "console").settings(own)
    asked = scrape.watched_urls(replace(console, segments=SegmentSettings(("all=1 > 0",))))
    assert asked["segments"] == f"http://springtide-segments:{console.up.segments_port}/metrics"


@with_kubectl
def test_experiments_run_next_to_the_trainer_and_steered_from_the_console() -> None:
    full = found("full")
    pods = {one.owner: one.pod for one in boxes(full) if one.name in ("experiments", "trainer", "console")}
    assert pods.keys() == {"Deployment springtide-trainer", "Deployment springtide-console"}
    (claim,) = (
        one for one in of_kind(full, "PersistentVolumeClaim") if one["metadata"]["name"] == "springtide-experiments"
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    seeing = {
        one.name for one in boxes(full) if one.mounts.get(f"/var/lib/springtide/{layout.EXPERIMENTS}") == "experiments"
    }
    # The trainer goes on from what one learned.
    assert seeing == {"experiments", "trainer", "console"}
    for pod in pods.values():
        (volume,) = (one for one in pod["volumes"] if one["name"] == "experiments")
        assert volume["persistentVolumeClaim"] == {"claimName": "springtide-experiments"}
    small = [one.name for one in boxes(found("small"))]
    assert "experiments" not in small and "segments" not in small, "off by default"


@with_kubectl
def test_a_standby_trainer_runs_on_another_node_and_a_drain_leaves_one_of_them() -> None:
    standby = found("standby")
    (trainer,) = (box for box in boxes(standby) if box.name == "trainer")
    assert trainer.document["spec"]["replicas"] == 2
    (term,) = trainer.pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname" and selects(term["labelSelector"], trainer.labels)
    budgets = {one["metadata"]["name"]: one["spec"] for one in of_kind(standby, "PodDisruptionBudget")}
    assert budgets["springtide-trainer"]["maxUnavailable"] == 1
    held = {box.owner for box in boxes(standby) if selects(budgets["springtide-trainer"]["selector"], box.labels)}
    assert held == {"Deployment springtide-trainer"}
    claims = {one["metadata"]["name"]: one["spec"]["accessModes"] for one in of_kind(standby, "PersistentVolumeClaim")}
    mounted = [
        one["persistentVolumeClaim"]["claimName"] for one in trainer.pod["volumes"] if "persistentVolumeClaim" in one
    ]
    assert {name: claims[name] for name in mounted} == {
        name: ["ReadWriteMany"] for name in ("springtide-registry", "springtide-trainers")
    }


@with_kubectl
def test_workers_of_the_trainer_have_the_addresses_and_numbers_that_the_settings_name() -> None:
    workers = found("workers")
    sizes = next(one for one in of_kind(workers, "ConfigMap") if one["metadata"]["name"] == "springtide-sizes")["data"]
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(workers, "Service")}
    (other,) = (box for box in boxes(workers) if box.name == "trainer-worker")
    settings, spec = other.settings(sizes), other.document["spec"]
    first, last = spec["ordinals"]["start"], spec["ordinals"]["start"] + spec["replicas"]
    pods = [f"{other.document['metadata']['name']}-{index}.{spec['serviceName']}" for index in range(first, last)]
    assert first == 1 and settings.trainer.workers == 1 + len(pods)
    assert [address.partition(":")[0] for address in settings.trainer.worker_addresses] == ["springtide-trainer", *pods]
    for name in ("springtide-trainer", spec["serviceName"]):
        assert services[name]["clusterIP"] == "None" and services[name]["publishNotReadyAddresses"] is True
    # The leader alone is in the service whose metrics the console reads.
    leading = [
        box.owner
        for box in boxes(workers)
        if selects({"matchLabels": services["springtide-trainer"]["selector"]}, box.labels)
    ]
    assert {*leading} == {"Deployment springtide-trainer"}


@with_kubectl
def test_each_half_is_scaled_by_itself_and_a_canary_holds_one() -> None:
    halves = found("halves")
    sets = {one["metadata"]["name"]: one for one in of_kind(halves, "StatefulSet")}
    scalers = {one["spec"]["scaleTargetRef"]["name"]: one for one in of_kind(halves, "HorizontalPodAutoscaler")}
    assert {*scalers} == {"springtide-serving", "springtide-serving-upper"}
    assert not any("replicas" in sets[name]["spec"] for name in scalers)
    budgets = [one["spec"]["selector"] for one in of_kind(halves, "PodDisruptionBudget")]
    held = {}
    for name, hosts in sets.items():
        if not name.startswith("springtide-serving"):
            continue
        labels = hosts["spec"]["template"]["metadata"]["labels"]
        assert sum(selects(selector, labels) for selector in budgets) == (name in scalers), name
        containers = [box for box in boxes([hosts]) if not box.is_first]
        env = [{one["name"]: one.get("value") for one in box.told["env"]} for box in containers]
        (held[name],) = {own["SPRINGTIDE_SERVING_SHARES"] for own in env}
        (address,) = (own["SPRINGTIDE_SERVING_ADVERTISE"] for own in env if "SPRINGTIDE_SERVING_ADVERTISE" in own)
        assert address == f"http://$(POD_NAME).{hosts['spec']['serviceName']}:8501"
    assert held == {
        "springtide-serving": "0-31", "springtide-serving-canary": "0-31", "springtide-serving-upper": "32-63"
    }  # fmt: skip


@with_kubectl
def test_over_an_object_store_no_volume_is_mounted_on_two_nodes() -> None:
    """What reads the trainer's own directory runs beside it; all others have copies, and may ask the store."""
    shared = found("shared")
    claims = {one["metadata"]["name"]: one["spec"] for one in of_kind(shared, "PersistentVolumeClaim")}
    assert claims["springtide-registry"]["accessModes"] == ["ReadWriteOnce"]
    assert not any("ReadWriteMany" in spec["accessModes"] for spec in claims.values())
    own = sizes("large") | sizes_of(FOLDER / "components" / "object-store" / "kustomization.yaml")
    beside, copies = set[str](), set[str]()
    for box in boxes(shared):
        assert box.told["image"] == f"springtide:{__version__}"
        assert box.settings(own).paths.shared_registry.startswith("s3://")
        assert {"secretRef": {"name": "springtide-object-store", "optional": True}} in box.told["envFrom"]
        (volume,) = (one for one in box.pod["volumes"] if one["name"] == "registry")
        component = box.labels["app.kubernetes.io/component"]
        (copies if "emptyDir" in volume else beside).add(component)
        if "persistentVolumeClaim" in volume and component != "trainer":
            (term,) = box.pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            (trainer,) = {one.owner for one in boxes(shared) if selects(term["labelSelector"], one.labels)}
            assert trainer == "Deployment springtide-trainer" and term["topologyKey"] == "kubernetes.io/hostname"
    assert copies == {"stream", "serving"}
    assert beside == {"trainer", "validation", "console", "compactor"}
    stream = [one.name for one in boxes(shared) if one.owner == "StatefulSet springtide-stream"]
    assert stream == ["first-copy", "rebuild-history", "stream"]


def sizing(overlay: str) -> Sizing:
    """What the first lines of an overlay say that it is for."""
    text = " ".join((FOLDER / "overlays" / overlay / "kustomization.yaml").read_text().split("\n# ")[:2]).split("`")[1]
    asked = dict(re.findall(r"--(\w+) ([\d.e]+)", text.replace("\n", " ")))
    assert asked.keys() == {"clicks", "users", "items", "answers"}
    figures: dict[str, Any] = {name: float(value) for name, value in asked.items()}
    load = Load(**figures)
    return Sizing(load, next(boxes(documents(BASE))).settings(sizes(overlay)))


def of_name(overlay: str, name: str) -> Box:
    return next(one for one in boxes(found(overlay)) if one.name == name and "canary" not in one.owner)


def claim(box: Box) -> float:
    (one,) = box.document["spec"]["volumeClaimTemplates"]
    return quantity(one["spec"]["resources"]["requests"]["storage"])


def memory_volume(box: Box) -> float:
    (one,) = (one for one in box.pod["volumes"] if one["name"] == "memory")
    assert one["emptyDir"]["medium"] == "Memory"
    return quantity(one["emptyDir"]["sizeLimit"])


@with_kubectl
@each_overlay
def test_an_overlay_is_as_large_as_the_load_that_it_says_it_is_for(overlay: str) -> None:
    wanted, needs = sizing(overlay), sizing(overlay).parts()
    for name in ("stream", "trainer", "applier"):
        request = of_name(overlay, name).told["resources"]["requests"]
        assert quantity(request["memory"]) >= RESERVE * needs[name].memory_bytes, name
        assert quantity(request["cpu"]) >= needs[name].cores, name
    stream, applier, worker = (of_name(overlay, name) for name in ("stream", "applier", "worker"))
    assert memory_volume(stream) >= RESERVE * wanted["stream_histories_bytes"]
    assert memory_volume(applier) >= RESERVE * (wanted["host_histories_bytes"] + wanted["served_bytes"])
    assert claim(stream) >= RESERVE * wanted["stream_histories_bytes"]
    assert claim(applier) >= RESERVE * wanted["host_histories_bytes"]
    (scaler,) = of_kind(found(overlay), "HorizontalPodAutoscaler")
    hosts, workers = scaler["spec"]["maxReplicas"], worker.settings(sizes(overlay)).serving.processes
    assert hosts * workers * wanted.load.use >= wanted["worker_cores"]
    assert quantity(worker.told["resources"]["requests"]["cpu"]) >= workers
    assert quantity(worker.told["resources"]["requests"]["memory"]) >= workers * wanted["worker_bytes"]


@with_kubectl
@each_overlay
def test_histories_have_the_time_that_saving_and_loading_them_takes(overlay: str) -> None:
    takes_s = sizing(overlay)["host_histories_bytes"] / DISK_BYTES_S
    for name in ("stream", "applier"):
        box = of_name(overlay, name)
        probe = box.told["startupProbe"]
        assert box.pod["terminationGracePeriodSeconds"] >= 60 + takes_s, name
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 60 + takes_s, name


@with_kubectl
@each_overlay
def test_the_settings_of_an_overlay_give_its_stores_their_room(overlay: str) -> None:
    wanted, settings = sizing(overlay), of_name(overlay, "stream").settings(sizes(overlay))
    for part in (storage.STREAM, storage.SERVING):
        assert storage.store_bytes(settings, part, layout.HISTORIES) >= wanted["host_histories_bytes"], part
    assert settings.history.max_users >= wanted.load.users
    claims = {one["metadata"]["name"]: one for one in of_kind(found(overlay), "PersistentVolumeClaim")}
    disk = quantity(claims["springtide-registry"]["spec"]["resources"]["requests"]["storage"])
    kept = min(settings.registry.delta_keep_gb * 1e9, storage.kept_bytes(settings, storage.REGISTRY))
    assert disk >= kept + 2 * wanted["base_bytes"]

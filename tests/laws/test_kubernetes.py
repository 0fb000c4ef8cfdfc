"""What `deploy/kubernetes` and the image name exists: commands, settings, ports, probes, metrics, secrets, volumes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.command_line import PROCESSES
from deploy.console.server import Reading
from deploy.serving.requests.access import OPEN, OPERATE, READ
from deploy.serving.requests.endpoints import health_endpoints
from deploy.supervisor import MALLOC
from deploy.watch import scrape
from state.config.settings import Settings
from tests.laws.test_commands_documented import check
from tests.manifests import BASE, FOLDER, KUBECTL, PAGE, ROOT, Box, boxes, built, documents, of_kind, selects, sizes_of

ALL = documents(BASE)
FULL: Sequence[dict[str, Any]] = built("overlays/full") if KUBECTL else ()
ADDED = ("segments", "experiments")
"""Parts that stand in components as additions to others: they are looked at as kustomize puts them together."""
BOXES = [
    *boxes([*ALL, *(one for name in ("flink", "workers") for one in documents(FOLDER / "components" / name))]),
    *(one for one in boxes(FULL) if one.name in ADDED),
]
SERVICES = of_kind(
    [*ALL, *(one for name in (*ADDED, "workers") for one in documents(FOLDER / "components" / name))], "Service"
)
MONITORS = of_kind(documents(FOLDER / "components" / "monitoring"), "ServiceMonitor")
ROUTES = [one for name in ("gateway", "istio") for one in documents(FOLDER / "components" / name)]
README = PAGE.read_text()
IMAGE = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
SIZES = sizes_of(BASE / "kustomization.yaml")
# Container -> its ports by name, and what answers GET there without a token.
PORTS = {
    "stream": {"metrics": attrgetter("stream.metrics_port")},
    "trainer": {"metrics": attrgetter("trainer.metrics_port")},
    "applier": {"metrics": attrgetter("serving.metrics_port")},
    "trainer-worker": {"metrics": attrgetter("trainer.metrics_port")},
    "worker": {"http": attrgetter("serving.port"), "grpc": attrgetter("serving.grpc_port")},
    "validation": {"metrics": attrgetter("up.validation_port")},
    "console": {"http": attrgetter("console.port")},
    "segments": {"segments": attrgetter("up.segments_port")},
    "experiments": {"experiments": attrgetter("up.experiments_port")},
}
WITHOUT_KAFKA = ("worker", "kernels", "compactor", "trainer-worker")
nobody: Any = None
PATHS = {
    "worker": [one for one in health_endpoints(nobody, nobody, lambda: False) if one.role == OPEN],
    "console": [one for one in Reading(nobody, nobody, nobody).endpoints() if one.role == OPEN],
}
every_box = pytest.mark.parametrize("box", BOXES, ids=lambda box: f"{box.owner} {box.name}")


def lasting() -> list[Box]:
    """Containers that run for ever."""
    return [one for one in BOXES if one.name in PORTS]


def test_every_part_of_a_deployment_is_there() -> None:
    once = {"bootstrap", "rebuild-history", "kernels", "compactor", "submit"}
    parts = PORTS.keys() if KUBECTL else PORTS.keys() - {*ADDED}
    assert {one.name for one in BOXES} == parts | once


@every_box
def test_a_container_runs_a_command_of_ours(box: Box) -> None:
    program, *words = box.told["command"]
    assert "args" not in box.told
    if program == "springtide" and len(words) == 1:
        assert words[0] in PROCESSES
    elif program == "springtide":
        # What follows the name of a runner is Beam's: tests/deploy/kubernetes.
        runner = [place + 1 for place, word in enumerate(words) if word.startswith("--runner=")]
        check(words[: runner[0]] if runner else words)
    else:
        assert [program, words[0]] == ["python", "-m"] and len(words) == 2
        module = ROOT.joinpath(*words[1].split(".")).with_suffix(".py")
        assert "\ndef main(" in module.read_text()
    assert box.told["image"].partition(":")[0] == "springtide", "without a host: an overlay names it"


@every_box
def test_a_container_starts_with_settings_that_are_known_and_go_together(box: Box) -> None:
    settings = box.settings(SIZES)
    assert settings.metrics.host == "0.0.0.0", "a probe and Prometheus come from outside of the pod"
    secrets = {one["name"] for one in box.told["env"] if "secretKeyRef" in one.get("valueFrom", ())}
    assert secrets <= {"SPRINGTIDE_KAFKA_SASL_USERNAME", "SPRINGTIDE_KAFKA_SASL_PASSWORD"}
    assert len(secrets) == (0 if box.name in WITHOUT_KAFKA else 2)


@every_box
def test_every_directory_that_the_settings_name_is_mounted(box: Box) -> None:
    settings, mounts = box.settings(SIZES), box.mounts
    secrets = {one["name"]: one["secret"] for one in box.pod["volumes"] if "secret" in one}
    assert mounts[str(settings.state_dir)] == "state"
    assert mounts[str(settings.registry_dir)] == "registry"
    assert secrets[mounts[str(settings.salt_path.parent)]]["secretName"] == "springtide-salt"
    assert settings.salt_path.name == "salt"
    if box.name in ("stream", "applier", "worker", "rebuild-history", "kernels", "segments"):
        assert mounts[settings.storage.memory_dir] == "memory"
    if box.name in ("worker", "console"):
        assert secrets[mounts[str(settings.tokens_dir)]]["secretName"] == "springtide-tokens"
    claims = {one["metadata"]["name"] for one in box.document["spec"].get("volumeClaimTemplates", ())}
    assert {*mounts.values()} <= claims | {one["name"] for one in box.pod["volumes"]}
    written = {str(Path(path)) for path in re.findall(r"(?:HOME|NUMBA_CACHE_DIR)=(\S+)", IMAGE)}
    assert written <= mounts.keys(), "the root file system is read-only"


@every_box
def test_nobody_is_root_or_may_become_it(box: Box) -> None:
    assert box.told["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = int(re.findall(r"useradd --uid (\d+)", IMAGE)[0])
    assert box.pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert f"USER {user}:{user}\n" in IMAGE
    assert box.pod["automountServiceAccountToken"] is False
    assert box.pod["serviceAccountName"] in {one["metadata"]["name"] for one in of_kind(ALL, "ServiceAccount")}
    # A service springtide-serving would be told as SPRINGTIDE_SERVING_PORT=tcp://..., which is a setting.
    assert box.pod["enableServiceLinks"] is False


@every_box
def test_a_container_says_what_it_takes_and_has_an_end_of_it(box: Box) -> None:
    resources = box.told["resources"]
    assert {*resources["requests"]} == {"cpu", "memory"}
    assert {*resources["limits"]} == {"memory"}, "a limit of processor time stops threads in the middle of a step"


@pytest.mark.parametrize("box", lasting(), ids=lambda box: box.name)
def test_ports_are_those_of_the_settings_and_probes_ask_what_answers_there(box: Box) -> None:
    settings = box.settings(SIZES)
    assert box.ports == {name: port(settings) for name, port in PORTS[box.name].items()}
    probes = {name: box.told[name]["httpGet"] for name in box.told if name.endswith("Probe")}
    assert "livenessProbe" in probes
    for asked in probes.values():
        assert asked["port"] in box.ports
        open_paths = [one.path for one in PATHS[box.name]] if box.name in PATHS else ["/metrics"]
        assert asked["path"] in open_paths
    if box.name == "worker":
        assert probes["readinessProbe"]["path"] == "/readyz" and probes["livenessProbe"]["path"] == "/healthz"
    if box.name == "console":
        assert settings.console.host == "0.0.0.0"


def test_a_pod_ends_no_sooner_than_its_processes() -> None:
    (worker,) = (one for one in BOXES if one.name == "worker")
    drain_s = worker.settings(SIZES).serving.drain_s
    grace = {one.name: one.pod.get("terminationGracePeriodSeconds", 30) for one in lasting()}
    assert grace["worker"] >= drain_s + 60 and grace["stream"] >= 90 and grace["trainer"] >= 30


def test_containers_that_share_a_store_share_their_process_ids() -> None:
    sharing = {one.owner: one.pod for one in BOXES if len(one.pod["containers"]) > 1}
    assert sharing, "serving"
    assert all(pod.get("shareProcessNamespace") is True for pod in sharing.values())


def test_there_is_one_stream_and_one_trainer() -> None:
    of = {one.name: one.document for one in BOXES}
    assert of["trainer"]["kind"] == "Deployment" and of["trainer"]["spec"]["strategy"] == {"type": "Recreate"}
    assert of["stream"]["kind"] == "StatefulSet"
    assert of["trainer"]["spec"]["replicas"] == of["stream"]["spec"]["replicas"] == 1
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in of_kind(ALL, "HorizontalPodAutoscaler")}
    assert scaled == {"springtide-serving"}


def test_hosts_are_scaled_by_their_workers() -> None:
    (scaler,) = of_kind(ALL, "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    (worker,) = (one for one in BOXES if one.owner == f"{target['kind']} {target['name']}" and one.name == "worker")
    (metric,) = scaler["spec"]["metrics"]
    assert metric["containerResource"]["container"] == worker.name
    assert "replicas" not in worker.document["spec"], "each `kubectl apply` would undo what the autoscaler decided"


def track(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels of a host, as `base/serving` adds to them where no overlay did."""
    of_hosts = labels.get("app.kubernetes.io/component") == "serving"
    return ({"springtide/track": "stable"} if of_hosts else {}) | dict(labels)


@pytest.mark.parametrize("service", of_kind(ALL, "Service"), ids=lambda one: str(one["metadata"]["name"]))
def test_a_service_leads_to_ports_that_are_there(service: dict[str, Any]) -> None:
    pods = [one for one in BOXES if selects({"matchLabels": service["spec"]["selector"]}, track(one.labels))]
    ports = {name: number for one in pods for name, number in one.ports.items()}
    assert {one["targetPort"]: one["port"] for one in service["spec"]["ports"]}.items() <= ports.items()


def test_disruption_budgets_hold_only_what_may_be_away_one_by_one() -> None:
    (budget,) = of_kind(ALL, "PodDisruptionBudget")
    held = {one.owner for one in BOXES if selects(budget["spec"]["selector"], track(one.labels))}
    assert held == {"StatefulSet springtide-serving"}, "one of a single pod would keep a node from being drained"


def test_the_trainers_state_outlives_its_pod() -> None:
    """The ledger of the privacy budget does, and the trainer refuses to start without the key of the noise."""
    (trainer,) = (box for box in BOXES if box.name == "trainer")
    (volume,) = (
        volume
        for volume in trainer.pod["volumes"]
        if volume["name"] == trainer.mounts[str(trainer.settings(SIZES).privacy_key_path.parent)]
    )
    claimed = volume["persistentVolumeClaim"]["claimName"]
    assert claimed in {claim["metadata"]["name"] for claim in of_kind(ALL, "PersistentVolumeClaim")}


def test_the_console_finds_the_other_parts_where_services_are() -> None:
    (console,) = (one for one in BOXES if one.name == "console")
    settings = console.settings(SIZES)
    ports = {
        one["metadata"]["name"]: {port["port"] for port in one["spec"]["ports"]} for one in of_kind(ALL, "Service")
    }
    urls = scrape.urls(settings)
    assert urls.keys() == {"stream", "trainer", "applier", "worker"}
    for url in urls.values():
        match = re.fullmatch(r"http://([a-z-]+):(\d+)/metrics", url)
        assert match is not None, url
        host, port = match.groups()
        assert int(port) in ports[host], url


@pytest.mark.parametrize("monitor", MONITORS, ids=lambda one: str(one["metadata"]["name"]))
def test_a_monitor_scrapes_a_port_that_is_there_under_a_name_that_rules_know(monitor: dict[str, Any]) -> None:
    (endpoint,) = monitor["spec"]["endpoints"]
    (service,) = (one for one in SERVICES if selects(monitor["spec"]["selector"], one["metadata"].get("labels", {})))
    assert endpoint["port"] in {one["name"] for one in service["spec"]["ports"]} and endpoint["path"] == "/metrics"
    (job,) = (one["replacement"] for one in endpoint["relabelings"] if one["targetLabel"] == "job")
    # Of what is not there by default in a comment.
    text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert job in re.findall(r"- job_name: (\S+)", text)
    # Workers let nobody at their metrics without a token where they listen on more than the loopback.
    assert ("authorization" in endpoint) == (endpoint["port"] == "http")
    if "authorization" in endpoint:
        assert endpoint["authorization"]["credentials"] == {"name": "springtide-tokens", "key": OPERATE}


def test_every_part_that_has_metrics_is_scraped() -> None:
    assert {one["metadata"]["name"] for one in MONITORS} == {
        f"springtide-{name}"
        for name in ("stream", "trainer", "trainer-worker", "applier", "worker", "validation", *ADDED)
    }


def test_secrets_are_those_that_the_readme_makes() -> None:
    made = {
        name: {*re.findall(r"--from-(?:file|literal)=([\w.]+)", words)}
        for name, words in re.findall(r"create secret generic (\S+) (.*)", README)
    }
    volumes = {one["secret"]["secretName"] for box in BOXES for one in box.pod["volumes"] if "secret" in one}
    named = [
        one["valueFrom"]["secretKeyRef"]
        for box in BOXES
        for one in box.told["env"]
        if "secretKeyRef" in one.get("valueFrom", ())
    ]
    given = {one["secretRef"]["name"] for box in BOXES for one in box.told["envFrom"] if "secretRef" in one}
    assert given == {"springtide-object-store"}
    assert volumes | given == made.keys() and {one["name"] for one in named} <= made.keys()
    assert all(one["key"] in made[one["name"]] for one in named)
    assert made["springtide-tokens"] == {READ, OPERATE} and made["springtide-salt"] == {"salt"}
    assert of_kind(ALL, "Secret") == [], "none is written down here"


@pytest.mark.parametrize("route", ROUTES, ids=lambda one: str(one["kind"]))
def test_weights_lead_to_both_sets_of_hosts_and_make_a_hundred(route: dict[str, Any]) -> None:
    spec = route["spec"]
    if route["kind"] == "HTTPRoute":
        ends = [(one["name"], one["port"], one["weight"]) for rule in spec["rules"] for one in rule["backendRefs"]]
    else:
        ends = [
            (one["destination"]["host"], one["destination"]["port"]["number"], one["weight"])
            for rule in spec["http"]
            for one in rule["route"]
        ]
    canary = yaml.safe_load((FOLDER / "components" / "canary" / "hosts" / "kustomization.yaml").read_text())
    assert [name for name, _, _ in ends] == ["springtide-serving", f"springtide-serving{canary['nameSuffix']}"]
    assert {port for _, port, _ in ends} == {Settings().serving.port}
    assert sum(weight for _, _, weight in ends) == 100


def test_the_image_is_what_the_manifests_expect() -> None:
    told = dict(re.findall(r"(\w+)=(\S+?)(?: \\)?$", IMAGE, re.M))
    assert MALLOC.items() <= told.items(), "as `springtide up` starts its parts"
    exposed = {int(one) for one in re.findall(r"^EXPOSE (.*)$", IMAGE, re.M)[0].split()}
    assert exposed == {port(Settings()) for ports in PORTS.values() for port in ports.values()}
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", IMAGE, re.M):
        assert all((ROOT / one).exists() for one in source.split())
    ignored = (ROOT / "deploy" / "container" / "Dockerfile.dockerignore").read_text()
    copied = {one for source in re.findall(r"^COPY (?!--from)(.*) \S+$", IMAGE, re.M) for one in source.split()}
    assert {*re.findall(r"^!(.*)$", ignored, re.M)} == copied


@pytest.mark.parametrize(
    ("base", "code"),
    [("python:3.11-slim-bookworm", 1), ("", 1), (f"python:3.11-slim-bookworm@sha256:{'0' * 64}", 0)],
)
def test_the_image_is_built_only_on_a_base_with_a_digest(base: str, code: int) -> None:
    assert {*re.findall(r"^FROM (\S+)", IMAGE, re.M)} == {"${BASE}"}
    assert re.findall(r"^ARG BASE(.*)$", IMAGE, re.M) == ["", ""], "a default would be a tag that moves, or a guess"
    (check,) = re.findall(r"^RUN (case .*)$", IMAGE, re.M)
    done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, text=True)
    assert (done.returncode, "NAME@sha256:DIGEST" in done.stderr) == (code, code == 1)


def test_the_image_has_no_packages_of_tests() -> None:
    installed = re.findall(r"--require-hashes -r (\S+)", IMAGE)
    assert installed == ["constraints.txt", "constraints-apart.txt"]


def test_every_file_that_the_readme_names_is_there() -> None:
    named = re.findall(r"`((?:base|overlays|components)/[\w./-]+)`", README)
    assert len(named) > 5 and [one for one in named if not (FOLDER / one).exists()] == []

"""What `deploy/kubernetes` says, as it stands in the files and as kustomize puts it together."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from state.config.loading import load
from state.config.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "how-to" / "kubernetes.md"
BASE = FOLDER / "base"
OVERLAYS = ("small", "large")
KUBECTL = shutil.which("kubectl")
WHY_NOT = "kubectl, which puts the overlays together, is not installed"
Document = dict[str, Any]
LOADER = yaml.CSafeLoader
"""The loader in C: a large overlay takes a tenth of the time."""


def documents(folder: Path) -> list[Document]:
    """All objects below a folder; what kustomize alone reads is left out."""
    return [
        one
        for path in sorted(folder.rglob("*.yaml"))
        if path.name != "kustomization.yaml"
        for one in yaml.load_all(path.read_text(), LOADER)
    ]


@functools.cache
def built(place: str) -> Sequence[Document]:
    """What `kubectl apply -k` would send of a folder below `deploy/kubernetes`."""
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(FOLDER / place)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return list(yaml.load_all(done.stdout, LOADER))


@dataclass(frozen=True)
class Box:
    """A container, with the pod that it is in.

    Attributes:
        pod: The pod's specification.
        labels: The pod's.
        owner: Kind and name of what makes the pod.
        document: All of that.
        is_first: Whether it ends before the others begin.
    """

    name: str
    told: Mapping[str, Any]
    pod: Mapping[str, Any]
    labels: Mapping[str, str]
    owner: str
    document: Document
    is_first: bool

    @property
    def ports(self) -> dict[str, int]:
        return {one["name"]: one["containerPort"] for one in self.told.get("ports", ())}

    @property
    def mounts(self) -> dict[str, str]:
        """Where -> the volume."""
        return {one["mountPath"]: one["name"] for one in self.told["volumeMounts"]}

    def settings(self, sizes: Mapping[str, str]) -> Settings:
        """Those in force in it."""
        env = dict(sizes) | {one["name"]: one["value"] for one in self.told["env"] if "value" in one}
        file = env.pop("SPRINGTIDE_CONFIG")
        assert file == "/etc/springtide/config/springtide.toml"
        return load([], env, BASE / "springtide.toml")


def boxes(found: Sequence[Document]) -> Iterator[Box]:
    """All containers of some objects."""
    for document in found:
        spec = document.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template is None:
            continue
        pod, labels = template["spec"], template["metadata"]["labels"]
        owner = f"{document['kind']} {document['metadata']['name']}"
        for key in ("initContainers", "containers"):
            for told in pod.get(key, ()):
                yield Box(told["name"], told, pod, labels, owner, document, key == "initContainers")


def sizes_of(kustomization: Path) -> dict[str, str]:
    """The variables of the ConfigMap `springtide-sizes` that a kustomization makes or adds to."""
    maps = yaml.load(kustomization.read_text(), LOADER).get("configMapGenerator", ())
    return dict(
        line.split("=", 1) for one in maps if one["name"] == "springtide-sizes" for line in one.get("literals", ())
    )


def of_kind(found: Sequence[Document], kind: str) -> list[Document]:
    return [one for one in found if one["kind"] == kind]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector takes what has these labels.

    >>> selects({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}), selects({}, {"a": "1"})
    (True, True)
    """
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        one["operator"] == "In" and labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", ())
    )


@dataclass(frozen=True)
class Peer:
    """One end of a connection.

    Attributes:
        labels: Of the pod.
        namespace: Labels of its namespace; None: it is in the namespace of the policies.
    """

    labels: Mapping[str, str]
    namespace: Mapping[str, str] | None = None


def connects(policies: Sequence[Document], client: Peer | None, server: Peer | None, port: int) -> bool:
    """Whether network policies let a TCP connection out of the client's pod and into the server's."""

    def lets(direction: str, held: Peer | None, other: Peer | None) -> bool:
        if held is None or held.namespace is not None:
            return True
        own = [
            policy["spec"]
            for policy in policies
            if selects(policy["spec"]["podSelector"], held.labels)
            and direction.capitalize() in policy["spec"]["policyTypes"]
        ]
        return not own or any(
            _has_port(rule, port) and _has_peer(rule.get({"ingress": "from", "egress": "to"}[direction]), other)
            for spec in own
            for rule in spec.get(direction, ())
        )

    return lets("egress", client, server) and lets("ingress", server, client)


def _has_port(rule: Mapping[str, Any], port: int) -> bool:
    return not rule.get("ports") or any(
        one["port"] == port and one.get("protocol", "TCP") == "TCP" for one in rule["ports"]
    )


def _has_peer(listed: Sequence[Mapping[str, Any]] | None, peer: Peer | None) -> bool:
    if not listed:
        return True
    if peer is None:
        return False
    return any(
        (
            selects(one["namespaceSelector"], peer.namespace or {})
            if "namespaceSelector" in one
            else peer.namespace is None
        )
        and selects(one.get("podSelector", {}), peer.labels)
        for one in listed
    )


BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> float:
    """A size or a number of cores.

    >>> quantity("2Gi"), quantity("1Mi"), quantity("200m"), quantity("2")
    (2147483648.0, 1048576.0, 0.2, 2.0)
    """
    for unit, factor in BYTES.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)

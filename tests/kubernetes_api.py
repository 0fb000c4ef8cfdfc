"""A stub of the Kubernetes API for the real `kubectl apply`: no cluster exists where the tests run.

It keeps objects in memory. It defaults `replicas`, refuses changes of immutable fields, merges the patches that kubectl
computes, scales what a HorizontalPodAutoscaler targets and makes and deletes the claims of StatefulSets.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.manifests import KUBECTL, quantity

# group/version -> kinds; what is not namespaced.
KINDS = {
    "v1": ("ConfigMap", "Namespace", "PersistentVolumeClaim", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "batch/v1": ("CronJob", "Job"),
    "monitoring.coreos.com/v1": ("ServiceMonitor",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
}
CLUSTER_WIDE = {"Namespace"}
# Fields that may change: of a StatefulSet as its validation lists them, of a claim its size alone.
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
MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "initContainers": "name",
    "topologySpreadConstraints": "topologyKey",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
Key = tuple[str, str]


class Refused(Exception):
    """The API server's 422 Invalid."""


def plural(kind: str) -> str:
    """The name of a kind in paths.

    >>> plural("NetworkPolicy"), plural("Job")
    ('networkpolicies', 'jobs')
    """
    return kind.lower()[:-1] + "ies" if kind.endswith("y") else kind.lower() + "s"


def merge(current: Any, patch: Any, name: str = "", strategic: bool = True) -> Any:
    """A JSON merge patch, or a strategic one of Kubernetes, applied.

    >>> merge({"a": 1, "b": {"c": 2}}, {"a": None, "b": {"d": 3}})
    {'b': {'c': 2, 'd': 3}}
    >>> merge({"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "B", "value": "2"}]})
    {'env': [{'name': 'A', 'value': '1'}, {'name': 'B', 'value': '2'}]}
    """
    if isinstance(patch, dict):
        replaces = patch.get("$patch") == "replace"
        merged = dict(current) if isinstance(current, dict) and not replaces else {}
        if "$retainKeys" in patch:
            merged = {key: value for key, value in merged.items() if key in patch["$retainKeys"]}
        for key, value in patch.items():
            if key == "$retainKeys" or key.startswith("$setElementOrder/") or (key == "$patch" and replaces):
                continue
            assert not key.startswith("$"), f"the stub does not know {key}"
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value, key, strategic)
        return merged
    if isinstance(patch, list) and isinstance(current, list) and strategic and patch and isinstance(patch[0], dict):
        by = MERGE_KEYS.get(name)
        if name == "ports":
            by = "containerPort" if any("containerPort" in entry for entry in patch) else "port"
        if by is not None:
            entries = {entry[by]: entry for entry in current}
            for entry in patch:
                if entry.get("$patch") == "delete":
                    entries.pop(entry[by], None)
                else:
                    entries[entry[by]] = merge(entries.get(entry[by]), entry, "", strategic)
            return list(entries.values())
    return patch


def require_allowed(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses what the API server refuses of a change of `spec`.

    Raises:
        Refused: An immutable field differs, or a claim shrinks.
    """
    differing = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    wrong = differing - MUTABLE[kind] if kind in MUTABLE else differing & IMMUTABLE.get(kind, set())
    if wrong:
        raise Refused(f"spec.{', spec.'.join(sorted(wrong))}: field is immutable")
    if kind == "PersistentVolumeClaim":
        sizes = [quantity(spec["resources"]["requests"]["storage"]) for spec in (old, new)]
        if sizes[1] < sizes[0]:
            raise Refused("spec.resources.requests.storage: a claim cannot shrink")


@dataclass
class Cluster:
    """What the stub holds.

    Attributes:
        url: Where it listens.
        objects: (kind, name) -> the object; there is one namespace.
    """

    url: str = ""
    objects: dict[Key, dict[str, Any]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def apply(self, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
        """Runs `kubectl apply -k`."""
        assert KUBECTL is not None
        return subprocess.run(
            [KUBECTL, f"--server={self.url}", f"--cache-dir={cache}", "apply", "--validate=false", "-k", str(folder)],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(cache), "KUBECONFIG": os.devnull},
        )

    def names(self, kind: str) -> set[str]:
        return {name for of, name in self.objects if of == kind}

    def scale(self, name: str, replicas: int) -> None:
        """Sets the replicas of a StatefulSet by its scale, as an autoscaler does."""
        with self.lock:
            self.objects["StatefulSet", name]["spec"]["replicas"] = replicas
            self._control()

    def put(self, document: dict[str, Any]) -> dict[str, Any]:
        """Creates or changes an object.

        Raises:
            Refused: The API server refuses the change.
        """
        kind = document["kind"]
        key = kind, document["metadata"]["name"]
        with self.lock:
            if kind in ("Deployment", "StatefulSet"):
                document["spec"].setdefault("replicas", 1)
            if key in self.objects:
                require_allowed(kind, self.objects[key].get("spec", {}), document.get("spec", {}))
            self.objects[key] = copy.deepcopy(document)
            self._control()
            return copy.deepcopy(self.objects[key])

    def _control(self) -> None:
        """What controllers do after each change: autoscaling within bounds, and the claims of StatefulSets."""
        for (kind, _), scaler in list(self.objects.items()):
            target = scaler.get("spec", {}).get("scaleTargetRef") if kind == "HorizontalPodAutoscaler" else None
            scaled = target and self.objects.get((target["kind"], target["name"]))
            if scaled:
                least, most = scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]
                scaled["spec"]["replicas"] = min(max(scaled["spec"]["replicas"], least), most)
        for (kind, name), made in list(self.objects.items()):
            if kind != "StatefulSet":
                continue
            retained = made["spec"].get("persistentVolumeClaimRetentionPolicy", {}).get("whenScaled", "Retain")
            for template in made["spec"].get("volumeClaimTemplates", ()):
                prefix = f"{template['metadata']['name']}-{name}-"
                wanted = {f"{prefix}{ordinal}" for ordinal in range(made["spec"]["replicas"])}
                for claim in wanted - self.names("PersistentVolumeClaim"):
                    self.objects["PersistentVolumeClaim", claim] = {"kind": "PersistentVolumeClaim"} | template
                for claim in self.names("PersistentVolumeClaim") - wanted:
                    if claim.removeprefix(prefix).isdigit() and retained == "Delete":
                        del self.objects["PersistentVolumeClaim", claim]


def discovery(path: str) -> dict[str, Any] | None:
    """The documents by which kubectl learns which kinds there are; None for another path."""
    groups = [version for version in KINDS if "/" in version]
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [
            {"name": one.partition("/")[0], "versions": [{"groupVersion": one, "version": one.partition("/")[2]}]}
            for one in groups
        ]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [one | {"preferredVersion": one["versions"][0]} for one in listed],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    resources = [
        {
            "name": plural(kind),
            "singularName": kind.lower(),
            "namespaced": kind not in CLUSTER_WIDE,
            "kind": kind,
            "verbs": ["create", "delete", "get", "list", "patch", "update"],
        }
        for kind in KINDS[version]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


@contextmanager
def cluster() -> Iterator[Cluster]:
    """An empty cluster, on a port of the loopback."""
    held = Cluster()
    kinds = {plural(kind): kind for listed in KINDS.values() for kind in listed}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, body: Mapping[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def fail(self, code: int, reason: str, message: str) -> None:
            body = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
            self.answer(code, body | {"reason": reason, "message": message, "code": code})

        def body(self) -> Any:
            return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def store(self, document: dict[str, Any], code: int) -> None:
            try:
                self.answer(code, held.put(document))
            except Refused as refused:
                name = f"{document['kind']} {document['metadata']['name']}"
                self.fail(422, "Invalid", f"{name} is invalid: {refused}")

        def key(self) -> Key | None:
            *_, collection, name = self.path.partition("?")[0].split("/")
            return (kinds[collection], name) if collection in kinds else None

        def do_GET(self) -> None:
            found = discovery(self.path.partition("?")[0])
            key = self.key()
            if found is None and key is not None:
                found = held.objects.get(key)
            if found is None:
                self.fail(404, "NotFound", f"{self.path} not found")
            else:
                self.answer(200, found)

        def do_POST(self) -> None:
            self.store(self.body(), 201)

        def do_PATCH(self) -> None:
            key, patch = self.key(), self.body()
            assert key is not None
            strategic = "strategic" in self.headers["Content-Type"]
            self.store(merge(held.objects[key], patch, strategic=strategic), 200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

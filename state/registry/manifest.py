"""Manifests: the description of a version, and the versions that it descends from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from state.disk import documents
from state.disk import files as durable
from state.positions import Source

FORMAT = 1
TOLD_MS = "told_ms"
"""Name of a metric: the newest time that a trained row itself reports, of its event or its label."""

Kind = Literal["base", "delta", "merged", "recent"]
"""How a version is stored.

base    its full state
delta   the changes since the preceding durable version
merged  several deltas in one: the changes since an older version
recent  the changes since the preceding version, durable or recent; kept for a few seconds
"""
Visible = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LogRange:
    """The range `[first, next)` of the training log between a version and its parent.

    Attributes:
        topic: The topic's name, for people.
        topic_id: The topic's id, 32 hexadecimal digits; empty before the first record.
        first: The offset of the first record.
        next: The offset at which the trainer continues.
        epoch: The epoch of the log at `next`, see `state/registry/log_line.py`.
        leader_epoch: Kafka's leader epoch of the record before `next`; -1 if unknown, as in versions of 0.1.0.
    """

    topic: str = ""
    topic_id: str = ""
    partition: int = 0
    first: int = 0
    next: int = 0
    epoch: int = 1
    leader_epoch: int = -1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) that a file of a version must have."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Draft:
    """The part of a manifest that its author knows; the registry adds number, descent and files.

    Attributes:
        epoch: The control's epoch in which it was trained.
        parent: The version it continues, durable unless it is `recent`; None for the very first.
        log: The range of the training log since the parent.
        sources: Per source the offset after the newest row trained; duplicates are dropped by it.
        steps: Steps since the beginning of the descent.
        rows: Rows trained since then.
        event_time_ms: Time of the newest event trained; 0 for none.
        spec: Digest of the feature spec.
        program: SHA-256 of the program that serving uses with these weights.
        salt: Fingerprint of the users' salt.
        mask_generation: Generation of the mask it was trained under.
        metrics: Progressive metrics at this point.
        environment: The software and hardware on which the bits depend: TensorFlow, NumPy, device, instruction set,
            threads.
        erased: The last erasure of control whose users' rows it no longer has; see `state/features/erased.py`.
        erasures: The newest erasures that its epoch applied, each with the offset of the training log where it did.
        verdict: The guard's verdict: `pass`, or empty without a check. Only a version that passed is published.
        guard: Rule of the guard -> how close it was to a hold, which is 1; only rules with a deviation.
    """

    kind: Kind
    epoch: int
    parent: int | None
    log: LogRange
    sources: tuple[tuple[Source, int], ...]
    steps: int
    rows: int
    created_at_ms: int
    event_time_ms: int
    spec: str
    program: str
    salt: str
    mask_generation: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    erased: int = 0
    erasures: tuple[tuple[int, int], ...] = ()
    verdict: str = ""
    guard: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Draft):
    """A complete version. Its fields are those of `Draft`, and:

    Attributes:
        version: Its number; one increasing integer over all epochs.
        visible: The versions it descends from, including itself, as closed intervals, newest first.
        files: Its files by name.
        format: Format of the manifest.
        rewritten: The last erasure whose users' rows were removed from its files after it was created; 0 for none.
    """

    version: int
    visible: Visible
    files: dict[str, FileEntry]
    format: int = FORMAT
    rewritten: int = 0

    @property
    def durable(self) -> bool:
        """Whether a rollback to it is possible. Other versions exist for seconds, and the log can reproduce them."""
        return self.kind != "recent"

    @property
    def marks(self) -> dict[Source, int]:
        """The next offset of each source, in the form that `trim` takes."""
        return dict(self.sources)


def complete(draft: Draft, version: int, ancestors: Visible, contents: Mapping[str, bytes]) -> Manifest:
    """Builds the manifest of `draft` as version `version`, whose parent sees `ancestors`."""
    values = {field.name: getattr(draft, field.name) for field in fields(draft)}
    values |= {
        "sources": tuple(sorted(draft.sources)),
        "metrics": {name: value for name, value in draft.metrics.items() if math.isfinite(value)},
        "environment": dict(draft.environment),
        "guard": dict(draft.guard),
    }
    visible = extend(ancestors, draft.parent, version)
    return Manifest(**values, version=version, visible=visible, files=entries(contents))


def entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Digest and size of each file."""
    return {name: FileEntry(durable.digest(data), len(data)) for name, data in sorted(files.items())}


def extend(ancestors: Visible, parent: int | None, version: int) -> Visible:
    """The versions that `version` sees when its parent sees `ancestors`.

    Versions after the parent that a rollback abandoned fall between two intervals.

    >>> extend(((1, 30),), 30, 31)
    ((1, 31),)
    >>> extend(((1, 30),), 30, 51)
    ((51, 51), (1, 30))
    >>> extend((), None, 1)
    ((1, 1),)
    """
    if parent is None:
        return ((version, version),)
    low, high = ancestors[0]
    if high == parent == version - 1:
        return ((low, version), *ancestors[1:])
    return ((version, version), *ancestors)


def sees(visible: Visible, version: int) -> bool:
    """Whether `version` is in the descent `visible`.

    >>> [sees(((51, 52), (1, 30)), version) for version in (30, 31, 52)]
    [True, False, True]
    """
    return any(low <= version <= high for low, high in visible)


def encode(manifest: Manifest) -> bytes:
    """Encodes `manifest` as canonical JSON with its digest."""
    return documents.encode_sealed(manifest)


def decode(data: bytes) -> Manifest:
    """Decodes the manifest that `encode` wrote; fields of later releases are ignored.

    Raises:
        ValueError: The bytes fail their digest, or have a format that this release does not read.
    """
    manifest = documents.decode_sealed(data, Manifest)
    if manifest.format != FORMAT:
        raise ValueError(f"it is of format {manifest.format}; this release reads {FORMAT}")
    return manifest

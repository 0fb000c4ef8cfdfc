"""Record of an applied version: the location of its rows, the versions that it may see, and its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from state.registry.manifest import Manifest, Visible, extend


@dataclass(frozen=True)
class Served:
    """One applied version.

    Attributes:
        serial: Number of the application; a version that is applied again gets another one.
        lane: Lane of the row store with its rows.
        visible: The entries of the lane that it sees, newest interval first.
        dims: Width of each table's rows.
        sources: Next offset of each source that it was trained on, by the source's text form.
        erased: The last erasure that it has applied.
    """

    version: int
    epoch: int
    parent: int | None
    serial: int
    lane: int
    visible: Visible
    dims: Mapping[str, int]
    created_at_ms: int
    event_time_ms: int
    applied_at_ms: int
    spec: str
    program: str
    salt: str
    mask_generation: int
    sources: Mapping[str, int]
    erased: int = 0

    @classmethod
    def parse(cls, record: bytes | memoryview) -> Served:
        """Parses the record that `to_json` wrote."""
        fields = json.loads(bytes(record))
        fields["visible"] = tuple((low, high) for low, high in fields["visible"])
        return cls(**fields)

    def to_json(self) -> bytes:
        """Encodes this record as a JSON object."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(
        cls, manifest: Manifest, parent: Served | None, serial: int, lane: int, dims: Mapping[str, int], now_ms: int
    ) -> Served:
        """Builds the record of a version as it is applied; a base, which has no parent, sees only its own rows."""
        version = manifest.version
        return cls(
            version=version,
            epoch=manifest.epoch,
            parent=manifest.parent,
            serial=serial,
            lane=lane,
            visible=((version, version),) if parent is None else joined(parent, manifest),
            dims=dims,
            created_at_ms=manifest.created_at_ms,
            event_time_ms=manifest.event_time_ms,
            applied_at_ms=now_ms,
            spec=manifest.spec,
            program=manifest.program,
            salt=manifest.salt,
            mask_generation=manifest.mask_generation,
            sources={str(source): int(following) for source, following in manifest.sources},
            erased=manifest.erased,
        )


def joined(parent: Served, manifest: Manifest) -> Visible:
    """The versions that a delta sees when it is applied onto `parent`.

    Recent versions between two durable ones are on one branch with both. Those that
    are stored belong to the past of the newer one, so one interval contains them
    all. This saves seeks: a reader seeks once for each interval.
    """
    (low, high), *older = parent.visible
    if high == parent.version and any(first <= high and manifest.version <= last for first, last in manifest.visible):
        return ((low, manifest.version), *older)
    return extend(parent.visible, parent.version, manifest.version)

"""Names on disk, each said once: what lies under `paths.state` and in the registry, and who writes it.

    paths.state/
    ├── lock                     of `springtide up`
    ├── salt                     the secret key of pseudonyms, or where `paths.salt_file` says
    ├── privacy.key              the secret key of the noise, or where `privacy.key_file` says     trainer/privacy/key.py
    ├── tokens/                  who may ask, or where `serving.tokens_dir` says   deploy/serving/edge/tokens.py
    ├── registry/                or where `paths.registry` says
    │   ├── versions/ merged/ bases/   one directory a version    state/registry/versions.py
    │   ├── recent/ recent.boot  versions that are not durable    state/registry/recent.py
    │   ├── control/             one file a generation            state/registry/controls.py
    │   ├── masks/               users that masks and erasures name, by digest
    │   ├── erasures/            how far each process has taken erasures   state/registry/erasing.py
    │   ├── outcomes/            what became of rollbacks         state/registry/outcomes.py
    │   ├── programs/ specs/     by digest
    │   ├── baselines/           accepted by operators            state/statistics/baselines.py
    │   ├── rollouts/            one file a generation, figures.json   state/rollouts/rollouts.py
    │   ├── gaps/                losses that the trainer accepted, records left out among them
    │   ├── privacy/ledger.json      what of the privacy budget is spent    state/registry/privacy_ledger.py
    │   ├── shared.json shared.catalog   where it is shared       state/registry/sharing/binding.py
    │   ├── tmp/                 being written; swept
    │   └── trainer.lock, compactor.lock, shared.lock
    ├── stream-0/                lock, writer (the transactional id)   streaming/fencing.py
    │   ├── leaders.json                                          streaming/leaders.py
    │   ├── histories            the stream's store, or while it runs a link to it, in memory
    │   │                        state/history/store.py, state/disk/memory_place.py, memory_store.py
    │   ├── histories.link, .saving   on their way into and out of memory
    │   ├── histories.rebuilding, .rebuilt, .bad<n>               streaming/takeover.py
    │   └── attributes/                                           state/attributes/store.py
    ├── serving/                 lock of the applier
    │   ├── rows                 a link to the rows, in memory    state/disk/memory_place.py, state/rows/store.py
    │   ├── rows.disk/           or, where memory has no room, here
    │   ├── histories attributes/   as the stream's
    │   ├── segments/            members of segments              state/segments/store.py
    │   ├── lookalikes/          of segments, as listed last      state/segments/lookalikes.py
    │   ├── current.version, current.histories   times only       deploy/serving/currency.py
    │   ├── exposures/           of workers, on their way to Kafka   deploy/serving/splitting/spool.py
    │   ├── counters/            of workers that share a port     deploy/serving/rest.py
    │   └── programs/            those of applied versions
    ├── exports/<version>/       SavedModels, or where `export.directory` says     trainer/exporting/saved_model.py
    ├── validation/              place.json, windows/<log time>.pb       deploy/validation/process.py
    ├── trials/retrain.json     what became of the scheduled retrain    state/trials/retraining.py
    ├── trials/<name>/           trial.json, comparison.json             state/trials/trial.py
    │   ├── registry/            of its own, while it runs; beside versions and control as above:
    │       ├── past.json       what its trainer learns first        state/trials/past.py
    │       ├── past-*/         histories of past clicks, while it does   streaming/past.py
    │   │   └── losses/          of rows, while a trial runs, in the live registry too   state/trials/row_losses.py
    │   └── host/                serving of its own, while a rollout of it is not over   deploy/rollouts/host.py
    ├── replay/<key>/            lock, journal                    deploy/replaying/journal.py
    ├── kafka/                   broker.lock, data; or where `paths.kafka` says      deploy/kafka/broker.py
    ├── prometheus/              prometheus.yml, data             deploy/startup/prometheus.py
    ├── flink/                  lock, conf, checkpoints, savepoints, logs   deploy/flink/processes.py
    └── logs/                    one file a process               deploy/children/supervisor.py

A store's directory holds `data.mdb`, `lock.mdb` and `mark.json`.
"""

from __future__ import annotations

import os
from pathlib import Path

LOCK = "lock"
SALT, TOKENS = "salt", "tokens"
PRIVACY_KEY, PRIVACY, PRIVACY_LEDGER = "privacy.key", "privacy", "ledger.json"

REGISTRY = "registry"
VERSIONS, MERGED, BASES, CONTROL = "versions", "merged", "bases", "control"
RECENT, RECENT_BOOT = "recent", "recent.boot"
SHARED_CATALOG, SHARED_LOCK, SHARED_LOOKED = "shared.catalog", "shared.lock", "shared.looked"
MASKS, OUTCOMES, ERASURES = "masks", "outcomes", "erasures"
PROGRAMS, SPECS, TEMPORARY = "programs", "specs", "tmp"
BASELINES = "baselines"
ROLLOUTS = "rollouts"
GAPS = "gaps"  # also the extra of the stream's histories that holds what the stream accepted
TRAINER_LOCK, COMPACTOR_LOCK = "trainer.lock", "compactor.lock"
SEGMENTS_LOCK = "segments.lock"

SERVING, KAFKA, LOGS, REPLAY, EXPORTS = "serving", "kafka", "logs", "replay", "exports"
VALIDATION = "validation"
TRIALS, LOSSES, PAST = "trials", "losses", "past.json"
RETRAIN, RETRAIN_LOCK = "retrain.json", "retrain.lock"
PROMETHEUS = "prometheus"
FLINK = "flink"
WRITER, LEADERS = "writer", "leaders.json"
HISTORIES, ATTRIBUTES, ROWS, SEGMENTS = "histories", "attributes", "rows", "segments"
LOOKALIKES = "lookalikes"
ROWS_DISK, WORKER_COUNTERS, CURRENT, EXPOSURES = "rows.disk", "counters", "current", "exposures"
DATA, MARK = "data.mdb", "mark.json"

_STREAM = "stream-"


def stream(state: Path) -> Path:
    """The directory of the stream; it has the number that it had among shards.

    >>> stream(Path("state")).as_posix()
    'state/stream-0'
    """
    return state / f"{_STREAM}0"


def streams(state: Path) -> list[Path]:
    """The histories of every stream that ever ran under `state`, by name: of one, or of the shards of an earlier release."""
    # One that a power cut took out of memory is a link that leads nowhere.
    return sorted(one / HISTORIES for one in state.glob(f"{_STREAM}*") if os.path.lexists(one / HISTORIES))


def trial_registry(state: Path, name: str) -> Path:
    """The registry of a trial.

    >>> trial_registry(Path("state"), "wider").as_posix()
    'state/trials/wider/registry'
    """
    return state / TRIALS / name / REGISTRY


def has_users(state: Path, registry: Path) -> bool:
    """Whether something is stored here under pseudonyms, whose salt must then be kept."""
    return bool(streams(state)) or any((registry / SPECS).glob("*/spec.json"))

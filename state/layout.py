"""Names of files on disk: the layout of `paths.state` and of the registry, and the module that writes each part.

    paths.state/
    ├── lock                     the lock of `springtide up`
    ├── salt                     the secret key of pseudonyms, or at `paths.salt_file`
    ├── privacy.key              the secret key of the noise                              trainer/privacy.py
    ├── tokens/                  access tokens, or at `serving.tokens_dir`         deploy/serving/requests/access.py
    ├── registry/                or at `paths.registry`
    │   ├── versions/ merged/ bases/   one directory per version  state/registry/registry.py
    │   ├── recent/ recent.boot  versions that are not durable    state/registry/registry.py
    │   ├── control/             one file per generation          state/registry/controls.py
    │   ├── masks/               users that masks and erasures name, by digest
    │   ├── erasures/            how far each process has applied erasures     state/registry/hosts.py
    │   ├── hosts/               serving hosts and the users they hold              state/registry/hosts.py
    │   ├── outcomes/            outcomes of rollbacks            state/registry/controls.py
    │   ├── programs/ specs/     by digest
    │   ├── baselines/           accepted by operators            state/statistics/baselines.py
    │   ├── snapshots/           snapshots of histories, or in the shared registry   state/history/snapshots.py
    │   ├── experiments/         experiments.json, lock, rollout.lock, report.json     state/experiments/experiment.py
    │   ├── gaps/                losses that the trainer accepted, including skipped records
    │   ├── privacy/ledger.json      the privacy budget spent so far       state/registry/privacy_ledger.py
    │   ├── shared.json shared.catalog   the shared registry      state/registry/directory.py
    │   ├── tmp/                 files being written; swept
    │   ├── trainer.lock takeover.lock   the trainer's claim      state/registry/directory.py
    │   └── compactor.lock, shared.lock
    ├── stream-0/                lock, writer (the transactional id)   streaming/writer.py
    │   ├── leaders.json                                          streaming/accounts.py
    │   ├── histories            the stream's store; while the stream runs, a link to the store in memory
    │   │                        state/history/store.py, state/disk/memory_place.py, lmdb_store.py
    │   ├── histories.link, .saving   copies on their way into and out of memory
    │   ├── histories.rebuilding, .rebuilt, .bad<n>               streaming/histories.py
    │   └── attributes/                                           state/attributes/values.py
    ├── serving/                 the applier's lock
    │   ├── rows                 a link to the rows, in memory    state/disk/memory_place.py, state/rows/store.py
    │   ├── rows.disk/           the rows if memory has no space
    │   ├── histories attributes/   as for the stream
    │   ├── segments/            members of segments              state/segments.py
    │   ├── lookalikes/          the newest list for each segment state/segments.py
    │   ├── current.version, current.histories   times only       deploy/serving/host_files.py
    │   ├── exposures/           exposures that workers have not sent to Kafka yet   deploy/serving/host_files.py
    │   ├── counters/            counters of workers that share a port     deploy/serving/rest.py
    │   └── programs/            the programs of applied versions
    ├── exports/<version>/       SavedModels                      trainer/exporting/saved_model.py
    ├── validation/              place.json, windows/<log time>.pb         deploy/validation/process.py
    ├── experiments/<name>/      comparison.json                           state/experiments/comparison.py
    │   ├── registry/            its own registry, with versions and control as above, and:
    │   │   ├── past.json        the past clicks that its trainer learns first    state/experiments/past.py
    │   │   ├── past-*/          histories of past clicks, while it learns them   streaming/past.py
    │   │   └── losses/          losses of rows, while an experiment runs, also in the live registry
    │   │                        state/experiments/comparison.py
    │   └── host/                its own serving, while its rollout runs   deploy/experiments/processes.py
    ├── replay/<key>/            lock, journal                    deploy/replaying/recording.py
    ├── kafka/                   broker.lock, data                deploy/local_kafka.py
    ├── prometheus/              prometheus.yml, data             deploy/startup/prometheus.py
    ├── flink/                   lock, conf, checkpoints, savepoints, logs     deploy/flink/command.py
    └── logs/                    one file per process             deploy/supervisor.py

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
HOSTS, FETCHED = "hosts", "fetched"
PROGRAMS, SPECS, PREPARED, TEMPORARY = "programs", "specs", "prepared", "tmp"
BASELINES = "baselines"
SNAPSHOTS = "snapshots"
GAPS = "gaps"  # also the extra of the stream's histories with the gaps that the stream accepted
TRAINER_LOCK, TAKEOVER_LOCK, COMPACTOR_LOCK = "trainer.lock", "takeover.lock", "compactor.lock"
SEGMENTS_LOCK = "segments.lock"

SERVING, KAFKA, LOGS, REPLAY, EXPORTS = "serving", "kafka", "logs", "replay", "exports"
VALIDATION = "validation"
EXPERIMENTS, LOSSES, PAST = "experiments", "losses", "past.json"
ROLLOUT_LOCK, RETRAIN_LOCK = "rollout.lock", "retrain.lock"
PROMETHEUS = "prometheus"
FLINK = "flink"
WRITER, LEADERS = "writer", "leaders.json"
HISTORIES, ATTRIBUTES, ROWS, SEGMENTS = "histories", "attributes", "rows", "segments"
LOOKALIKES = "lookalikes"
WORKER_COUNTERS, CURRENT, EXPOSURES = "counters", "current", "exposures"
DATA, MARK = "data.mdb", "mark.json"

_STREAM = "stream-"


def stream(state: Path) -> Path:
    """The directory of the stream, with its number from releases that had shards."""
    return state / f"{_STREAM}0"


def streams(state: Path) -> list[Path]:
    """The histories of every stream that ever ran under `state`, sorted: one, or the shards of an earlier release."""
    # After a power cut a store in memory is a dangling link.
    return sorted(folder / HISTORIES for folder in state.glob(f"{_STREAM}*") if os.path.lexists(folder / HISTORIES))


def experiment_registry(state: Path, name: str) -> Path:
    """The registry of an experiment."""
    return state / EXPERIMENTS / name / REGISTRY


def has_users(state: Path, registry: Path) -> bool:
    """Whether data is stored here under pseudonyms, whose salt must then be kept."""
    return bool(streams(state)) or any((registry / SPECS).glob("*/spec.json"))

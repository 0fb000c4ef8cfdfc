"""Stores of a host as they are when it has served for long, and a worker on them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.host_files import item_extra, item_value
from state.config.settings import Settings
from state.events.identity import load_salt, public_id, user_id
from state.features.spec import EVENT, FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.positions import Source
from state.process.environment import wall_ms
from state.ranking import transitions
from state.ranking.transitions import FOLLOWERS, Lists
from state.registry.manifest import LogRange, Manifest
from state.rows.store import RowStore

CATEGORIES = 256
ITEMS = 4000
SOURCE = Source("ab" * 16, 0)
READY_S = 60.0

U64 = NDArray[np.uint64]


class Ids(NamedTuple):
    """Who and what there is, uint64 each.

    Attributes:
        users: Those who have histories, `user-0` first.
        others: Users of whom there is a row and nothing else.
        items: All of them.
        categories: All of them.
    """

    users: U64
    others: U64
    items: U64
    categories: U64


def fill(settings: Settings, users: int, events: int, rows: int) -> tuple[Ids, Manifest, Any]:
    """Histories of `events` clicks, rows of everything, lists of what came next, one version of the default model.

    Args:
        settings: With the state directory.
        users: Who have histories.
        events: Of each.
        rows: Of users there are so many, at least `users`.

    Returns:
        The ids, the version, and its model.
    """
    salt = load_salt(settings.salt_path)
    rng = np.random.default_rng(11)
    ids = Ids(
        np.array([user_id(salt, f"user-{n}") for n in range(users)], np.uint64),
        rng.integers(1, 1 << 62, max(0, rows - users), dtype=np.uint64),
        np.array([public_id(f"item-{n}") for n in range(ITEMS)], np.uint64),
        np.array([public_id(f"category-{n}") for n in range(CATEGORIES)], np.uint64),
    )
    now_ms = wall_ms()
    _fill_histories(settings, ids, events, now_ms, rng)
    return ids, *_fill_rows(settings, ids, now_ms, rng)


def _fill_histories(settings: Settings, ids: Ids, events: int, now_ms: int, rng: np.random.Generator) -> None:
    histories = HistoryStore(settings.serving_dir / HISTORIES, settings.features.history)
    for first in range(0, len(ids.users), 2000):
        some = ids.users[first : first + 2000]
        clicks = np.zeros(len(some) * events, EVENT)
        clicks["at_ms"] = now_ms - rng.exponential(86_400_000, len(clicks)).astype(np.int64)
        clicks["category"] = ids.categories[rng.zipf(1.3, len(clicks)) % CATEGORIES]
        clicks["item"] = ids.items[rng.integers(0, ITEMS, len(clicks))]
        clicks["action"] = rng.integers(0, 4, len(clicks))
        clicks["topic"] = SOURCE.topic
        histories.commit(Appends.of(np.repeat(some, events), clicks))
    names = {f"name:{one:016x}": f"category-{n}".encode() for n, one in enumerate(ids.categories.tolist())}
    for n, item in enumerate(ids.items.tolist()):
        names[item_extra(item)] = item_value(int(ids.categories[n % CATEGORIES]), f"item-{n}".encode())
    clock = {"clock": json.dumps({"event_ms": now_ms, "accepted_ms": now_ms}).encode(), "caught_up": b"1"}
    histories.commit(Appends.none(), (), names | clock)
    histories.close()


def _fill_rows(settings: Settings, ids: Ids, now_ms: int, rng: np.random.Generator) -> tuple[Manifest, Any]:
    from trainer.model.default_ranker import DefaultRanker
    from trainer.versions.lowering import build

    spec, folder = FeatureSpec.from_settings(settings), settings.serving_dir
    model = DefaultRanker(settings.model, spec)
    program = build(model)
    digest = hashlib.sha256(program).hexdigest()
    (folder / PROGRAMS).mkdir()
    (folder / PROGRAMS / f"{digest}.tflite").write_bytes(program)
    tensors: dict[str, Any] = {f"dense.{name}": value for name, value in model.weights().items()}
    of_users = np.concatenate([ids.users, ids.others])
    for table, of in (("user", of_users), ("item", ids.items), ("category", ids.categories)):
        tensors[f"{table}.ids"] = of
        tensors[f"{table}.rows"] = rng.normal(0, 0.1, (len(of), settings.model.dim)).astype(np.float32)
    counts = np.sort(rng.integers(1, 500, (CATEGORIES, FOLLOWERS)).astype(np.int32), axis=1)[:, ::-1]
    followers = np.stack([rng.permutation(ids.categories)[:FOLLOWERS] for _ in range(CATEGORIES)])
    signs = np.zeros((CATEGORIES, transitions.SIGN_BYTES), np.uint8)
    tensors["transition.ids"] = ids.categories
    tensors["transition.rows"] = transitions.pack(Lists(np.ascontiguousarray(counts), followers), signs)
    tensors["popular"] = ids.categories[: settings.model.popular]
    manifest = Manifest(
        version=1, kind="base", epoch=1, parent=None, visible=((1, 1),), log=LogRange(), sources=((SOURCE, 1),), steps=1,
        rows=1, created_at_ms=now_ms, event_time_ms=now_ms, spec=spec.digest, program=digest,
        salt=load_salt(settings.salt_path).fingerprint, mask_generation=0, metrics={}, environment={}, files={},
    )  # fmt: skip
    rows = RowStore(folder / ROWS)
    rows.apply(manifest, tensors, now_ms, follow=True)
    rows.close()
    return manifest, model


@contextmanager
def worker(state: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A worker without gRPC, and how many seconds it took from its start until it was ready.

    Args:
        state: The state directory.
        port: Where it listens.

    Raises:
        AssertionError: It ended, or was not ready within `READY_S`.
    """
    environment = os.environ | {"SPRINGTIDE_PATHS_STATE": state, "SPRINGTIDE_SERVING_PORT": str(port)}
    environment["SPRINGTIDE_SERVING_GRPC_PORT"] = "0"
    began_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "deploy.serving.rest"], env=environment)
    try:
        until_answers(f"http://127.0.0.1:{port}/readyz", process)
        yield process, time.monotonic() - began_s
    finally:
        process.terminate()
        process.wait()


def until_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until a process answers.

    Raises:
        AssertionError: It ended, or did not within `READY_S`.
    """
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            assert time.monotonic() < deadline_s and process.poll() is None, f"{url} does not answer"
            time.sleep(0.02)

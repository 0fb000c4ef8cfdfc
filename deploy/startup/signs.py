"""The signs that the loop has come up: the trainer has a version, and serving answers with one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from deploy.startup.process_plan import TRAINER
from deploy.watch import scrape
from deploy.watch.address import serving_address
from state.config.settings import Settings

PATIENCE_S = 0.5
"""A process that compiles may answer late."""


def trained_version(settings: Settings) -> int:
    """The version that the trainer has loaded or made; 0 while there is none."""
    addresses = {TRAINER: scrape.urls(settings)[TRAINER]}
    return int(scrape.scrape(addresses)[TRAINER].value("springtide_trainer_version") or 0)


def kernels_left(settings: Settings, running: Collection[str]) -> str:
    """How far the running processes have prepared their kernels, for people; empty where all are ready, or nobody says."""
    addresses = {
        name: url for name, url in (scrape.urls(settings) | scrape.urls_beside(settings)).items() if name in running
    }
    found = scrape.scrape(addresses, lambda url: scrape.fetch(url, PATIENCE_S)) if addresses else {}
    counts = {
        name: (int(one.value("springtide_kernels_ready") or 0), int(one.value("springtide_kernels_total") or 0))
        for name, one in found.items()
    }
    return kernels_text({name: count for name, count in counts.items() if count[0] < count[1]})


def kernels_text(left: Mapping[str, tuple[int, int]]) -> str:
    """Words for the kernels of processes that are not ready: how many are, and of how many.

    >>> kernels_text({"trainer": (3, 20), "worker": (9, 10)})
    'compiling kernels, 12 of 30 (trainer 3 of 20, worker 9 of 10)'
    >>> kernels_text({})
    ''
    """
    if not left:
        return ""
    ready, total = (sum(column) for column in zip(*left.values(), strict=True))
    return f"compiling kernels, {ready} of {total} ({', '.join(f'{name} {one} of {all}' for name, (one, all) in left.items())})"


def answered_version(settings: Settings) -> int:
    """The version that an answer was given with just now; 0 where a worker gives none, or is not ready."""
    if scrape.fetch(serving_address(settings, "/readyz"))[0] != 200:
        return 0
    status, answer = scrape.fetch(scrape.profile_url(settings))
    return int(json.loads(answer)["version"]["number"]) if status == 200 else 0

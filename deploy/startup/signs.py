"""The signs that the loop has come up: the trainer has a version, and serving answers with one."""

from __future__ import annotations

import json

from deploy.startup.process_plan import TRAINER
from deploy.watch import scrape
from deploy.watch.address import serving_address
from state.config.settings import Settings


def trained_version(settings: Settings) -> int:
    """The version that the trainer has loaded or made; 0 while there is none."""
    addresses = {TRAINER: scrape.urls(settings)[TRAINER]}
    return int(scrape.scrape(addresses)[TRAINER].value("springtide_trainer_version") or 0)


def answered_version(settings: Settings) -> int:
    """The version that an answer was given with just now; 0 where a worker gives none, or is not ready."""
    if scrape.fetch(serving_address(settings, "/readyz"))[0] != 200:
        return 0
    status, answer = scrape.fetch(scrape.profile_url(settings))
    return int(json.loads(answer)["version"]["number"]) if status == 200 else 0

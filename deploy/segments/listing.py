"""Lists the users nearest to each segment's members once: `python -m deploy.segments.listing`.

It is a child of the process that keeps members. It writes the lists to a temporary directory. After a successful end
the parent moves them to their final location, unless a rollback or an erasure happened in the meantime.
"""

from __future__ import annotations

import logging
import sys

import numpy as np

from deploy.segments.command import opened
from deploy.segments.judging import open_host
from deploy.segments.lookalike_lists import aside
from deploy.segments.lookalikes import nearest, precision_curve, vectors_of
from state.config.settings import Settings
from state.disk import files as durable
from state.process.part import run_part
from state.process.wall_clock import wall_ms
from state.segments import lookalikes
from state.segments.configured import segments_of
from state.segments.lookalikes import LookalikeList, NearUser
from state.segments.store import all_members

_log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Writes the list of each segment that has members, from the current stores of this host.

    Raises:
        SpringtideError: A required store or file does not exist.
        OSError: The disk is full, or the operating system refused the access.
    """
    host, folder = open_host(settings), aside(settings)
    folder.mkdir()
    try:
        found = vectors_of(host.predictor(), lambda looked: None)
    finally:
        host.close()
    with opened(settings) as store:
        for segment in segments_of(settings):
            within = [user for page in all_members(store, segment) for user, _ in page]
            members = np.isin(found.users, np.array(within, np.uint64))
            if not members.any():
                continue
            near = nearest(found, members, settings.segments.lookalikes)
            made = LookalikeList(
                found.version,
                wall_ms(),
                int(members.sum()),
                len(found.users),
                tuple(NearUser(f"{user:016x}", similarity) for user, similarity in near),
                tuple(precision_curve(found, members)),
            )
            lookalikes.write(folder, segment, made)
    durable.sync_directory(folder)


def main(argv: list[str] | None = None) -> int:
    """Writes the lists with the settings of `argv`; returns the exit code."""
    return run_part("segments", run, argv, _log)


if __name__ == "__main__":
    sys.exit(main())

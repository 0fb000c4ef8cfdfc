"""Fills the cache of compiled kernels, where processes share one: `python -m state.kernels [MODULE...]`.

Each process prepares its own kernels at its start. This is for what must be done before that, such as an init container
whose limit of processor time is higher than that of the containers behind it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from state.compiled.preparing import Kernels
from state.process import log_lines

USED = ("state.features.kernel", "state.log.batch_decoder", "state.ranking.crosses", "state.ranking.transition_rows")
"""Those of serving and the stream."""
_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the kernels of the modules of `argv`, or of `USED`; returns the exit code."""
    log_lines.begin("kernels")
    Kernels(CollectorRegistry(), _log, uses=(sys.argv[1:] if argv is None else argv) or USED).prepare()
    return 0


if __name__ == "__main__":
    sys.exit(main())

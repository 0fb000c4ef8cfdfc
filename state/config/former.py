"""Settings of earlier releases: what they are called now, and which ones decide nothing any more."""

from __future__ import annotations

import logging
from typing import Any

from state.errors import SettingsError

RENAMED = {"features.labels": "features.recent_categories"}
"""What was called otherwise, and its name."""

SHARDS = {"stream.shard": "0", "stream.shards": "1"}
"""By which several streams could share the partitions, and their values where one read all."""

_CUT = "a store that was open in a power cut is made anew"
_ONE = "one stream reads all partitions"
GONE = {"stream.sync_s": _CUT, "serving.sync_s": _CUT, **dict.fromkeys(SHARDS, _ONE)}
"""What decides nothing any more, and why."""

_logger = logging.getLogger(__name__)


def is_gone(name: str, value: Any, origin: str) -> bool:
    """Whether nothing asks for a setting any more, which is said; its value is passed over.

    Raises:
        SettingsError: It asks for what there is no more.
    """
    if name in SHARDS and str(value).strip() != SHARDS[name]:
        raise SettingsError(
            f"{origin}: there is no {name} any more: {_ONE}",
            "stop all streams of this deployment, leave the setting out and start one; where histories of other shards "
            "lie beside its own it asks for `springtide rebuild-history`, which `springtide up` runs by itself",
        )
    if name in GONE:
        _logger.warning("%s: %s decides nothing any more: %s; leave it out", origin, name, GONE[name])
    return name in GONE

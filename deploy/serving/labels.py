"""Which version a label stands for on this host: what the operator said, else what answers and what answered before."""

from __future__ import annotations

import json

from deploy.serving.notes import CONTROL_NOTE
from state.rows.reader import RowReader

STABLE, PREVIOUS, CANARY = "stable", "previous", "canary"


def labels_of(reader: RowReader) -> dict[str, int]:
    """The version of each label, whether or not its rows are here.

    `stable` and `previous` are what answers and what answered before it where
    nobody set them.
    """
    control, served, before = reader.note(CONTROL_NOTE), reader.served(), reader.before()
    found = {} if served is None else {STABLE: served.version}
    if before is not None:
        found[PREVIOUS] = before
    return found | (json.loads(control).get("labels", {}) if control else {})

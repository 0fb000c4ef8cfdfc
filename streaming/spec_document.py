"""What `specs/<digest>/spec.json` of the registry says: where constants came from, and the first categories with their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from state.events.identity import Salt
from streaming.sample import Sample


def document(sample: Sample, salt: Salt, categories: Mapping[int, int], now_ms: int) -> dict[str, Any]:
    """What `spec.json` says beside the graph.

    Args:
        sample: The clicks analysed.
        salt: What users' pseudonyms were made with.
        categories: Clicks by category id. As many are listed as `model.popular`
            says: most clicked first, lower id first among equals.
        now_ms: Wall clock.
    """
    model, spec, tally = sample.settings.model, sample.spec, sample.tally
    ranked = sorted(categories.items(), key=lambda entry: (-entry[1], entry[0]))[: model.popular]
    return {
        "spec": spec.to_json(),
        "features": list(spec.names),
        "label_windows": list(spec.window_names),
        "salt": salt.fingerprint,
        "preprocessing": model.preprocessing,
        "options": list(model.options),
        "asked": sample.asked,
        "rows": tally.clicks,
        "popular": [[f"{label:016x}", clicks] for label, clicks in ranked],
        "names": {f"{label:016x}": name for label, name in sorted(tally.names.items())},
        "newest_ms": tally.newest_ms,
        "created_at_ms": now_ms,
    }

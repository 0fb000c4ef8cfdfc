"""The section `[model]` for user code, with a record of the options that the code reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from state.config.sections import Model


@dataclass(frozen=True)
class AskedModel(Model):
    """The section `[model]`, which records the options that were read.

    Attributes:
        asked: Option name -> the effective value and the default, both as text.

    >>> given = AskedModel.of(Model(options=("buckets=16", "heads=4")), {})
    >>> given.option("buckets", 8), given.option("even", True), given.asked
    (16, True, {'buckets': ['16', '8'], 'even': ['true', 'true']})
    """

    asked: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, settings: Model, asked: dict[str, list[str]]) -> AskedModel:
        """Wraps a section; reads are added to `asked`."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(Model)}, asked=asked)

    def option(self, name: str, default: Any) -> Any:
        """Like `Model.option`, and records the read."""
        text = str(default).lower() if isinstance(default, bool) else str(default)
        self.asked[name] = [self.written.get(name, text), text]
        return super().option(name, default)

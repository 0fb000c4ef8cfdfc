"""The section `[model]` as code of the user's own gets it, where it matters which options that code reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from state.config.sections import Model


@dataclass(frozen=True)
class AskedModel(Model):
    """The section `[model]`, which remembers the options that were read.

    Attributes:
        asked: By name the text in force and that of the default.

    >>> given = AskedModel.of(Model(options=("buckets=16", "heads=4")), {})
    >>> given.option("buckets", 8), given.option("even", True), given.asked
    (16, True, {'buckets': ['16', '8'], 'even': ['true', 'true']})
    """

    asked: dict[str, list[str]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, settings: Model, asked: dict[str, list[str]]) -> AskedModel:
        """The section with `asked`, which grows."""
        return cls(**{one.name: getattr(settings, one.name) for one in fields(Model)}, asked=asked)

    def option(self, name: str, default: Any) -> Any:
        """As `Model.option`."""
        text = str(default).lower() if isinstance(default, bool) else str(default)
        self.asked[name] = [self.written.get(name, text), text]
        return super().option(name, default)

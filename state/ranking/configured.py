"""Builds the crosses of a model from its settings; trainer, compactor and serving share this function."""

from __future__ import annotations

from state.attributes.values import tables_of
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.ranking.crosses import Crosses


def crosses_of(settings: Settings) -> Crosses:
    """The crosses of a model with these settings."""
    tables = tables_of(settings.attributes)
    users, items = (tables[side].names if side in tables else () for side in ("user", "item"))
    return Crosses(FeatureSpec.from_settings(settings), settings.events.context, users, items)

"""The factors that scale raw integers for a neural network: log(1 + x) * log_scale + x * scale + shift."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]


class Scaling(NamedTuple):
    """The factors of n columns, `[n]` float32 each."""

    log_scale: F32
    scale: F32
    shift: F32


def feature_scaling(names: tuple[str, ...]) -> Scaling:
    """The scaling of features without an analysis of past clicks, to about [0, 2].

    Counts become log(1 + x) / 4. A recency is a logarithm already (eight steps
    an octave, 255 for never) and is only scaled.
    """
    recency = np.array(["recency" in name or name.startswith("gap.") for name in names])
    scale = np.where(recency, 1 / 128, 0.0).astype(np.float32)
    return Scaling(np.where(recency, 0.0, 1 / 4).astype(np.float32), scale, np.zeros_like(scale))


def window_scaling(names: tuple[str, ...]) -> Scaling:
    """The scaling of the windows of categories, to about [-2, 4]: log(1 + x), centred by their kind.

    The kinds differ more than the categories of one user do.
    """
    by_kind = HYPERPARAMETERS.window_scaling
    rows = [by_kind[next((kind for kind in by_kind if name.startswith(kind)), "")] for name in names]
    return Scaling(*np.array(rows, np.float32).T.copy())

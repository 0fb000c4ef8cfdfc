"""The preprocessing of features: a function of tensors, or the bootstrap's analysis of one, which is loaded when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.model.targets import Tensor

F32 = npt.NDArray[np.float32]

Preprocessing = Callable[[Tensor], Tensor]
"""`[B, D]` float32 raw integers to `[B, D']` float32. The setting `model.preprocessing` makes it from the bootstrap's
analysis."""


class StoredTable(Protocol):
    """Keeps the table of a preprocessing from one start to the next."""

    def load(self) -> F32 | None:
        """The table that `save` stored for the same analysis and environment; None if there is none."""

    def save(self, table: F32) -> None:
        """Stores the table."""


@dataclass(frozen=True)
class Analysed:
    """The preprocessing that the bootstrap analysed. Its graph needs TensorFlow, its stored table does not.

    Attributes:
        transform: The directory with the analysed graph.
        table: Of the default preprocessing: `[65536, D]` float32, the value of each feature for each raw integer.
    """

    transform: Path
    table: StoredTable

"""Where the noise of a record stands: its place in the log, with all that can change which rows it has there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NoisePlace:
    """A place. The same noise on other rows would let their difference be seen without any.

    Attributes:
        topic_id: Of the training log.
        partition: Likewise.
        offset: Of the record.
        epoch: Of control, each with a mask of its own.
        erased: The last erasure that counts there.
    """

    topic_id: str
    partition: int
    offset: int
    epoch: int
    erased: int

    def of_update(self, number: int) -> str:
        """The text of an update of the record.

        >>> NoisePlace("ab", 0, 7, 1, 0).of_update(2)
        'ab:0:7 epoch 1 erased 0 update 2'
        """
        return f"{self.topic_id}:{self.partition}:{self.offset} epoch {self.epoch} erased {self.erased} update {number}"

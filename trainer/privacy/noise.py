"""Normal numbers as a function of a secret key and a name alone.

Each name gets its own key (keyed BLAKE2b, RFC 7693), with which ChaCha20 (RFC 8439) makes a stream of bits. Two words
of 53 bits make two normal numbers (Box and Muller 1958). So a process that reads the log again makes the same noise.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

F64 = npt.NDArray[np.float64]

_UNIT = 2.0**-53


class Noise:
    """The noise of one key."""

    def __init__(self, key: bytes) -> None:
        # BLAKE2b accepts keys of at most 64 bytes.
        self._key = hashlib.blake2b(key, digest_size=64, person=b"springtide noise").digest()

    def normal(self, name: str, count: int) -> F64:
        """Standard normal numbers, `[count]` float64. The first ones are the same for any `count`; `name` is unique to their use.

        >>> one, other = Noise(b"a key of a test"), Noise(b"another one")
        >>> bool((one.normal("here", 3) == one.normal("here", 8)[:3]).all())
        True
        >>> bool((one.normal("here", 3) == other.normal("here", 3)).any() or (one.normal("there", 3) == one.normal("here", 3)).any())
        False
        """
        key = hashlib.blake2b(name.encode(), key=self._key, digest_size=32).digest()
        pairs = -(-count // 2)
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(16 * pairs))
        words = np.frombuffer(stream, "<u8").reshape(pairs, 2) >> np.uint64(11)
        # In (0, 1], so that its logarithm is finite: at most 8.57 standard deviations.
        length = np.sqrt(-2.0 * np.log((words[:, 0] + np.uint64(1)).astype(np.float64) * _UNIT))
        angle = words[:, 1].astype(np.float64) * (2.0 * np.pi * _UNIT)
        numbers = np.empty((pairs, 2))
        numbers[:, 0], numbers[:, 1] = length * np.cos(angle), length * np.sin(angle)
        return numbers.reshape(-1)[:count]

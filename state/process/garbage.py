"""Keeps the garbage of a process that lives for long small."""

from __future__ import annotations

import gc


def keep_what_is_there() -> None:
    """Takes all objects of now, modules above all, out of what the collector looks at; called once a process is set up.

    Python looks for unused cycles among old objects only once a quarter as many new ones have come to stay. Beside the
    million objects of TensorFlow that is hardly ever, and cycles hold whole arrays meanwhile; once it comes, it takes
    half a second. Afterwards there are few old objects, so that it comes often and takes nothing to speak of.
    """
    gc.collect()
    gc.freeze()
    # Only a full collection counts the old objects anew.
    gc.collect()

"""Opens the place for files that a word names."""

from __future__ import annotations

from pathlib import Path

from state.places.directory import DirectoryPlace
from state.places.place import FilePlace
from state.places.url import UrlPlace

STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Protocols of object stores."""


def open_place(text: str) -> FilePlace:
    """The place that a word of the command line or a setting names: a directory, an object store, or a URL that fsspec knows.

    >>> open_place("/mnt/backups").told, open_place("file:///mnt/backups").told
    ('/mnt/backups', '/mnt/backups')

    Raises:
        UnusablePlace: It cannot be reached, or nothing that reaches it is installed.
    """
    if "://" not in text or text.startswith("file://"):
        return DirectoryPlace(Path(text.removeprefix("file://")))
    if text.partition("://")[0] in STORES:
        # Whoever has none needs neither its client nor that of AWS.
        from state.places.store import StorePlace

        return StorePlace(text)
    return UrlPlace(text)

"""An object store as a place for files, as fsspec reaches it: its objects are whole or absent, and it says what is durable.

An S3 store makes `create` exclusive by the header `If-None-Match: *`. Each
word of the door is one request there, but for long lists and what is larger
than 100 MB, which is sent in parts. Each request has its time; what takes
longer is refused, and whoever asked decides whether to ask again.
"""

from __future__ import annotations

import contextlib
from typing import Any

from state.errors import UnusablePlace
from state.places.place import reached, without_password

CONNECT_S, ANSWER_S = 5, 20
"""How long a connection may take, and a silence within an answer."""
TRIES = 1
"""Again, of one request that was not answered."""
_S3 = ("s3", "s3a")
_FLAT = (*_S3, "gs", "gcs", "abfs", "az")
"""Protocols of stores that have no folders."""


class UrlPlace:
    """A place that fsspec reaches, such as `s3://bucket/folder`. See `FilePlace`.

    Raises:
        UnusablePlace: What its protocol needs is not installed, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.told = without_password(url)
        protocol = url.partition("://")[0]
        try:
            import fsspec

            with reached(self.told, "be opened"):
                self._files, self._root = fsspec.url_to_fs(url, **_options(protocol))
        except ImportError as error:
            raise UnusablePlace(
                f"{self.told} cannot be opened ({error})", "install what fsspec names there, such as s3fs for s3://"
            ) from error
        if protocol in _S3:
            self._files.retries = TRIES
        self._made: set[str] | None = None if protocol in _FLAT else set()

    def names(self, folder: str) -> list[str]:
        """See `FilePlace`."""
        root = f"{self._root}/{folder}".rstrip("/")
        with reached(self.told, "be listed"):
            self._files.invalidate_cache()
            try:
                found: list[str] = self._files.find(root)
            except FileNotFoundError:
                found = []
        # Of a file system with folders the root is a path from its own root.
        return sorted(name.removeprefix(root).removeprefix("/") for name in found if name.strip("/") != root.strip("/"))

    def read(self, name: str) -> bytes:
        """See `FilePlace`."""
        with reached(self.told, f"give {name}"):
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
            return data

    def write(self, name: str, data: bytes) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"take {name}"):
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """See `FilePlace`."""
        try:
            with reached(self.told, f"take {name}"):
                self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"give up {name}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def _path(self, name: str) -> str:
        path = f"{self._root}/{name}"
        folder = path.rpartition("/")[0]
        if self._made is not None and folder not in self._made:
            self._files.makedirs(folder, exist_ok=True)
            self._made.add(folder)
        return path


def _options(protocol: str) -> dict[str, Any]:
    """What a protocol's file system is told beside the URL."""
    if protocol not in _S3:
        return {}
    times = {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retries": {"max_attempts": TRIES}}
    # With more at once s3fs asks for the size before it reads, and lists where there is no such file: two requests for one.
    return {"config_kwargs": times, "use_listings_cache": False, "max_concurrency": 1}

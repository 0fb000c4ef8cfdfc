"""File stores for backups and shared registries: a directory or an object store, with the same operations.

A file is complete or absent. `DirectoryStore` writes a temporary file, syncs it, renames or links it, and syncs the
directory. `ObjectStore` is an S3 (or compatible) bucket, Google Cloud Storage or Azure; an object is durable once the
store confirms it. Each operation is one request with a time limit. Exceptions are lists of more than a thousand names,
and files larger than `PART_BYTES`, which are sent in parts. The caller decides whether to retry a failed request.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar, cast

from state.disk import files as durable
from state.errors import SpringtideError, UnusablePlace, reason_of
from state.metrics import SharedMetrics

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.auth.boto3 import Boto3CredentialProvider

PROTOCOLS = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Protocols of object stores."""
CONNECT, ANSWER, WHOLE = timedelta(seconds=5), timedelta(seconds=30), timedelta(days=1)
"""Time limits: of a connection; of a request and the start of its response, or of a pause; and of a whole response."""
TRIES = 1
"""Retries of a request without a response."""
PART_BYTES, PARTS_AT_ONCE = 5 * 1024 * 1024, 2
"""The smallest part that S3 accepts; each part has the time limit of a request, also over a slow link."""

Answer = TypeVar("Answer")
P = ParamSpec("P")


class FileStore(Protocol):
    """A file store. Thread-safe.

    Its `name` is for messages. Names of files are relative paths with `/` between their parts.
    """

    name: str

    def names(self, folder: str) -> list[str]:
        """The names of all files below `folder`, relative to it, ascending; empty if there is no such folder.

        Like every other method, it raises `UnusablePlace` if the request failed.
        """
        ...

    def read(self, name: str) -> bytes:
        """Reads a file; FileNotFoundError if there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a file as a whole; durable when this returns.

        If it fails, the file is unchanged; or it has the new content, if only the response was lost.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Creates a file durably and returns True, or False if the file exists. Of concurrent callers one gets True.

        A caller that retries after a lost response may get False for its own file: compare the content.
        """
        ...

    def tagged(self, name: str) -> tuple[bytes, str]:
        """Reads a file and the tag of its content, for `swap`; two empty values if there is none."""
        ...

    def swap(self, name: str, data: bytes, tag: str) -> str:
        """Replaces a file whose tag is still `tag`, or creates it if `tag` is empty.

        Of concurrent callers, one succeeds.

        Returns:
            The new tag; empty if the file has another tag and is unchanged. A caller that retries after a lost response
            may find its own content.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file; no error if it does not exist."""
        ...


def open_store(text: str) -> FileStore:
    """Opens the store that an argument or a setting names: a directory, or the URL of an object store.

    >>> open_store("/mnt/backups").name, open_store("file:///mnt/backups").name
    ('/mnt/backups', '/mnt/backups')
    """
    if "://" not in text or text.startswith("file://"):
        return DirectoryStore(Path(text.removeprefix("file://")))
    if text.partition("://")[0] not in PROTOCOLS:
        raise UnusablePlace(
            f"{without_password(text)} cannot be opened: its protocol is unknown",
            f"name a directory, or a URL that starts with {', '.join(f'{protocol}://' for protocol in PROTOCOLS)}",
        )
    return ObjectStore(text)


class DirectoryStore:
    """A directory, created at the first write. See `FileStore`."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def names(self, folder: str) -> list[str]:
        """See `FileStore`."""
        root = self._path / folder

        def raise_unless_missing(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        with usable(self.name, "be listed"):
            names = [
                Path(at, name).relative_to(root).as_posix()
                for at, _, names in os.walk(root, onerror=raise_unless_missing)
                for name in names
                if not durable.is_temporary(name)
            ]
        return sorted(names)

    def read(self, name: str) -> bytes:
        """See `FileStore`."""
        with usable(self.name, f"read {name}"):
            return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `FileStore`."""
        with usable(self.name, f"write {name}"):
            path = self._with_folder(name)
            durable.replace(path, data, durable.unique(path))

    def create(self, name: str, data: bytes) -> bool:
        """See `FileStore`."""
        with usable(self.name, f"write {name}"):
            path = self._with_folder(name)
            return durable.create(path, data, durable.unique(path))

    def tagged(self, name: str) -> tuple[bytes, str]:
        """See `FileStore`. The tag is a digest."""
        try:
            data = self.read(name)
        except FileNotFoundError:
            return b"", ""
        return data, durable.digest(data)

    def swap(self, name: str, data: bytes, tag: str) -> str:
        """See `FileStore`. A lock file next to the file excludes other callers, even while its holder is frozen."""
        with usable(self.name, f"write {name}"):
            path = self._with_folder(name)
            handle = os.open(path.with_name(f"{path.name}~lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if self.tagged(name)[1] != tag:
                    return ""
                self.write(name, data)
            finally:
                os.close(handle)
        return durable.digest(data)

    def remove(self, name: str) -> None:
        """See `FileStore`."""
        with usable(self.name, f"remove {name}"):
            (self._path / name).unlink(missing_ok=True)

    def _with_folder(self, name: str) -> Path:
        path = self._path / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.sync_directory(path.parent.parent)
        return path


class ObjectStore:
    """A folder of an object store, such as `s3://bucket/folder`. See `FileStore`.

    Credentials and region for S3 come from the same sources as in AWS's own tools: the environment, a profile, or the
    machine's role. It raises `UnusablePlace` without credentials, or if the URL names no store.
    """

    def __init__(self, url: str) -> None:
        # Imported here, because only deployments with an object store need its client and the AWS client.
        from obstore.store import from_url

        self.name = without_password(url)
        with self._reached("be opened"):
            self._store = from_url(
                url,
                client_options={
                    "allow_http": True,
                    "connect_timeout": CONNECT,
                    "read_timeout": ANSWER,
                    "timeout": WHOLE,
                },
                retry_config={"max_retries": TRIES, "retry_timeout": ANSWER},
                credential_provider=self._credentials() if url.startswith("s3") else None,
            )

    def names(self, folder: str) -> list[str]:
        """See `FileStore`."""
        with self._reached("be listed"):
            paths = [entry["path"] for page in self._store.list(folder or None) for entry in page]
        return sorted(name.removeprefix(folder).removeprefix("/") for name in paths)

    def read(self, name: str) -> bytes:
        """See `FileStore`."""
        with self._reached(f"read {name}"):
            return self._store.get(name).bytes().to_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `FileStore`."""
        with self._reached(f"write {name}"):
            self._store.put(name, data, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def create(self, name: str, data: bytes) -> bool:
        """See `FileStore`."""
        from obstore.exceptions import AlreadyExistsError

        with self._reached(f"write {name}"):
            try:
                self._store.put(name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def tagged(self, name: str) -> tuple[bytes, str]:
        """See `FileStore`. The tag is the object's ETag and version."""
        with self._reached(f"read {name}"):
            try:
                object_ = self._store.get(name)
            except FileNotFoundError:
                return b"", ""
            return object_.bytes().to_bytes(), _tag(object_.meta)

    def swap(self, name: str, data: bytes, tag: str) -> str:
        """See `FileStore`."""
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        parts = dict(zip(("e_tag", "version"), tag.split(_OF), strict=False))
        with self._reached(f"write {name}"):
            try:
                result = self._store.put(
                    name,
                    data,
                    mode=cast("UpdateVersion", {part: value for part, value in parts.items() if value})
                    if tag
                    else "create",
                )
            except (AlreadyExistsError, NotFoundError, PreconditionError):
                return ""
        return _tag(result)

    def remove(self, name: str) -> None:
        """See `FileStore`."""
        with self._reached(f"remove {name}"):
            self._store.delete(name)

    def _credentials(self) -> Boto3CredentialProvider:
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            return Boto3CredentialProvider()
        except ValueError as error:
            raise UnusablePlace(
                f"{self.name} cannot be opened: there are no credentials",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
            ) from error

    @contextmanager
    def _reached(self, doing: str) -> Iterator[None]:
        """Converts every error of the store's client, except for a missing file."""
        try:
            yield
        except (FileNotFoundError, UnusablePlace):
            raise
        except Exception as error:
            detail = without_password(str(error).partition("\n")[0]) or type(error).__name__
            raise UnusablePlace(
                f"{self.name} cannot {doing} ({detail})", "check the network and your rights there, and repeat it"
            ) from error


def _counted(
    operation: str, method: Callable[Concatenate[FileStore, P], Answer]
) -> Callable[Concatenate[CountedStore, P], Answer]:
    """Makes a method of `CountedStore` out of one of `FileStore`; `operation` is its label in the metrics."""

    @functools.wraps(method)
    def call(self: CountedStore, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        self.metrics.requests.labels(operation).inc()
        answer: Answer = getattr(self.store, method.__name__)(*args, **kwargs)
        contents = answer if isinstance(answer, tuple) else (answer,)
        self.metrics.bytes.labels("received").inc(sum(len(part) for part in contents if isinstance(part, bytes)))
        self.metrics.bytes.labels("sent").inc(sum(len(part) for part in args if isinstance(part, bytes)))
        return answer

    return call


class CountedStore:
    """A `FileStore` that counts its requests and the bytes transferred.

    A store that lists a thousand names per request may get more requests than are counted.
    """

    def __init__(self, store: FileStore, metrics: SharedMetrics) -> None:
        self.store, self.metrics, self.name = store, metrics, store.name

    names = _counted("list", FileStore.names)
    read = _counted("get", FileStore.read)
    write = _counted("put", FileStore.write)
    create = _counted("put", FileStore.create)
    tagged = _counted("get", FileStore.tagged)
    swap = _counted("put", FileStore.swap)
    remove = _counted("delete", FileStore.remove)


_OF = " of version "


def _tag(meta: ObjectMeta | PutResult) -> str:
    return f"{meta['e_tag'] or ''}{_OF}{meta['version'] or ''}"


def without_password(url: str) -> str:
    """A URL without user and password, for display.

    >>> without_password("sftp://ann:secret@host/folder"), without_password("s3://bucket/folder")
    ('sftp://host/folder', 's3://bucket/folder')
    """
    return re.sub(r"://[^/@]*@", "://", url)


@contextmanager
def usable(name: str, doing: str, failed: type[SpringtideError] = UnusablePlace) -> Iterator[None]:
    """Converts an operating system error in the block to an error of class `failed`, except FileNotFoundError.

    `name` is the directory's name and `doing` the operation, for the message.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failed(
            f"{name} cannot {doing} ({reason_of(error)})", "free space or correct its access rights, and repeat it"
        ) from error

"""A place for files, which are whole or absent: what a directory and an object store both promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from state.errors import SpringtideError, UnusablePlace, reason_of


class FilePlace(Protocol):
    """A place for files. Names are paths relative to it, with `/` between their parts. Any thread may call.

    Attributes:
        told: How it is called in messages, without a password.
    """

    told: str

    def names(self, folder: str) -> list[str]:
        """The names of all files below `folder`, relative to it, ascending; none where there is no such folder.

        Raises:
            UnusablePlace: It cannot be listed.
        """
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: There is none.
            UnusablePlace: It cannot be read.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it; whole, and durable when this returns.

        Raises:
            UnusablePlace: It was refused; the file is as it was, or new where an answer was lost on the way.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file where there is none, durably; False where there is one, which stays. Of several at once one is told True.

        Whose answer is lost asks again, and may be told False of its own file: compare what is there.

        Raises:
            UnusablePlace: It was refused; whether the file is there is not known.
        """
        ...

    def remove(self, name: str) -> None:
        """Takes a file away; one that is gone already is no error.

        Raises:
            UnusablePlace: It was refused.
        """
        ...


def without_password(url: str) -> str:
    """A URL as it may be shown.

    >>> without_password("sftp://ann:secret@host/folder"), without_password("s3://bucket/folder")
    ('sftp://host/folder', 's3://bucket/folder')
    """
    return re.sub(r"://[^/@]*@", "://", url)


@contextmanager
def usable(told: str, doing: str, failed: type[SpringtideError] = UnusablePlace) -> Iterator[None]:
    """Turns what the operating system refuses into an error of ours; a file that is not there stays one.

    Args:
        told: What refuses, as messages call it.
        doing: What it was to do.
        failed: The error.

    Raises:
        FileNotFoundError: A file is not there.
        SpringtideError: The disk is full or read-only, or rights are missing: `failed`.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failed(
            f"{told} cannot {doing} ({reason_of(error)})", "free space or correct its access rights, and repeat it"
        ) from error


@contextmanager
def reached(told: str, doing: str) -> Iterator[None]:
    """As `usable`, for what is behind a network: each client has errors of its own.

    Raises:
        FileNotFoundError, FileExistsError: A file is not there, or is there already.
        ImportError: Something is not installed.
        UnusablePlace: It cannot be reached, or refused.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, ImportError, UnusablePlace):
        raise
    except Exception as error:
        detail: Any = without_password(str(error).partition("\n")[0]) or type(error).__name__
        raise UnusablePlace(
            f"{told} cannot {doing} ({detail})", "check the network and your rights there, and repeat it"
        ) from error

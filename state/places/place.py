"""The contract of a file store, which a directory and an object store implement: files are complete or absent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from state.errors import SpringtideError, UnusablePlace, reason_of


class FilePlace(Protocol):
    """A file store. Names are relative paths with `/` between their parts. Any thread may call.

    Attributes:
        told: Its name in messages, without a password.
    """

    told: str

    def names(self, folder: str) -> list[str]:
        """The names of all files below `folder`, relative to it, ascending; empty if there is no such folder.

        Raises:
            UnusablePlace: The files cannot be listed.
        """
        ...

    def read(self, name: str) -> bytes:
        """Reads a file.

        Raises:
            FileNotFoundError: There is no such file.
            UnusablePlace: The file cannot be read.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a file as a whole; durable when this returns.

        Raises:
            UnusablePlace: The request failed. The file is unchanged, or new if only the response was lost.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Creates a file durably and returns True, or False if the file exists. Of concurrent callers one gets True.

        A caller that retries after a lost response may get False for its own file: compare the content.

        Raises:
            UnusablePlace: The request failed; whether the file exists is unknown.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file; no error if it does not exist.

        Raises:
            UnusablePlace: The request failed.
        """
        ...


def without_password(url: str) -> str:
    """A URL without user and password, for display.

    >>> without_password("sftp://ann:secret@host/folder"), without_password("s3://bucket/folder")
    ('sftp://host/folder', 's3://bucket/folder')
    """
    return re.sub(r"://[^/@]*@", "://", url)


@contextmanager
def usable(told: str, doing: str, failed: type[SpringtideError] = UnusablePlace) -> Iterator[None]:
    """Converts an operating system error in the block to one of ours; FileNotFoundError passes unchanged.

    Args:
        told: The file store's name in messages.
        doing: The operation, for the message.
        failed: The class of the error to raise.

    Raises:
        FileNotFoundError: A file does not exist.
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
    """Like `usable`, for a store behind a network, whose client has its own errors.

    Raises:
        FileNotFoundError, FileExistsError: A file does not exist, or exists already.
        ImportError: A package is not installed.
        UnusablePlace: The store cannot be reached, or refused.
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

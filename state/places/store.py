"""An object store as a file store: S3 and compatible stores, Google Cloud Storage and Azure.

An object is complete or absent, and durable once the store confirms it. Only one
writer can create it: S3 uses the header `If-None-Match: *`. Each operation is one
request, except lists of more than a thousand names, and files larger than
`PART_BYTES`, which are sent in parts. Each request has a time limit. A request
that exceeds it fails, and the caller decides whether to retry.

Credentials and region for S3 are found as AWS's own tools find them: in the
environment, a profile, or the machine's role.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError
from obstore.store import from_url

from state.errors import UnusablePlace
from state.places.place import reached, without_password

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CONNECT, ANSWER, WHOLE = timedelta(seconds=5), timedelta(seconds=30), timedelta(days=1)
"""Time limits: of a connection; of a request and the start of its response, or of a pause; and of a whole response."""
TRIES = 1
"""Retries of a request without a response."""
PART_BYTES, PARTS_AT_ONCE = 5 * 1024 * 1024, 2
"""The smallest part that S3 accepts; each part has the time limit of a request, also over a slow link."""


class StorePlace:
    """A file store in an object store, such as `s3://bucket/folder`. See `FilePlace`.

    Raises:
        UnusablePlace: There are no credentials, or the URL names no store.
    """

    def __init__(self, url: str) -> None:
        self.told = without_password(url)
        self._store = self._opened(url)

    def names(self, folder: str) -> list[str]:
        """See `FilePlace`."""
        with reached(self.told, "be listed"):
            found = [one["path"] for page in self._store.list(folder or None) for one in page]
        return sorted(name.removeprefix(folder).removeprefix("/") for name in found)

    def read(self, name: str) -> bytes:
        """See `FilePlace`."""
        with reached(self.told, f"give {name}"):
            return self._store.get(name).bytes().to_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"take {name}"):
            self._store.put(name, data, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def create(self, name: str, data: bytes) -> bool:
        """See `FilePlace`."""
        with reached(self.told, f"take {name}"):
            try:
                self._store.put(name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """See `FilePlace`."""
        with reached(self.told, f"give up {name}"):
            self._store.delete(name)

    def _opened(self, url: str) -> ObjectStore:
        client: ClientConfig = {
            "allow_http": True,
            "connect_timeout": CONNECT,
            "read_timeout": ANSWER,
            "timeout": WHOLE,
        }
        again: RetryConfig = {"max_retries": TRIES, "retry_timeout": ANSWER}
        with reached(self.told, "be opened"):
            found = self._credentials() if url.startswith("s3") else None
            return from_url(url, client_options=client, retry_config=again, credential_provider=found)

    def _credentials(self) -> Boto3CredentialProvider:
        try:
            return Boto3CredentialProvider()
        except ValueError as error:
            raise UnusablePlace(
                f"{self.told} cannot be opened: there are no credentials",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
            ) from error

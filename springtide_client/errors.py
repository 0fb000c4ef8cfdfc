"""Exceptions of the client; each message gives the cause and the remedy.

ClientError
├── Unreachable         the address cannot be reached
├── TimedOut            no response arrived in time
├── Refused             the response is an error: status, what, do, where
│   ├── Overloaded      429: more requests than can be served in time
│   └── ServerFailed    5xx: not ready, too late, or failed
└── UnexpectedAnswer    the response is not from Springtide, or has another format
"""

from __future__ import annotations


class ClientError(Exception):
    """Base class of the client's errors: a call got no response, or an error. `what` happened, and what to `do`."""

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; {do}" if do else what)
        self.what, self.do = what, do


class Unreachable(ClientError):
    """The address cannot be reached. Check whether a worker runs there."""


class TimedOut(ClientError):
    """No response arrived in time. Allow more time, or request less at once."""


class Refused(ClientError):
    """The response is an error.

    Args:
        status: HTTP status code.
        where: The part of the request at fault, if there is one: a parameter, or a JSON pointer into the body.
        retry_after_s: The wait in seconds that the worker requests before a retry; None if it requests none.
    """

    def __init__(
        self, status: int, what: str, do: str = "", where: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(what, do)
        self.status, self.where, self.retry_after_s = status, where, retry_after_s


class Overloaded(Refused):
    """The worker receives more requests than it can serve in time. Send fewer, or run more workers."""


class ServerFailed(Refused):
    """The worker is not ready, exceeded its deadline, or failed. Its log gives the cause."""


class UnexpectedAnswer(ClientError):
    """The response is not from Springtide, or has another format. Check the address and any proxies in between."""

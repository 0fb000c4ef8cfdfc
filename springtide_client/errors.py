"""The one tree of what a call can raise; each says what happened and what to do.

ClientError
├── Unreachable         nobody answered at the address
├── TimedOut            no answer came in time
├── Refused             the answer is an error: status, what, do, where
│   ├── Overloaded      429: more is asked than can be answered in time
│   └── ServerFailed    5xx: not ready, too late, or failed
└── UnexpectedAnswer    what answers is no Springtide, or one of another form
"""

from __future__ import annotations


class ClientError(Exception):
    """A call that was not answered.

    Args:
        what: What happened.
        do: What to do.

    Attributes:
        what: What happened.
        do: What to do.
    """

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; {do}" if do else what)
        self.what, self.do = what, do


class Unreachable(ClientError):
    """Nobody answered at the address. Look whether a worker runs there."""


class TimedOut(ClientError):
    """No answer came in time. Give more time, or ask for less at once."""


class Refused(ClientError):
    """The answer is an error.

    Args:
        status: Of HTTP.
        what: What happened.
        do: What to do.
        where: The place in the request, if it is one's fault: a parameter, or a JSON pointer into the body.
        retry_after_s: When the worker says to come again; None where it does not.

    Attributes:
        status: As given.
        where: As given.
        retry_after_s: As given.
    """

    def __init__(
        self, status: int, what: str, do: str = "", where: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(what, do)
        self.status, self.where, self.retry_after_s = status, where, retry_after_s


class Overloaded(Refused):
    """More is asked than can be answered in time. Ask less often, or run more workers."""


class ServerFailed(Refused):
    """The worker is not ready, was too late, or failed. Its log says why."""


class UnexpectedAnswer(ClientError):
    """What answers is no Springtide, or one of another form. Look at the address, and what stands in between."""

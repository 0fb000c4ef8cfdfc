"""The tree of errors; each class tells the operator what to do.

    SpringtideError                 exit 1
    ├── SettingsError               exit 2
    │   └── ModelMismatch
    ├── MissingSalt, SaltMismatch, SpecMismatch
    ├── LogError
    │   ├── UnreachableBroker, UnknownTopic
    │   ├── GapError
    │   │   └── TruncatedLog
    ├── StoreError
    │   ├── LockHeld, PositionConflict, RewoundLog, CorruptStore, StoreFull, UnusableDisk
    ├── RegistryError
    │   ├── UnknownVersion, CorruptVersion, UnusableRegistry, WrongEpoch, ControlConflict,
    │   ├── UnfitVersion, UnfitMask
    ├── MicroBatchError, DecodeError, ProgramError, TrainingHeld, NotReady, NotHeld
    ├── UnusablePlace
    ├── BackupError
    │   └── DamagedBackup
    ├── BadRequest                  HTTP 400, 404, 405, 408, 413, 431, 501
    │   └── Unauthorized, Forbidden     HTTP 401, 403
    ├── Overloaded, TookTooLong     HTTP 429, 504
    ├── WorkerFailed                HTTP 500
    └── PortTaken, KafkaFailed, FlinkFailed, ProcessFailed, WorkerLost

An error states in one line what happened, to which input, and what to do, without a raw user id. A bad record is no
error: it goes to the dead letters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from state.positions import Gap


class SpringtideError(Exception):
    """Something an operator can act on; the process ends with `exit_code`. Do what the message says.

    Args:
        what: What happened, to which input.
        do: What to do; by default the advice of the class.

    >>> error = StoreFull("rows/ is full", "free space")
    >>> str(error), error.what, error.do
    ('rows/ is full; free space', 'rows/ is full', 'free space')
    >>> UnknownTopic("there is no topic clicks").do
    'Create it, or correct its name in `[kafka]`; a mistyped name is never created.'
    """

    exit_code: int = 1
    http_status: int = 503
    http_headers: tuple[tuple[bytes, bytes], ...] = ()

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}; {do}" if do else what)
        self.what = what
        self.do = do or self._advice()

    @classmethod
    def _advice(cls) -> str:
        """The docstring's first line after its first sentence."""
        return (cls.__doc__ or "").partition("\n")[0].partition(". ")[2]


class SettingsError(SpringtideError):
    """A setting is unknown or impossible. Correct the file and line, variable or flag that the message names."""

    exit_code = 2


class MissingSalt(SpringtideError):
    """There is no salt file, and none may be made. Restore the file, or set `paths.salt_file` to where it is."""

    @classmethod
    def at(cls, path: object) -> MissingSalt:
        """The error for a missing file."""
        return cls(f"there is no salt at {path}", "restore the file, or set paths.salt_file to where it is")


class SaltMismatch(SpringtideError):
    """The salt is not the one the stored pseudonyms were made with. Restore the salt file (`paths.salt_file`); without it start a new state directory."""

    @classmethod
    def between(cls, holder: str, stored: str, own: str) -> SaltMismatch:
        """The error for data whose users were made with another salt, with the fingerprints of both salts."""
        return cls(
            f"{holder} has users of salt {stored}, the salt here is {own}",
            "restore the salt file (paths.salt_file); without it start a new state directory (paths.state)",
        )


class SpecMismatch(SpringtideError):
    """The feature settings are not those of the stored state. Put `[features]` and `events.actions` back, or continue from the learned state as the message says."""


class ModelMismatch(SettingsError):
    """The newest version was trained with another model. Put the settings back that the message names, or learn from the training log from scratch as it says."""


class LogError(SpringtideError):
    """Kafka refused or lost something. See the class below it for what to do; the process may be started again."""


class UnreachableBroker(LogError):
    """No broker answers. Check `kafka.bootstrap_servers`, the network, and the SASL and TLS settings."""


class UnknownTopic(LogError):
    """A topic does not exist. Create it, or correct its name in `[kafka]`; a mistyped name is never created."""


class GapError(LogError):
    """Positions of a log are gone that were not read. Restore the topic, or accept the loss with `--accept-gap PARTITION:A-B --reason TEXT`.

    Attributes:
        gaps: The missing ranges; empty if no gap can be accepted, as in a log that ends too early.
    """

    def __init__(self, what: str, do: str = "", gaps: Iterable[Gap] = ()) -> None:
        super().__init__(what, do)
        self.gaps = tuple(gaps)


class TruncatedLog(GapError):
    """A log was truncated below our position, so that the offsets of its gap are used again. Do as the message says: it depends on the process."""

    @property
    def kept(self) -> int:
        """The offset up to which the log is still the one that was read."""
        return self.gaps[0].first


class StoreError(SpringtideError):
    """A store on disk cannot be used as it is. See the class below it; nothing was half written."""


class LockHeld(StoreError):
    """Another process owns the directory. Stop the process that the message names, or choose another `paths.state`."""


class PositionConflict(StoreError):
    """A batch does not begin where the store ends. Find the second writer; a restart reads again from the stored position."""


class RewoundLog(StoreError):
    """The training log was rewound to before the position that a distributed job has read. Resume the job from an older savepoint."""


class CorruptStore(StoreError):
    """Stored bytes cannot be trusted; they are not used. Run `springtide rebuild-history`: it rebuilds them from Kafka."""


class StoreFull(StoreError):
    """The disk or a store's map is full. Free space, or raise `storage.budget_gb` and start again."""


class UnusableDisk(StoreError):
    """A file of the state directory cannot be read or written. Free space, or correct the rights that the message names, and start again."""


class RegistryError(SpringtideError):
    """The registry refused. See the class below it; no version or control was changed."""


class UnknownVersion(RegistryError):
    """No such version is kept. Use one of `springtide versions`; the message names the nearest."""


class CorruptVersion(RegistryError):
    """A version's file fails its digest. Roll back to an earlier version, and check the disk."""


class UnusableRegistry(RegistryError):
    """The registry's files cannot be read or written; no version was half written. Free space, or correct the rights that the message names, and start again."""


class WrongEpoch(RegistryError):
    """A version of an epoch that control no longer names was refused. Nothing to do: the trainer reloads and continues in control's epoch."""


class ControlConflict(RegistryError):
    """Another operator created this control generation first. Check `springtide history`, then repeat the command if it still applies."""


class UnfitVersion(RegistryError):
    """The system cannot be rolled back to this version. Use the version that the message names."""


class UnfitMask(RegistryError):
    """A mask is not set, or the masks do not fit into control. Use one of `springtide masks`, or name fewer ranges."""


class MicroBatchError(SpringtideError):
    """A record of the micro-batch topic cannot be read. Check who else writes there, and that the releases match."""


class DecodeError(SpringtideError):
    """A record's value cannot be turned into an event; it becomes a dead letter. Correct the producer or `[events]`.

    Attributes:
        reason: The dead letter's reason code, such as `undecodable`.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class UnusablePlace(SpringtideError):
    """A directory or an object store for files cannot be reached, or refused; no file in it is half written. Check the network and your permissions, and repeat the command."""


class BackupError(SpringtideError):
    """A backup cannot be made or restored as asked. Do as the message says; the state before is unchanged."""


class DamagedBackup(BackupError):
    """A part of a backup is missing or fails its digest; nothing was restored. Use another one: `springtide backup FROM --list`."""


class ProgramError(SpringtideError):
    """The model does not lower to a program, or the program's answers differ. Replace the operation that the message names."""


class TrainingHeld(SpringtideError):
    """The guard held training after many bad steps. Check the input, then `springtide rollback --to V --reason TEXT`, or `springtide resume` where it is good."""


class NotReady(SpringtideError):
    """Something that answers need is not available yet. Wait for the applier, or check its log."""


class NotHeld(SpringtideError):
    """A user belongs to a share that this host does not hold. Ask a host that holds it, or start one with the share in `serving.shares`."""


class BadRequest(SpringtideError):
    """A request cannot be answered as it is. Correct it as the answer says.

    `where` is a JSON pointer into the body, or a parameter's name; empty if the error concerns the whole request.
    """

    exit_code = 2
    http_status = 400

    def __init__(self, what: str, do: str = "", where: str = "", http_status: int | None = None) -> None:
        super().__init__(what, do)
        self.where = where
        if http_status is not None:
            self.http_status = http_status


class Unauthorized(BadRequest):
    """A request has no token, or none of this host's. Send one of those in `serving.tokens_dir`."""

    http_status = 401
    http_headers: tuple[tuple[bytes, bytes], ...] = ((b"www-authenticate", b"Bearer"),)


class Forbidden(BadRequest):
    """A token's role does not allow this. Send one of the role that the answer names."""

    http_status = 403


class Overloaded(SpringtideError):
    """Requests exceed the capacity to answer in time. Ask less or later, or give serving more workers or hosts."""

    http_status = 429
    http_headers: tuple[tuple[bytes, bytes], ...] = ((b"retry-after", b"1"),)


class TookTooLong(SpringtideError):
    """An answer did not come in time. Ask less or later, or give serving more workers or hosts."""

    http_status = 504


class WorkerFailed(SpringtideError):
    """A worker failed with an unexpected error. Report it with the worker's log."""

    http_status = 500


class PortTaken(SpringtideError):
    """A port is in use. Stop its owner, or choose another with the setting that the message names."""


class KafkaFailed(SpringtideError):
    """The local Kafka did not start or died. Read the log file that the message names."""


class FlinkFailed(SpringtideError):
    """The local Flink did not start, does not answer or refuses, or a job ended on its engine. Do as the message says, or read the log that it names."""


class WorkerLost(SpringtideError):
    """A worker of the trainer ended, does not answer or has other weights. All start again from the newest version."""


class ProcessFailed(SpringtideError):
    """One of the loop's processes dies again and again. Read the log file that the message names."""


def of_disk(problem: SpringtideError | OSError) -> SpringtideError:
    """Converts an operating system error into `UnusableDisk` with advice; returns our own errors unchanged.

    >>> str(of_disk(OSError(28, "No space left on device", "state/salt")))
    'state/salt: No space left on device; free space or correct its access rights, and start again'
    """
    if isinstance(problem, SpringtideError):
        return problem
    return UnusableDisk(reason_of(problem), "free space or correct its access rights, and start again")


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message; its class name if there is no message."""
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__


def reason_of(problem: OSError) -> str:
    """File and reason of an operating system's error, in one line."""
    reason = problem.strerror or str(problem) or type(problem).__name__
    return f"{problem.filename}: {reason}" if problem.filename else reason

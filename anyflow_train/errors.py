"""Exceptions and warnings that users see as one line, without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from anyflow_train.text import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_DISK = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)
"""Error numbers whose cause is a disk, a permission or a name, and never a bug of this package."""


class UserError(ValueError):
    """A user error: printed as one line without a traceback, with exit code 2.

    Control characters in both texts are escaped.

    Args:
        where: the wrong config key (dotted) or file.
        problem: the bad value and what would be right, in one sentence.

    Attributes:
        errors: the single errors, one for each line: this one, or those of a `UserErrors`.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where = printable(where)
        self.problem = printable(problem)
        self.errors: tuple[UserError, ...] = (self,)
        super().__init__(f"{self.where}: {self.problem}")

    def within(self, place: str) -> list[UserError]:
        """Return the single errors, each with the place of its config before the key."""
        return [UserError(f"{place}: {one.where}", one.problem) for one in self.errors]

    @classmethod
    def of_file(cls, error: OSError, folder: object) -> UserError:
        """Explain a file that cannot be read or written. `folder` is named if the error does not name a file."""
        where, reason = str(error.filename or folder), error.strerror or str(error)
        if error.errno in NO_ROOM:
            return cls(where, f"the disk is full ({reason}); checkpoints are intact, free some space and start again")
        return cls(where, f"cannot be read or written ({reason}); mend that and start again")


class UserErrors(UserError):
    """Several user errors, printed together with one line each."""

    def __init__(self, errors: Iterable[UserError]) -> None:
        self.errors = tuple(errors)
        ValueError.__init__(self, "\n".join(map(str, self.errors)))


class SharedErrors(UserErrors):
    """User errors that every process of a run raises, so that each process ends by itself."""


@contextmanager
def requires_extra(where: str, extra: str) -> Iterator[None]:
    """Turn a failed import in the block into a UserError that says how to install the extra."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("anyflow_train"):
            raise
        problem = f"needs packages that are not installed: pip install 'anyflow_train[{extra}]'"
        raise UserError(where, problem) from None


def raise_all(errors: Sequence[UserError], kind: type[UserErrors] = UserErrors) -> None:
    """Raise the errors together, as `kind`, if there are any."""
    if errors:
        raise kind(errors)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class ConfigWarning(UserWarning):
    """A warning about a config: printed as one line, and the command continues."""


class LostProcess(Exception):
    """Another process of the run has died: printed as one line, with exit code 1."""

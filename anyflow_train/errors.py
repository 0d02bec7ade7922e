"""The one exception that is meant for people."""


class UserError(ValueError):
    """A user's mistake: becomes one line on the terminal and exit code 2, without a traceback.

    Args:
        where: the dotted config key or the file that is wrong.
        problem: the bad value and what would be right, as one sentence.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where = where
        self.problem = problem
        super().__init__(f"{where}: {problem}")


class UserErrors(UserError):
    """Several mistakes, reported together: one line each."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = tuple(errors)
        ValueError.__init__(self, "\n".join(str(error) for error in errors))


class SharedErrors(UserErrors):
    """Mistakes that every process of a run raises, so that each of them ends by itself."""


class ConfigWarning(UserWarning):
    """Something about a config that is worth a line on the terminal, and no error."""


class LostProcess(Exception):
    """Another process of the run is gone: no mistake of the user's, and one line says enough."""

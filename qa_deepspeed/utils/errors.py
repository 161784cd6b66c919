"""The exceptions that users see as a single line instead of a traceback."""


class UserError(ValueError):
    """A user's mistake in data, flags, files or machine.

    The message is one line: what is wrong, where, and what to do. The command line prints it and exits with status 2.
    Mistakes of this program are `assert`s.
    """


class StorageError(UserError):
    """A disk that is full or fails: the same command may succeed later.

    status: the exit status of the command line, 2 or one that asks for the same command again.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class LostRankError(UserError):
    """Another rank, or another process that builds the same features, has ended or does not answer.

    The command line exits with status 1: launchers restart such a run, but not one that ends with a user's mistake.
    """

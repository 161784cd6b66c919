"""The one exception that users see as a single line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave us: data, flags, files or the machine.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and exits
    with status 2. Mistakes of our own are `assert`s.
    """

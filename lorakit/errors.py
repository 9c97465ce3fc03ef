"""The errors that lorakit raises on purpose, and the exit code each one means."""

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


class LorakitError(Exception):
    """The run failed for a reason that is not in what the user wrote (exit code 1)."""

    exit_code = EXIT_FAILED
    one_a_line = False
    """Whether each line of the message is a finding of its own, which begins with its place."""


class UserError(LorakitError):
    """The recipe, the data or the arguments are wrong (exit code 2).

    The message says where, what was given, why it cannot be, and what to write instead.
    """

    exit_code = EXIT_USER


class Interrupted(LorakitError):
    """The user stopped the work with Ctrl-C or SIGTERM (exit code 130)."""

    exit_code = EXIT_INTERRUPTED

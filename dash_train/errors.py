"""The errors a user can cause, and how a command reports them."""

EXIT_USER_ERROR = 2
EXIT_RANK_LOST = 3


class UserError(ValueError):
    """A mistake in a recipe, a file or an environment.

    The message is one line: what is wrong, where, what was expected, the likely fix. Commands print it and exit with
    code 2.
    """


class RankError(RuntimeError):
    """Another rank of the run died or hangs; the message is one line. Commands print it and exit with
    code 3."""

"""The errors a user can cause, and how a command reports them."""


class UserError(ValueError):
    """A mistake in a recipe, a file or an environment.

    The message is one line: what is wrong, where, what was expected, the likely fix. Commands print it and exit with
    code 2.
    """

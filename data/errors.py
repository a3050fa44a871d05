"""The error that bad data raises."""

from dash_train.errors import UserError


class DataError(UserError):
    """A data problem a user can mend: one line naming the file (and line), what was expected, and the fix."""

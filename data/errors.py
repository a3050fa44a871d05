"""The error that bad data raises. `data` stands apart from `dash_train`, so it has its own."""


class DataError(ValueError):
    """A data problem a user can mend: one line naming the file (and line), what was expected, and the fix."""

"""The one exception a user's mistake ends in: launch.py prints it as one line and exits with 2."""


class UserError(ValueError):
    """Something the user gave is wrong: says what was wrong, where, and what is allowed."""

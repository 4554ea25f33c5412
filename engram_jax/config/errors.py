"""The exception for a user's mistakes: launch.py prints it as one line and exits with status 2."""


class UserError(ValueError):
    """Wrong input from the user; the message says what is wrong, where, and what is allowed."""

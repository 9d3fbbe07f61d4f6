"""The exception type for mistakes of a user."""


class UserError(ValueError):
    """A mistake that the user can fix: it is shown as one line, and the process exits with code 2.

    The message names the setting or file:line, the value and the fix. Every other exception is a bug: its traceback
    is shown, and the process exits with code 1.
    """

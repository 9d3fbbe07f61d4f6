"""The one type for what a user did."""


class UserError(ValueError):
    """What a user did and can cure: shown as one line, and the process exits with code 2.

    The text names the setting or file:line, the value and the cure. Every other exception is a bug: its traceback
    is shown, and the process exits with code 1.
    """

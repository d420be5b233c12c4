"""The errors that a user can mend, and the warnings that a user should read."""


class InputError(ValueError):
    """What was given cannot be used; the message says what was given, what was expected and how to mend it.

    The command line turns it into one line on stderr and exit status 2.
    """


class NonFiniteLogitsError(InputError):
    """The model produced NaN, +inf, or a row of only −inf; the message names the sequence and the position."""


class EntropyFastWarning(UserWarning):
    """Something was done differently from what was asked, or a result needs care."""

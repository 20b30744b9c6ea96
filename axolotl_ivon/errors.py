"""The error that a user is meant to read."""


class IVONError(Exception):
    """A wrong input, told in one line that names the key, the value and the fix.

    `ivon-post` prints the line and exits with status 1; library users catch it like any other exception.
    """

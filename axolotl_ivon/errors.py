"""The error that a user is meant to read."""

_LONGEST = 2000


def printable(text: str) -> str:
    """Return one line that a terminal shows and does not obey: whatever a file put into `text` comes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks."""
    return " ".join(str(error).split())


class IVONError(Exception):
    """A wrong input, told in one line that names the key, the value and the fix.

    `ivon-post` prints the line and exits with status 1; library users catch it like any other exception.
    """

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        super().__init__(line)

"""Texts of other libraries, as they may be shown in a message."""

from minilora.files.text import shown

# Long enough for a reason, too short to fill a terminal.
LIMIT = 400


def one_line(text: object, limit: int = LIMIT) -> str:
    r"""Returns a text in one line, with its white space as single spaces, as `shown` shows it.

    Example:
        >>> one_line("a\nb \x1b[31m\u202e")
        'a b \\x1b[31m\\u202e'
    """
    # Only what can be shown is looked at, plus what white space may take.
    return shown(" ".join(str(text)[: 8 * limit].split()), limit)

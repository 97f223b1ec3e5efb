"""Text that came from a file or a model, made safe for a terminal."""

import unicodedata


def shown(text: object, limit: int = 100) -> str:
    r"""Returns a text as a terminal may show it: cut to `limit` characters, on one line.

    Characters that control a terminal or reverse the reading direction are escaped.

    Example:
        >>> shown("q_proj"), shown("\x1b[2Jq\u202e"), shown("a" * 9, limit=4)
        ('q_proj', '\\x1b[2Jq\\u202e', 'aaaa...')
    """
    whole = str(text)
    kept = whole[:limit]
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in kept)
    return escaped + ("..." if len(whole) > limit else "")


def shown_lines(text: str) -> str:
    r"""Returns a text of any length and several lines as a terminal may show it.

    Spaces of all kinds and what joins emoji or letters stay. What controls a terminal, or changes
    the reading direction, is escaped.

    Example:
        >>> print(shown_lines("one\ntwo \x1b[2J"))
        one
        two \x1b[2J
    """
    return "".join(c if is_harmless(c) else repr(c)[1:-1] for c in text)


def is_harmless(character: str) -> bool:
    """Whether a character can be shown on a terminal as it is; a new line can."""
    # Control, format, surrogate, line and paragraph separator.
    controls = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return not controls or character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def shown_value(value: object, limit: int = 80) -> str:
    r"""Returns a value from a file as Python writes it, made safe by `shown`.

    Example:
        >>> shown_value("x\n"), shown_value([1, None])
        ("'x\\n'", '[1, None]')
    """
    return shown(repr(value), limit)

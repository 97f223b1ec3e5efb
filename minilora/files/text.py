"""Text that came from a file, made safe for a message."""


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


def shown_value(value: object, limit: int = 80) -> str:
    r"""Returns a value from a file as Python writes it, made safe by `shown`.

    Example:
        >>> shown_value("x\n"), shown_value([1, None])
        ("'x\\n'", '[1, None]')
    """
    return shown(repr(value), limit)

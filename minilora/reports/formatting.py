"""Numbers as a person reads them."""


def format_seconds(seconds: float) -> str:
    """Returns a time with three digits.

    Example:
        >>> format_seconds(0.01234), format_seconds(72.4)
        ('12.3 ms', '72.4 s')
    """
    for unit in ("s", "ms"):
        if seconds >= 1 or not seconds:
            return f"{three_digits(seconds)} {unit}"
        seconds *= 1000
    return f"{three_digits(seconds)} us"


def three_digits(n: float) -> str:
    """Returns a number with three digits, and all those before the decimal point.

    Example:
        >>> three_digits(0.05), three_digits(97.04), three_digits(12345.6)
        ('0.05', '97.0', '12,346')
    """
    decimals = 0 if n >= 99.95 or not n else 1 if n >= 9.995 else 2
    return f"{n:,.{decimals}f}"


def format_bytes(n: float) -> str:
    """Returns a number of bytes with a decimal unit.

    Example:
        >>> format_bytes(12_345_678)
        '12.3 MB'
    """
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}"
    n /= 1000
    return f"{n:.2f} GB" if n < 1000 else f"{n / 1000:,.2f} TB"

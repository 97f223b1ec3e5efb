"""Numbers as a person reads them."""


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

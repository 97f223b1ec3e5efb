"""What a user of the command line sees of an error: one line, and an exit code."""

from typing import Any

# Of sysexits.h: an error inside the program, which is not the user's.
INTERNAL_ERROR = 70

# Errors that say what to do; any other one is a defect of minilora.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)


def describe(error: Exception) -> tuple[str, int]:
    """Returns the line that a user sees for an error, and the exit code.

    Example:
        >>> describe(ValueError("r=0: must be positive"))
        ('r=0: must be positive', 1)
    """
    if hasattr(error, "format_message") and hasattr(error, "ctx"):
        return _describe_usage(error)

    # Of PyTorch: a RuntimeError of this name, or one that only its text tells apart.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in str(error):
        return f"out of memory: {error or 'the system gives no more'}; see `minilora plan`", 1
    if isinstance(error, EXPECTED) and str(error):
        return str(error), 1
    return (
        f"internal error: {error!r}. This is a defect of minilora: please report it with what "
        "`minilora --debug ...` prints",
        INTERNAL_ERROR,
    )


def _describe_usage(error: Any) -> tuple[str, int]:
    """The same for one of typer's errors: an option that is missing, unknown or misspelt."""
    command = error.ctx.command_path if error.ctx else "minilora"
    return f"{error.format_message()} (see `{command} --help`)", error.exit_code

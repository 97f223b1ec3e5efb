"""The page of the command line, from the commands themselves.

python tests/tools/command_page.py writes it; tests/cli/test_cli.py checks that it is current.
"""

from pathlib import Path
from typing import Any

import typer

from minilora.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "command-line.md"

INTRODUCTION = """\
# The command line

`minilora COMMAND --help` prints the same texts, `minilora --version` the version. `python -m
minilora` is the same command. An error is one line on standard error, which says what to do;
`minilora --debug COMMAND ...` shows its traceback as well. Notes and warnings are one line each and
begin with `minilora: note:` or `minilora: warning:`. Source: [cli.py](../../minilora/cli.py). The
options of `finetune` are the fields of [FinetuneConfig](../../minilora/training/config.py).

No command runs code that comes with a model, unless `--trust-remote-code` allows it, and none asks
a question on standard input; `chat` reads messages there.
"""

EXIT_CODES = """
## Exit codes

| code | meaning |
|---|---|
| 0 | success |
| 1 | an error; its message is on standard error |
| 2 | an unknown option, a missing one, or a value of the wrong type |
| 70 | an internal error: a defect of minilora, to be reported with what `--debug` shows |
| 130, 143 | `finetune` was interrupted by Ctrl-C or SIGTERM, and has saved a checkpoint |
"""


def render() -> str:
    """Returns the page: every command with its options."""
    group: Any = typer.main.get_command(app)
    sections = [section(name, command) for name, command in group.commands.items()]
    return "".join([INTRODUCTION, *sections, EXIT_CODES])


def section(name: str, command: Any) -> str:
    rows = "".join(row(option) for option in command.params)
    table = f"| option | default | description |\n|---|---|---|\n{rows}"
    return f"\n## minilora {name}\n\n{command.help}\n\n{table}"


def row(option: Any) -> str:
    names = " / ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"| {names} | {default(option)} | {option.help} |\n"


def default(option: Any) -> str:
    """The default value; empty if it is None, which the description explains."""
    if option.required:
        return "required"
    if isinstance(option.default, bool):
        chosen = option.opts if option.default else option.secondary_opts
        return f"`{chosen[0]}`"
    return "" if option.default is None else f"`{option.default}`"


if __name__ == "__main__":
    PAGE.write_text(render())

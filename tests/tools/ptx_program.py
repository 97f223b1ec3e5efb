"""Reads PTX text into instructions.

A program is a flat list: labels are replaced by places in it, and a register that is declared
inside a block `{ .reg .b32 x; ... }`, as inline assembly does, gets a name of its own.
"""

import dataclasses
import functools
import re
from typing import NamedTuple


class Guard(NamedTuple):
    """@%p1 or @!%p1: the threads in which an instruction acts."""

    register: str
    negated: bool


class Instruction(NamedTuple):
    """One statement.

    name: "ld.global.v4.b32"
    parts: the name split at its dots
    operands: as written, "{%r1, %r2}" and "[%rd1+4]" whole
    text: the statement, for errors
    """

    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: Guard | None
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The instructions of a function or of inline assembly.

    labels: the place of each label in the list
    widths: bytes of each declared register; of "%r<9>" under "%r"
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: dict[str, int]

    def width(self, register: str) -> int:
        """Bytes of a register; 0 of a predicate."""
        if register in self.widths:
            return self.widths[register]
        return self.widths[register.rstrip("0123456789")]

    def is_register(self, name: str) -> bool:
        return name in self.widths or (name[:1] == "%" and name.rstrip("0123456789") in self.widths)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A kernel. `parameters` are the names of its parameters and their kinds, in order."""

    name: str
    parameters: dict[str, str]
    threads: int
    body: Body


COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LINE_TABLE = re.compile(r"^\s*\.(loc|file)\b[^\n]*$", re.MULTILINE)
LABEL = re.compile(r"([$\w]+):(?!:)\s*")
GUARD = re.compile(r"@(!?)([%\w]+)\s+")
OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)")
NAME = re.compile(r"[%$\w]+")
WIDTHS = {"pred": 0, "16": 2, "32": 4, "64": 8}


@functools.lru_cache(maxsize=512)
def parse(ptx: str) -> Program:
    """Reads a module with one kernel."""
    ptx = LINE_TABLE.sub("", COMMENTS.sub("", ptx))
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL)
    if not entry:
        raise ValueError("no .entry in the PTX")

    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if not threads:
        raise ValueError(f"{entry[1]} does not say how many threads it has")
    parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", entry[2].strip())
    named = {name: kind for kind, name in parameters}
    return Program(entry[1], named, int(threads[1]), parse_body(_block(ptx[entry.end() :])))


def _block(text: str) -> str:
    """The text up to the brace that closes the one before it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise ValueError("the PTX ends inside a block")


class _Reader:
    """What parse_body has read so far; `scopes` maps names declared in open blocks to new ones."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = []
        self.blocks = 0

    def statement(self, text: str) -> None:
        text = self._front(text.strip())
        if not text or text.startswith((".pragma", ".shared")):
            return
        if text.startswith(".reg"):
            self._declare(text)
            return
        text = NAME.sub(self._renamed, text)

        guard = GUARD.match(text)
        rest = text[guard.end() :] if guard else text
        name, _, operands = rest.partition(" ")
        found = tuple(operand.strip() for operand in OPERAND.findall(operands))
        acting = Guard(guard[2], guard[1] == "!") if guard else None
        self.instructions.append(Instruction(name, tuple(name.split(".")), found, acting, text))

    def _front(self, text: str) -> str:
        """Takes labels and braces off the front of a statement."""
        while text:
            label = LABEL.match(text)
            if label:
                self.labels[label[1]] = len(self.instructions)
                text = text[label.end() :]
            elif text[0] == "{":
                self.scopes.append({})
                self.blocks += 1
                text = text[1:].strip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].strip()
            else:
                break
        return text

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        width = next(w for suffix, w in WIDTHS.items() if kind.endswith(suffix))
        for name in names.split(","):
            name = name.strip().partition("<")[0]
            if self.scopes:
                self.scopes[-1][name] = f"{name}.{self.blocks}"
                name = f"{name}.{self.blocks}"
            self.widths[name] = width

    def _renamed(self, name: "re.Match[str]") -> str:
        for scope in reversed(self.scopes):
            if name[0] in scope:
                return scope[name[0]]
        return name[0]


def parse_body(text: str) -> Body:
    """Reads statements, without the braces around them."""
    reader = _Reader()
    text = " ".join(LINE_TABLE.sub("", COMMENTS.sub("", text)).split())
    for statement in text.split(";"):
        reader.statement(statement)
    return Body(tuple(reader.instructions), reader.labels, reader.widths)


def vector(operand: str) -> list[str]:
    """The registers of "{%r1, %r2}"; of "%r1", that one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """The register or symbol of "[%rd1+4]", and the number of bytes after it."""
    base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
    return base, int(offset or "0", 0)

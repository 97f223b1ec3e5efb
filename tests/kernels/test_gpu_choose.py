"""The table of choices: how it is read, and that the one in the file is sound."""

import json

import pytest

pytest.importorskip("triton", reason="the paths to choose from are written in Triton")

from minilora.kernels.gpu import choose

DENSE = {"path": "dense"}


def test_the_first_line_that_fits_is_taken() -> None:
    assert choose.choose("forward", 1, 4096, 4096, 64)["path"] == "skinny"
    assert choose.choose("forward", 100, 4096, 4096, 64)["path"] == "tile"
    assert choose.choose("backward", 1, 4096, 4096, 64)["path"] == "tile"

    # The skinny path scales whole sums over 64 columns.
    assert choose.choose("forward", 1, 4096, 4096, 32)["path"] == "tile"


@pytest.mark.parametrize(
    ("M", "I", "block_size"), [(10**5, 4096, 64), (1, 100, 64), (1, 96, 32), (1, 128, 256)]
)
def test_what_no_line_takes_is_dense(M: int, I: int, block_size: int) -> None:
    assert choose.choose("forward", M, 4096, I, block_size) == DENSE


def test_the_table_in_the_file_is_sound() -> None:
    table = json.loads(choose.TABLE.read_text())
    assert table.keys() == {"measured on", "forward", "backward"}

    for direction in ("forward", "backward"):
        *tried, last = table[direction]
        assert last == DENSE
        assert [line["rows"] for line in tried] == sorted(line["rows"] for line in tried)
        for line in tried:
            sides = {"BM", "BO", "BI", "warps", "stages"} if line["path"] == "tile" else set()
            keys = {"rows", "path"} | sides
            assert keys <= line.keys() <= keys | {"weights"}
            assert line["path"] != "skinny" or (line["rows"] <= 16 and direction == "forward")

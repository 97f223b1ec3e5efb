"""The tables of choices: how they are read, that those in the file are sound, and falling back."""

import json
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the paths to choose from are written in Triton")

from minilora.kernels.gpu import choose, tuned

DENSE = {"path": "dense"}
TILE = {"path": "tile", "BM": 64, "BO": 64, "BI": 64, "warps": 4, "stages": 4}
DIRECTIONS = ("forward", "backward")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test chooses anew, and leaves nothing behind."""
    choose.forget()
    yield
    choose.forget()


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with tiles for up to 100 rows."""
    table = [{"rows": 16, "path": "skinny"}, {"rows": 100} | TILE, DENSE]
    monkeypatch.setattr(choose, "_table", lambda *_: table)


def test_the_first_line_that_fits_is_taken(tiled: None) -> None:
    assert choose.choose("forward", 1, 4096, 4096, 64)["path"] == "skinny"
    assert choose.choose("forward", 100, 4096, 4096, 64)["path"] == "tile"
    assert choose.choose("forward", 101, 4096, 4096, 64) == DENSE

    # The skinny path scales whole sums over 64 columns.
    assert choose.choose("forward", 1, 4096, 4096, 32)["path"] == "tile"


@pytest.mark.parametrize(
    ("M", "I", "block_size"), [(10**5, 4096, 64), (1, 100, 64), (1, 96, 32), (1, 128, 256)]
)
def test_what_no_line_takes_is_dense(tiled: None, M: int, I: int, block_size: int) -> None:
    assert choose.choose("forward", M, 4096, I, block_size) == DENSE


def test_the_tables_in_the_file_are_sound() -> None:
    table = json.loads(choose.TABLE.read_text())
    assert table.keys() == {"measured on", "generations", "tiles"}
    assert list(table["generations"]) == choose.generations()

    for generation in choose.generations():
        assert table["generations"][generation].keys() == set(DIRECTIONS)
        for direction in DIRECTIONS:
            tuned.check_lines(direction, table["generations"][generation][direction])
    for direction in DIRECTIONS:
        tiles = [{"rows": 1} | tile for tile in table["tiles"][direction]]
        assert tiles
        tuned.check_lines(direction, [*tiles, DENSE])


def test_the_oldest_generation_has_no_tile() -> None:
    for direction in DIRECTIONS:
        assert all(line["path"] != "tile" for line in choose.lines(direction, "sm_75"))
        assert any(line["path"] == "tile" for line in choose.lines(direction, "sm_80"))
    most = max(line["rows"] for line in choose.lines("forward", "sm_75") if line != DENSE)
    assert most <= 8


@pytest.mark.parametrize(
    ("capability", "generation"),
    {
        (6, 1): "sm_75",
        (7, 5): "sm_75",
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 9): "sm_86",
        (9, 0): "sm_90",
        (10, 3): "sm_100",
        (11, 0): "sm_100",
        (12, 1): "sm_120",
        (13, 0): "sm_120",
    }.items(),
)
def test_a_gpu_belongs_to_the_newest_generation_that_is_no_newer(
    capability: tuple[int, int], generation: str
) -> None:
    assert choose.generation_of(*capability) == generation


def test_a_device_has_the_table_of_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card that nobody tuned")
    for capability, most in (((7, 5), 8), ((8, 0), 64), ((12, 0), 32)):
        choose.forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose.choose("forward", most, 4096, 4096, 64, cuda)["path"] == "skinny"
        assert choose.choose("forward", most + 1, 4096, 4096, 64, cuda) == DENSE

    choose.forget()
    monkeypatch.setattr(choose.runtime, "PORTABLE", True)
    assert choose.generation(cuda) == "amd"
    assert choose.choose("forward", 17, 4096, 4096, 64, cuda) == DENSE

    # A tensor on the CPU, as the interpreter takes.
    assert choose.generation(CPU) == choose.DEFAULT


def test_lines_are_all_that_a_product_may_be_given(tiled: None) -> None:
    for generation in choose.generations():
        for direction in DIRECTIONS:
            lines = choose.lines(direction, generation)
            assert DENSE in lines
            assert all(line not in lines[:i] for i, line in enumerate(lines))


# A line that is too large for the card.


def test_a_line_that_does_not_fit_gives_way_to_fewer_stages_and_at_last_to_dense(
    tiled: None,
) -> None:
    line = choose.choose("forward", 50, 4096, 4096, 64)
    seen = []
    while line != DENSE:
        seen.append(line["stages"])
        choose.give_up("forward", line, CPU)
        line = choose.choose("forward", 50, 4096, 4096, 64)
    assert seen == [4, 3, 2]

    # What has nothing to do with it is as before.
    assert choose.choose("forward", 1, 4096, 4096, 64)["path"] == "skinny"
    assert choose.choose("backward", 50, 4096, 4096, 64)["stages"] == 4


# Tuned tables.


@pytest.fixture
def cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and one H100."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_what_was_tuned_on_the_card_goes_before_the_file(cache: None) -> None:
    cuda = torch.device("cuda", 0)
    small = {"forward": [{"rows": 300} | TILE, DENSE], "backward": [DENSE]}
    large = {"forward": [DENSE], "backward": [{"rows": 8} | TILE, DENSE]}
    assert choose.choose("forward", 1, 256, 256, 64, cuda)["path"] == "skinny"

    tuned.store("NVIDIA H100", {(256, 256): small, (4096, 4096): large})
    choose.forget()
    assert choose.choose("forward", 300, 256, 256, 64, cuda) == {"rows": 300} | TILE
    assert choose.choose("forward", 1, 4096, 4096, 64, cuda) == DENSE

    # The nearest shape decides for one that was not tuned; another card has its own.
    assert choose.choose("forward", 1, 512, 576, 64, cuda) == {"rows": 300} | TILE
    assert choose.choose("backward", 1, 11008, 4096, 64, cuda) == {"rows": 8} | TILE
    assert choose.choose("forward", 1, 4096, 4096, 64)["path"] == "skinny"


def test_a_file_of_another_card_is_left_alone_with_one_warning(cache: None) -> None:
    cuda = torch.device("cuda", 0)
    path = tuned.store("NVIDIA H100", {(64, 64): {"forward": [DENSE], "backward": [DENSE]}})
    path.write_text(path.read_text().replace("NVIDIA H100", "NVIDIA A100"))

    choose.forget()
    with pytest.warns(UserWarning, match=r"is not used .*'NVIDIA A100', this is 'NVIDIA H100'"):
        assert choose.choose("forward", 1, 64, 64, 64, cuda)["path"] == "skinny"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose("forward", 2, 64, 64, 64, cuda)["path"] == "skinny"

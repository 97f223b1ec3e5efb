"""Tables: text in columns, and HTML with the same cells."""

from dataclasses import dataclass

from markup import parse

from minilora.reports.tables import Table, group_layers


def test_a_table_has_aligned_columns_and_its_html_the_same_cells_escaped() -> None:
    table = Table(
        "a < b", ("layer", "n"), (("<up>", "1"), ("down & out", "10,000")), ("left out: x",)
    )
    assert str(table).splitlines() == [
        "a < b",
        "  layer            n",
        "  <up>             1",
        "  down & out  10,000",
        "  left out: x",
    ]
    tree = parse(table.html())
    assert [[cell.text for cell in row] for row in tree.iter("tr")] == [
        ["layer", "n"],
        ["<up>", "1"],
        ["down & out", "10,000"],
    ]
    assert [cell.get("style") for cell in tree.iter("td")] == [
        f"text-align:{side};padding:2px 10px" for side in ("left", "right")
    ] * 2


@dataclass
class Layer:
    name: str
    out_features: int
    in_features: int


def test_layers_are_grouped_by_the_end_of_their_names_and_by_size() -> None:
    up, other_up = Layer("a.up", 8, 4), Layer("b.up", 8, 4)
    wide, down = Layer("c.up", 16, 4), Layer("down", 8, 4)
    assert group_layers([up, down, other_up, wide]) == {
        ("up", "8 x 4"): [up, other_up],
        ("down", "8 x 4"): [down],
        ("up", "16 x 4"): [wide],
    }


def test_a_table_as_markdown_keeps_its_columns() -> None:
    table = Table("two", ("name", "size"), (("a|b", "1"), ("c", "20")))
    assert table.markdown().splitlines() == [
        "| name | size |",
        "|---|---:|",
        r"| a\|b | 1 |",
        "| c | 20 |",
    ]

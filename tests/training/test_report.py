"""report.md: its facts, and that no text of a model or of the data becomes markup."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_step
from torch import nn

from minilora.training import FinetuneConfig, Sample
from minilora.training.report import escaped, fenced, next_commands, write_report
from minilora.training.result import Result

CONFIG = FinetuneConfig("base", "my.jsonl", "my run")


def result(out: Path, **changes: Any) -> Result:
    steps = [made_up_step(i, loss=4.0 - i, tokens=50, seconds=0.5) for i in (1, 2, 3)]
    given: dict[str, Any] = {"eval_before": 3.9, "eval_after": 2.75, "history": steps}
    return Result(nn.Linear(2, 2), None, out, **(given | changes))


def written(out: Path, **changes: Any) -> str:
    write_report(result(out, **changes), CONFIG, {"data": "my.jsonl: 9 examples"})
    return (out / "report.md").read_text()


def test_the_report_has_the_facts_and_what_to_do_next(tmp_path: Path) -> None:
    text = written(tmp_path, best_step=2)
    for line in (
        "The hold-out loss went from 3.900 to 2.750. "
        "The adapter is that of step 2 of 3, where it was lowest.",
        "| data | my.jsonl: 9 examples |",
        "| training | 2 s, 100 tokens/s on cpu |",
        "| training (first step, last step) | 3.000 | 1.000 |",
        "| hold-out (before, after) | 3.900 | 2.750 |",
        "minilora chat --adapter 'my run'",
    ):
        assert line in text.splitlines()


def test_without_evaluations_the_adapter_is_that_of_the_last_step(tmp_path: Path) -> None:
    assert "The adapter is that of the last step." in written(tmp_path)


def test_the_report_says_if_the_training_has_done_no_good(tmp_path: Path) -> None:
    assert "**It is no better than the base model.**" in written(tmp_path, eval_after=3.95)
    assert "no better" not in written(tmp_path)


def test_the_report_says_what_is_not_installed_as_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fails)
    assert "minilora not installed as a package, python " in written(tmp_path)


def test_without_a_hold_out_there_are_neither_its_losses_nor_samples(tmp_path: Path) -> None:
    text = written(tmp_path, eval_before=None, eval_after=None)
    assert "from 3.000 to 1.000; nothing was held out." in text
    assert (
        "hold-out (before" not in text
        and "There are no sample answers: `samples` is 0, the hold-out" in text
    )


def test_the_report_shows_the_samples_whole(tmp_path: Path) -> None:
    samples = [Sample("2 + 2?", "4", "I\nthink " + 99 * "so ", "4"), Sample("1?", "1", "1", "2")]
    text = written(tmp_path, samples=samples)
    assert "Exactly as expected: 1 of 2 answers before training, 1 after." in text
    assert "### 1 (exact)" in text and "### 2 (not exact)" in text
    assert f"before:\n\n```text\nI\nthink {99 * 'so '}\n```" in text


@pytest.mark.parametrize(
    "hostile", ["```\n<script>", "````\n# head", "\x1b[2J\u202e", "a\r\n```\n![x](y)"]
)
def test_a_text_cannot_leave_its_block(tmp_path: Path, hostile: str) -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="it reads the report as Markdown")
    text = written(tmp_path, samples=[Sample(hostile, hostile, hostile, hostile)])
    assert "\x1b" not in text and "\u202e" not in text
    tokens = markdown_it.MarkdownIt().parse(text)
    blocks = [t.content for t in tokens if t.type == "fence" and t.info == "text"]
    assert len(blocks) == 4 and not any(t.type == "html_block" for t in tokens)
    headings = [i for i, t in enumerate(tokens) if t.type == "heading_open"]
    titles = [tokens[i + 1].content for i in headings[1:]]
    assert titles == ["Answers to held-out prompts", "1 (exact)", "Next steps"]


@pytest.mark.parametrize("name", ["a|b", "<img src=x>", "*b* `c` [d](e)", "a\nb", "&lt; $x$"])
def test_a_name_is_shown_as_it_is(name: str) -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="it reads the report as Markdown")
    table = f"| x | y |\n|---|---|\n| {escaped(name)} | 1 |\n"
    tokens = markdown_it.MarkdownIt().enable("table").parse(table)
    cells = [t for t in tokens if t.type == "inline"]
    assert len(cells) == 4
    texts = {"text", "text_special"}
    assert all(child.type in texts for child in cells[2].children)
    shown = "".join(child.content for child in cells[2].children).replace("\\$", "$")
    assert shown == name.replace("\n", "\\n")


@pytest.mark.parametrize(
    "text",
    [
        "if x:\n\treturn 1",
        "10\N{NO-BREAK SPACE}000 km",
        "\N{IDEOGRAPHIC SPACE}\u6771\u4eac",
        "\u0645\u06cc\N{ZERO WIDTH NON-JOINER}\u062e\u0648\u0627\u0647\u0645",
        "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
        "a line of " + 9000 * "x",
    ],
)
def test_what_controls_no_terminal_is_shown_as_it_is(text: str) -> None:
    assert fenced(text) == f"```text\n{text}\n```"
    assert fenced("\x1b" + text) == f"```text\n\\x1b{text}\n```"


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    assert fenced("a ```` b") == "`````text\na ```` b\n`````"


def test_the_commands_quote_the_paths() -> None:
    chat, _, merge = next_commands(CONFIG)
    assert chat == "minilora chat --adapter 'my run'"
    assert merge == "minilora merge --adapter 'my run' --out 'my run-merged'"


def test_without_matplotlib_the_report_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "There is no loss.png: matplotlib is not installed (`pip install matplotlib`)." in (
        written(tmp_path)
    )
    assert not (tmp_path / "loss.png").exists()


def test_with_matplotlib_the_report_shows_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    assert "(loss.png)" in written(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

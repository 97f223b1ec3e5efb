"""The demo's text: how many answers are right, and which ones are shown."""

from demo_report import RIGHT, WRONG, report

from minilora.demo.report import SHOWN, answers_of, shortened


def test_an_answer_is_shortened_to_one_line() -> None:
    assert shortened("a\n  b") == "a b"
    assert shortened("x" * 97) == "x" * 95 + "…" and shortened("x" * 96) == "x" * 96


def test_an_answer_cannot_control_the_terminal() -> None:
    assert shortened("\x1b[2Jgone") == r"\x1b[2Jgone"


def test_it_counts_the_answers_that_are_exactly_right() -> None:
    text = str(report([RIGHT] * 5 + [WRONG]))
    assert "exactly right before training    0 of 6\n" in text
    assert "exactly right after training     5 of 6\n" in text


def test_right_answers_are_shown_and_then_mistakes() -> None:
    found = report([WRONG, *[RIGHT] * 5])
    assert found.right == [RIGHT] * SHOWN and found.wrong == [WRONG]
    text = str(found)
    right, wrong = (
        text.index(". Some right answers:\n"),
        text.index("Wrong after training, 1 of 6:\n"),
    )
    assert right < text.index(RIGHT.prompt) < wrong < text.index(WRONG.prompt)


def test_answers_are_called_right_only_if_some_are() -> None:
    text = str(report([WRONG] * 5))
    assert "right answers" not in text and "Wrong after training, 5 of 5:" in text
    assert text.count(WRONG.prompt) == SHOWN
    assert "Wrong after training" not in str(report([RIGHT]))


def test_the_right_answer_is_given_where_the_model_is_wrong() -> None:
    assert answers_of(WRONG)[-1] == ("expected", WRONG.expected)
    assert [name for name, _ in answers_of(RIGHT)] == ["before", "after"]


def test_it_says_the_losses_the_sizes_and_the_time() -> None:
    rows = dict(line.split("  ", 1) for line in str(report([RIGHT])).splitlines() if "  " in line)
    found = {name: value.strip() for name, value in rows.items()}
    assert found["hold-out loss, unquantized base"] == "5.00 nats per completion token"
    assert found["hold-out loss, base in NF4"] == "6.00"
    assert found["hold-out loss, fine-tuned"] == "0.25"
    assert found["hold-out loss, merged"] == "0.26, one dense model"
    assert found["adapter in a fresh model"] == "logits differ by 0"
    assert found["adapter on disk"] == "19.6 MB; the unquantized base 269.0 MB"
    assert found["training"] == "2 steps in 4 s, 250 tokens/s"
    assert found["peak memory of the process"] == "1.50 GB"


def test_without_a_peak_there_is_no_line_of_it() -> None:
    assert "peak memory" not in str(report([RIGHT], peak=0))

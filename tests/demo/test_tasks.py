"""The demo's tasks: their records, and what of them is held out."""

import re

import pytest
from embedded import needs_data

from minilora.demo.tasks import LONGEST, TASKS, make_task
from minilora.training.records import check_record

BOTH = pytest.mark.parametrize("name", ["orders", pytest.param("shell", marks=needs_data)])


@BOTH
def test_a_task_is_the_same_for_the_same_seed(name: str) -> None:
    task = make_task(name, seed=3)
    assert task == make_task(name, seed=3) and task.name == name
    assert task.training != make_task(name, seed=4).training
    assert task.held_out != make_task(name, seed=4).held_out


@BOTH
def test_finetune_reads_the_records_and_nothing_is_in_both_files(name: str) -> None:
    task = make_task(name, seed=0)
    for record in [*task.training, *task.held_out]:
        assert check_record(record, "here") == record
    assert not [record for record in task.held_out if record in task.training]
    assert len(task.training) > 200 and 0 < task.asked <= len(task.held_out)


@needs_data
def test_the_shell_task_names_the_system_message_of_its_records() -> None:
    task = make_task("shell", seed=0)
    for record in [*task.training, *task.held_out]:
        assert record["messages"][0] == {"role": "system", "content": task.system}
    texts = [[turn["content"] for turn in record["messages"][1:]] for record in task.training]
    assert max(len(question + answer) for question, answer in texts) <= LONGEST + len(": ")


@BOTH
def test_what_is_said_about_a_task_is_true_whatever_a_run_gave(name: str) -> None:
    caveat = make_task(name, seed=0).caveat
    assert not re.search(r"\b(has|have) (not )?learned\b|\bit (answers|makes)\b", caveat)


def test_a_task_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no demo 'sheel': choose one of orders, shell"):
        make_task("sheel", seed=0)
    assert list(TASKS) == ["orders", "shell"]

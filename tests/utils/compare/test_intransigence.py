"""Intransigence: against joint training, over the seeds, tasks and class orders that both have."""

import pytest

from tests.helpers.finished import make
from utils.compare import intransigence, runs
from utils.compare.rows import rows_of


def table_of(folder):
    return intransigence.table(list(enumerate(rows_of(runs.find([folder]).runs), start=1)))


def test_of_a_pair_worked_by_hand():
    assert intransigence.of_pair([90.0, 50.0, None], [95.0, 80.0, 70.0]) == pytest.approx((5 + 30) / 2)
    assert intransigence.of_pair([None], [1.0]) is None


def test_the_rows_that_have_a_reference(tmp_path):
    for seed, right in ((1, 7), (2, 8)):
        make(tmp_path / "joint" / f"seed_{seed}", seed, right=right, model_name="joint")
    for seed in (1, 2, 3):  # the third has no reference
        make(tmp_path / "sema" / f"seed_{seed}", seed, right=6)
    make(tmp_path / "other" / "seed_1", 1, right=6, order=[1, 0], model_name="l2p")  # another class order
    note, lines = table_of(tmp_path)
    # newest task: 75 % against 87.5 % and 100 %, the first task 100 % in all: 6.25 and 12.5
    assert [row[1:] for row in lines.rows] == [["9.38 ± 4.42", 2]] and "sema" in lines.rows[0][0]
    assert "Chaudhry" in note.text


def test_without_joint_training_there_is_none(tmp_path):
    make(tmp_path / "seed_1", 1)
    assert table_of(tmp_path) == []

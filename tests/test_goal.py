"""The goal and limit that suit a dataset."""

import numpy as np
import pandas as pd
import pytest

from config import PROJECT, UserError
from experiments import goal


def episodes(method, accuracies):
    """Rounds of one seed, from a list of accuracies per episode."""
    return pd.DataFrame(
        [
            ("", method, 0, episode, number, accuracy)
            for episode, some in enumerate(accuracies)
            for number, accuracy in enumerate(some, 1)
        ],
        columns="variant method seed episode round accuracy".split(),
    )


def table(random, alone):
    return pd.concat([episodes("random", random), episodes("standalone", alone)])


def test_first_rounds():
    rounds = episodes("random", [[0.1, 0.5, 0.4], [0.1, 0.2, 0.5], [0.6, 0.1, 0.7], [0.1]])
    assert goal.first_rounds(rounds, 0.5).tolist() == [1, 2, 3, np.inf]


def test_goals_by_hand():
    # Nine of ten random episodes have 0.02 by round 3 and 0.03 by round 4; none has 0.04.
    random = [[0.01, 0.01, 0.02, 0.03]] * 8 + [[0.03, 0.01, 0.01, 0.03], [0.0] * 4]
    # Of 20 episodes at a node alone all have 0.01, two 0.02 by round 3, one 0.03 in round 4.
    alone = [[0.01, 0.02, 0.02, 0.02], [0.01, 0.01, 0.02, 0.03], *[[0.01] * 4] * 18]
    found = goal.goals(table(random, alone), 1.0)
    assert found.to_numpy().tolist() == [[0.01, 1, 1.0], [0.02, 3, 0.1], [0.03, 4, 0.05]]


def test_no_goal_suits_if_random_reaches_none():
    found = goal.goals(table([[0.015]] * 10, [[0.02]] * 10), 1.0)
    assert found.to_numpy().tolist() == [[0.01, 1, 1.0]]


def test_no_higher_goal_than_the_highest():
    assert goal.goals(table([[0.9]] * 10, [[0.9]] * 10), 0.29)["goal"].max() == 0.29


def test_both_methods_are_needed():
    with pytest.raises(UserError, match="standalone"):
        goal.goals(episodes("random", [[0.5]]), 1.0)


def test_mnist_follows_the_rule(capsys):
    assert goal.main([str(PROJECT / "results" / "reference" / "paper-mnist")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| 0.80 | 35 | 5 % |"
    assert lines[-1].endswith("GOAL_ACCURACY=0.80 MAX_ROUNDS=35")


def test_no_comparison(tmp_path, capsys):
    assert goal.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

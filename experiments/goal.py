"""Recommend a dataset's goal and limit of rounds, by episodes of ``random`` and ``standalone``.

Usage: ``python3 -m experiments.goal results/<comparison>``

A goal's limit is the round by which random has reached it in nine of ten episodes. The recommended
goal is the lowest whole percent that standalone reaches by then in at most one of twenty. MNIST's
values of the public code, 0.80 and 36, follow this rule to one round. Higher goals than that of the
comparison are not judged: GOAL_ACCURACY = 1 and a high MAX_ROUNDS judge them all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import cli
from config import UserError
from experiments import estimates

RANDOM_SHARE = 0.9  # of the episodes reach the goal, at least
STANDALONE_SHARE = 0.05  # at most


def first_rounds(rounds: pd.DataFrame, goal: float) -> np.ndarray:
    """Return the round in which each episode first has the accuracy, ascending; inf for never."""
    reached = rounds["round"].where(rounds["accuracy"] >= goal, np.inf)
    return np.sort(reached.groupby([rounds["seed"], rounds["episode"]]).min())


def goals(rounds: pd.DataFrame, highest: float) -> pd.DataFrame:
    """Return ``goal``, ``limit`` and standalone's ``share`` for each goal up to the recommended.

    Args:
        rounds: the comparison's.
        highest: goal that is judged.

    Raises:
        UserError: ``random`` or ``standalone`` is missing.
    """
    random, alone = (estimates.select(rounds, "", name) for name in ("random", "standalone"))
    if random.empty or alone.empty:
        raise UserError("goal: got no episodes of random or standalone, takes both")
    found = []
    for percent in range(1, round(100 * highest) + 1):
        times = first_rounds(random, percent / 100)
        limit = times[int(np.ceil(RANDOM_SHARE * len(times))) - 1]
        if np.isinf(limit):
            break
        share = float(np.mean(first_rounds(alone, percent / 100) <= limit))
        found.append((percent / 100, int(limit), share))
        if share <= STANDALONE_SHARE:
            break
    return pd.DataFrame(found, columns=["goal", "limit", "share"])


def report(folder: Path) -> str:
    """Return the highest goals of a comparison as a table, and what is recommended."""
    tables = estimates.read_comparison(folder)
    rows = goals(tables["rounds"], tables["episodes"]["goal_accuracy"].min())
    lines = ["| goal | random's limit | standalone reaches it |", "|---|---|---|"]
    for goal, limit, share in rows.tail(5).itertuples(index=False):
        lines.append(f"| {goal:.2f} | {limit} | {100 * share:.0f} % |")
    found = rows[rows["share"] <= STANDALONE_SHARE].to_dict("records")
    goal = "GOAL_ACCURACY={goal:.2f} MAX_ROUNDS={limit}".format(**found[0]) if found else "none"
    return "\n".join([*lines, f"recommended: {goal}"])


def main(arguments: list[str] | None = None) -> int:
    """Print the last rows of ``goals`` and what is recommended; return the exit status."""
    parser = cli.Parser("experiments.goal", "Recommend a goal and a limit of rounds.")
    parser.usage = "experiments.goal folder"
    parser.add_argument("folder", type=Path, help="a comparison with random and standalone")
    folder = parser.parse_args(arguments).folder

    def show() -> int:
        print(report(folder))
        return 0

    return cli.exit_status(parser.prog, show)


if __name__ == "__main__":
    sys.exit(main())

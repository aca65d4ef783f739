"""Which goal and limit of rounds suit a dataset, by the episodes of ``random`` and ``standalone``.

Usage: ``python3 -m experiments.goal results/<comparison>``

A goal's limit is the round by which random has reached it in nine of ten episodes. The goal that
suits is the lowest whole percent that at most one of twenty episodes at a node alone reaches by
then. MNIST's values of the public code, 0.80 and 36, follow this rule to one round.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import cli
from config import UserError
from experiments import estimates

REACHED_BY_RANDOM = 0.9  # share of episodes, at least
REACHED_ALONE = 0.05  # share of episodes, at most


def first_rounds(rounds: pd.DataFrame, goal: float) -> np.ndarray:
    """Return the round in which each episode first has the accuracy, ascending; inf for never."""
    reached = rounds["round"].where(rounds["accuracy"] >= goal, np.inf)
    return np.sort(reached.groupby([rounds["seed"], rounds["episode"]]).min())


def goals(rounds: pd.DataFrame) -> pd.DataFrame:
    """Return the goals that random reaches: ``goal``, ``limit`` and the share reached ``alone``.

    The last row is the goal that suits, if there is one; the rows before are the lower ones.

    Raises:
        UserError: ``random`` or ``standalone`` is missing.
    """
    random, alone = (estimates.select(rounds, "", name) for name in ("random", "standalone"))
    if random.empty or alone.empty:
        raise UserError("goal: got no episodes of random or standalone, takes both")
    found = []
    for percent in range(1, 101):
        times = first_rounds(random, percent / 100)
        limit = times[int(np.ceil(REACHED_BY_RANDOM * len(times))) - 1]
        share = np.mean(first_rounds(alone, percent / 100) <= limit)
        if np.isfinite(limit):
            found.append((percent / 100, int(limit), float(share)))
        if np.isinf(limit) or share <= REACHED_ALONE:
            break
    return pd.DataFrame(found, columns=["goal", "limit", "alone"])


def main(arguments: list[str] | None = None) -> int:
    """Print the last rows of ``goals``; return the exit status."""
    parser = cli.Parser("experiments.goal", "Print which goal and limit of rounds suit a dataset.")
    parser.usage = "experiments.goal folder"
    parser.add_argument("folder", type=Path, help="a comparison with random and standalone")
    folder = parser.parse_args(arguments).folder

    def show() -> int:
        print("| goal | limit of rounds | reached alone |\n|---|---|---|")
        for row in goals(estimates.read_comparison(folder)["rounds"]).tail(5).itertuples():
            print(f"| {row.goal:.2f} | {row.limit} | {100 * row.alone:.0f} % |")
        return 0

    return cli.exit_status(parser.prog, show)


if __name__ == "__main__":
    sys.exit(main())

"""Estimates from a comparison's tables: means, reductions against random, and their intervals.

All intervals are 95 % percentile intervals of a bootstrap in two levels. Seeds are drawn with
replacement, and from each drawn seed's test episodes as many again. Both methods of a reduction get
the same draws, because their seeds and episodes are paired. With few seeds that differ such an
interval is too narrow. Without a learned policy seeds differ only by their episodes; the interval
is then too wide, by up to the root of two.

An episode that misses the goal counts with MAX_ROUNDS rounds. A mean is one over all episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 10_000

ESTIMATE_COLUMNS = ("variant", "method", "quantity", "mean", "low", "high", "seeds", "episodes")

# Columns of episodes.csv whose means are estimated for every method.
QUANTITIES = ("rounds", "communication_cost", "goal_reached")

# Reduces the last two axes, seeds and episodes, of its arrays.
Statistic = Callable[..., np.ndarray]


def select(table: pd.DataFrame, variant: str, method: str) -> pd.DataFrame:
    """Return the rows of a method, with one value of what the comparison varies."""
    return table[(table["variant"] == variant) & (table["method"] == method)]


def matrix(episodes: pd.DataFrame, column: str) -> np.ndarray:
    """Return (S, E) float64: a method's values by seed and test episode, both ascending."""
    return episodes.pivot(index="seed", columns="episode", values=column).to_numpy(float)


def paired(episodes: pd.DataFrame, variant: str, method: str) -> list[pd.DataFrame]:
    """Return the episodes of a method and of random, of the seeds that both have."""
    ours, theirs = (select(episodes, variant, name) for name in (method, "random"))
    return [ours[ours["seed"].isin(theirs["seed"])], theirs[theirs["seed"].isin(ours["seed"])]]


def misses_more_often(episodes: pd.DataFrame, variant: str, method: str) -> bool:
    """Return whether a method misses the goal more often than random, on the seeds of both."""
    ours, theirs = (table["goal_reached"].mean() for table in paired(episodes, variant, method))
    return bool(ours < theirs)


def bootstrap(statistic: Statistic, *values: np.ndarray) -> tuple[float, float, float]:
    """Return a statistic of (S, E) arrays, drawn together, and its interval's low and high.

    With a single seed low and high are NaN. The draws are always the same: seeds first, then
    episodes of each.
    """
    mean = float(statistic(*values))
    if len(values[0]) < 2:
        return mean, np.nan, np.nan
    seeds, episodes = values[0].shape
    rng = np.random.default_rng(0)
    draws = rng.integers(seeds, size=(RESAMPLES, seeds, 1)) * episodes
    draws = draws + rng.integers(episodes, size=(RESAMPLES, seeds, episodes))
    resampled = statistic(*(array.take(draws) for array in values))
    # "inverted_cdf" gives a value that occurs: interpolation between infinities gives none.
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    return mean, float(low), float(high)


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last two axes, seeds and episodes."""
    return values.mean(axis=(-2, -1))


def reduction(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the share by which our mean is less than theirs; 0 of nothing against nothing."""
    a, b = mean(ours), mean(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - np.where(a == b, 1.0, a / b)


def break_even(spent: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return after how many episodes what was spent once is saved; infinite if nothing is."""
    saved = mean(theirs) - mean(ours)
    with np.errstate(divide="ignore"):
        return np.where(saved > 0, mean(spent) / np.maximum(saved, 0), np.inf)


def estimate(tables: dict[str, Any]) -> pd.DataFrame:
    """Return all estimates of a comparison, a row per variant, method and quantity.

    Quantities are the means of ``QUANTITIES``, and of rounds and communication cost, on the seeds
    that random has as well:

    - ``_reduction``: share of random's mean that is saved.
    - ``_break_even``: how many foundation models to train until the training is paid back.
      Left out if the policy misses the goal more often than random. That of the cost is left out
      with several nodes per round as well: a training counts the transfer to the first one alone.

    Columns are ``ESTIMATE_COLUMNS``: ``low`` and ``high`` bound the 95 % interval, empty with one
    seed; ``seeds`` and ``episodes`` count what the estimate rests on.
    """
    rows = []
    for variant, method in tables["episodes"][["variant", "method"]].drop_duplicates().to_numpy():
        for quantity, statistic, values in _quantities(tables, variant, method):
            size = len(values[0]), values[0].size
            rows.append((variant, method, quantity, *bootstrap(statistic, *values), *size))
    return pd.DataFrame(rows, columns=list(ESTIMATE_COLUMNS))


def _quantities(
    tables: dict[str, Any], variant: str, method: str
) -> Iterator[tuple[str, Statistic, list[np.ndarray]]]:
    """Yield the name, the statistic and its (S, E) arrays of all that is estimated for a method."""
    names = ("episodes", "rounds", "training")
    episodes, rounds, training = (select(tables[name], variant, method) for name in names)
    for column in QUANTITIES:
        yield column, mean, [matrix(episodes, column)]
    ours, theirs = paired(tables["episodes"], variant, method)
    if method == "random" or ours.empty:
        return
    seeds = sorted(set(ours["seed"]))
    misses = misses_more_often(tables["episodes"], variant, method)
    pays_back = not misses and set(seeds) <= set(training["seed"])
    several_nodes = rounds["node"].str.contains("+", regex=False).any()
    for column in ("rounds", "communication_cost"):
        pair = [matrix(ours, column), matrix(theirs, column)]
        yield f"{column}_reduction", reduction, pair
        if pays_back and not (several_nodes and column == "communication_cost"):
            spent = training.groupby("seed")[[column]].sum().loc[seeds].to_numpy(float)
            yield f"{column}_break_even", break_even, [np.broadcast_to(spent, pair[0].shape), *pair]

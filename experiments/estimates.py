"""Estimates from a comparison's tables: means, reductions against random, and their intervals.

All intervals are 95 % percentile intervals of a bootstrap in two levels. Seeds are drawn with
replacement, and from each drawn seed's test episodes as many again (stratified by seed). Both
methods of a reduction get the same draws, because their seeds and episodes are paired. SciPy's
bootstrap has one level; with one episode per seed both give the same (tested).

For methods that learn no policy, seeds differ in nothing but their episodes. Such an interval is
too wide, with many seeds by up to the root of two. The spread of the seeds' means holds that of the
episodes already. Where seeds differ and are few, it is too narrow, as any bootstrap's.

An episode that misses the goal counts with MAX_ROUNDS rounds. A mean is one over all episodes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import records
from config import UserError, reason

RESAMPLES = 10_000
LEVEL = 0.95

JOB_COLUMNS = tuple(
    "variant method seed state seconds error agent git_revision tensorflow cpu".split()
)
EPISODE_COLUMNS = tuple(
    "dataset variant method seed episode rounds goal_reached final_accuracy episode_reward "
    "communication_cost transfers megabytes observation_megabytes diverged goal_accuracy "
    "max_rounds seconds".split()
)
ROUND_COLUMNS = tuple(
    "dataset variant method seed episode round node distance accuracy reward".split()
)
TRAINING_COLUMNS = ("dataset", "variant", "method", "seed", *records.EPISODE_COLUMNS[1:])
ESTIMATE_COLUMNS = ("variant", "method", "quantity", "mean", "low", "high", "seeds", "episodes")
DISTANCE_COLUMNS = ("variant", "node", "other_node", "distance")

# Columns of episodes.csv whose means are estimated for every method.
QUANTITIES = tuple(
    "rounds goal_reached communication_cost transfers megabytes observation_megabytes seconds "
    "diverged".split()
)

JOB_KEY = ["variant", "method", "seed"]  # what identifies a job

# Tables of a comparison. episodes.csv is written last: a job that is in it is in all others.
TABLES = {
    "jobs": JOB_COLUMNS,
    "rounds": ROUND_COLUMNS,
    "training": TRAINING_COLUMNS,
    "episodes": EPISODE_COLUMNS,
}

# A quantity's name, its statistic, and the (S, E) arrays that the statistic takes.
Statistic = Callable[..., np.ndarray]
Quantity = tuple[str, Statistic, list[np.ndarray]]


# --- Tables ----------------------------------------------------------------------------------


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return ``config`` (config.json) and the tables of a comparison's finished jobs.

    Returns:
        ``config`` is a dictionary. ``jobs`` has all jobs. ``episodes``, ``rounds`` and ``training``
        have the rows of the finished ones. All are data frames with the columns above.

    Raises:
        UserError: a file is missing or damaged, or no job is finished.
    """
    tables: dict[str, Any] = {
        "config": _read_config(folder / "config.json"),
        "jobs": records.read_table(folder / "jobs.csv", TABLES["jobs"]),
    }
    finished = tables["jobs"][tables["jobs"]["state"] == "finished"]
    if finished.empty:
        raise UserError(f"{folder}: got no finished job, takes at least one")
    of_finished = pd.MultiIndex.from_frame(finished[JOB_KEY])
    for name in ("episodes", "rounds", "training"):
        table = records.read_table(folder / f"{name}.csv", TABLES[name])
        tables[name] = table[pd.MultiIndex.from_frame(table[JOB_KEY]).isin(of_finished)]
    expected = tables["config"]["test_episodes"]
    counts = tables["episodes"].groupby(JOB_KEY).size()
    for job in finished[JOB_KEY].itertuples(index=False, name=None):
        if counts.get(job, 0) != expected:
            name = " ".join(filter(None, map(str, job)))
            raise UserError(
                f"{folder / 'episodes.csv'}: got {counts.get(job, 0)} test episodes of {name}, "
                f"takes {expected}; run the comparison again"
            )
    return tables


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        str(config["comparison"]), str(config["parameter"]), int(config["test_episodes"])
    except OSError as error:
        raise UserError(f"{path}: can't be read ({reason(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a comparison's config.json ({error})") from error
    return config


def select(table: pd.DataFrame, variant: str, method: str) -> pd.DataFrame:
    """Return the rows of one method with one value of what the comparison varies."""
    return table[(table["variant"] == variant) & (table["method"] == method)]


def matrix(episodes: pd.DataFrame, column: str) -> np.ndarray:
    """Return (S, E) float64: one method's values by seed and test episode, both ascending."""
    return episodes.pivot(index="seed", columns="episode", values=column).to_numpy(float)


def paired(episodes: pd.DataFrame, variant: str, method: str) -> list[pd.DataFrame]:
    """Return the episodes of a method and of random, of the seeds that both have."""
    both = [select(episodes, variant, name) for name in (method, "random")]
    seeds = set(both[0]["seed"]) & set(both[1]["seed"])
    return [table[table["seed"].isin(seeds)] for table in both]


def misses_more_often(episodes: pd.DataFrame, variant: str, method: str) -> bool:
    """Return whether a method misses the goal more often than random does, on the same seeds.

    What it saves then, it does not save for the same result.
    """
    ours, theirs = (table["goal_reached"].mean() for table in paired(episodes, variant, method))
    return bool(ours < theirs)


# --- Statistics ------------------------------------------------------------------------------


def bootstrap(
    statistic: Statistic, *values: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float | None, float | None]:
    """Return a statistic of paired arrays, with the bounds of its interval.

    Args:
        statistic: takes arrays of shape (..., S, E) and reduces the last two axes.
        values: (S, E) arrays, seeds by test episodes, all drawn together.
        resamples: how many draws.

    Returns:
        The statistic and the interval's bounds; None with a single seed. The draws are always the
        same, so that the same tables give the same numbers.
    """
    mean = float(statistic(*values))
    if len(values[0]) < 2:
        return mean, None, None
    resampled = np.concatenate(
        [
            # In parts, because a statistic of all pairs of episodes takes much memory.
            statistic(*(v.take(part) for v in values))
            for part in np.array_split(_draws(*values[0].shape, resamples), -(-resamples // 500))
        ]
    )
    tail = (1 - LEVEL) / 2
    # "inverted_cdf" gives a value that occurs: interpolation between infinities gives none.
    low, high = np.quantile(resampled, [tail, 1 - tail], method="inverted_cdf")
    return mean, float(low), float(high)


@functools.lru_cache(maxsize=2)
def _draws(seeds: int, episodes: int, resamples: int) -> np.ndarray:
    """Return (resamples, S, E) indices into the S x E values, seeds drawn first."""
    rng = np.random.default_rng(0)
    first = rng.integers(seeds, size=(resamples, seeds, 1)) * episodes
    return first + rng.integers(episodes, size=(resamples, seeds, episodes))


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last two axes, seeds and episodes."""
    return values.mean(axis=(-2, -1))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of all values; a quarter is cut off at each end."""
    from scipy import stats  # takes seconds to import, and is needed here alone

    return stats.trim_mean(values.reshape(*values.shape[:-2], -1), 0.25, axis=-1)


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


def improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the probability that our episode has less than one of theirs, ties counted half.

    Of (..., S, E) values, every episode is compared with each of theirs with the same seed.
    """
    ours, theirs = ours[..., :, None], theirs[..., None, :]
    axes = (-3, -2, -1)
    less = np.count_nonzero(ours < theirs, axis=axes)
    not_more = np.count_nonzero(ours <= theirs, axis=axes)
    return (less + not_more) / (2 * ours.shape[-3] * ours.shape[-2] * theirs.shape[-1])


# --- Estimates -------------------------------------------------------------------------------


def estimate(tables: dict[str, Any]) -> pd.DataFrame:
    """Return all estimates of a comparison, a row per variant, method and quantity.

    Quantities are the means of ``QUANTITIES`` over all episodes, and of rounds and communication
    cost:

    - ``_iqm``: interquartile mean.
    - ``_reduction``: share of random's mean that is saved, over the seeds that both have.
    - ``_improvement``: probability that an episode has less than one of random's.
    - ``_break_even``: after how many trainings of the foundation model the training of the DQN is
      paid back, against random. Left out if the policy misses the goal more often than random.
      With several nodes per round, the cost's is left out: a training's cost holds the transfer to
      a round's first node alone.

    Returns:
        Columns ``ESTIMATE_COLUMNS``. ``low`` and ``high`` bound the 95 % interval, empty with one
        seed. ``seeds`` and ``episodes`` count what the estimate rests on.
    """
    rows = []
    for variant, method in tables["episodes"][["variant", "method"]].drop_duplicates().to_numpy():
        for quantity, statistic, values in _quantities(tables, variant, method):
            size = len(values[0]), values[0].size
            rows.append((variant, method, quantity, *bootstrap(statistic, *values), *size))
    # Numbers also where no row has an interval, which would be a column of objects.
    table = pd.DataFrame(rows, columns=list(ESTIMATE_COLUMNS))
    return table.astype({"low": float, "high": float})


def _quantities(tables: dict[str, Any], variant: str, method: str) -> Iterator[Quantity]:
    """Yield what is estimated for a method."""
    episodes = select(tables["episodes"], variant, method)
    for column in QUANTITIES:
        yield column, mean, [matrix(episodes, column)]
    ours, theirs = paired(tables["episodes"], variant, method)
    misses = misses_more_often(tables["episodes"], variant, method)
    for column in ("rounds", "communication_cost"):
        yield f"{column}_iqm", interquartile_mean, [matrix(episodes, column)]
        if method == "random" or ours.empty:
            continue
        pair = [matrix(ours, column), matrix(theirs, column)]
        yield f"{column}_reduction", reduction, pair
        yield f"{column}_improvement", improvement, pair
        spent = _spent(tables, variant, method, sorted(set(ours["seed"])), column)
        if spent is not None and not misses:
            spent = np.broadcast_to(spent[:, None], pair[0].shape)
            yield f"{column}_break_even", break_even, [spent, *pair]


def _spent(
    tables: dict[str, Any], variant: str, method: str, seeds: list[int], column: str
) -> np.ndarray | None:
    """Return (S,) what all episodes of training took on each seed; None if it is not known."""
    training = select(tables["training"], variant, method)
    if not set(seeds) <= set(training["seed"]):
        return None
    if column == "communication_cost" and several_nodes(tables["rounds"], variant, method):
        return None
    return training.groupby("seed")[column].sum()[seeds].to_numpy(float)


def several_nodes(rounds: pd.DataFrame, variant: str, method: str) -> bool:
    """Return whether several nodes trained in a round; a training's cost then counts otherwise."""
    return bool(select(rounds, variant, method)["node"].str.contains("+", regex=False).any())

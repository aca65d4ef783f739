"""What a comparison's tables say: means, reductions against random, and their intervals.

All intervals are 95 % percentile intervals of a bootstrap in two levels: seeds are drawn with
replacement, and from each drawn seed's test episodes as many again (stratified by seed); both
methods of a reduction get the same draws, because their seeds and episodes are paired. SciPy's
bootstrap has one level; with one episode per seed this one gives the same (tested).

Where seeds differ in nothing but their episodes, as they do for methods that learn no policy, such
an interval is wider than it had to be (by up to the root of two with many seeds): the spread of the
seeds' means holds that of the episodes already. Where they differ and are few, it is too narrow,
as any bootstrap's. Drawing seeds alone would be worse with the few seeds that a comparison has.

An episode that missed the goal counts with the limit as its number of rounds: the mean is one over
all episodes, restricted to the limit.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from baselines import training_name
from config import UserError
from records import (
    EPISODE_COLUMNS,
    ROUND_COLUMNS,
    TEST_EPISODE_COLUMNS,
    TEST_ROUND_COLUMNS,
    read_table,
    replacing,
)

RESAMPLES = 10_000
LEVEL = 0.95

JOB_COLUMNS = (
    "comparison",
    "parameter",
    "variant",
    "method",
    "seed",
    "folder",
    "state",
    "seconds",
    "error",
)
ESTIMATE_COLUMNS = (
    "comparison",
    "parameter",
    "variant",
    "method",
    "quantity",
    "mean",
    "low",
    "high",
    "seeds",
    "episodes",
)

# Columns of the tests' episodes.csv whose means are estimated for every method.
QUANTITIES = (
    "rounds",
    "goal_reached",
    "communication_cost",
    "transfers",
    "megabytes",
    "observation_megabytes",
    "seconds",
    "diverged",
)


def read_comparison(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a comparison, after ``jobs`` of all its finished jobs.

    ``episodes`` and ``rounds`` have a column ``variant`` at the end; a finished job whose tables
    are damaged has failed in ``jobs``, with the reason as its error. ``training`` has the episodes
    of the trainings of DQNs, as their runs wrote them, and ``variant``, ``method``, ``seed`` and
    ``several_nodes`` (whether rounds had more than one, whose communication a run counts
    otherwise); of a damaged one nothing, and the reason is its finished job's error.

    Raises:
        UserError: a file is missing or not what compare.py writes, or no job is finished.
    """
    jobs = read_jobs(folder)
    test_episodes = _test_episodes(folder)
    if jobs["comparison"].nunique() > 1:
        raise UserError(f"{folder / 'jobs.csv'}: is of several comparisons")
    parts: dict[str, list[pd.DataFrame]] = {"episodes": [], "rounds": [], "training": []}
    for row, job in jobs[jobs["state"] == "finished"].iterrows():
        try:
            of_job = read_job(folder / job["folder"], test_episodes)
        except UserError as error:
            jobs.loc[row, ["state", "error"]] = "failed", str(error)
            continue
        for name, table in of_job.items():
            parts[name].append(table.assign(variant=job["variant"]))
        try:
            parts["training"].append(_read_training(folder, job))
        except FileNotFoundError:
            continue  # a method that trains none, or an agent that was trained before
        except UserError as error:
            jobs.loc[row, "error"] = (
                f"of its training: {error}; delete the training's folder and the job's, and the "
                "same command makes both again"
            )
    if not parts["episodes"]:
        raise UserError(f"{folder}: no job is finished")
    parts["training"] = parts["training"] or [pd.DataFrame(columns=_TRAINING_COLUMNS)]
    tables = {"jobs": jobs}
    tables |= {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}
    counts = tables["episodes"].groupby(["variant", "method", "seed"]).size()
    if counts.nunique() > 1:
        raise UserError(
            f"{folder}: jobs with {counts.min()} and with {counts.max()} test episodes; choose "
            "the same --test-episodes for all of a comparison"
        )
    for column in ("dataset", "goal_accuracy", "max_rounds"):
        if (tables["episodes"].groupby("variant")[column].nunique() > 1).any():
            raise UserError(f"{folder}: jobs with several values of {column} can't be compared")
    return tables


def read_jobs(folder: Path) -> pd.DataFrame:
    """``jobs.csv`` of a comparison, with JOB_COLUMNS.

    Raises:
        UserError: it is missing or not what compare.py writes.
    """
    try:
        return read_table(folder / "jobs.csv", JOB_COLUMNS)
    except UserError as error:
        raise UserError(
            f"{error}; without it compare.py makes it anew, of the jobs that it is asked for"
        ) from error


_TRAINING_COLUMNS = [*EPISODE_COLUMNS, "variant", "method", "seed", "several_nodes"]


def _read_training(folder: Path, job: pd.Series) -> pd.DataFrame:
    path = (folder / job["folder"]).parent / training_name(job["method"], job["seed"])
    if not path.is_dir():
        raise FileNotFoundError(path)
    nodes = read_table(path / "rounds.csv", ROUND_COLUMNS)["node"]
    return read_table(path / "episodes.csv", EPISODE_COLUMNS).assign(
        variant=job["variant"],
        method=job["method"],
        seed=job["seed"],
        several_nodes=nodes.str.contains("+", regex=False).any(),
    )


def _test_episodes(folder: Path) -> int | None:
    """How many each job has, as ``comparison.json`` tells; None if it does not."""
    try:
        return int(json.loads((folder / "comparison.json").read_text())["test_episodes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_job(folder: Path, test_episodes: int | None = None) -> dict[str, pd.DataFrame]:
    """The tables ``episodes`` and ``rounds`` of a finished job.

    Args:
        folder: the job's.
        test_episodes: how many it has to have, if that is known.

    Raises:
        UserError: one is missing, not what compare.py writes, or the two do not fit each other.
    """
    advice = "delete the job's folder, and the same command makes it again"
    try:
        episodes = read_table(folder / "episodes.csv", TEST_EPISODE_COLUMNS)
        rounds = read_table(folder / "rounds.csv", TEST_ROUND_COLUMNS)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    recorded = rounds.groupby("episode").size().to_dict()
    whole = episodes.set_index("episode")["rounds"].to_dict() == recorded
    if episodes.empty or not whole or len(episodes) != (test_episodes or len(episodes)):
        raise UserError(f"{folder}: the tables are damaged; {advice}")
    return {"episodes": episodes, "rounds": rounds}


def matrix(episodes: pd.DataFrame, column: str) -> np.ndarray:
    """(S, E) float64: one method's values by seed and test episode, both ascending."""
    return episodes.pivot(index="seed", columns="episode", values=column).to_numpy(float)


def bootstrap(
    statistic: Callable[..., np.ndarray], *values: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float | None, float | None]:
    """A statistic of paired arrays with its interval.

    Args:
        statistic: from arrays of shape (..., S, E), reducing the last two axes.
        values: (S, E) arrays, seeds by test episodes, all drawn together.
        resamples: how many draws.

    Returns:
        The statistic, and the bounds of its interval; None with a single seed. The draws are always
        the same, so that the same tables give the same numbers.
    """
    mean = float(statistic(*values))
    if len(values[0]) < 2:
        return mean, None, None
    resampled = np.concatenate(
        [
            # In pieces, for a statistic of all pairs of episodes takes much memory.
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
    """(resamples, S, E): indices into the S x E values, seeds drawn first; always the same."""
    rng = np.random.default_rng(0)
    first = rng.integers(seeds, size=(resamples, seeds, 1)) * episodes
    return first + rng.integers(episodes, size=(resamples, seeds, episodes))


def mean(values: np.ndarray) -> np.ndarray:
    """Over the last two axes, seeds and episodes."""
    return values.mean(axis=(-2, -1))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all values, a quarter of their number cut off at each end."""
    return stats.trim_mean(values.reshape(*values.shape[:-2], -1), 0.25, axis=-1)


def reduction(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share by which our mean is less than theirs; no reduction of nothing to nothing."""
    a, b = mean(ours), mean(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - np.where(a == b, 1.0, a / b)


def break_even(spent: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """After how many episodes what was spent once is saved; infinite if nothing is."""
    saved = mean(theirs) - mean(ours)
    with np.errstate(divide="ignore"):
        return np.where(saved > 0, mean(spent) / np.maximum(saved, 0), np.inf)


def improvement(method: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Probability that an episode has less than one of its rival's, ties counted half.

    Of (..., S, E) values, every episode is compared with every one of the rival's with the same
    seed, and the mean taken over seeds.
    """
    ours, theirs = method[..., :, None], rival[..., None, :]
    axes = (-3, -2, -1)
    less = np.count_nonzero(ours < theirs, axis=axes)
    not_more = np.count_nonzero(ours <= theirs, axis=axes)
    return (less + not_more) / (2 * method.shape[-2] * method.shape[-1] * rival.shape[-1])


def estimate(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All estimates of a comparison, a row per variant, method and quantity.

    Quantities: those of ``QUANTITIES``, means over all episodes; ``rounds_iqm`` and
    ``communication_cost_iqm``, interquartile means; against random, over the seeds that both
    have: ``rounds_reduction`` and ``communication_cost_reduction``, shares of random's mean;
    ``rounds_improvement`` and ``communication_cost_improvement``, probabilities that an episode
    has less; of methods that learn ``rounds_break_even`` and ``communication_cost_break_even``, the
    number of trainings of the foundation model after which what the DQN's training took is saved
    against random (infinite if nothing is saved), unless the policy misses the goal more often than
    random: what it saves it does not save for the same result. With several nodes per round that of
    the cost is left out: a training's, as main.py's, holds the way to a round's first node alone.

    Returns:
        Columns ``ESTIMATE_COLUMNS``; ``low`` and ``high`` bound the 95 % interval, empty with one
        seed; ``seeds`` and ``episodes`` say on how many of each it rests.
    """
    jobs, episodes = tables["jobs"], tables["episodes"]
    rows = []
    for (variant, method), _ in jobs.groupby(["variant", "method"], sort=False):
        of_variant = episodes[episodes["variant"] == variant]
        own = of_variant[of_variant["method"] == method]
        if own.empty:
            continue
        rival = of_variant[of_variant["method"] == "random"]
        seeds = sorted(set(own["seed"]) & set(rival["seed"]))

        def add(
            quantity: str,
            statistic: Callable[..., np.ndarray],
            *values: np.ndarray,
            variant: str = variant,
            method: str = method,
        ) -> None:
            size = len(values[0]), values[0].size
            rows.append((variant, method, quantity, *bootstrap(statistic, *values), *size))

        for column in QUANTITIES:
            add(column, mean, matrix(own, column))
        for column in ("rounds", "communication_cost"):
            add(f"{column}_iqm", interquartile_mean, matrix(own, column))
            if method == "random" or not seeds:
                continue
            ours = matrix(own[own["seed"].isin(seeds)], column)
            theirs = matrix(rival[rival["seed"].isin(seeds)], column)
            add(f"{column}_reduction", reduction, ours, theirs)
            add(f"{column}_improvement", improvement, ours, theirs)
            spent = _spent(tables["training"], variant, method, seeds, column)
            success = [mean(matrix(t[t["seed"].isin(seeds)], "goal_reached")) for t in (own, rival)]
            if spent is not None and success[0] >= success[1]:
                spent = np.broadcast_to(spent[:, None], ours.shape)
                add(f"{column}_break_even", break_even, spent, ours, theirs)
    # Numbers also where no row has an interval, which would be a column of objects.
    table = pd.DataFrame(rows, columns=ESTIMATE_COLUMNS[2:]).astype({"low": float, "high": float})
    table.insert(0, "parameter", jobs["parameter"].iloc[0])
    table.insert(0, "comparison", jobs["comparison"].iloc[0])
    return table


def _spent(
    training: pd.DataFrame, variant: str, method: str, seeds: list[int], column: str
) -> np.ndarray | None:
    """(S,) what all episodes of training took on each seed; None if they are not at hand."""
    training = training[(training["variant"] == variant) & (training["method"] == method)]
    if not set(seeds) <= set(training["seed"]):
        return None
    if column == "communication_cost" and training["several_nodes"].any():
        return None
    return training.groupby("seed")[column].sum()[seeds].to_numpy(float)


def counted(count: int | str, noun: str) -> str:
    """A number or a range of numbers with its noun: 1 seed, 5 seeds, 2 to 3 seeds."""
    return f"{count} {noun}{'s' * (str(count) != '1')}"


# --- Report ----------------------------------------------------------------------------------

# Reductions against a random policy that the paper reports.
PUBLISHED = {"rounds": 0.508, "communication_cost": 0.746}


def write(folder: Path, tables: dict[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Estimates a comparison from its CSVs, and writes ``estimates.csv`` beside them.

    Args:
        folder: the comparison's.
        tables: what ``read_comparison`` gave, if that was called already.

    Raises:
        UserError: as ``read_comparison``.
        OSError: it can't be written.
    """
    table = estimate(tables or read_comparison(folder))
    with replacing(folder / "estimates.csv") as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())
    return table


def report(folder: Path, tables: dict[str, pd.DataFrame] | None = None) -> str:
    """What ``estimates.csv`` and ``jobs.csv`` of a comparison say, as Markdown tables.

    Args:
        folder: the comparison's.
        tables: what ``read_comparison`` gave, if that was called already.

    Raises:
        UserError: one of them is missing or something else.
    """
    table = read_table(folder / "estimates.csv", ESTIMATE_COLUMNS)
    tables = tables or read_comparison(folder)
    cells = table.set_index(["variant", "method", "quantity"])
    groups = list(dict.fromkeys(zip(table["variant"], table["method"], strict=True)))
    varied = table["parameter"].iloc[0]

    def cell(variant: str, method: str, quantity: str, form: str) -> str:
        if (variant, method, quantity) not in cells.index:
            return ""
        row = cells.loc[(variant, method, quantity)]
        # Infinite are the trainings after which HL is paid back, and what costs against nothing.
        texts = [
            ("never" if v > 0 else "infinitely more") if np.isinf(v) else format(v, form)
            for v in row[["mean", "low", "high"]]
        ]
        return texts[0] if np.isnan(row["low"]) else f"{texts[0]} [{texts[1]}, {texts[2]}]"

    def rows(columns: dict[str, tuple[str, str]], of: str) -> list[str]:
        first = ([varied] if varied else []) + ["method", "seeds x episodes"]
        lines = ["| " + " | ".join([*first, *columns]) + " |"]
        lines.append("|---" * (len(first) + len(columns)) + "|")
        for variant, method in groups:
            values = [cell(variant, method, *what) for what in columns.values()]
            if any(values):
                size = cells.loc[(variant, method, of)]
                size = f"{size['seeds']} x {size['episodes'] // size['seeds']}"
                name = ([variant] if varied else []) + [method, size]
                lines.append("| " + " | ".join([*name, *values]) + " |")
        return lines

    lines = rows(
        {
            "rounds": ("rounds", ".1f"),
            "rounds, interquartile mean": ("rounds_iqm", ".1f"),
            "goal reached": ("goal_reached", ".0%"),
            "communication cost": ("communication_cost", ".3f"),
            "cost, interquartile mean": ("communication_cost_iqm", ".3f"),
            "MB sent": ("megabytes", ".2f"),
            "MB to observe": ("observation_megabytes", ".1f"),
            "seconds": ("seconds", ".1f"),
        },
        of="rounds",
    )
    lines += ["", *_sizes(table, tables)]
    if table["quantity"].eq("rounds_reduction").any():
        lines += ["", "Against random, with the same seeds:", ""]
        lines += rows(
            {
                "fewer rounds": ("rounds_reduction", "+.1%"),
                "less communication cost": ("communication_cost_reduction", "+.1%"),
                "P(fewer rounds)": ("rounds_improvement", ".2f"),
                "P(less cost)": ("communication_cost_improvement", ".2f"),
            },
            of="rounds_reduction",
        )
        if not varied:  # the paper's settings
            published = [f"+{PUBLISHED[c]:.1%}" for c in ("rounds", "communication_cost")]
            lines.append(f"| *published, HL (MNIST)* |  | {' | '.join(published)} |  |  |")
    if table["quantity"].str.endswith("_break_even").any():
        lines += ["", "Trainings after which the DQN's own training is paid back:", ""]
        lines += rows(
            {
                "in rounds": ("rounds_break_even", ".0f"),
                "in communication cost": ("communication_cost_break_even", ".0f"),
            },
            of="rounds_break_even",
        )
    return "\n".join([*lines, "", f"results and figures: {folder}"])


def _sizes(table: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What the numbers rest on, in sentences."""
    jobs, training = tables["jobs"], tables["training"]
    states = jobs["state"].value_counts()
    wrong = jobs[jobs["error"] != ""]
    wrong = (
        wrong["folder"]
        + np.where(wrong["state"] == "failed", " failed", "")
        + ": "
        + wrong["error"]
    )
    diverged = f"{int(_total(table, 'diverged'))} test episodes"
    if not training.empty:
        diverged += f" and {int(training['diverged'].sum())} of training"
    counts = {name: states.get(name, 0) for name in ("finished", "waiting", "failed")}
    return [
        "Means over all test episodes, in brackets their 95 % intervals (none with one seed); an "
        "episode that missed the goal counts with the limit of rounds.",
        f"Jobs: {len(jobs)}, {', '.join(f'{n} {name}' for name, n in counts.items())}"
        + "".join(f"; {text}" for text in wrong)
        + f"; {diverged} diverged.",
    ]


def _total(table: pd.DataFrame, quantity: str) -> float:
    rows = table[table["quantity"] == quantity]
    return float((rows["mean"] * rows["episodes"]).sum().round())

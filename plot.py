"""Figures and summary of a run, a comparison or an audit, from its CSVs alone.

Usage: python3 plot.py results/<name> [results/<name> ...]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats

import estimates
from baselines import METHODS
from config import UserError, reason
from estimates import PUBLISHED
from records import EPISODE_COLUMNS, ROUND_COLUMNS, SHARD_COLUMNS, read_table, replacing

# Episodes in a moving average, in a row of the summary, and in "early" and "late".
WINDOW = 20

_COLUMNS = {"episodes": EPISODE_COLUMNS, "rounds": ROUND_COLUMNS, "shards": SHARD_COLUMNS}

# Episodes or seeds that an interval by Student's t needs: with fewer it would be wider than what
# can happen at all.
_FEWEST = 5

# Episodes that stand for the random policy: epsilon is 0.83 or more in the first ten.
_RANDOM_EPISODES, _RANDOM_EPSILON = 10, 0.8

Tables = TypeVar("Tables")  # what a figure is drawn from

_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}


def read_run(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables ``episodes``, ``rounds`` and ``shards`` of a run's folder.

    Raises:
        UserError: a file is missing or not what a run writes.
    """
    tables = {n: read_table(folder / f"{n}.csv", columns) for n, columns in _COLUMNS.items()}
    if tables["episodes"].empty:
        raise UserError(f"{folder}: no episode is finished yet")
    # The rounds of an episode in progress belong to no finished episode.
    finished = tables["rounds"]["episode"].isin(tables["episodes"]["episode"])
    tables["rounds"] = tables["rounds"][finished]
    return tables


def summary(folder: Path) -> str:
    """How a run went, as a Markdown table of means over each 20 episodes, and where it is.

    After each mean stands the half-width of its 95 % interval (Student's t over the episodes).
    """
    episodes = read_run(folder)["episodes"]
    lines = [
        "| episodes | rounds | communication cost | goal reached | episode reward |",
        "|---|---|---|---|---|",
    ]
    for start in range(0, len(episodes), WINDOW):
        part = episodes[start : start + WINDOW]
        lines.append(
            f"| {_span(part['episode'])} "
            f"| {_mean(part['rounds'], 1)} | {_mean(part['communication_cost'], 2)} "
            f"| {part['goal_reached'].mean():.0%} | {_mean(part['episode_reward'], 1)} |"
        )
    missed = int((episodes["goal_reached"] == 0).sum())
    lines.append(
        f"{len(episodes)} episodes on {episodes['dataset'].iloc[0]} in "
        f"{episodes['seconds'].sum() / 60:.1f} min: {missed} missed the goal (counted with "
        f"{episodes['max_rounds'].iloc[0]} rounds), {int(episodes['diverged'].sum())} diverged"
    )
    lines.append(
        f"\N{PLUS-MINUS SIGN}: half-width of the mean's 95 % interval, from {_FEWEST} episodes on"
    )
    lines.append(f"results and figures: {folder}")
    return "\n".join(lines)


def _span(episodes: pd.Series) -> str:
    first, last = episodes.iloc[0], episodes.iloc[-1]
    return f"{first} to {last}" if last > first else f"{first}"


def _mean(values: pd.Series, digits: int) -> str:
    if len(values) < _FEWEST:
        return f"{values.mean():.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def draw_run(folder: Path) -> None:
    """Draws all figures of a run into its folder, each as PNG and PDF.

    Raises:
        UserError: as ``read_run``.
        OSError: a figure can't be written.
    """
    tables = read_run(folder)
    figures: dict[str, Callable[[dict[str, pd.DataFrame]], Figure]] = {
        "learning": draw_learning,
        "accuracy": draw_accuracy,
        "walk": draw_walk,
        "shards": draw_shards,
    }
    for name, draw in figures.items():
        save_figure(folder / name, draw, tables)


def save_figure(path: Path, draw: Callable[[Tables], Figure], tables: Tables) -> None:
    """Draws a figure in this project's look into ``path`` + ``.png`` and ``path`` + ``.pdf``.

    Raises:
        OSError: it can't be written.
    """
    with plt.rc_context(_STYLE):
        figure = draw(tables)
        # The places of all parts are found once; each savefig would do it anew.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        # Without a creation date the same CSVs give the same file.
        for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            with replacing(path.with_name(f"{path.name}.{suffix}")) as file:
                figure.savefig(file, format=suffix, metadata=metadata)
        plt.close(figure)


def _title(figure: Figure, text: str, tables: dict[str, pd.DataFrame]) -> None:
    """The figure's title, with the dataset, and a plain word where that is a stand-in."""
    note = _data_note(tables["episodes"])
    figure.suptitle(f"{text}  [data: {note}]", fontweight="bold", fontsize=10)


def _data_note(episodes: pd.DataFrame) -> str:
    dataset = episodes["dataset"].iloc[0]
    return "bundled digits, NOT MNIST" if dataset == "digits" else dataset


def _early_and_late(tables: dict[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    """The rounds of the first and of the last episodes, without overlap, each with its title."""
    rounds, episodes = tables["rounds"], tables["episodes"]["episode"]
    count = min(WINDOW, max(1, len(episodes) // 2))
    parts = []
    for chosen in (episodes[:count], episodes[-count:]):
        title = f"episode{'s' * (count > 1)} {_span(chosen)}"
        parts.append((title, rounds[rounds["episode"].isin(chosen)]))
    return parts


def draw_learning(tables: dict[str, pd.DataFrame]) -> Figure:
    """Episode reward, rounds and communication cost over episodes, raw and as moving average."""
    episodes = tables["episodes"]
    figure, axes = plt.subplots(3, 1, figsize=(6.4, 7.2), sharex=True)
    panels = (
        ("episode_reward", "episode reward", None),
        ("rounds", "rounds to the goal\n(or the limit)", PUBLISHED["rounds"]),
        (
            "communication_cost",
            "communication cost\n(sum of distances)",
            PUBLISHED["communication_cost"],
        ),
    )
    reached = episodes["goal_reached"] == 1
    for axis, (column, label, reduction) in zip(axes, panels, strict=True):
        x, y = episodes["episode"], episodes[column]
        axis.plot(x[reached], y[reached], "o", ms=3, color="0.6", label="goal reached")
        axis.plot(x[~reached], y[~reached], "x", ms=4, color="0.35", label="goal missed")
        mean = y.rolling(WINDOW).mean()
        axis.plot(x, mean, "-", color="black", lw=1.8, label=f"mean of the last {WINDOW}")
        axis.set_ylabel(label)
        if reduction is not None:
            _draw_published(axis, tables, column, reduction)
    limit = episodes["max_rounds"].iloc[0]
    axes[1].axhline(limit, color="0.5", lw=0.8, ls=":", label=f"limit, {limit} rounds")
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    for axis in axes:
        # What all panels share is named in the first.
        handles, labels = axis.get_legend_handles_labels()
        own = slice(None) if axis is axes[0] else slice(3, None)
        axis.legend(handles[own], labels[own], loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel("episode")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _title(figure, "DQN training", tables)
    return figure


def _draw_published(
    axis: Axes, tables: dict[str, pd.DataFrame], column: str, reduction: float
) -> None:
    """The published reduction against random, where the run starts on MNIST and at random."""
    episodes, rounds = tables["episodes"], tables["rounds"]
    first = episodes[:_RANDOM_EPISODES]
    chosen_by = rounds.loc[rounds["episode"].isin(first["episode"]), "chosen_by"]
    at_random = first["epsilon"].min() >= _RANDOM_EPSILON and "repeated" not in set(chosen_by)
    if episodes["dataset"].iloc[0] != "mnist" or not at_random or len(first) < _RANDOM_EPISODES:
        return
    level = first[column].mean() * (1 - reduction)
    label = f"published: \N{MINUS SIGN}{reduction:.1%} of\nepisodes 1 to {_RANDOM_EPISODES}"
    axis.axhline(level, color="black", lw=1, ls="--", label=label)


def draw_accuracy(tables: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy over the rounds of early and late episodes."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharex=True, sharey=True)
    goal = tables["episodes"]["goal_accuracy"].iloc[0]
    limit = tables["episodes"]["max_rounds"].iloc[0]
    for axis, (title, rounds) in zip(axes, _early_and_late(tables), strict=True):
        wide = rounds.pivot(index="round", columns="episode", values="accuracy")
        wide = wide.reindex(range(1, limit + 1))
        axis.plot(wide.index, wide, color="0.75", lw=0.7)
        # An episode that has ended holds its last accuracy: else only the slow ones would be left.
        axis.plot(wide.index, wide.ffill().mean(axis=1), color="black", lw=2, label="mean")
        axis.plot([], [], color="0.75", lw=0.7, label="one episode")
        axis.axhline(goal, color="black", lw=1, ls="--", label=f"goal, {goal:g}")
        axis.set(title=title, xlabel="round", xlim=(1, max(limit, 2)), ylim=(0, 1))
    axes[0].set_ylabel("test accuracy (share of images)")
    axes[1].legend(loc="lower right")
    _title(figure, "Accuracy by round (ended episodes hold their last)", tables)
    return figure


def draw_walk(tables: dict[str, pd.DataFrame]) -> Figure:
    """Which node hands over to which, in early and late episodes."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.2), sharey=True)
    parts = _early_and_late(tables)
    count = 1 + max(int(n) for n in tables["shards"]["node"])
    image = None
    for axis, (title, rounds) in zip(axes, parts, strict=True):
        shares = handovers(rounds, count)
        image = axis.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="equal")
        if count <= 12:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    color = "white" if share > 0.5 else "black"
                    text = f"{share:.2f}".lstrip("0")
                    axis.text(column, row, text, ha="center", va="center", color=color, fontsize=6)
            axis.set(xticks=range(count), yticks=range(count))
        axis.grid(False)
        axis.set(title=title, xlabel="next node")
    axes[0].set_ylabel("current node")
    figure.colorbar(image, ax=axes, label="share of the current node's hand-overs", shrink=0.85)
    _title(figure, "Walk of the model", tables)
    return figure


def handovers(rounds: pd.DataFrame, count: int) -> np.ndarray:
    """(N, N) float64: of the hand-overs from node i, the share that went to node j.

    With several nodes in a round, the first hands the model on, to each node of the next round.
    A node that never handed over has a row of zeros.

    Args:
        rounds: columns episode, round, node (text, several joined by "+").
        count: N.
    """
    counts = np.zeros((count, count))
    for _, episode in rounds.sort_values(["episode", "round"]).groupby("episode"):
        nodes = [[int(n) for n in text.split("+")] for text in episode["node"]]
        for current, following in itertools.pairwise(nodes):
            np.add.at(counts, (current[0], following), 1)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)


def draw_shards(tables: dict[str, pd.DataFrame]) -> Figure:
    """Who holds how many images of which class."""
    shards = tables["shards"].assign(node=tables["shards"]["node"].astype(int))
    wide = shards.pivot(index="node", columns="class", values="images")
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    image = axis.imshow(wide, cmap="Greys", aspect="auto", vmin=0)
    if len(wide) <= 12 and wide.shape[1] <= 12:
        for (row, column), images in np.ndenumerate(wide.to_numpy()):
            color = "white" if images > wide.to_numpy().max() / 2 else "black"
            axis.text(column, row, images, ha="center", va="center", color=color, fontsize=7)
        axis.set(yticks=range(len(wide)))
    if wide.shape[1] <= 12:
        axis.set(xticks=range(wide.shape[1]))
    axis.grid(False)
    axis.set(xlabel="class", ylabel="node")
    figure.colorbar(image, ax=axis, label="training images")
    _title(figure, "Shards", tables)
    return figure


# --- Audits ----------------------------------------------------------------------------------

AUDIT_COLUMNS = ("dataset", "observation", "target", "r2", "low", "high", "episodes", "rounds")

# What accuracies are predicted from, in the order of the figure; the last two are references.
OBSERVATIONS = {
    "zeros": "nothing",
    "last_node": "last node",
    "last_node_moved": "last node and how far the model moved",
    "broadcast": "broadcast (public code)",
    "local": "local",
    "local_holder": "local, signs by the last node",
    "fixed": "fixed basis",
    "both": "broadcast and local",
    "first_both_loading": "first component of both",
    "first_both": "first component of both, signs by the last node",
    "last_node_round": "last node and round *",
    "history": "all nodes' visits and the round *",
}
TARGETS = {"accuracy": "accuracy now", "next_accuracy": "accuracy after the next node"}


def _read_audit(folder: Path) -> pd.DataFrame:
    path = folder / "audit.csv"
    table = read_table(path, AUDIT_COLUMNS)
    there = set(zip(table["observation"], table["target"], strict=True))
    for row in itertools.product(OBSERVATIONS, TARGETS):
        if row not in there:
            raise UserError(f"{path}: {' '.join(row)} is missing, audit.py makes it again")
    return table


def draw_audit(folder: Path) -> None:
    """Draws an audit's figure from ``audit.csv``, as PNG and PDF.

    Raises:
        UserError: the table is missing or something else.
        OSError: a file can't be written.
    """
    tables = {"episodes": _read_audit(folder)}
    save_figure(folder / "audit", draw_explained, tables)


def draw_explained(tables: dict[str, pd.DataFrame]) -> Figure:
    """R2 of each observation, a bar per target, with intervals."""
    table = tables["episodes"]
    figure, axis = plt.subplots(figsize=(8.4, 4.2))
    for place, (target, label) in enumerate(TARGETS.items()):
        rows = table[table["target"] == target].set_index("observation").loc[list(OBSERVATIONS)]
        y = np.arange(len(rows)) + (place - 0.5) * 0.36
        errors = np.array([rows["r2"] - rows["low"], rows["high"] - rows["r2"]])
        axis.barh(y, rows["r2"], 0.36, xerr=errors, color=("0.75", "0.35")[place], label=label)
    axis.set_yticks(range(len(OBSERVATIONS)), list(OBSERVATIONS.values()))
    axis.invert_yaxis()
    axis.set_xlabel("R2 on walks that were not learned from")
    axis.legend(loc="upper right")  # the first bars are short: nothing is seen there, or little
    episodes, rounds = table["episodes"].iloc[0], table["rounds"].iloc[0]
    figure.supxlabel("95 % intervals over walks; * not shown to the agent", fontsize=8)
    _title(figure, f"What observations tell, {episodes} walks, {rounds} rounds", tables)
    return figure


def audit_report(folder: Path) -> str:
    """The audit's table, as Markdown.

    Raises:
        UserError: as ``draw_audit``.
    """
    table = _read_audit(folder)
    lines = [f"| observation | {' | '.join(TARGETS.values())} |", "|---" * (1 + len(TARGETS)) + "|"]
    for name, label in OBSERVATIONS.items():
        rows = table[table["observation"] == name].set_index("target").loc[list(TARGETS)]
        cells = [f"{r.r2:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows.itertuples()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- Comparisons -----------------------------------------------------------------------------


def draw_comparison(folder: Path) -> dict[str, pd.DataFrame]:
    """Estimates a comparison from its CSVs and draws its figures, each as PNG and PDF.

    Returns:
        Its tables, as ``estimates.read_comparison`` does, and ``estimates``.

    Raises:
        UserError: as ``estimates.read_comparison``.
        OSError: a file can't be written.
    """
    tables = estimates.read_comparison(folder)
    table = tables["estimates"] = estimates.write(folder, tables)
    figures: dict[str, Callable[[dict[str, pd.DataFrame]], Figure]] = {}
    if table["variant"].nunique() > 1:
        figures["variants"] = draw_variants
    else:
        figures["methods"] = draw_methods
        figures["accuracy"] = draw_accuracy_of_methods
        if (table["quantity"] == "rounds_reduction").any():
            figures["reduction"] = draw_reduction
        if _learned(tables["episodes"]):
            figures["walks"] = draw_walks
    if not tables["training"].empty:
        figures["training"] = draw_training
    for name, draw in figures.items():
        save_figure(folder / name, draw, tables)
    return tables


def _methods(table: pd.DataFrame) -> list[str]:
    """The methods of a table in their usual order, and at the end those that a script added."""
    present = list(dict.fromkeys(table["method"]))
    return [*(n for n in METHODS if n in present), *(n for n in present if n not in METHODS)]


def _method_title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def _learned(episodes: pd.DataFrame) -> list[str]:
    """The methods whose policy is a trained DQN."""
    return [n for n in _methods(episodes) if n in METHODS and METHODS[n].learns]


def _range(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return str(low) if low == high else f"{low} to {high}"


def _size(estimates_table: pd.DataFrame) -> str:
    """On how many seeds and episodes the estimates rest."""
    rows = estimates_table[estimates_table["quantity"].isin(["rounds", "rounds_reduction"])]
    seeds, episodes = _range(rows["seeds"]), _range(rows["episodes"] // rows["seeds"])
    return f"{estimates.counted(seeds, 'seed')} x {estimates.counted(episodes, 'episode')}"


def _interval(estimates_table: pd.DataFrame, word: str = "interval") -> str:
    """What the figure's title says after the mean; with one seed there is no interval."""
    return f", 95 % {word}" if estimates_table["low"].notna().any() else ""


def _rows(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return table[table["quantity"] == quantity].set_index("method")


def _errors(rows: pd.DataFrame) -> np.ndarray | None:
    """(2, n) lengths of the error bars from mean to low and to high; 0 without an interval.

    None if there are no intervals at all, as with one seed: no bars then, in the legend either.
    """
    if rows["low"].isna().all():
        return None
    return np.nan_to_num(np.abs(rows[["low", "high"]].to_numpy(float).T - rows["mean"].to_numpy()))


def draw_methods(tables: dict[str, pd.DataFrame]) -> Figure:
    """Rounds, communication cost and success of each method: seeds as points, mean and interval."""
    episodes, table = tables["episodes"], tables["estimates"]
    names = _methods(table)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 0.34 * len(names) + 1.3), sharey=True)
    panels = (
        ("rounds", "rounds to the goal (or the limit)"),
        ("communication_cost", "communication cost (sum of distances)"),
        ("goal_reached", "goal reached (share of episodes)"),
    )
    y = np.arange(len(names))
    for axis, (column, label) in zip(axes, panels, strict=True):
        seeds = episodes.groupby(["method", "seed"])[column].mean()
        for place, name in enumerate(names):
            values = seeds[name]
            axis.plot(values, np.full(len(values), place + 0.2), "o", ms=2.5, color="0.6")
        rows = _rows(table, column).loc[names]
        axis.errorbar(
            rows["mean"], y - 0.08, xerr=_errors(rows), fmt="D", ms=4, color="black", capsize=2.5
        )
        axis.set_xlabel(label)
        highest = rows["high"].fillna(rows["mean"])
        shown = rows.index
        if column == "communication_cost" and "random" in names:
            # FedAvg's cost is many times random's: cut off, and said so.
            shown = rows.index[rows["mean"] <= 3 * rows.loc["random", "mean"]]
        right = max(highest[shown].max(), seeds[shown].max(), 1e-3) * 1.06
        if column == "goal_reached":
            right = 1.06
        for place, value in enumerate(rows["mean"]):
            if value > right:
                text = f"{value:.1f} →"
                axis.text(right, place, text, ha="right", va="center", fontsize=8)
        # A little room, for what is at 0 or at the end shall be seen whole.
        axis.set_xlim(-0.03 * right, right)
    axes[0].set_yticks(y, [_method_title(name) for name in names])
    axes[0].invert_yaxis()
    limit = episodes["max_rounds"].iloc[0]
    axes[0].axvline(limit, color="0.5", lw=0.8, ls=":")
    axes[0].set(xlim=(None, max(axes[0].get_xlim()[1], 1.06 * limit)), ylim=(None, -0.9))
    axes[0].text(0.98 * limit, -0.6, f"limit, {limit} rounds", ha="right", fontsize=7)
    what = f"{_size(table)}; seeds: grey; mean{_interval(table)}: black"
    _title(figure, f"Methods ({what})", tables)
    return figure


def draw_accuracy_of_methods(tables: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy by round of each method, mean and 95 % band, beside that of random."""
    rounds, episodes = tables["rounds"], tables["episodes"]
    names = _methods(episodes)
    limit, goal = episodes["max_rounds"].iloc[0], episodes["goal_accuracy"].iloc[0]
    curves = {name: _accuracy_curve(rounds[rounds["method"] == name], limit) for name in names}
    figure, panels = _panels(len(names), 4, (2.4, 1.8), (0, 0.5), ("round", "test accuracy"))
    x = np.arange(1, limit + 1)
    for axis, name in zip(panels, names, strict=True):
        if "random" in curves and name != "random":
            axis.plot(x, curves["random"][0], color="0.6", lw=1)
        middle, low, high = curves[name]
        axis.fill_between(x, low, high, color="0.8", lw=0)
        axis.plot(x, middle, color="black", lw=1.5)
        axis.axhline(goal, color="black", lw=0.8, ls="--")
        axis.set(xlim=(1, max(limit, 2)), ylim=(0, 1))
        axis.set_title(_method_title(name), fontsize=9)
    what = f"{_size(tables['estimates'])}; mean{_interval(tables['estimates'], 'band')}"
    _title(figure, f"Accuracy by round ({what})", tables)
    random = "grey line: random; " * ("random" in curves)
    figure.supxlabel(f"{random}an episode that has ended holds its last accuracy", fontsize=8)
    return figure


def _panels(
    count: int,
    columns: int,
    size: tuple[float, float],
    margin: tuple[float, float],
    labels: tuple[str, str],
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels that share both axes, in rows of ``columns`` or fewer.

    Args:
        count: 1 or more.
        columns: in a row.
        size: of a panel, in inches.
        margin: what the figure has beside all panels, in inches.
        labels: of the x and of the y axes, at the grid's edge.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        # A single panel still leaves room for the figure's title.
        figsize=(max(size[0] * columns + margin[0], 5.2), size[1] * rows + margin[1]),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels = list(axes.flat[:count])
    for axis in panels[-columns:]:  # the lowest of each column
        axis.set_xlabel(labels[0])
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel(labels[1])
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, panels


def _accuracy_curve(rounds: pd.DataFrame, limit: int) -> tuple[np.ndarray, ...]:
    """Mean over all test episodes by round, and its interval: three arrays of ``limit`` numbers."""
    wide = rounds.pivot(index="round", columns=["seed", "episode"], values="accuracy")
    wide = wide.reindex(range(1, limit + 1)).ffill()
    seeds = wide.columns.get_level_values("seed").nunique()
    values = wide.to_numpy().reshape(limit, seeds, -1)
    bounds = [estimates.bootstrap(estimates.mean, v, resamples=1000) for v in values]
    # With a single seed there is no interval: the band is the mean's line.
    return tuple(
        np.array([[m, m if a is None else a, m if b is None else b] for m, a, b in bounds]).T
    )


def draw_walks(tables: dict[str, pd.DataFrame]) -> Figure:
    """Who trained in each round of each test episode, by seed, where a DQN decided.

    Of several nodes in a round the first, which hands the model on.
    """
    rounds, episodes = tables["rounds"], tables["episodes"]
    rounds = rounds.assign(node=rounds["node"].str.split("+").str[0].astype(int))
    limit, count = episodes["max_rounds"].iloc[0], 1 + rounds["node"].max()
    parts = [
        (name, seed, of_seed)
        for name in _learned(episodes)
        for seed, of_seed in rounds[rounds["method"] == name].groupby("seed")
    ]
    # Nodes are names: as many colours as there are nodes, while there are that many apart.
    colors = matplotlib.colormaps["tab10"].colors[:count] if count <= 10 else None
    colors = matplotlib.colors.ListedColormap(colors) if colors else "viridis"
    figure, panels = _panels(len(parts), 5, (1.9, 1.5), (1.2, 0.8), ("round", "test episode"))
    image = None
    for axis, (name, seed, of_seed) in zip(panels, parts, strict=True):
        wide = of_seed.pivot(index="episode", columns="round", values="node")
        wide = wide.reindex(columns=range(1, limit + 1))
        image = axis.imshow(
            wide,
            cmap=colors,
            vmin=-0.5,
            vmax=count - 0.5,
            aspect="auto",
            interpolation="none",
            extent=(0.5, limit + 0.5, len(wide) + 0.5, 0.5),
        )
        axis.set_title(f"{_method_title(name)}, seed {seed}", fontsize=8)
        axis.grid(False)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    bar = figure.colorbar(image, ax=figure.axes, label="node")
    if count <= 10:
        bar.set_ticks(range(count))
    _title(figure, "Walks of the frozen policies", tables)
    figure.supxlabel("an episode ends at the goal, or at the limit", fontsize=8)
    return figure


def draw_reduction(tables: dict[str, pd.DataFrame]) -> Figure:
    """Reduction of rounds and cost against random, beside what the paper reports for HL."""
    table = tables["estimates"]
    names = [name for name in _methods(table) if name != "random"]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 0.34 * len(names) + 1.5), sharey=True)
    y = np.arange(len(names))
    for axis, (column, label) in zip(
        axes, (("rounds", "rounds"), ("communication_cost", "communication cost")), strict=True
    ):
        rows = _rows(table, f"{column}_reduction").reindex(names)
        axis.errorbar(
            rows["mean"], y, xerr=_errors(rows), fmt="D", ms=4, color="black", capsize=2.5
        )
        axis.axvline(0, color="0.4", lw=0.8)
        published = PUBLISHED[column]
        axis.axvline(published, color="black", lw=1, ls="--")
        axis.text(
            published - 0.02,
            -0.75,
            f"published (MNIST) {published:.1%}",
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axis.set_xlabel(f"{label}: reduction against random")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        # FedAvg's cost is many times random's: cut off, and said so.
        low = min(-0.4, *rows["mean"].clip(lower=-1.2))
        axis.set_xlim(low - 0.1, 1.1)
        for place, value in enumerate(rows["mean"]):
            if value < low - 0.1:
                axis.text(low - 0.08, place, f"\N{LEFTWARDS ARROW} {value:+.0%}", va="center")
    axes[0].set_yticks(y, [_method_title(name) for name in names])
    axes[0].set_ylim(len(names) - 0.5, -1)
    size = _size(table[table["quantity"] == "rounds_reduction"])
    _title(figure, f"Against random ({size}; mean{_interval(table)})", tables)
    return figure


def draw_training(tables: dict[str, pd.DataFrame]) -> Figure:
    """Rounds and cost over the DQN's training: moving average of each seed, mean and band.

    Of more than eight values of what the comparison varies, which lines in one panel can't tell
    apart, each has a panel with the rounds' mean and band beside the mean of the first; without
    the cost.
    """
    training, table = tables["training"], tables["estimates"]
    if training["method"].nunique() > 1:
        titles = training["method"].map(_method_title)
        training = training.assign(variant=(titles + " " + training["variant"]).str.strip())
    variants = list(dict.fromkeys(training["variant"]))
    window = min(WINDOW, max(1, training["episode"].max() // 3))
    limit = tables["episodes"]["max_rounds"].max()
    banded = bool(training.groupby("variant")["seed"].nunique().max() >= _FEWEST)
    band = ", with 95 % band" * banded

    def smooth(variant: str, column: str) -> pd.DataFrame:
        own = training[training["variant"] == variant]
        return own.pivot(index="episode", columns="seed", values=column).rolling(window).mean()

    def fill(axis: Axes, each: pd.DataFrame, column: str, color: str) -> None:
        if each.shape[1] >= _FEWEST:
            half = stats.t.ppf(0.975, each.shape[1] - 1) * each.sem(axis=1)
            low, high = (each.mean(axis=1) - half).clip(lower=0), each.mean(axis=1) + half
            if column == "rounds":
                high = high.clip(upper=limit)
            axis.fill_between(each.index, low, high, color=color, alpha=0.15, lw=0)

    seeds = _range(training.groupby("variant")["seed"].nunique())
    title = f"DQN training, {estimates.counted(seeds, 'seed')}"
    if len(variants) > 8:
        labels = (f"episode (means of {window}{band})", "rounds")
        figure, panels = _panels(len(variants), 4, (2.4, 1.6), (0, 0.8), labels)
        for axis, variant in zip(panels, variants, strict=True):
            for name, color in ((variants[0], "0.65"), (variant, "black")):
                each = smooth(name, "rounds")
                axis.plot(each.mean(axis=1), color=color, lw=1.5)
            fill(axis, each, "rounds", color)
            axis.set_title(variant, fontsize=9)
            axis.set_ylim(0, limit)
        _title(figure, title, tables)
        figure.supxlabel(f"grey line: {variants[0]}", fontsize=8)
        return figure
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 5.2), sharex=True)
    styles = [("-", "--", ":", "-.")[place % 4] for place in range(len(variants))]
    colors = [str(c) for c in np.linspace(0, 0.6, len(variants))]
    for axis, (column, label) in zip(
        axes,
        (
            ("rounds", "rounds to the goal\n(or the limit)"),
            ("communication_cost", "communication cost"),
        ),
        strict=True,
    ):
        for variant, style, color in zip(variants, styles, colors, strict=True):
            each = smooth(variant, column)
            if len(variants) == 1:
                axis.plot(each.index, each, color="0.75", lw=0.7)
                axis.plot([], [], color="0.75", lw=0.7, label="one seed")
            fill(axis, each, column, color)
            mean = each.mean(axis=1)
            axis.plot(mean, style, color=color, lw=1.8, label=variant or "mean of seeds")
        # With several variants there are as many lines of random, in "variants".
        rows = _rows(table[table["variant"] == variants[0]], column)
        comparable = column == "rounds" or not training["several_nodes"].any()
        if "random" in rows.index and len(variants) == 1 and comparable:
            axis.axhline(rows.loc["random", "mean"], color="black", lw=0.8, ls=":", label="random")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel(f"episode of training (means of {window}{band})")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _title(figure, title, tables)
    return figure


def draw_variants(tables: dict[str, pd.DataFrame]) -> Figure:
    """Rounds, cost and success by the value of what the comparison varies.

    Numbers stand on the x axis and have a line per method; names, and numbers of nodes and of
    seeds, between which a line would mean nothing, have a row each.
    """
    table = tables["estimates"]
    variants = list(dict.fromkeys(table["variant"]))
    parameter = table["parameter"].iloc[0]
    in_rows = parameter in ("STARTER_NODE", "DISTANCE_SEED") or not all(map(_is_number, variants))
    names = _methods(table)
    if in_rows:
        height = (0.2 + 0.07 * len(names)) * len(variants) + 1.5
        figure, axes = plt.subplots(1, 3, figsize=(9.6, height), sharey=True)
    else:
        figure, axes = plt.subplots(3, 1, figsize=(6.4, 7.0), sharex=True)
    panels = (
        ("rounds", "rounds to the goal\n(or the limit)"),
        ("communication_cost", "communication cost\n(sum of distances)"),
        ("goal_reached", "share of episodes\nthat reached the goal"),
    )
    markers = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h", "p")
    colors = [str(c) for c in np.linspace(0, 0.65, len(names))]
    for axis, (column, label) in zip(axes, panels, strict=True):
        for place, (name, color) in enumerate(zip(names, colors, strict=True)):
            rows = table[(table["quantity"] == column) & (table["method"] == name)]
            rows = rows.set_index("variant").reindex(variants)
            # Side by side, that intervals don't cover each other.
            apart = min(0.15, 0.6 / len(names)) if in_rows else 0.06
            along = np.arange(len(variants)) + (place - (len(names) - 1) / 2) * apart
            axis.errorbar(
                *((rows["mean"], along) if in_rows else (along, rows["mean"])),
                **{"xerr" if in_rows else "yerr": _errors(rows)},
                fmt=("" if in_rows else "-") + markers[place % len(markers)],
                ms=4,
                lw=1,
                color=color,
                capsize=2,
                label=_method_title(name),
            )
        limits, set_limits, set_label = (
            (axis.get_xlim, axis.set_xlim, axis.set_xlabel)
            if in_rows
            else (axis.get_ylim, axis.set_ylim, axis.set_ylabel)
        )
        set_label(label)
        # A little below 0, for what stands there.
        top = 1.0 if column == "goal_reached" else limits()[1]
        set_limits(-0.04 * top, 1.04 * top)
    where = axes[-1] if in_rows else axes[0]
    where.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    told = f"{parameter} (mean{_interval(table)})"
    if in_rows:
        axes[0].set_yticks(range(len(variants)), variants)
        axes[0].set_ylim(len(variants) - 0.5, -0.5)
        axes[0].set_ylabel(told)
    else:
        axes[-1].set_xticks(range(len(variants)), variants)
        axes[-1].set_xlabel(told)
    _title(figure, f"{table['comparison'].iloc[0]}, {_size(table)}", tables)
    return figure


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Draws the runs, comparisons and audits named on the command line; returns the exit status.

    It is 2 if a folder is not what is drawn here, and 1 if a file can't be written or a comparison
    has jobs that failed or are damaged, as compare.py's.
    """
    parser = argparse.ArgumentParser(
        prog="plot.py",
        description="Draw all figures of runs, comparisons and audits again, from CSVs.",
    )
    parser.add_argument("folder", nargs="+", type=Path, help="results/<name>")
    status = 0
    try:
        for folder in parser.parse_args(arguments).folder:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder, takes results/<name>")
            for parent in folder.absolute().parents[:2]:
                if (parent / "jobs.csv").exists() and not folder.name.startswith("training-"):
                    raise UserError(f"{folder}: part of a comparison, takes the whole: {parent}")
            if (folder / "jobs.csv").exists():
                tables = draw_comparison(folder)
                print(estimates.report(folder, tables))
                status |= int((tables["jobs"]["error"] != "").any())
            elif (folder / "audit.csv").exists():
                draw_audit(folder)
                print(audit_report(folder))
            elif not any((folder / name).exists() for name in ("config.json", "episodes.csv")):
                raise UserError(
                    f"{folder}: holds no run, comparison or finished audit itself, takes "
                    "results/<name>"
                )
            else:
                draw_run(folder)
                print(summary(folder))
    except UserError as error:
        sys.stderr.write(f"plot.py: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"plot.py: {reason(error)}\n")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

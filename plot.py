"""Figures and summary of a run, from its CSVs alone.

Usage: python3 plot.py results/<name> [results/<name> ...]
"""

from __future__ import annotations

import argparse
import io
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
from matplotlib.ticker import MaxNLocator
from scipy import stats

from config import UserError, reason
from records import EPISODE_COLUMNS, ROUND_COLUMNS, SHARD_COLUMNS, replacing

# Episodes in a moving average, in a row of the summary, and in "early" and "late".
WINDOW = 20

_COLUMNS = {"episodes": EPISODE_COLUMNS, "rounds": ROUND_COLUMNS, "shards": SHARD_COLUMNS}

# Episodes that an interval needs: with fewer it would be wider than what can happen at all.
_FEWEST = 5

# Reductions against a random policy that the paper reports.
PUBLISHED_ROUNDS, PUBLISHED_COST = 0.508, 0.746

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
    tables = {}
    for name, columns in _COLUMNS.items():
        path = folder / f"{name}.csv"
        try:
            text = path.read_text(encoding="utf-8")
            # A row without its end is one that could not be written any more.
            text = text[: text.rfind("\n") + 1]
            # A single node reads as a number, several ("3+5") as text: always text here.
            table = pd.read_csv(io.StringIO(text), dtype={"node": str, "dataset": str})
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{path}: can't be read ({error})") from error
        if list(table) != list(columns):
            raise UserError(f"{path}: is not a run's {name}.csv, whose columns are {columns}")
        tables[name] = table
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
        # Without a creation date the same CSVs give the same file.
        for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            with replacing(path.with_name(f"{path.name}.{suffix}")) as file:
                figure.savefig(file, format=suffix, metadata=metadata)
        plt.close(figure)


def _title(figure: Figure, text: str, tables: dict[str, pd.DataFrame]) -> None:
    """The figure's title, with the dataset, and a plain word where that is a stand-in."""
    dataset = tables["episodes"]["dataset"].iloc[0]
    note = "bundled digits, NOT MNIST" if dataset == "digits" else dataset
    figure.suptitle(f"{text}  [data: {note}]", fontweight="bold", fontsize=10)


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
        ("rounds", "rounds to the goal\n(or the limit)", PUBLISHED_ROUNDS),
        ("communication_cost", "communication cost\n(sum of distances)", PUBLISHED_COST),
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
            _draw_published(axis, episodes, column, reduction)
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


def _draw_published(axis: Axes, episodes: pd.DataFrame, column: str, reduction: float) -> None:
    """The published reduction against random, where the run starts on MNIST and at random."""
    first = episodes[:_RANDOM_EPISODES]
    at_random = first["epsilon"].min() >= _RANDOM_EPSILON
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


def main(arguments: list[str] | None = None) -> int:
    """Draws the runs named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="plot.py", description=draw_run.__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="+", type=Path, help="results/<name>")
    try:
        for folder in parser.parse_args(arguments).folder:
            draw_run(folder)
            print(summary(folder))
    except UserError as error:
        sys.stderr.write(f"plot.py: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"plot.py: {reason(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

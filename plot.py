"""Figures and summary of runs, from their CSVs alone.

Usage: ``python3 plot.py results/<name> [results/<name> ...]``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from scipy import stats

import cli
import records
from config import UserError

# Figures are drawn at the size at which they are printed: no text is below 7 pt.
_STYLE: Any = {  # Matplotlib's versions type the keys differently
    "font.size": 8,
    "figure.titlesize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "savefig.dpi": 150,
    "pdf.fonttype": 42,
    "svg.hashsalt": "homogeneous-learning",  # the same tables give the same file
}
matplotlib.rcParams.update(_STYLE)

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, GREY = "#000000", "#767676"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PURPLE = "#E69F00", "#D55E00", "#CC79A7"

# Colour and style of up to 28 lines: no two share both.
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINE_STYLES = tuple(zip(4 * COLORS, 7 * ("-", "--", ":", "-."), strict=True))

# File formats, with the metadata that leaves out the time of writing.
FORMATS: dict[str, Any] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all, in the format that the path's suffix names."""
    name = path.suffix[1:]
    with records.replacing(path) as file:
        figure.savefig(file, format=name, metadata=FORMATS[name])


def panels(height: float, rows: int, columns: int, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure over two columns of print, of a height in inches, and its panels."""
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def data_name(dataset: str) -> str:
    """Return a dataset's name for a figure."""
    return "bundled digits, NOT MNIST" if dataset == "digits" else dataset


def set_title(figure: Figure, table: pd.DataFrame, text: str, *notes: str) -> None:
    """Set a figure's title: what it shows, of which data, and more notes."""
    datasets = map(data_name, table["dataset"].unique())
    figure.suptitle(f"{text} (data: {'; '.join([*datasets, *notes])})")


def label_at_right(axis: Axes, y: float, text: str, x: float = 1.01) -> None:
    """Write a text beside a panel; ``x`` is a fraction of the panel's width."""
    axis.text(x, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7)


def span(values: pd.Series) -> str:
    """Return the first and the last value as text, or one if they are equal: "1 to 20"."""
    first, last = values.iloc[0], values.iloc[-1]
    return f"{first} to {last}" if last > first else f"{first}"


# --- Tables ----------------------------------------------------------------------------------

WINDOW = 20  # episodes in a moving average, in a row of the summary, in "first" and in "last"
MIN_EPISODES = 5  # episodes that an interval by Student's t needs; with fewer it says nothing

# Reductions that the paper reports for HL against a random policy, and the public code's world,
# whatever a user edits in config.py. A run shows the reductions if its CSVs agree with that world.
PUBLISHED = {"rounds": 0.508, "communication_cost": 0.746}
PUBLISHED_WORLD: dict[str, Any] = {
    "GOAL_ACCURACY": 0.8,
    "MAX_ROUNDS": 36,
    "DATASET": "mnist",
    "NUM_NODES": 10,
    "STARTER_NODE": 0,
    "NODES_PER_ROUND": 1,
    "SHARD_RULE": "main_class",
    "SAMPLES_PER_NODE": 500,
    "HETEROGENEITY": 0.8,
    "DISTANCE_SCALE": 0.1,
    "DISTANCE_SEED": 0,
    "LEARNING_RATE": 0.001,
    "BATCH_SIZE": 32,
    "LOCAL_EPOCHS": 1,
}

Tables = dict[str, pd.DataFrame]


def read_run(folder: Path) -> Tables:
    """Return ``episodes``, ``rounds``, ``shards`` and ``distances`` of a run's finished episodes.

    UserError if the folder holds no run, no finished episode, or a table is missing or damaged.
    """
    if (folder / "jobs.csv").exists():
        command = f"python3 -m experiments.figures {folder}"
        raise UserError(f"{folder}: a comparison, takes a run; {command} draws it")
    columns = {
        "episodes": records.EPISODE_COLUMNS,
        "rounds": records.ROUND_COLUMNS,
        "shards": records.SHARD_COLUMNS,
        "distances": records.DISTANCE_COLUMNS,
    }
    tables = {n: records.read_table(folder / f"{n}.csv", c) for n, c in columns.items()}
    if tables["episodes"].empty:
        raise UserError(f"{folder}: no episode is finished yet")
    rounds = tables["rounds"]
    return {**tables, "rounds": rounds[rounds["episode"].isin(tables["episodes"]["episode"])]}


def summary(folder: Path) -> str:
    """Return a Markdown table of a run's means over each 20 episodes, with half-widths, as text."""
    episodes = read_run(folder)["episodes"]
    # A diverged DQN has no loss either.
    untrained = bool(episodes["q_loss"].isna().all() and not episodes["diverged"].any())
    lines = [
        "| episodes | rounds | communication cost | goal reached | episode reward |",
        "|---|---|---|---|---|",
    ]
    for start in range(0, len(episodes), WINDOW):
        part = episodes[start : start + WINDOW]
        lines.append(
            f"| {span(part['episode'])} "
            f"| {_mean(part['rounds'], 1)} | {_mean(part['communication_cost'], 2)} "
            f"| {part['goal_reached'].mean():.0%} | {_mean(part['episode_reward'], 1)} |"
        )
    lines += [
        f"{cli.counted(len(episodes), 'episode')} on {episodes['dataset'].iloc[0]} in "
        f"{episodes['seconds'].sum() / 60:.1f} min: {sum(episodes['goal_reached'] == 0)} missed "
        f"the goal (counted with {episodes['max_rounds'].iloc[0]} rounds), "
        f"{episodes['diverged'].sum()} diverged",
        *["the DQN was never trained: it waits for REPLAY_SAMPLE transitions"] * untrained,
        f"\N{PLUS-MINUS SIGN}: half-width of the 95 % interval, from {MIN_EPISODES} episodes on",
        f"results and figures: {folder}",
    ]
    return "\n".join(lines)


def _mean(values: pd.Series, digits: int) -> str:
    text = f"{values.mean():.{digits}f}"
    if len(values) < MIN_EPISODES:
        return text
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{text} \N{PLUS-MINUS SIGN} {half:.{digits}f}"


def moving_average(values: pd.Series) -> pd.Series:
    """Return the mean of the last 20 values at each, NaN before; of all so far if fewer in all."""
    return values.rolling(WINDOW, min_periods=WINDOW if len(values) >= WINDOW else 1).mean()


def published_levels(tables: Tables) -> dict[str, float]:
    """Return the rounds and cost that the published reductions of the first 10 episodes give.

    Empty if the tables contradict the public code's world, or these episodes are not random:
    epsilon is below 0.8, or a choice is repeated.
    """
    first, rounds, shards = tables["episodes"][:10], tables["rounds"], tables["shards"]
    chosen_by = rounds.loc[rounds["episode"].isin(first["episode"]), "chosen_by"]
    at_random = first["epsilon"].min() >= 0.8 and "repeated" not in set(chosen_by)
    world = {
        "DATASET": first["dataset"].iloc[0],
        "GOAL_ACCURACY": first["goal_accuracy"].iloc[0],
        "MAX_ROUNDS": first["max_rounds"].iloc[0],
        "NUM_NODES": shards["node"].nunique(),
    }
    main_class = round(PUBLISHED_WORLD["HETEROGENEITY"] * PUBLISHED_WORLD["SAMPLES_PER_NODE"])
    as_published = world.items() <= PUBLISHED_WORLD.items()
    as_published &= bool((shards.groupby("node")["images"].max() == main_class).all())
    if not as_published or not at_random or len(first) < 10:
        return {}
    return {column: first[column].mean() * (1 - share) for column, share in PUBLISHED.items()}


# --- Figures of a run ------------------------------------------------------------------------

# Axis labels of the quantities of episodes, here and in experiments.
LABELS = {
    "episode_reward": "episode reward\n(sum over the rounds)",
    "rounds": "rounds to the goal\n(or the limit)",
    "communication_cost": "communication cost\n(sum of distances)",
    "goal_reached": "goal reached\n(share of episodes)",
}
_CURVES = ("episode_reward", "rounds", "communication_cost")


def draw_run(folder: Path, format_: str = "png") -> None:
    """Draw all figures of a run into its folder, in one of FORMATS; raises as ``read_run``."""
    tables = read_run(folder)
    for draw in (draw_learning, draw_accuracy, draw_data):
        name = draw.__name__.removeprefix("draw_")
        save_figure(folder / f"{name}.{format_}", draw(tables))


def _draw_curves(draw: Callable[[Axes, str], None]) -> Figure:
    """Draw each quantity of ``_CURVES`` over the episodes, in a panel of its own."""
    figure, axes = panels(5.2, len(_CURVES), 1, sharex=True)
    for axis, column in zip(axes, _CURVES, strict=True):
        draw(axis, column)
        axis.set_ylabel(LABELS[column])
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("episode")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_learning(tables: Tables) -> Figure:
    """Draw reward, rounds and communication cost over the episodes, with moving averages."""
    episodes, published = tables["episodes"], published_levels(tables)
    x, limit = episodes["episode"], episodes["max_rounds"].iloc[0]
    reached = episodes["goal_reached"] == 1

    def draw(axis: Axes, column: str) -> None:
        y = episodes[column]
        axis.plot(x[reached], y[reached], "o", color=SKY, mew=0, label="goal reached")
        axis.plot(x[~reached], y[~reached], "x", color=RED, label="goal missed")
        label = f"mean of the last {WINDOW} episodes"
        axis.plot(x, moving_average(y), color=BLACK, label=label)
        if column == "rounds":
            axis.axhline(limit, color=GREY, lw=0.8, ls=":")
            label_at_right(axis, limit, f"limit: {limit}")
        if column in published:
            axis.axhline(published[column], color=BLACK, lw=0.8, ls="--", label="published")
            text = f"published: {PUBLISHED[column]:.1%}\nbelow the mean of\nepisodes 1 to 10"
            label_at_right(axis, published[column], text)

    figure = _draw_curves(draw)
    figure.axes[0].set_xlim(0, x.max() + 1)
    set_title(figure, episodes, "Training of the DQN")
    return figure


def draw_overlay(runs: dict[str, pd.DataFrame]) -> Figure:
    """Draw the moving averages of reward, rounds and cost; ``runs`` are the episodes by label."""

    def draw(axis: Axes, column: str) -> None:
        for (label, table), (color, line) in zip(runs.items(), cycle(LINE_STYLES)):
            y = moving_average(table[column])
            axis.plot(table["episode"], y, line, color=color, label=label)

    figure = _draw_curves(draw)
    # Rewards by `power` and `progress` do not compare.
    figure.axes[0].set_ylabel("episode reward\n(sum over the rounds,\neach by its REWARD)")
    set_title(figure, pd.concat(runs.values()), f"Training, mean of the last {WINDOW} episodes")
    return figure


def _first_and_last(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    """Return the rounds of the first and of the last episodes, without overlap, with titles."""
    rounds, episodes = tables["rounds"], tables["episodes"]["episode"]
    count = min(WINDOW, len(episodes) // 2)
    parts = []
    for chosen in (episodes[:count], episodes[-count:]) if count else (episodes,):
        title = f"episode{'s' * (len(chosen) > 1)} {span(chosen)}"
        parts.append((title, rounds[rounds["episode"].isin(chosen)]))
    return parts


def draw_accuracy(tables: Tables) -> Figure:
    """Draw accuracy over the rounds of the first and last episodes; ended ones keep their last."""
    parts = _first_and_last(tables)
    figure, axes = panels(2.8, 1, len(parts), sharex=True, sharey=True)
    goal = tables["episodes"]["goal_accuracy"].iloc[0]
    limit = tables["episodes"]["max_rounds"].iloc[0]
    for axis, (title, rounds) in zip(axes, parts, strict=True):
        wide = rounds.pivot(index="round", columns="episode", values="accuracy")
        wide = wide.reindex(range(1, limit + 1))
        axis.plot(wide.index, wide, color=SKY, lw=0.6, alpha=0.7)
        # Without the ended episodes, only the slow ones would count in the later rounds.
        axis.plot(wide.index, wide.ffill().mean(axis=1), color=BLACK, lw=2, label="mean")
        axis.plot([], [], color=SKY, lw=0.6, label="one episode")
        axis.axhline(goal, color=BLACK, lw=0.8, ls="--")
        axis.set(title=title, xlabel="round", xlim=(1, max(limit, 2)), ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_at_right(axes[-1], goal, f"goal: {goal:g}")
    axes[0].set_ylabel("test accuracy (fraction)")
    axes[-1].legend(loc="lower right")
    set_title(figure, tables["episodes"], "Accuracy by round, ended episodes keep their last")
    return figure


def _heatmap(axis: Axes, values: np.ndarray, top: float, digits: int) -> AxesImage:
    """Draw a matrix in greys from 0 to ``top``; numbers in its cells where they fit."""
    image = axis.imshow(values, cmap="Greys", vmin=0, vmax=top, aspect="auto")
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    if max(values.shape) <= 10 and len(_cell_text(top, digits)) <= 4:
        for (row, column), value in np.ndenumerate(values):
            color, text = "white" if value > 0.6 * top else "black", _cell_text(value, digits)
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    return image


def _cell_text(value: float, digits: int) -> str:
    """Return a number below 1 as ".12"; nothing if it rounds to 0."""
    text = f"{value:.{digits}f}".removeprefix("0")
    return text if text.strip(".0") else ""


def draw_data(tables: Tables) -> Figure:
    """Draw how many images of which class each node holds, beside the nodes' distances."""
    shards = tables["shards"].astype({"node": int})
    images = shards.pivot(index="node", columns="class", values="images").to_numpy()
    pairs = tables["distances"][["node", "other_node"]].to_numpy(dtype=int)
    distances = np.zeros((len(images), len(images)))
    distances[pairs[:, 0], pairs[:, 1]] = tables["distances"]["distance"]
    distances += distances.T
    figure, (left, right) = panels(3.2, 1, 2)
    image = _heatmap(left, images, images.max(), 0)
    left.set(xlabel="class", ylabel="node")
    figure.colorbar(image, ax=left, label="training images", aspect=30, pad=0.02)
    top = float(np.max(distances)) or 1.0
    image = _heatmap(right, distances, top, 3 if top < 1 else 1)
    right.set(xlabel="node", ylabel="node")
    figure.colorbar(image, ax=right, label="communication distance (no unit)", aspect=30, pad=0.02)
    set_title(figure, tables["episodes"], "Shards and distances")
    return figure


def parent_of(folders: list[Path]) -> Path:
    """Return the deepest folder that all of them lie in."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _draw_all(folders: list[Path], format_: str) -> int:
    runs = {folder.resolve(): read_run(folder)["episodes"] for folder in folders}
    for folder in folders:
        draw_run(folder, format_)
        print(summary(folder))
    if len(runs) > 1:
        parent = parent_of(folders)
        path = parent / f"overlay.{format_}"
        save_figure(path, draw_overlay({str(f.relative_to(parent)): runs[f] for f in runs}))
        print(f"overlay of {len(runs)} runs: {path}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Draw the runs of a command line; return 0, 2 if one is no run, 1 if a write fails."""
    examples = (
        "  python3 plot.py results/mnist-seed0     # one run, into its folder\n"
        "  python3 plot.py results/A results/B     # and an overlay of both: results/overlay.png"
    )
    parser = cli.Parser("plot.py", "Draw the figures of runs from their CSVs.", examples)
    return draw_folders(parser, arguments, _draw_all)


def draw_folders(
    parser: cli.Parser, arguments: list[str] | None, draw: Callable[[list[Path], str], int]
) -> int:
    """Draw the folders of a command line in the format that it names; return the exit status."""
    parser.usage = f"{parser.prog} [options] folder ..."
    parser.add_argument("folder", nargs="+", type=Path, help="results to draw, e.g. results/<name>")
    help_ = "of the figures [png]"
    parser.add_argument("--format", choices=list(FORMATS), default="png", help=help_)
    parsed = parser.parse_args(arguments)
    return cli.exit_status(parser.prog, lambda: draw(parsed.folder, parsed.format))


if __name__ == "__main__":
    sys.exit(main())

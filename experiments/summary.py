"""The results of several comparisons: a table per task, and one figure.

Usage: ``python3 -m experiments.summary <figure>.png results/<comparison> [...]``

A task is a dataset with a number of nodes. Comparisons of the same task share a table; a method
that several of them have is taken from the first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import cli
import plot
import records
from experiments import estimates, figures

# By heading: the quantity, and the format of its numbers.
COLUMNS: figures.Columns = {
    "rounds": ("rounds", "{:.1f}"),
    "rounds against random": ("rounds_reduction", "{:+.1%}"),
    "cost against random": ("communication_cost_reduction", "{:+.1%}"),
    "goal reached": ("goal_reached", "{:.0%}"),
}
_MOST_CHANGE = 60.0  # percent; larger changes are written as text


def read_task(folder: Path) -> tuple[str, pd.DataFrame]:
    """Return a comparison's task, such as ``mnist, 10 nodes``, and its estimates and changes.

    Raises as ``estimates.read_comparison``.
    """
    tables = estimates.read_comparison(folder)
    path = folder / "estimates.csv"
    tables["estimates"] = records.read_table(path, estimates.ESTIMATE_COLUMNS)
    means = tables["estimates"][tables["estimates"]["quantity"].isin(("rounds", "goal_reached"))]
    rows = pd.concat([means.assign(mark=""), figures.marked_changes(tables)])
    name = (
        f"{tables['config']['dataset']['name']}, {tables['config']['settings']['NUM_NODES']} nodes"
    )
    return name, rows[rows["variant"] == ""]


def read_tasks(folders: list[Path]) -> dict[str, pd.DataFrame]:
    """Return the rows of each task, methods by their rounds."""
    tasks: dict[str, pd.DataFrame] = {}
    for name, rows in map(read_task, folders):
        known = tasks.get(name, rows.head(0))
        tasks[name] = pd.concat([known, rows[~rows["method"].isin(known["method"])]])
    for name, rows in tasks.items():
        rounds = rows[rows["quantity"] == "rounds"].set_index("method")["mean"]
        tasks[name] = rows.sort_values("method", key=lambda m: m.map(rounds), kind="stable")
    return tasks


def draw(tasks: dict[str, pd.DataFrame]) -> Figure:
    """Draw the change of rounds and cost against random, methods by rows, tasks by columns.

    The mark of a cost that is saved while the goal is missed more often is open.
    """
    methods = list(dict.fromkeys(m for rows in tasks.values() for m in rows["method"]))
    methods.remove("random")
    height = 0.24 * len(methods) + 1.2
    figure, axes = plot.panels(height, 1, len(tasks), sharex=True, sharey=True)
    figure.suptitle("Change against random, mean with 95 % interval")
    for axis, (name, rows) in zip(axes, tasks.items(), strict=True):
        found = rows.set_index(["quantity", "method"])
        axis.axvline(0, color=plot.BLACK, lw=1)
        axis.set(title=name, xlabel="change, %", xlim=(-105, _MOST_CHANGE + 5))
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        for shift, marker, color, column in (
            (-0.15, "o", plot.BLUE, "rounds"),
            (0.15, "s", plot.ORANGE, "communication_cost"),
        ):
            label = column.replace("_", " ")
            if name.startswith("mnist, 10 "):
                published = -100 * plot.PUBLISHED[column]
                axis.axvline(published, color=color, lw=1, ls=":", label=f"{label}, published")
            for row in found.loc[f"{column}_reduction"].itertuples():
                mean, *ends = (100 * end for end in (row.mean, row.low, row.high))
                y = methods.index(row.Index) + shift
                if mean > _MOST_CHANGE:
                    text = f"{mean:+.0f} % \N{RIGHTWARDS ARROW}"
                    axis.text(_MOST_CHANGE, y, text, ha="right", va="center", size=7, color=color)
                    continue
                bars = None if np.isnan(ends).any() else np.abs(np.subtract(ends, mean))[:, None]
                style: Any = {"color": color, "mfc": "white" if row.mark else color, "label": label}
                axis.errorbar(mean, y, xerr=bars, fmt=marker, ms=4, capsize=2, **style)
        goal = found.loc["goal_reached", "mean"]
        plot.label_at_right(axis, -0.8, "goal reached", x=0.9)
        for method in goal.index.intersection(methods):
            plot.label_at_right(axis, methods.index(method), f"{100 * goal[method]:.0f} %")
    figures.add_legend(figure)
    return figure


def report(tasks: dict[str, pd.DataFrame]) -> str:
    """Return a Markdown table for each task."""
    tables = ((name, figures.markdown(rows, "", COLUMNS)) for name, rows in tasks.items())
    return "\n\n".join("\n".join([f"{name}:", "", *lines]) for name, lines in tables)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and draw the figure of a command line; return the exit status."""
    parser = cli.Parser("experiments.summary", "Summarise comparisons: a table per task, a figure.")
    parser.usage = "experiments.summary figure folder ..."
    parser.add_argument("figure", type=Path, help="file to write; .png, .pdf or .svg")
    parser.add_argument("folder", nargs="+", type=Path, help="a comparison with random")
    parsed = parser.parse_args(arguments)
    if parsed.figure.suffix[1:] not in plot.FORMATS:
        parser.error(f"figure: got {str(parsed.figure)!r}, takes a name with .png, .pdf or .svg")

    def summarise() -> int:
        tasks = read_tasks(parsed.folder)
        print(report(tasks))
        plot.save_figure(parsed.figure, draw(tasks))
        return 0

    return cli.exit_status(parser.prog, summarise)


if __name__ == "__main__":
    sys.exit(main())

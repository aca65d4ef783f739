"""Figures and report of a comparison, from its tables alone.

Usage: ``python3 -m experiments.figures results/<comparison> [...]``
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import cli
import plot
import records
from config import Settings, WorldSettings
from experiments import estimates
from experiments.tables import read_comparison
from plot import BLACK, BLUE, GREY, PUBLISHED, PUBLISHED_WORLD

# What read_comparison returns, "estimates", and what prepare adds.
Tables = dict[str, Any]

_MAX_LINES = 8  # in one panel
# A colour per node, repeated from node 10 on; light (Paul Tol), so that black numbers can be read.
_NODE_COLORS = (
    *("#99DDFF", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB"),
    *("#77AADD", "#AAAA00", "#DDDDDD", "#BBCC33", "#FFFFFF"),
)
_MAX_CHANGE = 0.6  # larger changes are written as text
_MAX_COST = 3.0  # times random's; larger costs are written as text

_PAPER = "paper (MNIST)"  # its row, and the task where it belongs
_PAPER_TASK = f"{PUBLISHED_WORLD['DATASET']}, {PUBLISHED_WORLD['NUM_NODES']} nodes"


def draw_comparison(folder: Path, format_: str = "png") -> Tables:
    """Estimate a comparison, write ``estimates.csv``, and draw its figures in one of plot.FORMATS.

    Returns its tables; raises as ``read_comparison``.
    """
    tables = read_comparison(folder)
    tables["estimates"] = estimates.estimate(tables)
    records.write_table(folder / "estimates.csv", tables["estimates"])
    prepare(tables)
    varies, tasks = bool(tables["config"]["parameter"]), by_task([tables])
    trained = tables["training"]["label"].nunique()
    for name, draw, wanted in (
        ("variants", lambda: draw_rows(tables), varies),
        ("methods", lambda: draw_rows(tables), not varies),
        ("walks", lambda: draw_walks(tables), not varies),
        ("headline", lambda: draw_changes(tasks), bool(tasks)),
        ("training", lambda: draw_training(tables), 0 < trained <= _MAX_LINES),
    ):
        path = folder / f"{name}.{format_}"
        if wanted:
            plot.save_figure(path, draw())
        elif name == "training":
            path.unlink(missing_ok=True)  # drawn when there were fewer lines
    return tables


def prepare(tables: Tables) -> None:
    """Add what the figures show: to all tables a column ``label``, and more to the estimates.

    A label is the varied value, the method, or both. ``learned`` says whether it was
    trained, here or before. Reductions become changes: 25 % more rounds are +0.25. ``mark`` is "*"
    at a cost saved while the goal is missed more often than by random, else "".
    """
    jobs, table = tables["jobs"], tables["estimates"]
    by_variant = tables["config"]["parameter"] and jobs["method"].nunique() == 1
    learned = set(jobs.loc[jobs["agent"] != "", "method"]) | set(tables["training"]["method"])
    reduced = table["quantity"].str.endswith("_reduction")
    saved = (table["quantity"] == "communication_cost_reduction") & (table["mean"] > 0)
    misses = [
        row.saved and estimates.misses_more_often(tables["episodes"], row.variant, row.method)
        for row in table.assign(saved=saved).itertuples()
    ]
    tables["estimates"] = table.assign(
        mean=table["mean"].where(~reduced, 0.0 - table["mean"]),
        low=table["low"].where(~reduced, 0.0 - table["high"]),
        high=table["high"].where(~reduced, 0.0 - table["low"]),
        mark=np.where(misses, "*", ""),
        learned=table["method"].isin(learned),
    )
    for name in ("jobs", "episodes", "rounds", "training", "estimates"):
        both = (tables[name]["variant"] + " " + tables[name]["method"]).str.strip()
        tables[name] = tables[name].assign(label=tables[name]["variant"] if by_variant else both)


def _rows(table: pd.DataFrame, quantity: str, index: str = "label") -> pd.DataFrame:
    """Return the estimates of a quantity, by label or another column."""
    return table[table["quantity"] == quantity].set_index(index)


def _counted(counts: pd.Series, noun: str) -> str:
    """Return a number or a range of numbers with its noun: 1 seed, 5 to 10 seeds."""
    return f"{plot.span(counts.sort_values())} {noun}{'s' if counts.max() > 1 else ''}"


def _size(rows: pd.DataFrame) -> tuple[str, str]:
    """Return what the estimates rest on: "5 to 10 seeds" and "x 20 episodes"."""
    episodes = _counted(rows["episodes"] // rows["seeds"], "episode")
    return _counted(rows["seeds"], "seed"), f"x {episodes}"


def _mean_of(rows: pd.DataFrame) -> str:
    """Return what is drawn: means, with intervals if there are several seeds."""
    return "mean" + " with 95 % interval" * bool(rows["low"].notna().any())


def _add_legend(figure: Figure) -> None:
    """Add a legend below the figure, in rows of equal length: each label once, as first drawn."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    rows = -(-len(handles) // 4)
    columns = -(-len(handles) // rows)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _add_marks(
    axis: Axes,
    table: pd.DataFrame,
    quantity: str,
    labels: list[str],
    most: float = np.inf,
    form: str = "{:.1f}",
) -> None:
    """Mark each label's mean with its interval, or write the mean if it is above ``most``."""
    goal = _rows(table, "goal_reached")["mean"]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    kinds = {}  # of marks, with their marker, edge and face: for the legend
    for row in table[table["quantity"] == quantity].itertuples():
        y, mean = labels.index(row.label), row.mean
        if mean > most:
            # The axis label has the unit.
            text = form.format(mean).removesuffix("%") + " \N{RIGHTWARDS ARROW}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            right = axis.get_yaxis_transform()
            axis.text(0.98, y, text, ha="right", va="center", size=7, bbox=box, transform=right)
            continue
        marker, color = ("o", BLUE) if row.learned else ("s", BLACK)
        kinds["learned" if row.learned else "not learned"] = marker, color, color
        if row.mark:
            kinds["open: saved while the goal is missed more often"] = marker, color, "white"
        if goal[row.label] < 0.5:
            color = "0.65"
            kinds["grey: goal reached in less than 50 % of the episodes"] = marker, color, color
        style: Any = {"fmt": marker, "color": color, "ms": 4, "capsize": 2, "elinewidth": 1}
        bars = [[mean - row.low], [row.high - mean]]  # NaN, which draws none, with one seed
        axis.errorbar([mean], [y], xerr=bars, mfc="white" if row.mark else color, **style)
    for kind, (marker, edge, face) in kinds.items():
        axis.plot([], [], marker, color=edge, mfc=face, ms=4, label=kind)


def draw_changes(tasks: dict[str, pd.DataFrame]) -> Figure:
    """Draw the changes of rounds and cost against random, of the tasks that ``by_task`` returns.

    A method is a row; rows are sorted by the rounds in the first task that has the method. A task
    has two panels, and beside them the share of episodes that reach the goal. The paper's values
    are in the task that the paper has. An open mark is a cost with a ``mark``.
    """
    every = pd.concat(tasks.values())
    changed = every[every["quantity"] == "rounds_reduction"]
    places = {"random": 0.0, **changed.groupby("label", sort=False)["mean"].first()}
    if _PAPER_TASK in tasks:
        places[_PAPER] = -PUBLISHED["rounds"]
    labels = sorted(places, key=lambda label: places[label])
    figure, axes = plot.panels(0.2 * len(labels) + 1.8, 1, 2 * len(tasks), sharex=True, sharey=True)
    panels = itertools.product(tasks.items(), PUBLISHED.items())
    for axis, ((name, rows), (column, share)) in zip(axes, panels, strict=True):
        axis.axvline(0, color=BLACK, lw=1, label="random")
        _add_marks(axis, rows, f"{column}_reduction", labels, _MAX_CHANGE, "{:+.0%}")
        if name == _PAPER_TASK:
            style: Any = {"ms": 5, "mfc": "white", "mec": plot.RED, "mew": 1.2}
            axis.plot(-share, labels.index(_PAPER), "D", label="published", **style)
        axis.set_xlabel(f"{column.removeprefix('communication_')} (%)")
        axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        if column == "rounds":
            dataset, nodes, *others = name.split(", ")
            size = _size(rows[rows["quantity"] == "rounds_reduction"])
            title = "\n".join([f"{plot.data_name(dataset)}, {nodes}", *others, *size])
            axis.set_title(title, loc="left")
            continue
        goal = _rows(rows, "goal_reached")["mean"]
        axis.annotate(
            "goal\nreached",
            xy=(1.03, 0),
            xycoords="axes fraction",
            xytext=(0, -12),
            textcoords="offset points",
            va="top",
            fontsize=7,
        )
        for label, mean in goal[goal.index.isin(labels)].items():
            plot.label_at_right(axis, labels.index(label), f"{round(100 * mean, 1):g} %", x=1.03)
    _add_legend(figure)
    figure.suptitle(f"Change of rounds and communication cost against random, {_mean_of(changed)}")
    return figure


def draw_rows(tables: Tables) -> Figure:
    """Draw rounds, cost and success, a row per label: a point per seed, mean and interval."""
    table, config, episodes = tables["estimates"], tables["config"], tables["episodes"]
    labels = list(_rows(table, "rounds")["mean"].sort_values(kind="stable").index)
    figure, axes = plot.panels(0.22 * len(labels) + 1.15, 1, 3, sharey=True)
    limit, *others = episodes["max_rounds"].unique()
    if not others:
        axes[0].axvline(limit, color=BLACK, lw=0.8, ls=":", label=f"limit, {limit} rounds")
    for axis, column in zip(axes, estimates.QUANTITIES, strict=True):
        rows, most = _rows(table, column), np.inf
        if "random" in labels:
            random = rows.loc["random", "mean"]
            axis.axvline(random, color=GREY, lw=1, ls="--", label="random")
            most = _MAX_COST * random if column == "communication_cost" else np.inf
        _add_marks(axis, table, column, labels, most)
        if table["seeds"].max() > 1:
            seeds = episodes.groupby(["label", "seed"])[column].mean().reset_index()
            seeds = seeds[seeds["label"].map(rows["mean"]) <= most]
            y = seeds["label"].map(labels.index) + 0.33
            axis.plot(seeds[column], y, ".", ms=3, color="0.55", label="one seed")
        right = axis.dataLim.x1 or 1.0
        axis.set(xlabel=plot.LABELS[column], xlim=(-0.05 * right, 1.05 * right))
    axes[0].set_ylabel(config["parameter"])
    _add_legend(figure)
    rows = table[table["quantity"] == "rounds"]
    plot.set_title(figure, episodes, "Rounds, cost and goal", " ".join(_size(rows)), _mean_of(rows))
    return figure


def typical_episode(episodes: pd.DataFrame, label: str) -> pd.Series:
    """Return the first row of the lowest seed whose rounds are closest to the label's mean."""
    rows = episodes[episodes["label"] == label]
    of_seed = rows[rows["seed"] == rows["seed"].min()].sort_values("episode")
    return of_seed.loc[(of_seed["rounds"] - rows["rounds"].mean()).abs().idxmin()]


def draw_walks(tables: Tables) -> Figure:
    """Draw a test episode of random and of each learned method, or else of the first method.

    Of several nodes in a round it shows the first, which transfers the model.
    """
    episodes, rounds = tables["episodes"], tables["rounds"]
    names = list(episodes["label"].unique())
    learned = tables["estimates"].query("learned")["label"].unique()
    chosen = [name for name in ("random", *learned) if name in names] or names[:1]
    chosen = chosen[:9]  # more panels are too many
    limit, goal = episodes["max_rounds"].iloc[0], episodes["goal_accuracy"].iloc[0]
    figure, axes = plot.panels(1.05 * len(chosen) + 0.6, len(chosen), 1, sharex=True, sharey=True)
    for axis, name in zip(axes, chosen, strict=True):
        episode = typical_episode(episodes, name)
        key = ["label", "seed", "episode"]
        walk = rounds[(rounds[key] == episode[key]).all(axis=1)].sort_values("round")
        nodes = walk["node"].str.split("+").str[0].astype(int)
        colors = [_NODE_COLORS[node % len(_NODE_COLORS)] for node in nodes]
        cells = axis.bar(walk["round"], 0.28, 0.92, 1.1, color=colors, ec=GREY, lw=0.4)
        axis.bar_label(cells, nodes, label_type="center", fontsize=7)
        axis.plot(walk["round"], walk["accuracy"], color=BLACK, marker="o", ms=2, lw=1)
        axis.axhline(goal, color=GREY, lw=0.8, ls=":")
        if episode["goal_reached"]:
            end = walk[["round", "accuracy"]].iloc[-1]
            axis.plot(*end, "*", ms=10, color=plot.ORANGE, mec=BLACK, mew=0.6, zorder=3)
        goal_reached = "reached" if episode["goal_reached"] else "missed"
        axis.set_title(
            f"{name}: goal {goal_reached} after {cli.counted(episode['rounds'], 'round')}, "
            f"communication cost {episode['communication_cost']:.2f} "
            f"(seed {episode['seed']}, test episode {episode['episode']})",
            loc="left",
        )
        axis.set(ylabel="accuracy", xlim=(0.4, limit + 0.6), ylim=(0, 1.4))
        axis.spines["left"].set_bounds(0, 1)
        axis.set_yticks([0, goal], ["0", f"{goal:g}"])
        axis.grid(False)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    plot.set_title(figure, episodes, "Node that trains in each round, and the accuracy after it")
    return figure


def draw_training(tables: Tables) -> Figure:
    """Draw reward, rounds and cost over the trainings, means of all seeds, a line per label."""
    lines = {}
    for label, rows in tables["training"].groupby("label", sort=False):
        mean = rows.groupby(["dataset", "episode"], as_index=False).mean(numeric_only=True)
        lines[f"{label}, {cli.counted(rows['seed'].nunique(), 'seed')}"] = mean
    return plot.draw_overlay(lines)


# By heading of a column: the quantity, and the format of its numbers.
Columns = dict[str, tuple[str, str]]

_SUMMARY: Columns = {
    "rounds": ("rounds", "{:.1f}"),
    "rounds against random": ("rounds_reduction", "{:+.1%}"),
    "cost against random": ("communication_cost_reduction", "{:+.1%}"),
    "goal reached": ("goal_reached", "{:.1%}"),
}
_REPORT: Columns = {
    **_SUMMARY,
    "communication cost": ("communication_cost", "{:.3f}"),
    "rounds paid back": ("rounds_break_even", "{:.0f}"),
    "cost paid back": ("communication_cost_break_even", "{:.0f}"),
}


def report(folder: Path, tables: Tables) -> str:
    """Return what a comparison's estimates and jobs say: a Markdown table and notes on it."""
    table, jobs = tables["estimates"], tables["jobs"]
    failed = jobs[jobs["error"] != ""]
    counts = [f"{sum(jobs['state'] == name)} {name}" for name in ("finished", "waiting", "failed")]
    diverged, in_training = (tables[name]["diverged"].sum() for name in ("episodes", "training"))
    lines = [
        *_markdown(table, tables["config"]["parameter"], _REPORT),
        "",
        f"Means over all {tables['config']['episodes']} episodes; 95 % intervals in brackets, none "
        "with one seed. An episode that misses the goal counts with the limit of rounds. Changes "
        "use only the seeds that the method and random share.",
    ]
    if table["low"].notna().any() and table["seeds"].max() < 5:
        lines.append("With so few seeds the intervals are too narrow if the seeds differ.")
    if table["mark"].any():
        lines.append("\\*: saved while the goal is reached less often than by random.")
    if table["quantity"].str.endswith("_break_even").any():
        lines.append("Paid back: foundation models to train until the training is paid back.")
    lines += [
        f"Jobs: {len(jobs)}, {', '.join(counts)}. Diverged episodes: {diverged} in tests, "
        f"{in_training} in training.",
        *(failed["label"] + " seed " + failed["seed"].astype(str) + ": " + failed["error"]),
        "",
        f"results and figures: {folder}",
    ]
    return "\n".join(lines)


def _markdown(table: pd.DataFrame, varied: str, columns: Columns) -> list[str]:
    """Return a Markdown table of estimates with their intervals, a row per variant and method.

    ``varied`` is the heading of the variants. Columns without an estimate are left out.
    """
    columns = {k: c for k, c in columns.items() if c[0] in set(table["quantity"])}
    # Where one method is varied, its name says nothing.
    named = not (varied and table["method"].nunique() == 1)
    heads = [*[varied] * bool(varied), *["method"] * named, "seeds x episodes", *columns]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    forms = dict(columns.values())
    chosen = table[table["quantity"].isin(forms)]
    for (variant, method), rows in chosen.groupby(["variant", "method"], sort=False):
        cells = dict.fromkeys(forms, "")
        for row in rows.itertuples():
            numbers = [row.mean] if np.isnan(row.low) else [row.mean, row.low, row.high]
            mean, *ends = (forms[row.quantity].format(x).replace("%", " %") for x in numbers)
            interval = f" [{', '.join(ends)}]" if ends else ""
            cells[row.quantity] = mean + row.mark + interval
        seeds, episodes = rows[["seeds", "episodes"]].iloc[0]  # of the mean rounds
        size = f"{seeds} x {episodes // seeds}"
        texts = [*[variant] * bool(varied), *[method] * named, size, *cells.values()]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


# --- Several comparisons ---------------------------------------------------------------------


def by_task(comparisons: list[Tables]) -> dict[str, pd.DataFrame]:
    """Return the prepared estimates by task, such as "mnist, 10 nodes", methods by their rounds.

    A task's name also has the world's settings that are not the dataset's defaults (on MNIST: the
    public code's), and says if episodes are validation episodes. A method that several comparisons
    of a task have is taken from the first of them. Those that vary something, or compare nothing
    with random, are left out.
    """
    tasks: dict[str, pd.DataFrame] = {}
    for tables in comparisons:
        config, rows = tables["config"], tables["estimates"]
        if not config["parameter"] and (rows["quantity"] == "rounds_reduction").any():
            name = _task(config)
            known = tasks.get(name, rows.head(0))
            tasks[name] = pd.concat([known, rows[~rows["method"].isin(known["method"])]])
    for name, rows in tasks.items():
        rounds = _rows(rows, "rounds", "method")["mean"]
        tasks[name] = rows.sort_values("method", key=lambda m: m.map(rounds), kind="stable")
    return tasks


def _task(config: dict[str, Any]) -> str:
    """Return the name of a comparison's task, see ``by_task``."""
    dataset, used = config["dataset"]["name"], config["settings"]
    usual = Settings(DATASET=dataset).model_dump()
    if dataset == PUBLISHED_WORLD["DATASET"]:
        usual |= PUBLISHED_WORLD
    parts = [dataset, f"{used['NUM_NODES']} nodes"]
    for name in WorldSettings.model_fields:
        value = used.get(name, usual[name])
        if name not in ("DATASET", "NUM_NODES") and value != usual[name]:
            parts.append(f"{name}={value}")
    if config["episodes"] != "test":
        parts.append(f"{config['episodes']} episodes")
    return ", ".join(parts)


def summary(tasks: dict[str, pd.DataFrame]) -> str:
    """Return a Markdown table for each task."""
    tables = (f"{name}:\n\n" + "\n".join(_markdown(r, "", _SUMMARY)) for name, r in tasks.items())
    return "\n\n".join(tables)


def _draw_all(folders: list[Path], format_: str) -> int:
    drawn = []
    for folder in folders:
        drawn.append(draw_comparison(folder, format_))
        print(report(folder, drawn[-1]))
    tasks = by_task(drawn)
    if len(folders) > 1 and tasks:
        path = plot.parent_of(folders) / f"summary.{format_}"
        plot.save_figure(path, draw_changes(tasks))
        print(f"\n{summary(tasks)}\n\nsummary: {path}")
    return int(any((tables["jobs"]["error"] != "").any() for tables in drawn))


def main(arguments: list[str] | None = None) -> int:
    """Draw the comparisons of a command line; return the exit status, 1 if a job has failed."""
    parser = cli.Parser(
        "experiments.figures",
        "Draw the figures of comparisons again, from their CSVs, and print their reports.",
        "  python3 -m experiments.figures results/paper-mnist\n"
        "  python3 -m experiments.figures results/A results/B  # and results/summary.png",
    )
    return plot.draw_folders(parser, arguments, _draw_all)


if __name__ == "__main__":
    sys.exit(main())

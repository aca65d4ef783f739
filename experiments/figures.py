"""Figures and report of a comparison, from its tables alone.

Usage: ``python3 -m experiments.figures results/<comparison> [...]``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

import cli
import plot
import records
from experiments import estimates
from plot import BLACK, BLUE, GREY, PUBLISHED

# What estimates.read_comparison returns, "estimates", and in all tables the column "label".
Tables = dict[str, Any]

_MOST_LINES = 8  # in one panel
_MOST_CHANGE = 60.0  # percent; larger changes are written as text
_MOST_COST = 3.0  # times random's; larger costs are written as text

_AXES = {
    "rounds": "rounds to the goal\n(or the limit)",
    "communication_cost": "communication cost\n(sum of distances)",
    "goal_reached": "goal reached\n(share of episodes)",
}

# A colour per node, from the eleventh on again: Paul Tol's light ones, below black numbers.
_NODE_COLORS = (
    *("#99DDFF", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB"),
    *("#77AADD", "#AAAA00", "#DDDDDD", "#BBCC33", "#FFFFFF"),
)


def draw_comparison(folder: Path, format_: str = "png") -> Tables:
    """Estimate a comparison, write ``estimates.csv``, and draw its figures in one of plot.FORMATS.

    Returns its tables; raises as ``estimates.read_comparison``.
    """
    tables = estimates.read_comparison(folder)
    tables["estimates"] = estimates.estimate(tables)
    records.write_table(folder / "estimates.csv", tables["estimates"])
    add_labels(tables)
    varies = bool(tables["config"]["parameter"])
    compared = _compares(tables)
    for name, draw, wanted in (
        ("variants", draw_rows, varies),
        ("methods", draw_rows, not varies),
        ("walks", draw_walks, not varies),
        ("headline", draw_headline, not varies and compared),
        ("training", draw_training, 0 < tables["training"]["label"].nunique() <= _MOST_LINES),
    ):
        if wanted:
            plot.save_figure(folder / f"{name}.{format_}", draw(tables))
    return tables


def add_labels(tables: Tables) -> None:
    """Add a column ``label`` to the tables: the varied value, the method, or both."""
    by_variant = tables["config"]["parameter"] and tables["jobs"]["method"].nunique() == 1
    for name in ("jobs", "episodes", "rounds", "training", "estimates"):
        table = tables[name]
        both = (table["variant"] + " " + table["method"]).str.strip()
        tables[name] = table.assign(label=table["variant"] if by_variant else both)


def _compares(tables: Tables) -> bool:
    """Return whether some method is compared with random."""
    return bool((tables["estimates"]["quantity"] == "rounds_reduction").any())


def _rows(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return the estimates of a quantity, by label."""
    return table[table["quantity"] == quantity].set_index("label")


def learned_labels(tables: Tables) -> list[str]:
    """Return the labels of DQNs, trained here or given."""
    jobs = tables["jobs"]
    learned = (jobs["agent"] != "") | jobs["label"].isin(tables["training"]["label"])
    return list(jobs.loc[learned, "label"].unique())


def _counted(counts: pd.Series, noun: str) -> str:
    """Return a number or a range of numbers with its noun: 1 seed, 5 to 10 seeds."""
    return f"{plot.span(counts.sort_values())} {noun}{'s' if counts.max() > 1 else ''}"


def _set_title(figure: Figure, tables: Tables, text: str, quantity: str = "rounds") -> None:
    """Set the figure's title, with the size of what the estimates of ``quantity`` rest on."""
    rows = _rows(tables["estimates"], quantity)
    seeds = _counted(rows["seeds"], "seed")
    episodes = _counted(rows["episodes"] // rows["seeds"], "episode")
    interval = "mean with 95 % interval" if rows["low"].notna().any() else "mean"
    plot.set_title(figure, tables["episodes"], text, f"{seeds} x {episodes}, {interval}")


def _add_legend(figure: Figure) -> None:
    """Add a legend below the figure, in rows of equal length: each panel's labels once."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        drawn, texts = axis.get_legend_handles_labels()
        handles |= dict(zip(texts, drawn, strict=True))
    rows = -(-len(handles) // 4)
    columns = -(-len(handles) // rows)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _bars(mean: float, low: float, high: float) -> np.ndarray | None:
    """Return an interval as the lengths that Matplotlib's error bars take; None without one."""
    return None if np.isnan([low, high]).any() else np.array([[mean - low], [high - mean]])


def _add_marks(
    axis: Axes,
    tables: Tables,
    rows: pd.DataFrame,
    labels: list[str],
    most: float = np.inf,
    form: str = "{:.1f}",
) -> None:
    """Mark each label's mean with its interval, or write the mean if it is above ``most``."""
    learned, goal = learned_labels(tables), _rows(tables["estimates"], "goal_reached")["mean"]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    for y, label in enumerate(labels):
        if label not in rows.index:
            continue
        mean, *ends = rows.loc[label, ["mean", "low", "high"]]
        if mean > most:
            text = form.format(mean) + " \N{RIGHTWARDS ARROW}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            right = axis.get_yaxis_transform()
            axis.text(0.99, y, text, ha="right", va="center", size=7, bbox=box, transform=right)
            continue
        kind, marker, color = "not learned", "s", BLACK
        if label in learned:
            kind, marker, color = "learned (DQN)", "o", BLUE
        if goal[label] < 0.5:
            kind, color = "grey: goal reached in less than 50 % of the episodes", "0.65"
        style: Any = {"fmt": marker, "color": color, "ms": 4, "capsize": 2, "elinewidth": 1}
        axis.errorbar([mean], [y], xerr=_bars(mean, *ends), label=kind, **style)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the reductions as changes: 25 % more rounds are +0.25, fewer are negative."""
    rows = table[table["quantity"].str.endswith("_reduction")]
    return rows.assign(mean=0.0 - rows["mean"], low=0.0 - rows["high"], high=0.0 - rows["low"])


def marked_changes(tables: Tables) -> pd.DataFrame:
    """Return ``changes``, with ``mark`` "*" at a cost saved while more episodes miss the goal."""
    change, episodes = changes(tables["estimates"]), tables["episodes"]
    cheaper = change.query("quantity == 'communication_cost_reduction' and mean < 0")
    keys = cheaper[["variant", "method"]].to_numpy()
    misses = [estimates.misses_more_often(episodes, *key) for key in keys]
    return change.assign(mark=np.where(change.index.isin(cheaper.index[misses]), "*", ""))


def draw_headline(tables: Tables) -> Figure:
    """Draw the change of rounds and of cost against random, beside what the paper reports."""
    change, paper = changes(tables["estimates"]), "paper (MNIST)"
    rounds = _rows(change, "rounds_reduction")["mean"]
    rounds = pd.concat([rounds, pd.Series({"random": 0.0, paper: -PUBLISHED["rounds"]})])
    labels = list(rounds.sort_values(kind="stable").index)
    figure, axes = plot.panels(0.2 * len(labels) + 1.15, 1, 2, sharex=True, sharey=True)
    for axis, (column, reduction) in zip(axes, PUBLISHED.items(), strict=True):
        axis.axvline(0, color=BLACK, lw=1)
        rows = 100 * _rows(change, f"{column}_reduction")[["mean", "low", "high"]]
        rows.loc["random"] = 0.0
        _add_marks(axis, tables, rows, labels, _MOST_CHANGE, "{:+.0f} %")
        place = -100 * reduction, labels.index(paper)
        axis.plot(*place, "D", ms=5, mfc="white", mec=plot.RED, mew=1.2, label="published")
        axis.set_xlabel(f"{column.replace('_', ' ')}, change in %")
    goal = _rows(tables["estimates"], "goal_reached")["mean"]
    texts = ["not stated" if name == paper else f"{100 * goal[name]:.0f} %" for name in labels]
    for y, text in enumerate(["goal reached", *texts], -1):
        plot.label_at_right(axes[1], y, text, x=1.03)
    _add_legend(figure)
    _set_title(figure, tables, "Change against random", "rounds_reduction")
    return figure


def draw_rows(tables: Tables) -> Figure:
    """Draw rounds, cost and success, a row per label: a point per seed, mean and interval."""
    table, config, episodes = tables["estimates"], tables["config"], tables["episodes"]
    labels = list(_rows(table, "rounds")["mean"].sort_values(kind="stable").index)
    figure, axes = plot.panels(0.22 * len(labels) + 1.15, 1, 3, sharey=True)
    limit = episodes["max_rounds"].max()
    axes[0].axvline(limit, color=BLACK, lw=0.8, ls=":", label=f"limit, {limit} rounds")
    for axis, (column, text) in zip(axes, _AXES.items(), strict=True):
        rows, most = _rows(table, column), np.inf
        if "random" in labels:
            random = rows.loc["random", "mean"]
            axis.axvline(random, color=GREY, lw=1, ls="--", label="random")
            most = _MOST_COST * random if column == "communication_cost" else np.inf
        _add_marks(axis, tables, rows, labels, most)
        if table["seeds"].max() > 1:
            seeds = episodes.groupby(["label", "seed"])[column].mean().reset_index()
            seeds = seeds[seeds["label"].map(rows["mean"]) <= most]
            y = seeds["label"].map(labels.index) + 0.33
            axis.plot(seeds[column], y, ".", ms=3, color="0.55", label="one seed")
        right = axis.dataLim.x1 or 1.0
        axis.set(xlabel=text, xlim=(-0.05 * right, 1.05 * right))  # room for whole marks
    axes[0].set_ylabel(config["parameter"])
    _add_legend(figure)
    _set_title(figure, tables, f"{config['comparison']}, sorted by rounds")
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
    chosen = [name for name in ("random", *learned_labels(tables)) if name in names] or names[:1]
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
    """Draw rounds and cost over the trainings of the DQNs, a line per label.

    From five seeds on with a 95 % band (Student's t), and with random's mean in the tests.
    """
    training, rounds = tables["training"], tables["rounds"]
    window = min(plot.WINDOW, max(1, training["episode"].max() // 3))
    # A training with several nodes per round counts its cost otherwise than a test.
    nodes = rounds.loc[rounds["label"].isin(training["label"]), "node"]
    comparable = not nodes.str.contains("+", regex=False).any()
    figure, axes = plot.panels(2.8, 1, 2, sharex=True)
    by_label = training.groupby("label", sort=False)
    for axis, column in zip(axes, PUBLISHED, strict=True):
        for (label, rows), (color, line) in zip(by_label, plot.LINE_STYLES, strict=False):
            each = rows.pivot(index="episode", columns="seed", values=column).rolling(window).mean()
            mean, count = each.mean(axis=1), each.shape[1]
            axis.plot(mean, line, color=color, marker="o", markevery=[-1], label=label)
            if count >= plot.FEWEST:
                half = stats.t.ppf(0.975, count - 1) * each.sem(axis=1)
                ends = mean - half, mean + half
                axis.fill_between(each.index, *ends, color=color, alpha=0.2, lw=0)
        level = _rows(tables["estimates"], column)["mean"].get("random")
        if level is not None and comparable:
            axis.axhline(level, color=GREY, lw=1, ls=":", label="random (test episodes)")
        axis.set(ylabel=_AXES[column], xlabel="episode", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _add_legend(figure)
    seeds = _counted(training.groupby("label")["seed"].nunique(), "seed")
    plot.set_title(figure, training, f"Training, moving average with window {window}", seeds)
    return figure


# By heading of a column: the quantity, and the format of its numbers.
Columns = dict[str, tuple[str, str]]

_MEANS: Columns = {
    "rounds": ("rounds", "{:.1f}"),
    "goal reached": ("goal_reached", "{:.0%}"),
    "communication cost": ("communication_cost", "{:.3f}"),
    "MB sent": ("megabytes", "{:.2f}"),
    "MB to observe": ("observation_megabytes", "{:.1f}"),
    "seconds": ("seconds", "{:.1f}"),
}
_NAMES = {name.replace("_", " "): name for name in PUBLISHED}
_CHANGES = {text: (f"{name}_reduction", "{:+.1%}") for text, name in _NAMES.items()}
_BREAK_EVENS = {f"in {text}": (f"{name}_break_even", "{:.0f}") for text, name in _NAMES.items()}


def report(folder: Path, tables: Tables) -> str:
    """Return what a comparison's estimates and jobs say, as Markdown tables."""
    table, jobs, episodes = (tables[name] for name in ("estimates", "jobs", "episodes"))
    varied = tables["config"]["parameter"]
    counts = [f"{sum(jobs['state'] == name)} {name}" for name in ("finished", "waiting", "failed")]
    failed = jobs[jobs["error"] != ""]
    lines = [
        *_markdown(table, varied, _MEANS),
        "",
        "Means over all test episodes; 95 % intervals in brackets, none with one seed. An episode "
        "that misses the goal counts with the limit of rounds.",
        f"Jobs: {len(jobs)}, {', '.join(counts)}. Diverged episodes: {episodes['diverged'].sum()} "
        f"in tests, {tables['training']['diverged'].sum()} in training.",
        *(failed["label"] + " seed " + failed["seed"].astype(str) + ": " + failed["error"]),
    ]
    change = marked_changes(tables)
    if len(change):
        lines += ["", "Change against random, on the same seeds:", ""]
        lines += _markdown(change, varied, _CHANGES)
        if not varied:
            published = " | ".join(f"-{100 * share:.1f} %" for share in PUBLISHED.values())
            lines.append(f"| paper, HL on MNIST |  | {published} |")
        if change["mark"].any():
            lines += ["", "\\* saved while the goal is reached less often than by random."]
    if table["quantity"].str.endswith("_break_even").any():
        lines += ["", "Foundation models to train until the training of the DQN is paid back:", ""]
        lines += _markdown(table, varied, _BREAK_EVENS)
    return "\n".join([*lines, "", f"results and figures: {folder}"])


def _markdown(table: pd.DataFrame, varied: str, columns: Columns) -> list[str]:
    """Return a Markdown table of estimates with their intervals, a row per variant and method.

    A column ``mark`` has texts to write after the means. ``varied`` is the heading of the variants.
    """
    heads = [*filter(None, [varied]), "method", "seeds x episodes", *columns]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    forms = dict(columns.values())
    chosen = table[table["quantity"].isin(forms)]
    for (variant, method), rows in chosen.groupby(["variant", "method"], sort=False):
        cells = dict.fromkeys(forms, "")
        for row in rows.itertuples():
            numbers = [row.mean] if np.isnan(row.low) else [row.mean, row.low, row.high]
            mean, *ends = (forms[row.quantity].format(x).replace("%", " %") for x in numbers)
            interval = f" [{', '.join(ends)}]" if ends else ""
            cells[row.quantity] = mean + getattr(row, "mark", "") + interval
        size = f"{row.seeds} x {row.episodes // row.seeds}"
        texts = [*[variant] * bool(varied), method, size, *cells.values()]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


# --- Several comparisons ---------------------------------------------------------------------

_SUMMARY: Columns = {
    "rounds": _MEANS["rounds"],
    "rounds against random": _CHANGES["rounds"],
    "cost against random": _CHANGES["communication cost"],
    "goal reached": _MEANS["goal reached"],
}


def by_task(comparisons: list[Tables]) -> dict[str, pd.DataFrame]:
    """Return the rows of ``_SUMMARY`` by task, such as "mnist, 10 nodes", methods by their rounds.

    A method that several comparisons of a task have is taken from the first of them. Comparisons
    that vary something, or compare nothing with random, are left out.
    """
    tasks: dict[str, pd.DataFrame] = {}
    for tables in comparisons:
        config, means = tables["config"], tables["estimates"]
        if config["parameter"] or not _compares(tables):
            continue
        means = means[means["quantity"].isin(("rounds", "goal_reached"))].assign(mark="")
        rows = pd.concat([means, marked_changes(tables)])
        name = f"{config['dataset']['name']}, {config['settings']['NUM_NODES']} nodes"
        known = tasks.get(name, rows.head(0))
        tasks[name] = pd.concat([known, rows[~rows["method"].isin(known["method"])]])
    for name, rows in tasks.items():
        rounds = rows[rows["quantity"] == "rounds"].set_index("method")["mean"]
        order = rows["method"].map(rounds).argsort(kind="stable")
        tasks[name] = rows.iloc[order]
    return tasks


def summary(tasks: dict[str, pd.DataFrame]) -> str:
    """Return a Markdown table for each task."""
    tables = (f"{name}:\n\n" + "\n".join(_markdown(r, "", _SUMMARY)) for name, r in tasks.items())
    return "\n\n".join(tables)


def _add_changes(axis: Axes, rows: pd.DataFrame, places: pd.Index, style: dict[str, Any]) -> None:
    """Mark the changes at their places, in percent, or write them if they are too large."""
    for y, row in zip(places, rows.itertuples(), strict=True):
        mean, low, high = (100 * value for value in (row.mean, row.low, row.high))
        if mean > _MOST_CHANGE:
            text = f"{mean:+.0f} % \N{RIGHTWARDS ARROW}"
            aligned: Any = {"ha": "right", "va": "center", "size": 7}
            axis.text(_MOST_CHANGE, y, text, color=style["color"], **aligned)
            continue
        face = "white" if row.mark else style["color"]
        axis.errorbar(mean, y, xerr=_bars(mean, low, high), ms=4, mfc=face, capsize=2, **style)


def draw_summary(tasks: dict[str, pd.DataFrame]) -> Figure:
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
        axis.axvline(0, color=BLACK, lw=1)
        axis.set(title=name, xlabel="change, %", xlim=(-105, _MOST_CHANGE + 5))
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        for shift, marker, color, column in (
            (-0.15, "o", BLUE, "rounds"),
            (0.15, "s", plot.ORANGE, "communication_cost"),
        ):
            label = column.replace("_", " ")
            if name.startswith("mnist, 10 "):
                published = -100 * PUBLISHED[column]
                axis.axvline(published, color=color, lw=1, ls=":", label=f"{label}, published")
            change = found.loc[f"{column}_reduction"]
            places = change.index.map(methods.index) + shift
            _add_changes(axis, change, places, {"fmt": marker, "color": color, "label": label})
        goal = found.loc["goal_reached", "mean"]
        plot.label_at_right(axis, -0.8, "goal reached", x=0.9)
        for method in goal.index.intersection(methods):
            plot.label_at_right(axis, methods.index(method), f"{100 * goal[method]:.0f} %")
    _add_legend(figure)
    return figure


def _draw_all(folders: list[Path], format_: str) -> int:
    drawn = []
    for folder in folders:
        drawn.append(draw_comparison(folder, format_))
        print(report(folder, drawn[-1]))
    tasks = by_task(drawn)
    if len(folders) > 1 and tasks:
        path = plot.parent_of(folders) / f"summary.{format_}"
        plot.save_figure(path, draw_summary(tasks))
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

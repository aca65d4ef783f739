"""Figures and report of a comparison, from its tables alone.

Usage: ``python3 -m experiments.figures results/<comparison> [...]``
"""

from __future__ import annotations

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
from matplotlib.ticker import MaxNLocator
from scipy import stats

import cli
import plot
import records
from experiments import estimates
from plot import BLACK, BLUE, DOUBLE, GREY, PUBLISHED, STYLE

# What estimates.read_comparison returns, and "estimates". In draw_comparison's, ``label`` is one
# more column: the method, the varied value, or both.
Tables = dict[str, Any]

_MOST_PANELS = 9
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


# --- All figures -----------------------------------------------------------------------------


def draw_comparison(folder: Path, format_: str = "png") -> Tables:
    """Estimate a comparison from its tables, write ``estimates.csv`` and draw its figures.

    Files have a format of ``plot.FORMATS``.

    Raises:
        UserError: as ``estimates.read_comparison``.
        OSError: a file can't be written.
    """
    tables = estimates.read_comparison(folder)
    tables["estimates"] = estimates.estimate(tables)
    records.write_table(folder / "estimates.csv", tables["estimates"])
    add_labels(tables)
    figures: dict[str, Callable[[Tables], Figure]] = {}
    if tables["config"]["parameter"]:
        figures["variants"] = draw_rows
    else:
        figures["methods"] = draw_rows
        figures["walks"] = draw_walks
        if (tables["estimates"]["quantity"] == "rounds_reduction").any():
            figures["headline"] = draw_headline
    if 0 < tables["training"]["label"].nunique() <= _MOST_LINES:
        figures["training"] = draw_training
    for name, draw in figures.items():
        plot.save_figure(folder / f"{name}.{format_}", draw(tables))
    return tables


def add_labels(tables: Tables) -> None:
    """Add a column ``label`` to the tables: the varied value, the method, or both."""
    several = tables["jobs"]["method"].nunique() > 1
    varied = bool(tables["config"]["parameter"])
    for name in ("jobs", "episodes", "rounds", "training", "estimates"):
        table = tables[name]
        both = (table["variant"] + " " + table["method"]).str.strip()
        tables[name] = table.assign(label=both if several or not varied else table["variant"])


def _rows(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return the estimates of a quantity, by label."""
    return table[table["quantity"] == quantity].set_index("label")


def learned_labels(tables: Tables) -> list[str]:
    """Return the labels of trained DQNs, trained here or given."""
    jobs = tables["jobs"]
    learned = {*tables["training"]["label"], *jobs.loc[jobs["agent"] != "", "label"]}
    return [label for label in dict.fromkeys(jobs["label"]) if label in learned]


def _counted(counts: pd.Series, noun: str) -> str:
    """Return a number or a range of numbers with its noun: 1 seed, 5 to 10 seeds."""
    low, high = counts.min(), counts.max()
    count = str(low) if low == high else f"{low} to {high}"
    return f"{count} {noun}{'s' if high > 1 else ''}"


def _set_title(figure: Figure, tables: Tables, text: str, quantity: str = "rounds") -> None:
    """Set the figure's title: what it shows, of which data, and how much it rests on."""
    rows = _rows(tables["estimates"], quantity)
    seeds = _counted(rows["seeds"], "seed")
    episodes = _counted(rows["episodes"] // rows["seeds"], "episode")
    interval = "mean with 95 % interval" if rows["low"].notna().any() else "mean"
    note = plot.data_note(tables["episodes"]["dataset"].iloc[0])
    figure.suptitle(f"{text} (data: {note}; {seeds} x {episodes}, {interval})")


def _add_legend(figure: Figure) -> None:
    """Add a legend below the figure, in rows of equal length: each panel's labels once."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        drawn, texts = axis.get_legend_handles_labels()
        handles |= dict(zip(texts, drawn, strict=True))
    rows = -(-len(handles) // 4)
    columns = -(-len(handles) // rows)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


# --- Methods, and values of a setting --------------------------------------------------------


def _add_marks(
    axis: Axes,
    tables: Tables,
    rows: pd.DataFrame,
    labels: list[str],
    most: float = np.inf,
    form: str = "{:.1f}",
) -> None:
    """Mark a mean with its interval in the row of each label, or write it if it is above ``most``.

    Circles are learned policies. Grey marks reach the goal in less than half of the episodes.
    Labels that ``rows`` lacks are skipped.
    """
    learned, goal = learned_labels(tables), _rows(tables["estimates"], "goal_reached")["mean"]
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    place: dict[str, Any] = {"fontsize": 7, "transform": axis.get_yaxis_transform(), "bbox": box}
    for y, label in enumerate(labels):
        if label not in rows.index:
            continue
        row = rows.loc[[label]]
        if row["mean"].item() > most:
            text = form.format(row["mean"].item()) + " \N{RIGHTWARDS ARROW}"
            axis.text(0.99, y, text, ha="right", va="center", **place)
            continue
        kind, marker, color = "not learned", "s", BLACK
        if label in learned:
            kind, marker, color = "learned (DQN)", "o", BLUE
        if goal[label] < 0.5:
            kind, color = "grey: goal reached in less than 50 % of the episodes", "0.65"
        ends = np.abs(row[["low", "high"]].to_numpy().T - row["mean"].item())
        style: dict[str, Any] = {"fmt": marker, "color": color, "ms": 4, "capsize": 2}
        style["xerr"] = None if np.isnan(ends).any() else ends
        axis.errorbar(row["mean"], [y], elinewidth=1, label=kind, **style)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the estimated reductions as changes: 25 % more rounds are +0.25, fewer are negative.

    The quantities are ``rounds_change`` and ``communication_cost_change``.
    """
    rows = table[table["quantity"].str.endswith("_reduction")]
    return rows.assign(
        quantity=rows["quantity"].str.replace("_reduction", "_change"),
        mean=0.0 - rows["mean"],
        low=0.0 - rows["high"],
        high=0.0 - rows["low"],
    )


@matplotlib.rc_context(STYLE)
def draw_headline(tables: Tables) -> Figure:
    """Draw the change of rounds and of cost against random, beside what the paper reports."""
    change, paper = changes(tables["estimates"]), "paper (MNIST)"
    rounds = _rows(change, "rounds_change")["mean"]
    rounds = pd.concat([rounds, pd.Series({"random": 0.0, paper: -PUBLISHED["rounds"]})])
    labels = list(rounds.sort_values(kind="stable").index)
    figure = Figure(figsize=(DOUBLE, 0.2 * len(labels) + 1.15), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (column, reduction) in zip(axes, PUBLISHED.items(), strict=True):
        axis.axvline(0, color=BLACK, lw=1)
        rows = 100 * _rows(change, f"{column}_change")[["mean", "low", "high"]]
        rows.loc["random"] = 0.0
        _add_marks(axis, tables, rows, labels, _MOST_CHANGE, "{:+.0f} %")
        style: dict[str, Any] = {
            "ls": "",
            "marker": "D",
            "ms": 5,
            "mfc": "white",
            "mec": plot.RED,
            "mew": 1.2,
        }
        axis.plot(-100 * reduction, labels.index(paper), label="published", **style)
        axis.set_xlabel(f"{column.replace('_', ' ')}, change in %")
    goal = _rows(tables["estimates"], "goal_reached")["mean"]
    texts = ["not stated" if name == paper else f"{100 * goal[name]:.0f} %" for name in labels]
    beside = axes[1].get_yaxis_transform()
    for y, text in enumerate(["goal reached", *texts], -1):
        axes[1].text(1.03, y, text, va="center", fontsize=7, transform=beside)
    _add_legend(figure)
    _set_title(figure, tables, "Change against random", "rounds_reduction")
    return figure


@matplotlib.rc_context(STYLE)
def draw_rows(tables: Tables) -> Figure:
    """Draw rounds, cost and success, a row per label: a point per seed, mean and interval."""
    table, config, episodes = tables["estimates"], tables["config"], tables["episodes"]
    labels = list(_rows(table, "rounds")["mean"].sort_values(kind="stable").index)
    figure = Figure(figsize=(DOUBLE, 0.22 * len(labels) + 1.15), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
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


# --- Episodes --------------------------------------------------------------------------------


def typical_episode(episodes: pd.DataFrame, label: str) -> pd.Series:
    """Return the row of the lowest seed whose number of rounds is closest to the label's mean.

    Of several such episodes, the first.
    """
    rows = episodes[episodes["label"] == label]
    of_seed = rows[rows["seed"] == rows["seed"].min()].sort_values("episode")
    return of_seed.loc[(of_seed["rounds"] - rows["rounds"].mean()).abs().idxmin()]


@matplotlib.rc_context(STYLE)
def draw_walks(tables: Tables) -> Figure:
    """Draw a test episode of random and of each learned method: nodes, accuracies and the goal.

    Without either, one of the first method. Of several nodes in a round the first is shown, which
    transfers the model.
    """
    episodes, rounds = tables["episodes"], tables["rounds"]
    names = list(dict.fromkeys(episodes["label"]))
    chosen = [name for name in ("random", *learned_labels(tables)) if name in names] or names[:1]
    chosen = chosen[:_MOST_PANELS]
    limit, goal = episodes["max_rounds"].iloc[0], episodes["goal_accuracy"].iloc[0]
    figure = Figure(figsize=(DOUBLE, 1.05 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots(len(chosen), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
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
        axis.set_title(
            f"{name}: goal {'reached' if episode['goal_reached'] else 'missed'} after "
            f"{episode['rounds']} rounds, communication cost {episode['communication_cost']:.2f} "
            f"(seed {episode['seed']}, test episode {episode['episode']})",
            loc="left",
        )
        axis.set(ylabel="accuracy", xlim=(0.4, limit + 0.6), ylim=(0, 1.4))
        axis.spines["left"].set_bounds(0, 1)
        axis.set_yticks([0, goal], ["0", f"{goal:g}"])
        axis.grid(False)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    note = plot.data_note(episodes["dataset"].iloc[0])
    figure.suptitle(f"Node that trains in each round, and the accuracy after it (data: {note})")
    return figure


# --- Training --------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_training(tables: Tables) -> Figure:
    """Draw rounds and cost over the trainings of the DQNs, a line per label.

    A 95 % band (Student's t) is drawn from five seeds on, and random's mean in the tests.
    """
    training, rounds = tables["training"], tables["rounds"]
    window = min(plot.WINDOW, max(1, training["episode"].max() // 3))
    # A training with several nodes per round counts its cost otherwise than a test.
    nodes = rounds.loc[rounds["label"].isin(training["label"]), "node"]
    comparable = not nodes.str.contains("+", regex=False).any()
    figure = Figure(figsize=(DOUBLE, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, column in zip(axes, PUBLISHED, strict=True):
        styles = zip(cycle(plot.COLORS), cycle(plot.LINES), strict=False)
        by_label = training.groupby("label", sort=False)
        for (label, rows), (color, line) in zip(by_label, styles, strict=False):
            each = rows.pivot(index="episode", columns="seed", values=column)
            each = each.rolling(window).mean()
            mean, count = each.mean(axis=1), each.shape[1]
            axis.plot(mean, line, color=color, marker="o", markevery=[-1], label=label)
            if count >= plot.FEWEST:
                half = stats.t.ppf(0.975, count - 1) * each.sem(axis=1)
                axis.fill_between(
                    each.index, mean - half, mean + half, color=color, alpha=0.2, lw=0
                )
        level = _rows(tables["estimates"], column)["mean"].get("random")
        if level is not None and comparable:
            axis.axhline(level, color=GREY, lw=1, ls=":", label="random (test episodes)")
        axis.set(ylabel=_AXES[column], xlabel="episode", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _add_legend(figure)
    seeds = _counted(training.groupby("label")["seed"].nunique(), "seed")
    note = plot.data_note(training["dataset"].iloc[0])
    figure.suptitle(f"Training, moving average with window {window} (data: {note}; {seeds})")
    return figure


# --- Report ----------------------------------------------------------------------------------


def report(folder: Path, tables: Tables) -> str:
    """Return what a comparison's estimates and jobs say, as Markdown tables."""
    table, varied = tables["estimates"], tables["config"]["parameter"]
    lines = _markdown(
        table,
        varied,
        {
            "rounds": ("rounds", "{:.1f}"),
            "rounds, interquartile mean": ("rounds_iqm", "{:.1f}"),
            "goal reached": ("goal_reached", "{:.0%}"),
            "communication cost": ("communication_cost", "{:.3f}"),
            "cost, interquartile mean": ("communication_cost_iqm", "{:.3f}"),
            "MB sent": ("megabytes", "{:.2f}"),
            "MB to observe": ("observation_megabytes", "{:.1f}"),
            "seconds": ("seconds", "{:.1f}"),
        },
    )
    lines += ["", *_sizes(tables)]
    if table["quantity"].eq("rounds_reduction").any():
        lines += ["", "Change against random, on the same seeds:", "", *_changes(tables)]
    if table["quantity"].str.endswith("_break_even").any():
        lines += ["", "Foundation models to train until the training of the DQN is paid back:", ""]
        lines += _markdown(
            table,
            varied,
            {
                "in rounds": ("rounds_break_even", "{:.0f}"),
                "in communication cost": ("communication_cost_break_even", "{:.0f}"),
            },
        )
    return "\n".join([*lines, "", f"results and figures: {folder}"])


def _markdown(table: pd.DataFrame, varied: str, columns: dict[str, tuple[str, str]]) -> list[str]:
    """Return a Markdown table of estimates with their intervals, a row per variant and method.

    Args:
        table: estimates; a column ``mark``, if there is one, has texts to write after the means.
        varied: the heading of the variants; empty if nothing varies.
        columns: by heading, a quantity and how a number of it is formatted.
    """
    forms = dict(columns.values())
    first = [varied] * bool(varied) + ["method", "seeds x episodes"]
    lines = ["| " + " | ".join([*first, *columns]) + " |"]
    lines.append("|---" * (len(first) + len(columns)) + "|")
    chosen = table[table["quantity"].isin(forms)]
    for (variant, method), rows in chosen.groupby(["variant", "method"], sort=False):
        cells = dict.fromkeys(forms, "")
        for row in rows.itertuples():
            numbers = [row.mean] if np.isnan(row.low) else [row.mean, row.low, row.high]
            mean, *ends = (forms[row.quantity].format(x).replace("%", " %") for x in numbers)
            cells[row.quantity] = mean + getattr(row, "mark", "")
            cells[row.quantity] += f" [{', '.join(ends)}]" if ends else ""
        size = f"{row.seeds} x {row.episodes // row.seeds}"
        texts = [variant] * bool(varied) + [method, size, *cells.values()]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def _changes(tables: Tables) -> list[str]:
    """Return the table of changes against random, with the published ones."""
    table, varied = tables["estimates"], tables["config"]["parameter"]
    change = changes(table).assign(mark="")
    for row in change[change["quantity"] == "communication_cost_change"].itertuples():
        if row.mean < 0 and estimates.misses_more_often(
            tables["episodes"], row.variant, row.method
        ):
            change.loc[row.Index, "mark"] = "*"
    lines = _markdown(
        pd.concat([table.assign(mark=""), change]),
        varied,
        {
            "rounds": ("rounds_change", "{:+.1%}"),
            "communication cost": ("communication_cost_change", "{:+.1%}"),
            "P(fewer rounds)": ("rounds_improvement", "{:.2f}"),
            "P(less cost)": ("communication_cost_improvement", "{:.2f}"),
        },
    )
    if not varied:
        published = " | ".join(f"-{100 * share:.1f} %" for share in PUBLISHED.values())
        lines.append(f"| paper, HL on MNIST |  | {published} |  |  |")
    if change["mark"].any():
        lines += ["", "\\* saved while the goal is reached less often than by random."]
    return lines


def _sizes(tables: Tables) -> list[str]:
    """Return what the numbers rest on, in sentences."""
    jobs, training = tables["jobs"], tables["training"]
    counts = [f"{sum(jobs['state'] == name)} {name}" for name in ("finished", "waiting", "failed")]
    wrong = jobs[jobs["error"] != ""]
    return [
        "Means over all test episodes; 95 % intervals in brackets, none with one seed. An episode "
        "that misses the goal counts with the limit of rounds.",
        f"Jobs: {len(jobs)}, {', '.join(counts)}. Diverged: {tables['episodes']['diverged'].sum()} "
        f"test episodes, {training['diverged'].sum()} of training.",
        *(wrong["label"] + " seed " + wrong["seed"].astype(str) + ": " + wrong["error"]),
    ]


# --- Command ---------------------------------------------------------------------------------


def _draw_all(folders: list[Path], format_: str) -> int:
    status = 0
    for folder in folders:
        tables = draw_comparison(folder, format_)
        print(report(folder, tables))
        status |= int((tables["jobs"]["error"] != "").any())
    return status


def main(arguments: list[str] | None = None) -> int:
    """Draw the comparisons named on the command line and return the exit status.

    It is 2 if a folder holds no comparison, and 1 if a file can't be written or a job has failed.
    """
    parser = cli.Parser(
        "experiments.figures",
        "Draw the figures of comparisons again, from their CSVs, and print their reports.",
        "  python3 -m experiments.figures results/paper-mnist",
    )
    parser.usage = "python3 -m experiments.figures [options] results/<comparison> ..."
    add = parser.add_argument
    add("folder", nargs="+", type=Path, help="folder of a comparison")
    add("--format", choices=list(plot.FORMATS), default="png", help="of the figures [png]")
    parsed = parser.parse_args(arguments)
    return cli.exit_status("experiments.figures", lambda: _draw_all(parsed.folder, parsed.format))


if __name__ == "__main__":
    sys.exit(main())

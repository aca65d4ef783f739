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
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from scipy import stats

import cli
import plot
import records
from config import UserError
from experiments import estimates
from plot import BLACK, BLUE, DOUBLE, GREY, PUBLISHED, STYLE

# What estimates.read_comparison returns, and "estimates". In draw_comparison's, ``label`` is one
# more column: the method, the varied value, or both.
Tables = dict[str, Any]

MOST_PANELS = 9
_MOST_LINES = 8  # in one panel
_MOST_CHANGE = 0.6  # larger changes are written as text
_MOST_COST = 3.0  # times random's; larger costs are written as text
_LIGHT_GREY = "0.65"  # marks of methods that reach the goal in less than half of the episodes

_AXES = {
    "rounds": "rounds to the goal\n(or the limit)",
    "communication_cost": "communication cost\n(sum of distances)",
    "goal_reached": "goal reached\n(share of episodes)",
}

# A colour per node, while ten are enough.
_NODE_COLORS = (
    *(plot.SKY, plot.ORANGE, plot.GREEN, "#F0E442", plot.PURPLE),
    *(BLUE, plot.RED, "0.75", "0.45", BLACK),
)
_DARK = (BLUE, plot.RED, plot.GREEN, "0.45", BLACK)


# --- All figures -----------------------------------------------------------------------------


def draw_comparison(folder: Path, format_: str = "png") -> Tables:
    """Estimate a comparison from its tables, write ``estimates.csv`` and draw its figures.

    Args:
        folder: the comparison's.
        format_: a key of ``plot.FORMATS``.

    Returns:
        What ``estimates.read_comparison`` returns, and ``estimates``.

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
        numbers = all(_is_number(text) for text in tables["estimates"]["variant"])
        figures["variants"] = draw_numbers if numbers else draw_rows
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The estimates of a quantity, by label."""
    return table[table["quantity"] == quantity].set_index("label")


def _sorted_labels(values: pd.Series) -> list[str]:
    """The labels, from the least value to the largest."""
    return list(values.sort_values(kind="stable").index)


def learned_labels(tables: Tables) -> list[str]:
    """Return the labels of trained DQNs, trained here or given."""
    jobs = tables["jobs"]
    learned = {*tables["training"]["label"], *jobs.loc[jobs["agent"] != "", "label"]}
    return [label for label in dict.fromkeys(jobs["label"]) if label in learned]


def _errors(rows: pd.DataFrame) -> np.ndarray | None:
    """(2, n) lengths of the error bars; 0 where a row has no interval, None if no row has one."""
    if rows["low"].isna().all():
        return None
    return np.nan_to_num(np.abs(rows[["low", "high"]].to_numpy(float).T - rows["mean"].to_numpy()))


def _counted(counts: pd.Series, noun: str) -> str:
    """A number or a range of numbers with its noun: 1 seed, 5 to 10 seeds."""
    low, high = counts.min(), counts.max()
    count = str(low) if low == high else f"{low} to {high}"
    return f"{count} {noun}{'s' if high > 1 else ''}"


def _set_title(figure: Figure, tables: Tables, text: str, quantity: str = "rounds") -> None:
    """The figure's title: what it shows, of which data, and how much it rests on."""
    rows = _rows(tables["estimates"], quantity)
    seeds = _counted(rows["seeds"], "seed")
    episodes = _counted(rows["episodes"] // rows["seeds"], "episode")
    interval = "mean with 95 % interval" if rows["low"].notna().any() else "mean"
    note = plot.data_note(tables["episodes"]["dataset"].iloc[0])
    figure.suptitle(f"{text} (data: {note}; {seeds} x {episodes}, {interval})")


def _add_legend(figure: Figure, handles: list[Any]) -> None:
    """A legend below the figure, in rows of equal length."""
    rows = -(-len(handles) // 4)
    columns = -(-len(handles) // rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2)


# --- Methods, and variants that are no numbers -----------------------------------------------


def _add_marks(axis: Axes, tables: Tables, rows: pd.DataFrame, labels: list[str]) -> None:
    """Mark a mean with its interval in the row of each label; skip labels that ``rows`` lacks.

    Circles are learned policies. Grey ones reach the goal in less than half of the episodes.
    """
    learned, goal = learned_labels(tables), _rows(tables["estimates"], "goal_reached")["mean"]
    for y, label in enumerate(labels):
        if label in rows.index:
            row = rows.loc[[label]]
            color = BLUE if label in learned else BLACK
            axis.errorbar(
                row["mean"],
                [y],
                xerr=_errors(row),
                fmt="o" if label in learned else "s",
                color=_LIGHT_GREY if goal[label] < 0.5 else color,
                ms=4,
                elinewidth=1,
                capsize=2,
            )


def _add_cut_off(axis: Axes, x: float, texts: dict[int, str]) -> None:
    """Write values that lie to the right of the axis into their rows, with an arrow."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for y, text in texts.items():
        text += " \N{RIGHTWARDS ARROW}"
        axis.text(x, y, text, ha="right", va="center", fontsize=7, bbox=box)


def _show_labels(axis: Axes, tables: Tables, labels: list[str]) -> None:
    """Write the labels beside the y axis, the first at the top."""
    goal = _rows(tables["estimates"], "goal_reached")["mean"]
    axis.set_yticks(range(len(labels)), labels)
    for tick in axis.get_yticklabels():
        tick.set_color(GREY if goal.get(tick.get_text(), 1.0) < 0.5 else BLACK)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _handles_of_marks(tables: Tables) -> list[Line2D]:
    """What the legend says of the marks that occur."""
    labels, learned = dict.fromkeys(tables["jobs"]["label"]), learned_labels(tables)
    goal = _rows(tables["estimates"], "goal_reached")["mean"]
    grey = "grey: goal reached in less than 50 % of the episodes"
    kinds = (
        ("o", BLUE, "learned (DQN)", bool(learned)),
        ("s", BLACK, "not learned", len(learned) < len(labels)),
        ("s", _LIGHT_GREY, grey, (goal < 0.5).any()),
    )
    return [
        Line2D([], [], ls="", marker=marker, ms=4, color=color, label=text)
        for marker, color, text, occurs in kinds
        if occurs
    ]


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the estimated reductions as changes: 25 % more rounds are +0.25, fewer are negative.

    Args:
        table: estimates.

    Returns:
        The rows of ``rounds_change`` and ``communication_cost_change``, with the same columns.
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
    table, paper = tables["estimates"], "paper (MNIST)"
    change = changes(table)
    others = pd.Series({"random": 0.0, paper: -PUBLISHED["rounds"]})
    labels = _sorted_labels(pd.concat([_rows(change, "rounds_change")["mean"], others]))
    figure = Figure(figsize=(DOUBLE, 0.2 * len(labels) + 1.15), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, PUBLISHED, strict=True):
        axis.axvline(0, color=BLACK, lw=1)
        rows = _rows(change, f"{column}_change")
        rows.loc["random", ["mean", "low", "high"]] = 0.0
        shown = rows[rows["mean"] <= _MOST_CHANGE]
        right = max(_MOST_CHANGE, shown["high"].max())
        _add_marks(axis, tables, shown, labels)
        above = rows["mean"].drop(shown.index)
        _add_cut_off(axis, right, {labels.index(x): f"{_percent(y)} %" for x, y in above.items()})
        place = (-PUBLISHED[column], labels.index(paper))
        axis.plot(*place, "D", ms=5, mfc="white", mec=plot.RED, mew=1.2)
        axis.set_xlim(-1.06, right + 0.02)
        axis.xaxis.set_major_locator(MultipleLocator(0.25))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: _percent(share)))
        axis.set_xlabel(f"{column.replace('_', ' ')}, change in %")
    _show_labels(axes[0], tables, labels)
    goal = _rows(table, "goal_reached")["mean"]
    texts = ["not stated" if name == paper else f"{100 * goal[name]:.0f} %" for name in labels]
    for y, text in enumerate(["goal reached", *texts], -1):
        axes[1].annotate(
            text,
            (1.03, y),
            xycoords=axes[1].get_yaxis_transform(),
            va="center",
            fontsize=7,
            color=axes[0].get_yticklabels()[y].get_color() if y >= 0 else BLACK,
            annotation_clip=False,
        )
    hollow = Line2D([], [], ls="", marker="D", ms=5, mfc="white", mec=plot.RED, label="published")
    _add_legend(figure, [*_handles_of_marks(tables), hollow])
    _set_title(figure, tables, "Change against random", "rounds_reduction")
    return figure


def _percent(share: float) -> str:
    """A change in percent, with its sign and the typographic minus."""
    return f"{100 * share:+.0f}".replace("-", "\N{MINUS SIGN}") if share else "0"


@matplotlib.rc_context(STYLE)
def draw_rows(tables: Tables) -> Figure:
    """Draw rounds, cost and success, a row per label: a point per seed, mean and interval."""
    table, config = tables["estimates"], tables["config"]
    labels = _sorted_labels(_rows(table, "rounds")["mean"])
    figure = Figure(figsize=(DOUBLE, 0.22 * len(labels) + 1.15), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (column, text) in zip(axes, _AXES.items(), strict=True):
        rows = _rows(table, column)
        seeds = tables["episodes"].groupby(["label", "seed"])[column].mean()
        shown = rows
        if "random" in rows.index:
            axis.axvline(rows.loc["random", "mean"], color=GREY, lw=1, ls="--")
            if column == "communication_cost":
                shown = rows[rows["mean"] <= _MOST_COST * rows.loc["random", "mean"]]
        highest = shown["high"].fillna(shown["mean"]).max()
        right = max(highest, seeds[shown.index].max(), 1e-3) if column != "goal_reached" else 1.0
        for y, label in enumerate(labels):
            if label in shown.index and len(seeds[label]) > 1:
                values = seeds[label]
                axis.plot(values, np.full(len(values), y + 0.33), ".", ms=3, color="0.55")
        _add_marks(axis, tables, shown, labels)
        above = rows["mean"].drop(shown.index)
        _add_cut_off(axis, right, {labels.index(x): f"{y:.1f}" for x, y in above.items()})
        # A little room, so that a mark at 0 or at the end is seen whole.
        axis.set(xlabel=text, xlim=(-0.04 * right, 1.04 * right))
    limit = tables["episodes"]["max_rounds"].max()
    axes[0].axvline(limit, color=BLACK, lw=0.8, ls=":")
    axes[0].set_xlim(right=1.06 * limit)
    axes[0].set_ylabel(config["parameter"])
    _show_labels(axes[0], tables, labels)
    lines = []
    if table["seeds"].max() > 1:
        lines.append(Line2D([], [], color="0.55", ls="", marker=".", ms=3, label="one seed"))
    if "random" in labels:
        lines.append(Line2D([], [], color=GREY, lw=1, ls="--", label="random"))
    lines.append(Line2D([], [], color=BLACK, lw=0.8, ls=":", label=f"limit, {limit} rounds"))
    _add_legend(figure, [*_handles_of_marks(tables), *lines])
    _set_title(figure, tables, f"{config['comparison']}, sorted by rounds")
    return figure


# --- Variants that are numbers ---------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_numbers(tables: Tables) -> Figure:
    """Draw rounds, cost and success by the number that the comparison varies, a line a method."""
    table, config = tables["estimates"], tables["config"]
    variants, methods = (list(dict.fromkeys(table[name])) for name in ("variant", "method"))
    figure = Figure(figsize=(DOUBLE, 2.8), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    apart = min(0.04, 0.5 / len(methods))
    for axis, (column, text) in zip(axes, _AXES.items(), strict=True):
        styles = zip(cycle(plot.COLORS), cycle(plot.LINES), cycle("osD^vPX<>*"), strict=False)
        for place, (method, (color, line, marker)) in enumerate(zip(methods, styles, strict=False)):
            rows = estimates.select(table, table["variant"], method)
            rows = rows[rows["quantity"] == column].set_index("variant").reindex(variants)
            # Side by side, so that intervals don't cover each other.
            x = np.arange(len(variants)) + (place - (len(methods) - 1) / 2) * apart
            style = {"color": color, "ls": line, "marker": marker, "ms": 4, "lw": 1, "capsize": 2}
            axis.errorbar(x, rows["mean"], yerr=_errors(rows), label=method, **style)
        top = 1.0 if column == "goal_reached" else axis.get_ylim()[1]
        axis.set(ylabel=text, xlabel=config["parameter"], ylim=(-0.04 * top, 1.04 * top))
        axis.set_xticks(range(len(variants)), variants)
    _add_legend(figure, axes[0].get_legend_handles_labels()[0])
    _set_title(figure, tables, config["comparison"])
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
    rounds = rounds.assign(first_node=rounds["node"].str.split("+").str[0].astype(int))
    many = rounds["first_node"].max() >= len(_NODE_COLORS)
    names = list(dict.fromkeys(episodes["label"]))
    chosen = [name for name in ("random", *learned_labels(tables)) if name in names] or names[:1]
    chosen = chosen[:MOST_PANELS]
    limit, goal = episodes["max_rounds"].iloc[0], episodes["goal_accuracy"].iloc[0]
    figure = Figure(figsize=(DOUBLE, 1.05 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots(len(chosen), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, chosen, strict=True):
        episode = typical_episode(episodes, name)
        of_label = rounds[(rounds["label"] == name) & (rounds["seed"] == episode["seed"])]
        walk = of_label[of_label["episode"] == episode["episode"]].sort_values("round")
        for x, node in zip(walk["round"], walk["first_node"], strict=True):
            _draw_node(axis, x, node, "white" if many else _NODE_COLORS[node])
        axis.plot(walk["round"], walk["accuracy"], color=BLACK, marker="o", ms=2, lw=1)
        axis.axhline(goal, color=GREY, lw=0.8, ls=":")
        if episode["goal_reached"]:
            end = (episode["rounds"], walk["accuracy"].iloc[-1])
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


def _draw_node(axis: Axes, x: int, node: int, color: str) -> None:
    """Draw a numbered square above the accuracies."""
    axis.add_patch(Rectangle((x - 0.46, 1.1), 0.92, 0.28, fc=color, ec=GREY, lw=0.4))
    text = "white" if color in _DARK else BLACK
    axis.text(x, 1.235, str(node), ha="center", va="center", fontsize=7, color=text)


# --- Training --------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw_training(tables: Tables) -> Figure:
    """Draw rounds and cost over the trainings of the DQNs, a line per label."""
    training = tables["training"]
    window = min(plot.WINDOW, max(1, training["episode"].max() // 3))
    curves = {
        column: {
            label: rows.pivot(index="episode", columns="seed", values=column).rolling(window).mean()
            for label, rows in training.groupby("label", sort=False)
        }
        for column in ("rounds", "communication_cost")
    }
    figure = _draw_training_lines(curves, tables)
    seeds = _counted(training.groupby("label")["seed"].nunique(), "seed")
    note = plot.data_note(training["dataset"].iloc[0])
    figure.suptitle(f"Training, moving average with window {window} (data: {note}; {seeds})")
    return figure


def _draw_training_lines(curves: dict[str, dict[str, pd.DataFrame]], tables: Tables) -> Figure:
    """A line per label, with a 95 % band from five seeds on, and random's mean in the tests."""
    limit = tables["episodes"]["max_rounds"].max()
    figure = Figure(figsize=(DOUBLE, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, (column, by_label) in zip(axes, curves.items(), strict=True):
        styles = zip(cycle(plot.COLORS), cycle(plot.LINES), strict=False)
        for (label, each), (color, line) in zip(by_label.items(), styles, strict=False):
            axis.plot(each.mean(axis=1), line, color=color, marker="o", markevery=[-1], label=label)
            if each.shape[1] >= plot.FEWEST:
                half = stats.t.ppf(0.975, each.shape[1] - 1) * each.sem(axis=1)
                low, high = each.mean(axis=1) - half, each.mean(axis=1) + half
                high = high.clip(upper=limit) if column == "rounds" else high
                axis.fill_between(each.index, low.clip(lower=0), high, color=color, alpha=0.2, lw=0)
        rows = _rows(tables["estimates"], column)
        # A training with several nodes per round counts its cost otherwise.
        several = tables["rounds"].loc[tables["rounds"]["label"].isin(by_label), "node"]
        comparable = column == "rounds" or not several.str.contains("+", regex=False).any()
        if "random" in rows.index and comparable:
            level = rows.loc["random", "mean"]
            axis.axhline(level, color=GREY, lw=1, ls=":", label="random (test episodes)")
        axis.set(ylabel=_AXES[column], xlabel="episode", ylim=(0, None))
        locator = MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        axis.xaxis.set_major_locator(locator)
    _add_legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


# --- Report ----------------------------------------------------------------------------------


def report(folder: Path, tables: Tables) -> str:
    """Return what a comparison's estimates and jobs say, as Markdown tables.

    Args:
        folder: the comparison's.
        tables: of ``draw_comparison``.
    """
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
    """A Markdown table of estimates with their intervals, a row per variant and method.

    Args:
        table: estimates; a column ``mark``, if there is one, has texts to write after the means.
        varied: the heading of the variants; empty if nothing varies.
        columns: by heading, a quantity and how a number of it is formatted.
    """

    def text(value: float, form: str) -> str:
        # Infinite: a training that is never paid back, or a cost where random has none.
        return "infinite" if np.isinf(value) else form.format(value).replace("%", " %")

    first = ([varied] if varied else []) + ["method", "seeds x episodes"]
    lines = ["| " + " | ".join([*first, *columns]) + " |"]
    lines.append("|---" * (len(first) + len(columns)) + "|")
    for (variant, method), rows in table.groupby(["variant", "method"], sort=False):
        rows, cells, size = rows.set_index("quantity"), [], ""
        for quantity, form in columns.values():
            if quantity not in rows.index:
                cells.append("")
                continue
            row = rows.loc[quantity]
            size = size or f"{row['seeds']} x {row['episodes'] // row['seeds']}"
            cell = text(row["mean"], form) + row.get("mark", "")
            if not np.isnan(row["low"]):
                cell += f" [{text(row['low'], form)}, {text(row['high'], form)}]"
            cells.append(cell)
        if size:
            cells = [variant] * bool(varied) + [method, size, *cells]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _changes(tables: Tables) -> list[str]:
    """The table of changes against random, with the published ones."""
    table = tables["estimates"]
    change = changes(table).assign(mark="")
    for row in change[change["quantity"] == "communication_cost_change"].itertuples():
        misses = estimates.misses_more_often(tables["episodes"], row.variant, row.method)
        change.loc[row.Index, "mark"] = "*" if misses and row.mean < 0 else ""
    lines = _markdown(
        pd.concat([table.assign(mark=""), change]),
        tables["config"]["parameter"],
        {
            "rounds": ("rounds_change", "{:+.1%}"),
            "communication cost": ("communication_cost_change", "{:+.1%}"),
            "P(fewer rounds)": ("rounds_improvement", "{:.2f}"),
            "P(less cost)": ("communication_cost_improvement", "{:.2f}"),
        },
    )
    if not tables["config"]["parameter"]:
        published = [f"-{100 * PUBLISHED[c]:.1f} %" for c in ("rounds", "communication_cost")]
        lines.append(f"| paper, HL on MNIST |  | {' | '.join(published)} |  |  |")
    if change["mark"].any():
        lines += ["", "\\* saved while the goal is reached less often than by random."]
    return lines


def _sizes(tables: Tables) -> list[str]:
    """What the numbers rest on, in sentences."""
    jobs = tables["jobs"]
    states = jobs["state"].value_counts()
    counts = [f"{states.get(name, 0)} {name}" for name in ("finished", "waiting", "failed")]
    wrong = jobs[jobs["error"] != ""]
    diverged = f"{int(tables['episodes']['diverged'].sum())} test episodes"
    if not tables["training"].empty:
        diverged += f" and {int(tables['training']['diverged'].sum())} of training"
    return [
        "Means over all test episodes; 95 % intervals in brackets, none with one seed. An episode "
        "that misses the goal counts with the limit of rounds.",
        f"Jobs: {len(jobs)}, {', '.join(counts)}; {diverged} diverged.",
        *(wrong["label"] + " seed " + wrong["seed"].astype(str) + ": " + wrong["error"]),
    ]


# --- Command ---------------------------------------------------------------------------------


def _draw_all(folders: list[Path], format_: str) -> int:
    status = 0
    for folder in folders:
        if not (folder / "jobs.csv").exists():
            raise UserError(f"{folder}: holds no comparison, takes results/<comparison>")
        tables = draw_comparison(folder, format_)
        print(report(folder, tables))
        status |= int((tables["jobs"]["error"] != "").any())
    return status


def main(arguments: list[str] | None = None) -> int:
    """Draw the comparisons named on the command line and return the exit status.

    It is 2 if a folder holds no comparison, and 1 if a file can't be written or a job has failed.
    """
    examples = "  python3 -m experiments.figures results/paper-mnist"
    parser = cli.Parser(
        "experiments.figures",
        "Draw the figures of comparisons again, from their CSVs, and print their reports.",
        examples,
    )
    parser.usage = "python3 -m experiments.figures [options] results/<comparison> ..."
    add = parser.add_argument
    add("folder", nargs="+", type=Path, help="folder of a comparison")
    add("--format", choices=list(plot.FORMATS), default="png", help="of the figures [png]")
    parsed = parser.parse_args(arguments)
    return cli.exit_status("experiments.figures", lambda: _draw_all(parsed.folder, parsed.format))


if __name__ == "__main__":
    sys.exit(main())

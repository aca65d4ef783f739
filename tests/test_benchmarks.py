"""The benchmarks' counts, their plot, and the README's speed tables."""

import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT

import models
import plot

sys.path.append(str(PROJECT / "benchmarks"))

import rounds

README = (PROJECT / "README.md").read_text(encoding="utf-8")
RESULTS = PROJECT / "results" / "benchmark"


def test_floating_point_operations_counted_from_the_network():
    """By every layer's output positions, each a sum of as many products as its kernel has."""
    layers = [x for x in models.foundation_network((28, 28, 1), 10).layers if x.weights]
    forward = [
        2 * int(np.prod(layer.output.shape[1:-1])) * int(np.prod(layer.kernel.shape))
        for layer in layers
    ]
    assert sum(forward) == rounds.FORWARD == 3_792_000
    # Every layer's gradient by its weights and its inputs, but for the images themselves.
    assert 2 * sum(forward) - forward[0] == rounds.BACKWARD == 7_008_000


def test_actions_take_turns():
    calls = []
    times = rounds.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in times.values()] == [3, 3]


def test_readme_has_the_committed_reports():
    lines = [
        line
        for name in ("report.md", "variants.md")
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert len(lines) > 25
    for line in lines:
        assert line in README
    scaling = pd.read_csv(RESULTS / "scaling.csv")
    for row in scaling.itertuples(index=False):
        assert "| " + " | ".join(map(str, row)) + " |" in README


def test_nothing_grows_faster_than_the_number_of_nodes():
    scaling = pd.read_csv(RESULTS / "scaling.csv")
    assert set(scaling["nodes"]) == {10, 100, 1000}
    for _, rows in scaling.groupby("observation"):
        for column in ("seconds_per_round", "peak_memory_mb"):
            per_node = (rows.sort_values("nodes")[column] / sorted(rows["nodes"])).to_numpy()
            assert (np.diff(per_node) < 0).all()


def test_the_plot_shows_the_table():
    scaling = pd.read_csv(RESULTS / "scaling.csv")
    figure = rounds.draw_scaling(scaling)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for observation, rows in scaling.groupby("observation"):
        assert lines[observation].get_ydata() == pytest.approx(rows["seconds_per_round"])
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log"]
    plot.plt.close(figure)

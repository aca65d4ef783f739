"""The benchmarks' counts, their plot, and the README's speed tables."""

import re
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT, small_settings

import data
import environment
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


def test_readme_speaks_of_the_committed_reports():
    report = (RESULTS / "report.md").read_text(encoding="utf-8")
    speed = README[README.index("## Speed") : README.index("## Departures")]
    speed = " ".join(speed.split())
    again, first = re.search(r"takes (\S+) times .* first time (\S+) times", report).groups()
    assert f"**{again} times**" in speed
    assert f"first time {first} times" in speed
    cells = {
        row[0]: row for row in re.findall(r"^\| (\w+) \| (\S+) \|.*\| (.*?) \|$", report, re.M)
    }
    for what in ("evaluation", "training"):
        assert re.search(rf"{what} at \d+ % \({cells[what][2]}\)", speed)
    ours = f"{float(cells['round'][1]):.2f}"
    assert f"0.92 / {ours} is about {0.92 / float(ours):.1f}" in speed
    versions = re.findall(r"(?:tensorflow|keras|numpy) [\d.]+", report.splitlines()[0])
    assert len(versions) == 3
    for package in versions:
        assert package in speed.lower()


def test_neither_time_nor_memory_follows_the_number_of_nodes():
    scaling = pd.read_csv(RESULTS / "scaling.csv")
    assert set(scaling["observation"]) == {"broadcast", "local"}
    for _, rows in scaling.groupby("observation"):
        rows = rows.set_index("nodes")
        assert set(rows.index) == {10, 100, 1000}
        for column in ("seconds_per_round", "peak_memory_mb"):
            assert rows.loc[1000, column] < 1.5 * rows.loc[10, column]


@pytest.mark.parametrize("observation", ["broadcast", "local"])
def test_the_pca_sees_no_more_models_than_rounds_made(monkeypatch, few, observation):
    """However many nodes there are: each round makes one, and there is the initial one."""
    seen = []
    pca_scores = environment.pca_scores

    def spy(models, owners, components):
        seen.append((len(models), len(owners)))
        return pca_scores(models, owners, components)

    monkeypatch.setattr(environment, "pca_scores", spy)
    settings = small_settings(
        NUM_NODES=50, SAMPLES_PER_NODE=20, OBSERVATION=observation, GOAL_ACCURACY=1.0
    )
    env = environment.DecentralizedLearning(settings, few)
    env.reset(seed=0)
    for node in range(1, settings.MAX_ROUNDS):
        env.step(node)
    assert len(seen) == settings.MAX_ROUNDS == 5
    for rounds_made, (distinct, nodes) in enumerate(seen, start=1):
        assert distinct <= rounds_made + 1
        assert nodes == 50


def test_what_is_timed_of_a_round(tmp_path, few, monkeypatch):
    """Each part does its work on an environment as main.py has it."""
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    settings = small_settings(
        RESULTS_DIR=str(tmp_path), THREADS=models.use_cpu(0), GOAL_ACCURACY=1.0, EPISODES=2
    )
    bench = rounds.Bench(settings)
    parts = bench.rest(1)
    bench.run.__exit__(None, None, None)
    assert set(parts) == {"observation", "decision", "records", "agent's training"}
    assert all(value > 0 for value in parts.values())
    assert len(bench.agent.memory) == 2 * (settings.MAX_ROUNDS - 1)


def test_the_plot_shows_the_table():
    scaling = pd.read_csv(RESULTS / "scaling.csv")
    figure = rounds.draw_scaling(scaling)
    for axis, column in zip(figure.axes, ("seconds_per_round", "peak_memory_mb"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        for observation, rows in scaling.groupby("observation"):
            assert lines[observation].get_xdata() == pytest.approx(rows["nodes"])
            assert lines[observation].get_ydata() == pytest.approx(rows[column])
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log"]
    plot.plt.close(figure)

import itertools
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT, run
from test_estimates import VALUES, write_comparison

import compare
import plot
from config import UserError
from records import EPISODE_COLUMNS, ROUND_COLUMNS, SHARD_COLUMNS


def make_run(folder, episodes=50, dataset="mnist", first_epsilon=1.0, chosen_by="random"):
    """CSVs as a run writes them, with numbers that are easy to check."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, walks = [], []
    for episode in range(1, episodes + 1):
        rounds = 30 if episode <= 20 else 10
        for r in range(1, rounds + 1):
            node = (r - 1) % 4 if episode <= 20 else 2
            walks.append([dataset, episode, r, node, chosen_by, 0.05, rng.random() * 0.7, -0.6])
        epsilon = first_epsilon * np.exp(-0.02 * (episode - 1))
        rows.append(
            [
                *(dataset, episode, rounds, int(episode % 5 > 0)),
                *(0.8, -0.6 * rounds, 0.05 * rounds),
                *(epsilon, 0.1, 0, 0.8, 36, 2.0),
            ]
        )
    pd.DataFrame(rows, columns=EPISODE_COLUMNS).to_csv(folder / "episodes.csv", index=False)
    pd.DataFrame(walks, columns=ROUND_COLUMNS).to_csv(folder / "rounds.csv", index=False)
    shards = [[dataset, n, c, 400 if n == c else 11] for n in range(4) for c in range(10)]
    pd.DataFrame(shards, columns=SHARD_COLUMNS).to_csv(folder / "shards.csv", index=False)
    return folder


def test_drawing_needs_no_tensorflow():
    """Whose import takes longer than to draw."""
    code = "import sys, plot; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_handovers_by_hand():
    rounds = pd.DataFrame(
        {
            "episode": [1, 1, 1, 1, 2, 2],
            "round": [1, 2, 3, 4, 1, 2],
            "node": ["0", "1", "0", "0", "0", "2"],
        }
    )
    # From 0: to 1, to 0, and in episode 2 to 2. From 1: to 0. Nothing from episode to episode.
    expected = [[1 / 3, 1 / 3, 1 / 3], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(plot.handovers(rounds, 3), expected)


def test_handovers_of_several_nodes():
    rounds = pd.DataFrame({"episode": [1, 1, 1], "round": [1, 2, 3], "node": ["0", "2+1", "1+0"]})
    # 0 hands to 2 and 1; then 2, the first of its round, to 1 and 0.
    np.testing.assert_allclose(plot.handovers(rounds, 3), [[0, 0.5, 0.5], [0, 0, 0], [0.5, 0.5, 0]])


def test_summary_by_hand(tmp_path):
    lines = plot.summary(make_run(tmp_path / "x")).splitlines()
    # Equal numbers have an interval of no width.
    assert lines[2] == "| 1 to 20 | 30.0 ± 0.0 | 1.50 ± 0.00 | 80% | -18.0 ± 0.0 |"
    assert lines[3] == "| 21 to 40 | 10.0 ± 0.0 | 0.50 ± 0.00 | 80% | -6.0 ± 0.0 |"
    assert lines[4] == "| 41 to 50 | 10.0 ± 0.0 | 0.50 ± 0.00 | 80% | -6.0 ± 0.0 |"
    assert lines[5] == (
        "50 episodes on mnist in 1.7 min: 10 missed the goal (counted with 36 rounds), 0 diverged"
    )


def test_interval_by_hand():
    # Five values: mean 3, deviation root 2.5, an error of 0.7071; 4 degrees of freedom: 2.776.
    assert plot._mean(pd.Series([1.0, 2, 3, 4, 5]), 3) == "3.000 ± 1.963"
    assert plot._mean(pd.Series([1.0, 2, 3, 4]), 1) == "2.5"


def test_a_torn_last_row_is_left_out(tmp_path):
    folder = make_run(tmp_path / "x", episodes=20)
    whole = plot.summary(folder)
    for name, tail in (("episodes", "mnist,21,3"), ("rounds", "mnist,20,3"), ("rounds", ",1,2,")):
        with (folder / f"{name}.csv").open("a") as file:
            file.write(tail)
    assert plot.summary(folder) == whole
    plot.draw_run(folder)


def test_a_failing_write_keeps_the_old_figures(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "x")
    plot.draw_run(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot.Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plot.draw_run(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_figures_come_from_the_csvs_alone(tmp_path):
    folder = make_run(tmp_path / "x")
    done = run(folder, script="plot.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".pdf")}
    assert len(made) == 8
    assert all(made[n].startswith(b"\x89PNG" if n.endswith("png") else b"%PDF") for n in made)
    # The same CSVs give the same files.
    plot.draw_run(folder)
    assert all((folder / name).read_bytes() == content for name, content in made.items())


def texts(figure):
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]


@pytest.mark.parametrize("draw", ["learning", "accuracy", "walk", "shards"])
@pytest.mark.parametrize(
    ("dataset", "words"), [("digits", "bundled digits, NOT MNIST"), ("mnist", "[data: mnist]")]
)
def test_every_figure_names_the_data_and_its_axes(tmp_path, draw, dataset, words):
    tables = plot.read_run(make_run(tmp_path / "x", dataset=dataset))
    figure = getattr(plot, f"draw_{draw}")(tables)
    assert words in figure.get_suptitle()
    assert figure.axes[0].get_ylabel()
    assert figure.axes[-1].get_xlabel() or figure.axes[-1].get_ylabel()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, True),
        ({"dataset": "digits"}, False),
        ({"first_epsilon": 0.5}, False),
        ({"chosen_by": "repeated"}, False),
    ],
)
def test_published_line_where_it_applies(tmp_path, options, shown):
    figure = plot.draw_learning(plot.read_run(make_run(tmp_path / "x", **options)))
    lines = {
        line.get_label().split(":")[0]: line.get_ydata()[0]
        for axis in figure.axes[1:]
        for line in axis.get_lines()
        if str(line.get_label()).startswith("published")
    }
    assert bool(lines) is shown
    if shown:
        levels = [
            line.get_ydata()[0]
            for axis in figure.axes
            for line in axis.get_lines()
            if str(line.get_label()).startswith("published")
        ]
        # 49.2 % of 30 rounds and 25.4 % of a cost of 1.5.
        assert levels == pytest.approx([14.76, 0.381])


def test_moving_average_is_over_20_episodes(tmp_path):
    figure = plot.draw_learning(plot.read_run(make_run(tmp_path / "x")))
    (mean,) = [
        line for line in figure.axes[1].get_lines() if "mean of the last 20" in line.get_label()
    ]
    values = mean.get_ydata()
    assert np.isnan(values[18])
    assert values[19] == pytest.approx(30)
    assert values[29] == pytest.approx(20)  # ten of 30, ten of 10
    assert values[39] == pytest.approx(10)


def test_accuracy_holds_the_last_value_of_ended_episodes(tmp_path):
    tables = plot.read_run(make_run(tmp_path / "x"))
    tables["rounds"]["accuracy"] = np.where(tables["rounds"]["round"] < 5, 0.2, 0.6)
    short = (tables["rounds"]["episode"] == 1) & (tables["rounds"]["round"] > 2)
    tables["rounds"] = tables["rounds"][~short]
    figure = plot.draw_accuracy(tables)
    (mean,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "mean"]
    # 19 episodes at 0.6 and one that ended at 0.2.
    assert mean.get_ydata()[9] == pytest.approx((19 * 0.6 + 0.2) / 20)
    # Up to the limit, although all have ended after 30 rounds.
    assert mean.get_xdata()[-1] == 36
    assert mean.get_ydata()[-1] == pytest.approx((19 * 0.6 + 0.2) / 20)


def test_a_single_episode_can_be_drawn(tmp_path):
    folder = make_run(tmp_path / "x", episodes=1)
    plot.draw_run(folder)
    assert "| 1 |" in plot.summary(folder)


def test_missing_and_foreign_files_are_named(tmp_path, capsys):
    done = run(tmp_path / "nowhere", script="plot.py")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere: no such folder" in done.stderr
    (tmp_path / "results" / "digits-seed0").mkdir(parents=True)
    assert plot.main([str(tmp_path / "results")]) == 2
    assert "results: holds no run, comparison or finished audit" in capsys.readouterr().err
    folder = make_run(tmp_path / "x")
    shutil.copy(folder / "episodes.csv", folder / "rounds.csv")
    (folder / "rounds.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"rounds\.csv: is not such a table"):
        plot.draw_run(folder)


# --- Comparisons -----------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, as Matplotlib has them, by name."""
    kept = {}
    monkeypatch.setattr(plot, "save_figure", lambda p, draw, t: kept.update({p.name: draw(t)}))
    yield kept
    plt.close("all")


@pytest.fixture
def drawn(tmp_path, figures):
    """A comparison's figures."""
    training = {s: [(30 - e, 1.0 + s) for e in range(6)] for s in (0, 1)}
    write_comparison(tmp_path, VALUES, training=training)
    plot.draw_comparison(tmp_path)
    return figures


def test_figures_of_a_comparison(drawn):
    assert set(drawn) == {"methods", "accuracy", "reduction", "training", "walks"}
    for figure in drawn.values():
        assert "[data: mnist]" in figure.get_suptitle()
    assert "2 to 3 seeds x 2 episodes" in drawn["methods"].get_suptitle()
    assert "2 seeds x 2 episodes" in drawn["reduction"].get_suptitle()


def test_points_are_the_seeds_and_their_mean(drawn):
    axis = drawn["methods"].axes[0]
    points = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [[15.0, 25.0], [25.0, 35.0, 26.0]]
    assert list(axis.containers[0].lines[0].get_xdata()) == pytest.approx([20, 172 / 6])
    (limit,) = (line for line in axis.lines if line.get_linestyle() == ":")
    assert list(limit.get_xdata()) == [36, 36]


def test_only_a_cost_far_beyond_random_s_is_cut_off(tmp_path, figures):
    values = {
        "random": {0: [(30, 1.0), (36, 1.4)], 1: [(28, 1.2), (30, 1.2)]},
        "stay": {0: [(36, 0.0), (36, 0.0)], 1: [(36, 0.0), (20, 0.0)]},
        "centralized": {0: [(1, 0.5), (1, 0.5)], 1: [(1, 0.5), (1, 0.5)]},
        "fedavg": {0: [(7, 7.2), (7, 7.2)], 1: [(7, 7.2), (7, 7.2)]},
    }
    write_comparison(tmp_path, values)
    plot.draw_comparison(tmp_path)
    rounds, cost, goal = figures["methods"].axes
    texts = [
        [t.get_text() for t in axis.texts if "→" in t.get_text()] for axis in (rounds, cost, goal)
    ]
    assert texts == [[], ["7.2 →"], []]
    assert 1.3 < cost.get_xlim()[1] < 2
    assert rounds.get_xlim()[1] > 36
    assert goal.get_xlim()[1] == 1.06


def write_variants(folder, parameter, variants, **more):
    """A comparison's tables as ``write_comparison`` writes them, for each value of a parameter."""
    jobs = []
    for variant, values in variants.items():
        write_comparison(folder / variant, values, **more)
        part = pd.read_csv(folder / variant / "jobs.csv", dtype=str, keep_default_na=False)
        part["folder"] = f"{variant}/" + part["folder"]
        jobs.append(part.assign(comparison="some", parameter=parameter, variant=variant))
    pd.concat(jobs).to_csv(folder / "jobs.csv", index=False)


def test_all_methods_have_a_mark(tmp_path, figures):
    """Of a comparison of values, and what a script added as well."""
    names = [*plot.METHODS, "mine"]
    values = {name: {0: [(10, 0.2)]} for name in names}
    write_variants(tmp_path, "GOAL_ACCURACY", {"0.7": values, "0.8": values})
    plot.draw_comparison(tmp_path)
    legend = figures["variants"].axes[0].get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [*(method.title for method in plot.METHODS.values()), "mine"]


def test_trainings_of_two_methods(tmp_path, figures):
    values = {name: {0: [(10, 0.2), (20, 0.4)]} for name in ("hl", "tuned")}
    write_comparison(tmp_path, values, training={0: [(30, 1.0)] * 6})
    shutil.copytree(tmp_path / "training-seed0", tmp_path / "training-tuned-seed0")
    path = tmp_path / "training-tuned-seed0" / "episodes.csv"
    pd.read_csv(path).assign(rounds=12).to_csv(path, index=False)
    plot.draw_comparison(tmp_path)
    axis = figures["training"].axes[0]
    lines = {line.get_label(): line.get_ydata()[-1] for line in axis.lines}
    assert lines == {"HL (DQN)": 30, "HL (tuned DQN)": 12}


def test_reductions_stand_beside_the_published_ones(drawn):
    for axis, published, expected in zip(
        drawn["reduction"].axes, (0.508, 0.746), (1 - 80 / 120, 1 - 0.8 / 4), strict=True
    ):
        (line,) = (line for line in axis.lines if line.get_linestyle() == "--")
        assert list(line.get_xdata()) == [published, published]
        assert axis.containers[0].lines[0].get_xdata() == pytest.approx([expected])
        assert f"published (MNIST) {published:.1%}" in [text.get_text() for text in axis.texts]


def test_walks_of_the_trained_policies(tmp_path, figures):
    """A panel for each seed of each DQN, a row for each episode, nothing after its end."""
    pairs = {0: [(3, 0.2), (2, 0.4)], 1: [(36, 0.2), (1, 0.0)]}
    write_comparison(tmp_path, {"random": pairs, "hl": pairs, "tuned": pairs})
    path = tmp_path / "tuned-seed1" / "rounds.csv"
    pd.read_csv(path).assign(node=["7+2", *[8] * 35, 9]).to_csv(path, index=False)
    plot.draw_comparison(tmp_path)
    panels = [axis for axis in figures["walks"].axes if axis.images]
    titles = [f"{title}, seed {seed}" for title in ("HL (DQN)", "HL (tuned DQN)") for seed in "01"]
    assert [axis.get_title() for axis in panels] == titles
    nodes = panels[0].images[0].get_array().filled(-1)
    np.testing.assert_array_equal(nodes, [[0] * 3 + [-1] * 33, [0] * 2 + [-1] * 34])
    nodes = panels[3].images[0].get_array().filled(-1)
    np.testing.assert_array_equal(nodes, [[7] + [8] * 35, [9] + [-1] * 35])
    # The first row is episode 1, and each node has a colour of its own.
    assert panels[0].images[0].get_extent() == pytest.approx([0.5, 36.5, 2.5, 0.5])
    colors = {panels[0].images[0].to_rgba(np.array([[node]]))[0, 0].tobytes() for node in range(10)}
    assert len(colors) == 10


def test_accuracy_stays_where_an_episode_ended():
    rounds = pd.DataFrame(
        {
            "seed": [0, 0, 0, 1, 1],
            "episode": 1,
            "round": [1, 2, 3, 1, 2],
            "accuracy": [0.1, 0.2, 0.6, 0.3, 0.8],
        }
    )
    middle, low, high = plot._accuracy_curve(rounds, 4)
    np.testing.assert_allclose(middle, [0.2, 0.5, 0.7, 0.7])
    np.testing.assert_allclose(low, [0.1, 0.2, 0.6, 0.6])
    np.testing.assert_allclose(high, [0.3, 0.8, 0.8, 0.8])


def test_learning_curve(drawn):
    rounds, cost = drawn["training"].axes
    # Windows of two episodes of 30, 29, ..., 25 rounds; both seeds alike.
    mean = next(line for line in rounds.lines if line.get_label() == "mean of seeds")
    np.testing.assert_allclose(mean.get_ydata()[1:], [29.5, 28.5, 27.5, 26.5, 25.5])
    (random,) = (line for line in rounds.lines if line.get_label() == "random")
    assert random.get_ydata()[0] == pytest.approx(172 / 6)
    # Two seeds are too few for a band.
    assert not cost.collections
    assert "band" not in cost.get_xlabel()


def test_band_of_the_learning_curve(tmp_path, figures):
    values = {"hl": {seed: [(10, 0.2), (20, 0.4)] for seed in range(5)}}
    training = {seed: [(30, 5.0 * (seed == 4))] * 6 for seed in range(5)}
    write_comparison(tmp_path, values, training=training)
    plot.draw_comparison(tmp_path)
    cost = figures["training"].axes[1]
    # Four costs of 0 and one of 5: 1, and 2.776 times the standard error of 1, not below 0.
    band = cost.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0, 3.776), abs=1e-3)
    assert "with 95 % band" in cost.get_xlabel()


def test_a_figure_of_variants(tmp_path, figures):
    more = {
        method: {s: [(r + 4, c) for r, c in pairs] for s, pairs in by_seed.items()}
        for method, by_seed in VALUES.items()
    }
    write_variants(tmp_path, "GOAL_ACCURACY", {"0.7": VALUES, "0.8": more})
    plot.draw_comparison(tmp_path)
    assert set(figures) == {"variants"}
    axis = figures["variants"].axes[0]
    for container, mean in zip(axis.containers, (20, 172 / 6), strict=True):
        assert list(container.lines[0].get_ydata()) == pytest.approx([mean, mean + 4])
    assert [t.get_text() for t in figures["variants"].axes[-1].get_xticklabels()] == ["0.7", "0.8"]


def test_many_names_are_rows_that_can_be_read(tmp_path, figures):
    """As many as "changes" has: each has a row, a label that touches no other, and a panel."""
    variants = compare.COMPARISONS["changes"].variants
    values = {name: {"hl": {0: [(9 + r, 0.1 * r)]}} for r, name in enumerate(variants)}
    write_variants(tmp_path, "taken back", values, training={0: [(30, 1.0), (20, 0.5), (15, 0.1)]})
    for r, name in enumerate(variants):
        path = tmp_path / name / "training-seed0" / "episodes.csv"
        table = pd.read_csv(path)
        table.assign(rounds=table["rounds"] - 0.5 * r).to_csv(path, index=False)
    plot.draw_comparison(tmp_path)
    rounds, cost, _ = figures["variants"].axes
    assert list(rounds.containers[0].lines[0].get_xdata()) == [9 + r for r in range(len(variants))]
    assert list(rounds.containers[0].lines[0].get_ydata()) == list(range(len(variants)))
    assert [label.get_text() for label in rounds.get_yticklabels()] == list(variants)
    assert rounds.yaxis_inverted()  # the first is at the top
    assert list(cost.containers[0].lines[0].get_xdata())[:2] == [0.0, 0.1]
    figures["variants"].canvas.draw()
    boxes = [label.get_window_extent() for label in rounds.get_yticklabels()]
    assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))
    panels = [axis for axis in figures["training"].axes if axis.lines]
    assert [axis.get_title() for axis in panels] == list(variants)
    # One seed has no interval: a point without bars, on the axes and in the legend.
    assert not rounds.containers[0].has_xerr
    for r, axis in enumerate(panels):
        first, own = axis.lines
        assert (first.get_color(), own.get_color()) == ("0.65", "black")
        assert list(first.get_ydata()) == [30, 20, 15]
        assert list(own.get_ydata()) == [30 - 0.5 * r, 20 - 0.5 * r, 15 - 0.5 * r]
        assert not axis.collections  # nor has it a band


def test_bands_in_panels(tmp_path, figures):
    """Of nine values, each with five seeds, of which one differs."""
    values = {f"v{r}": {"hl": {seed: [(10, 0.2)] for seed in range(5)}} for r in range(9)}
    training = {seed: [(10 + 5 * (seed == 4), 1.0)] * 3 for seed in range(5)}
    write_variants(tmp_path, "taken back", values, training=training)
    plot.draw_comparison(tmp_path)
    figure = figures["training"]
    for axis in [axis for axis in figure.axes if axis.lines]:
        # Four of 10 rounds and one of 15: 11, and 2.776 times the standard error of 1.
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((8.224, 13.776), abs=1e-3)
    assert any("with 95 % band" in text for text in texts(figure))


def test_the_command_draws_a_comparison_again(tmp_path, capsys):
    write_comparison(tmp_path, VALUES)
    assert plot.main([str(tmp_path)]) == 0
    assert "| hl | 2 x 2 | 20.0 [" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.p*")}
    assert set(first) == {
        f"{n}.{s}" for n in ("methods", "accuracy", "reduction", "walks") for s in ("png", "pdf")
    }
    assert plot.main([str(tmp_path)]) == 0
    assert first == {path.name: path.read_bytes() for path in tmp_path.glob("*.p*")}
    (tmp_path / "hl-seed0" / "rounds.csv").unlink()
    assert plot.main([str(tmp_path)]) == 1

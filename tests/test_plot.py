import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import refusal

import plot
from config import PROJECT
from records import DISTANCE_COLUMNS, EPISODE_COLUMNS, ROUND_COLUMNS, SHARD_COLUMNS

FIGURES = ("accuracy", "data", "learning")


def make_run(
    folder,
    episodes=50,
    dataset="mnist",
    first_epsilon=1.0,
    chosen_by="random",
    nodes=10,
    goal=0.8,
    limit=36,
    main_class=400,
):
    """CSVs as a run writes them, with numbers that are easy to check."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, rounds = [], []
    for episode in range(1, episodes + 1):
        count = 30 if episode <= 20 else 10
        for r in range(1, count + 1):
            node = (r - 1) % nodes if episode <= 20 else 2
            rounds.append([dataset, episode, r, node, chosen_by, 0.05, rng.random() * 0.7, -0.6])
        epsilon = first_epsilon * np.exp(-0.02 * (episode - 1))
        outcome = [int(episode % 5 > 0), 0.8, -0.6 * count, 0.05 * count]
        rows.append([dataset, episode, count, *outcome, epsilon, 0.1, 0, goal, limit, 2.0])
    shards = [
        [dataset, n, c, main_class if n == c else 11] for n in range(nodes) for c in range(10)
    ]
    pairs = [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    distances = [[dataset, a, b, 0.01 * a + 0.001 * b] for a, b in pairs]
    for name, table, columns in (
        ("episodes", rows, EPISODE_COLUMNS),
        ("rounds", rounds, ROUND_COLUMNS),
        ("shards", shards, SHARD_COLUMNS),
        ("distances", distances, DISTANCE_COLUMNS),
    ):
        pd.DataFrame(table, columns=columns).to_csv(folder / f"{name}.csv", index=False)
    return folder


def lines_of(axis, label):
    return [line for line in axis.get_lines() if line.get_label() == label]


def text_of(axis):
    return [text.get_text() for text in axis.texts]


# --- Tables ----------------------------------------------------------------------------------


def test_summary_by_hand(tmp_path):
    lines = plot.summary(make_run(tmp_path / "x")).splitlines()
    # Equal numbers have an interval of no width.
    assert lines[2] == "| 1 to 20 | 30.0 ± 0.0 | 1.50 ± 0.00 | 80% | -18.0 ± 0.0 |"
    assert lines[3] == "| 21 to 40 | 10.0 ± 0.0 | 0.50 ± 0.00 | 80% | -6.0 ± 0.0 |"
    assert lines[4] == "| 41 to 50 | 10.0 ± 0.0 | 0.50 ± 0.00 | 80% | -6.0 ± 0.0 |"
    for part in ("50 episodes", "mnist", "1.7 min", "10 missed", "36 rounds", "0 diverged"):
        assert part in lines[5]


def test_the_summary_names_a_dqn_that_never_trained(tmp_path):
    folder = make_run(tmp_path / "x")
    assert "REPLAY_SAMPLE" not in plot.summary(folder)
    episodes = pd.read_csv(folder / "episodes.csv")
    episodes.assign(q_loss="").to_csv(folder / "episodes.csv", index=False)
    assert "REPLAY_SAMPLE" in plot.summary(folder)
    episodes.assign(q_loss="nan", diverged=1).to_csv(folder / "episodes.csv", index=False)
    assert "REPLAY_SAMPLE" not in plot.summary(folder)


def test_interval_by_hand():
    # Five values: mean 3, deviation root 2.5, an error of 0.7071; 4 degrees of freedom: 2.776.
    assert plot._mean(pd.Series([1.0, 2, 3, 4, 5]), 3) == "3.000 ± 1.963"
    assert plot._mean(pd.Series([1.0, 2, 3, 4]), 1) == "2.5"


def test_moving_average_by_hand():
    values = plot.moving_average(pd.Series(np.arange(1.0, 22)))
    assert values[:19].isna().all()
    assert values[19:].tolist() == [10.5, 11.5]
    # Of all so far, in a series of fewer than 20.
    assert plot.moving_average(pd.Series([2.0, 4, 9])).tolist() == [2, 3, 5]


def test_a_torn_last_row_and_an_unfinished_episode_are_left_out(tmp_path):
    folder = make_run(tmp_path / "x", episodes=20)
    whole, count = plot.summary(folder), len(plot.read_run(folder)["rounds"])
    with (folder / "rounds.csv").open("a") as file:
        file.write("mnist,21,1,0,starter,0.0,0.1,-0.9\nmnist,21,2,3,ran")
    with (folder / "episodes.csv").open("a") as file:
        file.write("mnist,21,3")
    assert plot.summary(folder) == whole
    assert len(plot.read_run(folder)["rounds"]) == count


# --- Figures of a run ------------------------------------------------------------------------


def test_the_command_in_a_process_of_its_own(tmp_path):
    folder = make_run(tmp_path / "x")
    code = (
        "import sys, plot; status = plot.main(sys.argv[1:]); "
        "sys.exit(status or 'tensorflow' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=PROJECT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "| 1 to 20 | 30.0 ± 0.0 |" in done.stdout.decode()
    made = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(made) == sorted(FIGURES)
    # The same CSVs give the same files.
    plot.draw_run(folder)
    assert all((folder / f"{name}.png").read_bytes() == made[name] for name in made)


def test_formats(tmp_path, capsys):
    folder = make_run(tmp_path / "x", episodes=2)
    assert plot.main([str(folder), "--format", "pdf"]) == 0
    assert plot.main([str(folder), "--format", "svg"]) == 0
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".csv"}
    assert set(made) == {f"{name}.{suffix}" for name in FIGURES for suffix in ("pdf", "svg")}
    assert made["data.pdf"].startswith(b"%PDF")
    assert b"<svg" in made["data.svg"]
    for suffix in ("pdf", "svg"):
        again = tmp_path / f"again.{suffix}"
        plot.save_figure(again, plot.draw_data(plot.read_run(folder)))
        assert again.read_bytes() == made[f"data.{suffix}"]
    assert "--format" in refusal(plot.main, [str(folder), "--format", "gif"], capsys)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("nodes", [4, 30])
def test_figures_name_data_and_axes_in_texts_that_fit(tmp_path, name, nodes):
    figure = getattr(plot, f"draw_{name}")(plot.read_run(make_run(tmp_path / "x", nodes=nodes)))
    plot.save_figure(tmp_path / "figure.png", figure)
    texts = [t for t in figure.findobj(plot.matplotlib.text.Text) if t.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7
    assert figure.get_figwidth() == 7
    assert "(data: mnist)" in figure.get_suptitle()
    assert figure.axes[0].get_ylabel()
    assert figure.axes[-1].get_xlabel() or figure.axes[-1].get_ylabel()
    left, bottom, right, top = figure.get_tightbbox().extents
    assert min(left, bottom) >= 0
    assert right <= figure.get_figwidth()
    assert top <= figure.get_figheight()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, True),
        ({"dataset": "digits"}, False),
        ({"first_epsilon": 0.5}, False),
        ({"chosen_by": "repeated"}, False),
        ({"episodes": 9}, False),
        ({"nodes": 4}, False),
        ({"goal": 0.7}, False),
        ({"limit": 40}, False),
        ({"main_class": 250}, False),
    ],
)
def test_published_line_where_it_applies(tmp_path, options, shown):
    figure = plot.draw_learning(plot.read_run(make_run(tmp_path / "x", **options)))
    lines = [line for axis in figure.axes for line in lines_of(axis, "published")]
    # 49.2 % of 30 rounds and 25.4 % of a cost of 1.5.
    levels = [14.76, 0.381] if shown else []
    assert [line.get_ydata()[0] for line in lines] == pytest.approx(levels)
    assert ["50.8%" in "".join(text_of(figure.axes[1]))] == [shown]


def test_curves_and_points_of_the_learning_figure(tmp_path):
    figure = plot.draw_learning(plot.read_run(make_run(tmp_path / "x")))
    expected = {0: (-18, -12, -6), 1: (30, 20, 10), 2: (1.5, 1.0, 0.5)}
    for place, values in expected.items():
        (mean,) = lines_of(figure.axes[place], "mean of the last 20 episodes")
        y = np.asarray(mean.get_ydata())
        assert np.isnan(y[18])
        # Twenty of the first value, ten of each, twenty of the second.
        assert y[[19, 29, 39]] == pytest.approx(values)
        (reached,) = lines_of(figure.axes[place], "goal reached")
        (missed,) = lines_of(figure.axes[place], "goal missed")
        assert list(missed.get_xdata()) == list(range(5, 51, 5))
        assert len(reached.get_xdata()) == 40
        assert reached.get_marker() != missed.get_marker()
    (limit,) = (line for line in figure.axes[1].get_lines() if line.get_linestyle() == ":")
    assert list(limit.get_ydata()) == [36, 36]


def test_accuracy_keeps_the_last_value_of_ended_episodes(tmp_path):
    tables = plot.read_run(make_run(tmp_path / "x"))
    tables["rounds"]["accuracy"] = np.where(tables["rounds"]["round"] < 5, 0.2, 0.6)
    short = (tables["rounds"]["episode"] == 1) & (tables["rounds"]["round"] > 2)
    tables["rounds"] = tables["rounds"][~short]
    figure = plot.draw_accuracy(tables)
    assert [axis.get_title() for axis in figure.axes] == ["episodes 1 to 20", "episodes 31 to 50"]
    (mean,) = lines_of(figure.axes[0], "mean")
    # 19 episodes at 0.6 and one that ended at 0.2.
    assert mean.get_ydata()[9] == pytest.approx((19 * 0.6 + 0.2) / 20)
    # Up to the limit, although all have ended after 30 rounds.
    assert mean.get_xdata()[-1] == 36
    assert mean.get_ydata()[-1] == pytest.approx((19 * 0.6 + 0.2) / 20)


def test_data_figure_has_the_shards_and_both_halves_of_the_distances(tmp_path):
    folder = make_run(tmp_path / "x", nodes=3)
    shards = pd.read_csv(folder / "shards.csv")
    shards.sample(frac=1, random_state=0).to_csv(folder / "shards.csv", index=False)
    figure = plot.draw_data(plot.read_run(folder))
    images, distances = (axis.images[0].get_array() for axis in figure.axes[:2])
    np.testing.assert_array_equal(images, np.full((3, 10), 11) + 389 * np.eye(3, 10))
    expected = [[0, 0.001, 0.002], [0.001, 0, 0.012], [0.002, 0.012, 0]]
    np.testing.assert_allclose(distances, expected)
    assert text_of(figure.axes[1]) == ["", ".001", ".002", ".001", "", ".012", ".002", ".012", ""]


def test_no_numbers_in_the_cells_of_many_nodes(tmp_path):
    tables = plot.read_run(make_run(tmp_path / "x", nodes=100))
    assert not any(text_of(axis) for axis in plot.draw_data(tables).axes)


@pytest.mark.filterwarnings("error")
def test_a_single_episode_can_be_drawn(tmp_path):
    folder = make_run(tmp_path / "x", episodes=1)
    plot.draw_run(folder)
    assert "| 1 |" in plot.summary(folder)
    figure = plot.draw_accuracy(plot.read_run(folder))
    assert [axis.get_title() for axis in figure.axes] == ["episode 1"]


# --- Overlay ---------------------------------------------------------------------------------


def test_overlay_of_runs_of_unequal_length(tmp_path):
    lengths = {"long": 50, "short": 25, "tiny": 3}
    runs = {
        n: plot.read_run(make_run(tmp_path / n, episodes=e))["episodes"] for n, e in lengths.items()
    }
    curves = plot.draw_overlay(runs).axes[1].get_lines()
    assert [line.get_label() for line in curves] == list(lengths)
    assert [line.get_xdata()[-1] for line in curves] == [50, 25, 3]
    # 25 episodes end with the mean of 15 of 30 rounds and 5 of 10.
    assert [line.get_ydata()[-1] for line in curves] == pytest.approx([10, 25, 30])
    assert len({line.get_color() for line in curves}) == 3
    assert len({line.get_linestyle() for line in curves}) == 3


def test_the_command_overlays_several_runs(tmp_path, capsys, monkeypatch):
    drawn, overlaid, draw_overlay = [], [], plot.draw_overlay

    def overlay(runs):
        overlaid.append(list(runs))
        return draw_overlay(runs)

    monkeypatch.setattr(plot, "draw_run", lambda folder, format_: drawn.append(str(folder)))
    monkeypatch.setattr(plot, "draw_overlay", overlay)
    folders = [str(make_run(tmp_path / n / "run", episodes=2)) for n in ("a", "b")]
    assert plot.main(folders) == 0
    assert capsys.readouterr().out.endswith(f": {tmp_path / 'overlay.png'}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "overlay.png"]
    assert drawn == folders
    assert overlaid == [["a/run", "b/run"]]


# --- Errors ----------------------------------------------------------------------------------


def test_what_is_no_run_is_named_and_nothing_is_written(tmp_path, capsys):
    folder = make_run(tmp_path / "results" / "x", episodes=2)
    comparison = make_run(tmp_path / "paper", episodes=2)
    (comparison / "jobs.csv").touch()
    for other, words in (
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path / "results", "results/episodes.csv"),
        (comparison, f"python3 -m experiments.figures {comparison}"),
        (make_run(tmp_path / "empty", episodes=0), "empty"),
    ):
        assert words in refusal(plot.main, [str(folder), str(other)], capsys)
    assert not list(tmp_path.glob("**/*.png"))


def test_a_failing_write_keeps_the_old_figures(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "x", episodes=2)
    for name in FIGURES:
        (folder / f"{name}.png").write_bytes(b"old")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot.Figure, "savefig", fail)
    assert plot.main([str(folder)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

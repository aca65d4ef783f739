"""The audit of the observations: its numbers by hand, its walks, its command."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, refusal, run, small_settings

import audit
import data
import models
import plot
from config import UserError, episode_seed
from environment import DecentralizedLearning
from records import read_arrays


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    """A small dataset, few trees, and figures that are kept instead of written."""
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    monkeypatch.setattr(plot, "save_figure", lambda path, draw, tables: plt.close(draw(tables)))
    trees = audit.ExtraTreesRegressor
    monkeypatch.setattr(audit, "ExtraTreesRegressor", lambda _, **more: trees(5, **more))


def start(folder, *arguments, **overrides):
    settings = {**SMALL, "RESULTS_DIR": folder, "THREADS": models.use_cpu(0), **overrides}
    for name in ("EPISODES", "REPLAY_SAMPLE"):  # an agent's
        del settings[name]
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return audit.main(audit.parse([*arguments, *sets]))


def test_the_share_of_variance_by_hand():
    """Mean 2, squares 4 + 1 + 0 + 1 + 4 = 10 around it; errors 1 + 0 + 0 + 1 + 0 = 2."""
    values, found = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 1, 2, 2, 4])
    walks = np.array([0, 0, 7, 7, 7])
    r2, low, high = audit.explained(values, found, walks, np.random.default_rng(0))
    assert r2 == pytest.approx(0.8)
    assert low <= 0.8 <= high
    perfect = audit.explained(values, values, walks, np.random.default_rng(0))
    assert perfect == pytest.approx((1, 1, 1))


@pytest.mark.filterwarnings("error")
def test_draws_without_variance_are_left_out():
    """Two walks of one value: half of the draws have the same walk twice; the others' R2 is 0."""
    values, found = np.array([0.1, 0.7]), np.array([0.4, 0.4])
    r2 = audit.explained(values, found, np.array([0, 1]), np.random.default_rng(0))
    assert r2 == pytest.approx((0, 0, 0))


def test_predictions_are_of_walks_that_were_not_learned_from():
    """Each walk has a value of its own: what a walk's number tells can't be learned from others."""
    rng = np.random.default_rng(0)
    walks = np.repeat(np.arange(30), 8)
    own = rng.normal(size=30)[walks]
    shared = rng.normal(size=240)
    features = np.column_stack([own, shared]).astype(np.float32)
    assert np.corrcoef(audit.predicted(features, shared, walks, 0), shared)[0, 1] > 0.9
    told_by_number = audit.predicted(walks[:, None].astype(np.float32), own, walks, 0)
    assert abs(np.corrcoef(told_by_number, own)[0, 1]) < 0.5


def test_references_by_hand():
    found = audit.references(np.array([2, 0, 0]), 3, 4)
    assert found["last_node_round"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 2], [1, 0, 0, 3]]
    visits, ago, rounds = np.split(found["history"], [3, 6], axis=1)
    assert visits.tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1]]
    assert ago.tolist() == [[8, 8, 0], [0, 8, 1], [0, 8, 2]]  # never: twice the longest
    assert rounds.ravel().tolist() == [1, 2, 3]


def test_observations_that_recorded_ones_contain_by_hand():
    """Of two nodes with two components each."""
    walk = {"broadcast": np.arange(1, 5)[None], "local": np.arange(5, 9)[None]}
    found = audit.made(walk, 2)
    assert found["both"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert found["first_both_loading"].tolist() == [[1, 3, 5, 7]]


def test_what_a_walk_records(few):
    settings = small_settings(OBSERVATION="fixed", EXPLORATION_REPEAT=0.5)
    walk = audit.record_walk(DecentralizedLearning(settings, few), 3)
    assert walk["nodes"].shape == walk["accuracies"].shape == (5,)
    for kind in ("broadcast", "local"):
        for signs in ("loading", "holder"):
            env = DecentralizedLearning(small_settings(OBSERVATION=kind, PCA_SIGNS=signs), few)
            seen = [env.reset(seed=episode_seed(0, 3))[0]]
            seen += [env.step(node)[0] for node in walk["nodes"][1:]]
            if signs == "loading":
                np.testing.assert_array_equal(walk[kind], seen)
            elif kind == "local":
                np.testing.assert_array_equal(walk["local_holder"], seen)
            half = walk["first_both"][:, :4] if kind == "broadcast" else walk["first_both"][:, 4:]
            if signs == "holder":
                np.testing.assert_array_equal(half, np.array(seen)[:, ::4])
    assert walk["last_node"].tolist() == np.eye(4)[walk["nodes"]].tolist()
    np.testing.assert_array_equal(walk["last_node_moved"][:, :4], walk["last_node"])
    # The starter has moved the fresh model; of four rows one differs by it, centred 3/4 of it.
    env = DecentralizedLearning(small_settings(), few)
    env.reset(seed=episode_seed(0, 3))
    moved = np.linalg.norm(env._model - env._initial)
    assert walk["last_node_moved"][0, 4] == pytest.approx(moved * np.sqrt(3) / 2, rel=1e-4)


def test_choices_repeat_and_are_the_episode_s(few):
    env = DecentralizedLearning(
        small_settings(OBSERVATION="fixed", EXPLORATION_REPEAT=1.0, STARTER_NODE=2), few
    )
    assert set(audit.record_walk(env, 1)["nodes"]) == {2}
    env = DecentralizedLearning(small_settings(OBSERVATION="fixed", MAX_ROUNDS=20), few)
    walks = [audit.record_walk(env, episode)["nodes"].tolist() for episode in (1, 1, 2)]
    assert walks[0] == walks[1] != walks[2]
    assert len(set(walks[0])) == 4


def test_an_audit_from_start_to_end(tmp_path, capsys):
    assert start(tmp_path, "--walks", "6") == 0
    folder = tmp_path / "audit-digits"
    table = pd.read_csv(folder / "audit.csv")
    assert list(table) == list(plot.AUDIT_COLUMNS)
    assert table["observation"].tolist() == [o for o in plot.OBSERVATIONS for _ in plot.TARGETS]
    lengths = [len(read_arrays(folder / f"walk-{e}.npz")["nodes"]) for e in range(1, 7)]
    assert set(table["rounds"]) == {sum(lengths) - 6}
    assert set(table["episodes"]) == {6}
    assert (table["low"] <= table["high"]).all()
    # Nothing seen: no better than the mean, which each part has from the others.
    nothing = table[(table["observation"] == "zeros") & (table["target"] == "accuracy")]
    assert nothing["r2"].item() <= 0
    first = (folder / "audit.csv").read_bytes()
    (folder / "walk-4.npz").unlink()
    others = (folder / "walk-5.npz").stat().st_mtime_ns
    assert start(tmp_path, "--walks", "6") == 0
    assert (folder / "audit.csv").read_bytes() == first
    assert (folder / "walk-5.npz").stat().st_mtime_ns == others
    assert plot.main([str(folder)]) == 0
    assert "| broadcast (public code) | " in capsys.readouterr().out
    # Another one does not go there.
    assert start(tmp_path, "--walks", "6", LEARNING_RATE=0.1) == 2
    error = capsys.readouterr().err
    assert "holds another audit (LEARNING_RATE = 0.001 there, 0.1 now); choose" in error
    about = json.loads((folder / "audit.json").read_text())
    assert about["settings"]["LEARNING_RATE"] == 0.001
    assert about["versions"]["numpy"] == np.__version__
    # What joined the constants later had the public code's value before.
    del about["settings"]["KEEP_MOMENTS"], about["settings"]["PCA_SIGNS"]
    (folder / "audit.json").write_text(json.dumps(about))
    assert start(tmp_path, "--walks", "6") == 0
    capsys.readouterr()
    (folder / "audit.json").write_text("{}")
    assert start(tmp_path, "--walks", "6") == 2
    assert "audit.json: damaged ('settings'); choose another --name" in capsys.readouterr().err


def test_walks_of_one_round_teach_nothing(tmp_path, capsys):
    """With a goal of 1 % each ends with the starter's training."""
    assert start(tmp_path, "--walks", "6", GOAL_ACCURACY=0.01) == 2
    assert "0 walks with a second round, takes 6 or more" in capsys.readouterr().err


def test_the_figure_s_bars(tmp_path):
    rows = [
        ("digits", name, target, 0.1 * place + 0.01 * (target != "accuracy"), 0.0, 2.0, 60, 1800)
        for place, name in enumerate(plot.OBSERVATIONS)
        for target in plot.TARGETS
    ]
    pd.DataFrame(rows, columns=list(plot.AUDIT_COLUMNS)).to_csv(tmp_path / "audit.csv", index=False)
    tables = {"episodes": pd.read_csv(tmp_path / "audit.csv")}
    figure = plot.draw_explained(tables)
    (axis,) = figure.axes
    now, later = [c for c in axis.containers if hasattr(c, "patches")]
    assert [b.get_width() for b in now] == pytest.approx([0.1 * i for i in range(len(now))])
    assert [b.get_width() for b in later] == pytest.approx(
        [0.1 * i + 0.01 for i in range(len(now))]
    )
    assert [t.get_text() for t in axis.get_yticklabels()] == list(plot.OBSERVATIONS.values())
    assert "bundled digits, NOT MNIST" in figure.get_suptitle()
    plt.close(figure)
    # The file as a cut leaves it: without its last row.
    table = tables["episodes"]
    table.iloc[:-1].to_csv(tmp_path / "audit.csv", index=False)
    last = " ".join(table.iloc[-1][["observation", "target"]])
    with pytest.raises(
        UserError, match=rf"audit\.csv: {last} is missing, audit\.py makes it again"
    ):
        plot.audit_report(tmp_path)


def test_what_an_audit_sets_may_be_named():
    assert audit.parse(["--set", "NODES_PER_ROUND=1"]).settings.NODES_PER_ROUND == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--walks", "5"], "--walks: got 5, takes at least 6"),
        (["--walks", "0"], "argument --walks: got '0', takes an integer >= 1"),
        (["--set", "OBSERVATION=local"], "OBSERVATION: got 'local', takes 'fixed' in an audit"),
        (["--settings", "tuned"], "--settings: got it in an audit, which has no agent"),
        (
            ["--set", "DISCOUNT=0.5"],
            "DISCOUNT: got 0.5, takes none in an audit, which has no agent and counts no distances",
        ),
        (["--set", "DISTANCE_SEED=1"], "DISTANCE_SEED: got 1, takes none in an audit"),
        (["--set", "NODES_PER_ROUND=2"], "NODES_PER_ROUND: got 2, takes 1 in an audit"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert words in refusal(audit.parse, arguments, capsys)


def test_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--set", f"RESULTS_DIR={tmp_path / 'file'}", "--set", "SAMPLES_PER_NODE=64"]
    assert audit.main(audit.parse(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"audit.py: {tmp_path / 'file' / 'audit-digits'}: can't be written (")
    assert message.count("\n") == 1


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "audit-digits").mkdir()
    (tmp_path / "audit-digits" / "notes.txt").write_text("mine")
    assert start(tmp_path, "--walks", "6") == 2
    assert "holds no audit" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "audit-digits").iterdir()] == ["notes.txt"]


def test_help_outside(tmp_path):
    done = run("--help", script="audit.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

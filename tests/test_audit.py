import json

import filelock
import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, refusal, set_flags, small_settings

import config
import data
import models
from config import episode_seed
from environment import DecentralizedLearning
from experiments import audit
from records import read_arrays, read_table, write_arrays


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    monkeypatch.setitem(data.DATASETS, "digits", lambda data_dir: few)
    monkeypatch.setattr(audit, "_TREES", 5)


def start(folder, *arguments, **overrides):
    settings = {**SMALL, "RESULTS_DIR": folder, "THREADS": models.use_device(), **overrides}
    for name in config.names_of(config.AgentSettings) & {"EPISODES", "REPLAY_SAMPLE"}:
        del settings[name]
    return audit.main([*arguments, *set_flags(settings)])


# --- Numbers by hand ---


def test_r2_by_hand():
    # Mean 2: squares 4 + 1 + 0 + 1 + 4 = 10 around it; errors 1 + 0 + 0 + 1 + 0 = 2.
    values, predictions = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 1, 2, 2, 4])
    walks = np.array([0, 0, 7, 7, 7])
    # Of the walk 0 alone it is 1 - 1 / 0.5, of 7 alone 1 - 1 / 2; both are drawn now and then.
    interval = audit.r2_interval(values, predictions, walks, np.random.default_rng(0))
    assert interval == pytest.approx((0.8, -1, 0.8))
    perfect = audit.r2_interval(values, values, walks, np.random.default_rng(0))
    assert perfect == pytest.approx((1, 1, 1))


def test_predictions_are_of_walks_that_the_trees_were_not_fitted_to(few):
    # The node decides the accuracy, and "broadcast" shows it. "local" holds the walk's number,
    # from which the rest can't be predicted: it is the walk's own.
    rng = np.random.default_rng(0)
    settings = small_settings(OBSERVATION="zeros")
    walks = []
    for number in range(30):
        nodes = rng.integers(4, size=9)
        walk = {"nodes": nodes, "accuracies": nodes + rng.normal()}
        walk["broadcast"] = np.tile(nodes[:, None], 16).astype(np.float32)
        walk["local"] = np.full((9, 16), number, np.float32)
        walks.append(walk)
    table = audit.audit_table(walks, DecentralizedLearning(settings, few))
    r2 = table.set_index(["target", "observation"])["r2"]
    assert r2["accuracy", "broadcast"] > 0.4
    assert r2["accuracy"][["local", "zeros"]].max() < 0.1
    # The next accuracy is predicted with the next node.
    assert r2["next_accuracy", "zeros"] > 0.4


def test_observations_by_hand():
    # Three rounds; three nodes with three scores each.
    scores = np.arange(-8, 19, dtype=np.float32).reshape(3, 9)
    walk = {"nodes": np.array([2, 0, 0]), "broadcast": scores, "local": scores - 2}
    observed = audit.observations(walk, 3, max_rounds=4)
    assert list(observed) == list(audit.OBSERVATIONS)
    assert {(len(matrix), matrix.dtype.name) for matrix in observed.values()} == {(3, "float32")}
    assert observed["zeros"].tolist() == [[0, 0, 0]] * 3
    assert observed["last_node"].tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    # The first round's norm: 64 + 49 + 36 + 25 + 16 + 9 + 4 + 1 + 0 = 204.
    assert observed["last_node_moved"][0] == pytest.approx([0, 0, 1, np.sqrt(204)])
    assert observed["last_node_round"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 2], [1, 0, 0, 3]]
    visits, age, rounds = np.split(observed["history"], [3, 6], axis=1)
    assert visits.tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1]]
    assert age.tolist() == [[8, 8, 0], [0, 8, 1], [0, 8, 2]]  # never visited: 2 * 4
    assert rounds.ravel().tolist() == [1, 2, 3]
    assert observed["broadcast_and_local"][1].tolist() == [*range(1, 10), *range(-1, 8)]
    assert observed["first_scores"][1].tolist() == [1, 4, 7, -1, 2, 5]
    # In the second round node 0's local scores are -1, 0 and 1.
    assert observed["local_holder"][1].tolist() == [1, 0, 1, -2, 3, 4, -5, 6, 7]
    # In the first round node 2's first scores are -2 and -4.
    assert observed["both"][0].tolist() == [8, 5, 2, 10, 7, 4]


# --- Walks ---


def test_what_a_walk_records(few):
    settings = small_settings(OBSERVATION="zeros")
    walk = audit.record_walk(DecentralizedLearning(settings, few), 3)
    assert walk["nodes"].shape == walk["accuracies"].shape == (5,)
    observed = audit.observations(walk, 4, settings.MAX_ROUNDS)
    for kind in ("broadcast", "local", "both"):
        env = DecentralizedLearning(small_settings(OBSERVATION=kind), few)
        seen = [env.reset(seed=episode_seed(0, 3))[0]]
        seen = np.array([*seen, *(env.step(node)[0] for node in walk["nodes"][1:])])
        scale = np.repeat(np.float32([4, 0.4]), 4) if kind == "both" else 1
        np.testing.assert_array_equal(seen, observed[kind] * scale)
    # The starter has moved the fresh model; of four rows one differs by it, centred 3/4 of it.
    env = DecentralizedLearning(small_settings(), few)
    env.reset(seed=episode_seed(0, 3))
    moved = np.linalg.norm(env._model - env._initial)
    assert observed["last_node_moved"][0, 4] == pytest.approx(moved * np.sqrt(3) / 2, rel=1e-4)


def test_choices_by_hand(few):
    # The stream's draws: a share of REPEAT stays, the others go to a uniform node, also the same.
    settings = small_settings(OBSERVATION="zeros", MAX_ROUNDS=20, STARTER_NODE=2)
    rng, nodes = config.stream(0, "exploration", 1), [2]
    while len(nodes) < 20:
        nodes.append(nodes[-1] if rng.random() < 0.6 else int(rng.integers(4)))
    env = DecentralizedLearning(settings, few)
    walks = [audit.record_walk(env, episode)["nodes"].tolist() for episode in (1, 1, 2)]
    assert walks[0] == walks[1] == nodes != walks[2]


# --- The command ---


def test_an_audit_from_start_to_end(tmp_path, capsys):
    assert start(tmp_path, "--walks", "6") == 0
    folder, walks = tmp_path / "audit-digits", tmp_path / "audit-digits" / "walks"
    table = pd.read_csv(folder / "audit.csv")
    assert list(table) == list(audit.AUDIT_COLUMNS)
    assert table["observation"].tolist() == [o for o in audit.OBSERVATIONS for _ in audit.TARGETS]
    lengths = [len(read_arrays(walks / f"walk-{e}.npz")["nodes"]) for e in range(1, 7)]
    assert set(table["rounds"]) == {sum(lengths) - 6}
    assert set(table["episodes"]) == {6}
    about = json.loads((folder / "config.json").read_text())
    assert about["settings"]["LEARNING_RATE"] == 0.001
    # In the order of their declaration: the same bytes in each process.
    used = {*config.names_of(config.WorldSettings), "SEED"} - {"DATASET"}
    assert list(about["settings"]) == [n for n in config.Settings.model_fields if n in used]
    assert about["versions"]["numpy"] == np.__version__
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert audit.report(table) in printed

    first = (folder / "audit.csv").read_bytes()
    (folder / "audit.csv").unlink()
    (walks / "walk-4.npz").unlink()
    others = (walks / "walk-5.npz").stat().st_mtime_ns
    assert start(tmp_path, "--walks", "6") == 0
    assert (folder / "audit.csv").read_bytes() == first
    assert (walks / "walk-5.npz").stat().st_mtime_ns == others
    assert capsys.readouterr().out == printed
    # A finished table is drawn again without its walks.
    (folder / "audit.png").unlink()
    for path in walks.iterdir():
        path.unlink()
    assert start(tmp_path, "--walks", "6") == 0
    assert capsys.readouterr().out == printed
    assert (folder / "audit.png").exists()
    assert list(walks.iterdir()) == []


def prepare_folder(folder, count, **changes):
    """Make a folder with recorded walks and config.json, without recording."""
    (folder / "walks").mkdir(parents=True)
    settings = small_settings()
    dataset = data.load(settings)
    about = {
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "settings": {**settings.stored(), **changes},
    }
    (folder / "config.json").write_text(json.dumps(about))
    rng = np.random.default_rng(0)
    for episode in range(1, count + 1):
        walk = {kind: rng.random((5, 16), np.float32) for kind in ("broadcast", "local")}
        walk |= {"nodes": rng.integers(4, size=5), "accuracies": rng.random(5)}
        write_arrays(folder / "walks" / f"walk-{episode}.npz", walk)


def test_more_walks_make_another_table(tmp_path):
    folder = tmp_path / "audit-digits"
    prepare_folder(folder, 8)
    # A walk of one round is an episode, but adds no row.
    path = folder / "walks" / "walk-3.npz"
    write_arrays(path, {name: array[:1] for name, array in read_arrays(path).items()})
    for count in (7, 8):
        assert start(tmp_path, "--walks", str(count)) == 0
        table = read_table(folder / "audit.csv", audit.AUDIT_COLUMNS)
        assert set(table["episodes"]) == {count}
        assert set(table["rounds"]) == {(count - 1) * 4}
    # The same table as without this walk.
    walks = [read_arrays(folder / "walks" / f"walk-{e}.npz") for e in range(1, 9) if e != 3]
    others = audit.audit_table(walks, DecentralizedLearning(small_settings()))
    columns = ["observation", "target", "r2", "low", "high"]
    pd.testing.assert_frame_equal(table[columns], others[columns], check_exact=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LEARNING_RATE": 0.1}, "LEARNING_RATE = 0.1 there, 0.001 now"),
        ({"SEED": 4}, "SEED = 4 there, 0 now"),
    ],
)
def test_another_audit_is_left_alone(tmp_path, capsys, changes, words):
    prepare_folder(tmp_path / "audit-digits", 6, **changes)
    assert start(tmp_path, "--walks", "6") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "audit-digits" / "audit.csv").exists()


def test_settings_of_an_agent_make_no_other_audit(tmp_path):
    prepare_folder(tmp_path / "audit-digits", 6, DISCOUNT=0.5, THREADS=7)
    with filelock.FileLock(tmp_path / "audit-digits" / ".lock"):  # another audit at work
        assert start(tmp_path, "--walks", "6") == 2
    assert start(tmp_path, "--walks", "6") == 0


def test_walks_of_one_round_teach_nothing(tmp_path, capsys):
    # With a goal of 1 % each ends with the starter's training.
    assert start(tmp_path, "--walks", "6", GOAL_ACCURACY=0.01) == 2
    assert "got 0 with a second round, takes at least 6" in capsys.readouterr().err


# --- Figure and report ---


@pytest.fixture
def table():
    rows = [
        ("digits", name, target, 0.1 * place + 0.01 * (target != "accuracy"), 0.0, 2.0, 60, 1800)
        for place, name in enumerate(audit.OBSERVATIONS)
        for target in audit.TARGETS
    ]
    return pd.DataFrame(rows, columns=list(audit.AUDIT_COLUMNS))


def test_the_figure_shows_the_table(table):
    figure = audit.draw_audit(table)
    (axis,) = figure.axes
    now, following = axis.containers
    count = len(audit.OBSERVATIONS)
    assert now[0].get_xdata() == pytest.approx([0.1 * i for i in range(count)])
    assert following[0].get_xdata() == pytest.approx([0.1 * i + 0.01 for i in range(count)])
    for container in (now, following):
        ends = np.array(container[2][0].get_segments())[:, :, 0]
        assert ends == pytest.approx(np.tile([0.0, 2.0], (count, 1)), abs=1e-12)
    assert [t.get_text() for t in axis.get_yticklabels()] == list(audit.OBSERVATIONS.values())
    assert "bundled digits, NOT MNIST" in figure.get_suptitle()


# --- Command line ---


def test_settings_of_an_audit():
    settings, walks = audit.parse(["--set", "NODES_PER_ROUND=1", "--set", "BATCH_SIZE=16"])
    assert (settings.BATCH_SIZE, settings.DATASET, walks) == (16, "digits", 60)
    settings, walks = audit.parse(["--dataset", "mnist", "--walks", "7", "--seed", "3"])
    assert (settings.DATASET, settings.SEED, walks) == ("mnist", 3, 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--walks", "5"], "--walks: got 5, takes at least 6"),
        (["--settings", "tuned"], "unrecognized arguments: --settings tuned"),
        (["--set", "OBSERVATION=local"], "OBSERVATION: got 'local', takes none"),
        (["--set", "DISCOUNT=0.5"], "DISCOUNT: got 0.5, takes none"),
        (["--set", "NODES_PER_ROUND=2"], "NODES_PER_ROUND: got 2, takes 1"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, words, capsys):
    assert words in refusal(audit.main, arguments, capsys)

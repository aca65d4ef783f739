"""Trainings that users start, stop and continue."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import (
    CORES,
    CPU_COUNT,
    PROJECT,
    SMALL,
    command,
    main_of_run,
    run,
    set_flags,
    small_settings,
    without_times,
)

import data
import main
import node
import plot
import records
from config import Settings, episode_seed
from environment import DecentralizedLearning, distance_matrix, power_reward
from node import DQNAgent

TESTS = PROJECT / "tests"


def use(patch, dataset):
    """Let runs in this process take a dataset that is loaded already, and draw nothing."""
    patch.setitem(data.DATASETS, "digits", lambda data_dir: dataset)
    patch.setattr(plot, "draw_run", lambda folder: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    use(monkeypatch, few)


def start(tmp_path, name="run", **overrides):
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME=name, SEED=3, **overrides)
    return main.main(settings), tmp_path / name


def agents_are_equal(*folders):
    one, two = (records.load_agent(folder / "agent.npz")[0] for folder in folders)
    return list(one) == list(two) and all((one[name] == two[name]).all() for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few):
    """One small run from start to end, with its figures: do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "digits", lambda data_dir: few)
        status, folder = start(tmp_path_factory.mktemp("finished"))
    assert status == 0
    return folder


# --- What a run writes -----------------------------------------------------------------------


def test_files_of_a_run(finished):
    figures = {f"{name}.png" for name in ("learning", "accuracy", "data")}
    tables = {"episodes.csv", "rounds.csv", "shards.csv", "distances.csv"}
    found = {path.name for path in finished.iterdir() if path.name != ".lock"}
    assert found == figures | tables | {"config.json", "agent.npz"}
    assert json.loads((finished / "config.json").read_text())["state"] == "finished"


def test_tables_agree_with_each_other_and_with_the_definitions(finished):
    episodes = records.read_table(finished / "episodes.csv", records.EPISODE_COLUMNS)
    rounds = records.read_table(finished / "rounds.csv", records.ROUND_COLUMNS)
    pairs = records.read_table(finished / "distances.csv", records.DISTANCE_COLUMNS)
    settings = small_settings()
    assert episodes["episode"].tolist() == [1, 2, 3, 4]
    distances = distance_matrix(settings)
    assert len(pairs) == 6
    expected = distances[pairs["node"].astype(int), pairs["other_node"].astype(int)]
    np.testing.assert_allclose(pairs["distance"], expected, rtol=1e-12)
    for row in episodes.itertuples():
        walk = rounds[rounds["episode"] == row.episode]
        assert walk["round"].tolist() == list(range(1, row.rounds + 1))
        assert walk["chosen_by"].iloc[0] == "starter"
        assert set(walk["chosen_by"].iloc[1:]) <= {"random", "greedy"}
        nodes = [int(node) for node in walk["node"]]
        expected = [0.0, *(distances[a, b] for a, b in itertools.pairwise(nodes))]
        np.testing.assert_allclose(walk["distance"], expected, rtol=1e-12)
        for r in walk.itertuples():
            assert r.reward == pytest.approx(
                power_reward(r.accuracy, r.distance, settings), abs=1e-12
            )
        assert row.communication_cost == pytest.approx(sum(expected), rel=1e-12)
        assert row.episode_reward == pytest.approx(walk["reward"].sum(), rel=1e-12)
        assert row.final_accuracy == walk["accuracy"].iloc[-1]
        assert row.goal_reached == (row.final_accuracy >= 0.8)
        assert row.rounds == 5 or row.goal_reached
        assert (row.goal_accuracy, row.max_rounds, row.diverged) == (0.8, 5, 0)
        assert row.epsilon == pytest.approx(np.exp(-0.02 * (row.episode - 1)))
    # 8 transitions make a sample: 4 rounds after the starter's in each of two episodes.
    assert episodes["q_loss"].isna().tolist() == [True, False, False, False]


def test_the_trained_agent_is_one_that_learned_from_the_recorded_rounds(few, finished):
    """Replayed with an agent that chooses nothing; the limit ends the episodes."""
    settings = small_settings(SEED=3)
    env = DecentralizedLearning(settings, few)
    agent = DQNAgent(16, settings)
    rounds = pd.read_csv(finished / "rounds.csv")
    for episode in range(1, 5):
        observation, _ = env.reset(seed=episode_seed(3, episode))
        for r in rounds[(rounds["episode"] == episode) & (rounds["round"] > 1)].itertuples():
            following, value, terminated, truncated, _ = env.step(r.node)
            assert value == pytest.approx(r.reward, rel=1e-12)
            agent.replay.add(observation, [r.node], value, following, terminated or truncated)
            observation = following
        assert truncated
        agent.train()
        agent.end_episode()
    arrays, about = records.load_agent(finished / "agent.npz")
    assert (agent.q.network.from_named_arrays(arrays).numpy() == agent.weights.numpy()).all()
    assert Settings(**about["settings"]) == settings
    assert about["dataset"] == {"name": "digits", "sha256": few.sha256}


def test_the_config_of_a_run_gives_the_same_run_and_another_seed_another(tmp_path, finished):
    flags = ["--config", str(finished / "config.json"), "--set", f"RESULTS_DIR={tmp_path}"]
    for name, more in (("same", []), ("other", ["--seed", "1"])):
        assert main_of_run([*flags, "--name", name, *more]) == 0
    same, other = tmp_path / "same", tmp_path / "other"
    assert without_times(same) == without_times(finished)
    assert agents_are_equal(same, finished)
    for table in ("rounds", "episodes"):
        assert without_times(other)[table] != without_times(finished)[table]
    assert not agents_are_equal(other, finished)


def test_several_nodes_in_a_round_that_are_repeated(tmp_path):
    status, folder = start(tmp_path, NODES_PER_ROUND=2, OBSERVATION="local", EPISODES=3, MAX_STAY=2)
    assert status == 0
    rounds = pd.read_csv(folder / "rounds.csv", dtype=str)
    assert set(rounds["chosen_by"]) == {"starter", "random", "repeated"}
    for before, after in itertools.pairwise(rounds.itertuples()):
        if after.chosen_by == "starter":
            assert after.node == "0"
        else:
            assert len(set(after.node.split("+"))) == 2
        if after.chosen_by == "repeated":
            assert after.node == before.node


def test_a_diverged_episode_is_counted(tmp_path, capsys):
    status, folder = start(tmp_path, LEARNING_RATE=1e30, EPISODES=2)
    assert status == 0
    episodes = pd.read_csv(folder / "episodes.csv")
    assert episodes["diverged"].tolist() == [1, 1]
    assert episodes["rounds"].tolist() == [5, 5]
    assert "2 diverged" in capsys.readouterr().out


def test_a_diverged_agent_is_counted(tmp_path):
    _, folder = start(tmp_path, Q_LEARNING_RATE=1e30, FIT_ALL_ACTIONS=False)
    episodes = pd.read_csv(folder / "episodes.csv")
    assert np.isfinite(episodes["q_loss"][1])
    assert not np.isfinite(episodes["q_loss"][2])
    assert episodes["diverged"].tolist() == [0, 0, 1, 1]


def test_a_goal_that_the_starter_reaches(tmp_path):
    status, folder = start(tmp_path, GOAL_ACCURACY=0.0, EPISODES=2)
    assert status == 0
    episodes = pd.read_csv(folder / "episodes.csv")
    assert episodes["rounds"].tolist() == episodes["goal_reached"].tolist() == [1, 1]


# --- Stopped and continued -------------------------------------------------------------------


def stop_in_episode(tmp_path, monkeypatch, episode, sent=signal.SIGINT, **overrides):
    """Start a run that gets a signal after two rounds of an episode."""
    add = records.Run.add

    def add_and_stop(run, table, row):
        add(run, table, row)
        if (table, run.episodes_finished + 1, row["round"]) == ("rounds.csv", episode, 2):
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(records.Run, "add", add_and_stop)
        return start(tmp_path, **overrides)


@pytest.mark.parametrize(("number", "episode"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_an_interrupted_run_continues(tmp_path, monkeypatch, capsys, finished, number, episode):
    status, folder = stop_in_episode(tmp_path, monkeypatch, episode, number)
    assert status == 128 + number
    assert capsys.readouterr().err.count("\n") == 1
    assert json.loads((folder / "config.json").read_text())["state"] == "running"
    assert len(pd.read_csv(folder / "episodes.csv")) == episode - 1
    assert start(tmp_path)[0] == 0
    assert without_times(folder) == without_times(finished)
    assert agents_are_equal(folder, finished)
    config = json.loads((folder / "config.json").read_text())
    assert config["state"] == "finished"
    assert [session["first_episode"] for session in config["sessions"]] == [1, episode]


OPTIONS = {
    "OBSERVATION": "both",
    "Q_WEIGHT_DECAY": 0.1,
    "N_STEP": 3,
    "ROUNDS_PER_CHOICE": 2,
    "TARGET_RATE": 0.5,
    "MAX_STAY": 3,
    "REWARD": "progress",
}


@pytest.mark.parametrize(("capacity", "overrides"), [(8, {}), (50_000, OPTIONS)])
def test_a_run_stopped_twice_continues_twice(tmp_path, monkeypatch, capsys, capacity, overrides):
    """Four transitions an episode: a buffer of eight has dropped the first by episode 4."""
    monkeypatch.setattr(node, "REPLAY_CAPACITY", capacity)
    for episode in (2, 4):
        status, folder = stop_in_episode(tmp_path, monkeypatch, episode, **overrides)
        assert status == 130
    assert start(tmp_path, **overrides)[0] == 0
    assert re.findall(r"(\d) of 4 episodes", capsys.readouterr().out) == ["0", "1", "3"]
    _, whole = start(tmp_path, "whole", **overrides)
    assert without_times(folder) == without_times(whole)
    assert agents_are_equal(folder, whole)


def run_on_noise(values, *names):
    """Start a run of each name, on a dataset that is made in no time."""
    rng = np.random.default_rng(0)
    labels, images = rng.integers(10, size=2300), rng.random((2300, 28, 28), np.float32)
    noise = data.Dataset("digits", images[:2000], labels[:2000], images[2000:], labels[2000:])
    with pytest.MonkeyPatch.context() as patch:
        use(patch, noise)
        for name in names:
            main.main(Settings(**json.loads(values), NAME=name))


def process_on_noise(values, *names):
    """Start ``run_on_noise`` in a process of its own, on all cores."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(TESTS)])}
    environment.pop("PYTEST_XDIST_WORKER", None)
    code = "import sys, test_main; test_main.run_on_noise(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps({**SMALL, **values}), *names],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: CORES and os.sched_setaffinity(0, CORES),
    )


def test_a_killed_process_continues_with_the_same_bits(tmp_path):
    values = {"RESULTS_DIR": str(tmp_path), "EPISODES": 4, "MAX_ROUNDS": 10}
    table = tmp_path / "killed" / "episodes.csv"
    with process_on_noise(values, "killed") as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if table.exists() and table.read_text().count("\n") >= 3:
                break
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= len(pd.read_csv(table)) < 4
    with process_on_noise(values, "killed", "whole") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.search(r"[1-3] of 4 episodes", output)
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    assert agents_are_equal(tmp_path / "killed", tmp_path / "whole")
    session = json.loads((tmp_path / "whole" / "config.json").read_text())["sessions"][0]
    assert session["machine"]["threads"] == CPU_COUNT


def test_a_full_disk(tmp_path, capsys, finished):
    """A limit on file sizes has its effect: the first checkpoint does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        status, folder = start(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert re.fullmatch(r"main.py: .*File too large.*\n", capsys.readouterr().err)
    assert start(tmp_path)[0] == 0
    assert without_times(folder) == without_times(finished)


def test_figures_that_fail_are_drawn_by_the_same_command(tmp_path, monkeypatch, finished):
    def fail(folder):
        raise OSError(28, "No space left on device")

    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plot, "draw_run", fail)
        status, folder = start(tmp_path)
    assert status == 1
    assert agents_are_equal(folder, finished)
    monkeypatch.setattr(plot, "draw_run", drawn.append)
    assert start(tmp_path)[0] == 0
    assert drawn == [folder]
    assert agents_are_equal(folder, finished)
    assert without_times(folder) == without_times(finished)


def test_a_finished_run_is_left_alone(tmp_path, finished, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("checkpoint.npz", "transitions.npy"):  # left by a kill at the very end
        (folder / name).write_bytes(b"")
    assert start(tmp_path)[0] == 0
    assert str(folder) in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_that_the_agent_refuses(tmp_path, monkeypatch, capsys):
    _, folder = stop_in_episode(tmp_path, monkeypatch, 3)
    path = folder / "transitions.npy"
    path.write_bytes(b"?" * path.stat().st_size)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert start(tmp_path)[0] == 2
    named = rf"main.py: {folder}/checkpoint.npz or transitions.npy: damaged .*--name.*\n"
    assert re.fullmatch(named, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- The command -----------------------------------------------------------------------------


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    python, *arguments = command(*set_flags({**SMALL, "RESULTS_DIR": tmp_path / "results"}))
    process = subprocess.Popen(
        [python, "-X", "importtime", *arguments], stderr=subprocess.PIPE, text=True
    )
    # The module data comes right before TensorFlow, which takes seconds.
    while process.stderr.readline().rpartition("|")[2].strip() != "data":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "results").exists()


def test_the_command_from_another_folder(tmp_path):
    flags = set_flags({**SMALL, "EPISODES": 2, "RESULTS_DIR": tmp_path, "NAME": "x"})
    done = run(*flags, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].endswith(str(tmp_path / "x"))
    assert done.stdout.count("\n") == 7
    assert (tmp_path / "x" / "agent.npz").exists()


def test_a_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert start(tmp_path, EPISODES=2)[0] == 0
    assert re.search(
        r"1/2 \|.*\| \d\d:\d\d .*round 5, accuracy 0\.\d+, cost 0\.\d+, epsilon 0\.98",
        capsys.readouterr().err,
    )


def test_mnist_with_the_default_settings(tmp_path, mnist_dir):
    """The first rounds on real MNIST are those of the reference run."""
    places = {"RESULTS_DIR": str(tmp_path), "DATA_DIR": str(mnist_dir)}
    assert main.main(Settings(DATASET="mnist", EPISODES=1, MAX_ROUNDS=4, **places)) == 0
    folder = tmp_path / "mnist-seed0"
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"]["verdict"] == "canonical"
    assert str(mnist_dir) not in (folder / "config.json").read_text()
    rounds = pd.read_csv(folder / "rounds.csv")
    reference = pd.read_csv(PROJECT / "results" / "reference" / "mnist-seed0" / "rounds.csv")[:4]
    # Another machine rounds differently; the random choices do not depend on it.
    assert rounds["node"].tolist() == reference["node"].tolist()
    assert rounds["distance"].tolist() == reference["distance"].tolist()
    # The first rounds have not grown apart yet.
    np.testing.assert_allclose(rounds["accuracy"][:3], reference["accuracy"][:3], atol=0.02)

"""Runs as users start, stop, continue and spoil them."""

import fcntl
import hashlib
import itertools
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pandas as pd
import pytest
from conftest import CORES, PROJECT, SMALL, as_flags, command, run, small_settings, without_times

import data
import main
import plot
import records
from config import episode_seed
from environment import DecentralizedLearning, reward
from node import DQNAgent
from records import Run

SAVE_FIGURE = plot.save_figure


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    """Runs within this process take a dataset that is loaded already, and draw nothing."""
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    monkeypatch.setattr(plot, "save_figure", lambda path, draw, tables: None)


def start(tmp_path, name="run", **overrides):
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME=name, **overrides)
    return main.main(settings), tmp_path / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few):
    """One small run from start to end: do not write into it."""
    patch = pytest.MonkeyPatch()
    patch.setitem(data.DATASETS, "digits", lambda settings: few)
    status, folder = start(tmp_path_factory.mktemp("finished"))
    patch.undo()
    assert status == 0
    return folder


# --- What a run writes -----------------------------------------------------------------------


def test_files_of_a_run(finished):
    figures = {
        f"{f}.{s}" for f in ("learning", "accuracy", "walk", "shards") for s in ("png", "pdf")
    }
    tables = {"episodes.csv", "rounds.csv", "shards.csv"}
    found = {path.name for path in finished.iterdir() if path.name != ".lock"}
    assert found == figures | tables | {"config.json", "agent.npz"}


def test_config_of_a_run(finished, few):
    config = json.loads((finished / "config.json").read_text())
    assert config["state"] == "finished"
    assert config["settings"]["NUM_NODES"] == 4
    assert config["seed"] == 0
    assert config["dataset"]["sha256"] == few.sha256
    assert config["dataset"]["verdict"] == "stand-in"
    assert config["started"] <= config["ended"]
    (session,) = config["sessions"]
    assert session["versions"]["numpy"] == np.__version__
    assert "DATA_FILE" not in config["settings"]
    assert "RESULTS_DIR" not in config["settings"]


def test_tables_agree_with_each_other_and_with_the_definitions(finished):
    episodes = pd.read_csv(finished / "episodes.csv")
    rounds = pd.read_csv(finished / "rounds.csv")
    settings = small_settings()
    assert list(episodes) == list(records.EPISODE_COLUMNS)
    assert list(rounds) == list(records.ROUND_COLUMNS)
    assert episodes["episode"].tolist() == [1, 2, 3, 4]
    distances = records_distances(settings)
    for row in episodes.itertuples():
        walk = rounds[rounds["episode"] == row.episode]
        assert walk["round"].tolist() == list(range(1, row.rounds + 1))
        assert walk["chosen_by"].iloc[0] == "starter"
        assert set(walk["chosen_by"].iloc[1:]) <= {"random", "greedy"}
        nodes = walk["node"].tolist()
        expected = [0.0, *(distances[a, b] for a, b in itertools.pairwise(nodes))]
        np.testing.assert_allclose(walk["distance"], expected, rtol=1e-12)
        for r in walk.itertuples():
            assert r.reward == pytest.approx(reward(r.accuracy, r.distance, settings), abs=1e-12)
        assert row.communication_cost == pytest.approx(sum(expected), rel=1e-12)
        assert row.episode_reward == pytest.approx(walk["reward"].sum(), rel=1e-12)
        assert row.final_accuracy == walk["accuracy"].iloc[-1]
        assert row.goal_reached == (row.final_accuracy >= 0.8)
        assert row.rounds == 5 or row.goal_reached
        assert row.epsilon == pytest.approx(np.exp(-0.02 * (row.episode - 1)))
    # 8 transitions make a sample: 4 rounds after the starter's in each of two episodes.
    assert episodes["q_loss"].isna().tolist() == [True, False, False, False]


def records_distances(settings):
    uniform = np.random.RandomState(settings.DISTANCE_SEED).random_sample((4, 4)) * 0.1
    distances = (uniform + uniform.T) / 2
    np.fill_diagonal(distances, 0)
    return distances


def test_shards_table(finished, few):
    shards = pd.read_csv(finished / "shards.csv")
    wide = shards.pivot(index="node", columns="class", values="images").to_numpy()
    expected = [
        np.bincount(few.y_train[s], minlength=10) for s in data.make_shards(few, small_settings())
    ]
    assert (wide == expected).all()
    assert [wide[n, n] for n in range(4)] == [51] * 4  # round(0.8 * 64)


@pytest.mark.parametrize("at_limit", [False, True])
def test_weights_of_a_run_are_those_of_the_agent(tmp_path, few, finished, at_limit):
    """Replayed from the recorded walk with an agent that only learns; the limit ends episodes."""
    folder = start(tmp_path, BOOTSTRAP_AT_LIMIT=True)[1] if at_limit else finished
    settings = small_settings(BOOTSTRAP_AT_LIMIT=at_limit)
    env = DecentralizedLearning(settings, few)
    agent = DQNAgent(16, 4, settings)
    rounds = pd.read_csv(folder / "rounds.csv")
    for episode in range(1, 5):
        observation, _ = env.reset(seed=episode_seed(0, episode))
        for r in rounds[(rounds["episode"] == episode) & (rounds["round"] > 1)].itertuples():
            following, value, terminated, truncated, _ = env.step(r.node)
            assert value == pytest.approx(r.reward, rel=1e-12)
            terminal = terminated or (truncated and not at_limit)
            agent.memory.add(observation, r.node, value, following, terminal)
            observation = following
        assert truncated
        agent.train()
        agent.decay_epsilon()
    stored = records.read_arrays(folder / "agent.npz")
    assert (agent.q.network.from_named_arrays(stored).numpy() == agent.weights.numpy()).all()


def test_same_seed_same_tables_other_seed_other_tables(tmp_path, finished):
    _, same = start(tmp_path, "same")
    _, other = start(tmp_path, "other", SEED=1)
    assert without_times(same) == without_times(finished)
    assert without_times(other)["rounds"] != without_times(finished)["rounds"]
    assert without_times(other)["episodes"] != without_times(finished)["episodes"]
    agents = [records.read_arrays(f / "agent.npz") for f in (same, finished)]
    assert all((agents[0][name] == agents[1][name]).all() for name in agents[0])


def test_same_seed_same_bits_on_several_cores(tmp_path):
    """With two threads or more: the processes of the tests may have a core each."""
    if len(CORES) < 2:
        pytest.skip("this machine has one core")
    code = """if True:
        import json, sys, data, main, plot
        import numpy as np
        from config import make_settings
        rng = np.random.default_rng(0)
        labels, images = rng.integers(10, size=2300), rng.random((2300, 28, 28), np.float32)
        parts = images[:2000], labels[:2000], images[2000:], labels[2000:]
        data.DATASETS["digits"] = lambda settings: data.Dataset("noise", *parts)
        plot.save_figure = lambda path, draw, tables: None
        for name in ("one", "two"):
            main.main(make_settings(**json.loads(sys.argv[1]), NAME=name))
    """
    settings = {**SMALL, "RESULTS_DIR": str(tmp_path), "EPISODES": 2}
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        cwd=PROJECT,
        preexec_fn=lambda: os.sched_setaffinity(0, CORES),
        timeout=120,
        check=True,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    (session,) = json.loads((one / "config.json").read_text())["sessions"]
    assert session["machine"]["threads"] == len(CORES)
    assert without_times(one) == without_times(two)
    agents = [records.read_arrays(f / "agent.npz") for f in (one, two)]
    assert all((agents[0][name] == agents[1][name]).all() for name in agents[0])


def test_the_default_name_tells_dataset_and_seed(tmp_path, capsys):
    start(tmp_path, "", SEED=3, EPISODES=1)
    assert (tmp_path / "digits-seed3" / "episodes.csv").exists()
    assert str(tmp_path / "digits-seed3") in capsys.readouterr().out


def test_several_nodes_in_a_round(tmp_path):
    status, folder = start(tmp_path, NODES_PER_ROUND=2, OBSERVATION="local", EPISODES=3)
    assert status == 0
    nodes = pd.read_csv(folder / "rounds.csv", dtype=str)["node"]
    assert nodes[0] == "0"
    assert all(len(set(text.split("+"))) == 2 for text in nodes[1:5])


def test_a_diverged_episode_is_counted(tmp_path, capsys):
    status, folder = start(tmp_path, LEARNING_RATE=1e30, EPISODES=2)
    assert status == 0
    episodes = pd.read_csv(folder / "episodes.csv")
    assert episodes["diverged"].tolist() == [1, 1]
    assert episodes["rounds"].tolist() == [5, 5]
    assert "2 missed the goal (counted with 5 rounds), 2 diverged" in capsys.readouterr().out


def test_a_goal_that_the_starter_reaches(tmp_path):
    status, folder = start(tmp_path, GOAL_ACCURACY=0.0, EPISODES=2)
    assert status == 0
    assert pd.read_csv(folder / "episodes.csv")["rounds"].tolist() == [1, 1]


# --- Stopped and continued -------------------------------------------------------------------


def stop_in_episode(tmp_path, monkeypatch, episode, sent=signal.SIGINT, **overrides):
    """A run that gets a signal after two rounds of an episode."""
    record_round = Run.record_round

    def record(self, number, info, chosen_by):
        record_round(self, number, info, chosen_by)
        if (number, info["round"]) == (episode, 2):
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record_round", record)
        return start(tmp_path, **overrides)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, few):
    """A run that was interrupted in episode 3."""
    patch = pytest.MonkeyPatch()
    patch.setitem(data.DATASETS, "digits", lambda settings: few)
    status, folder = stop_in_episode(tmp_path_factory.mktemp("stopped"), patch, 3)
    patch.undo()
    assert status == 130
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_run):
    """A copy of it to spoil, where ``start(tmp_path)`` finds it."""
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.mark.parametrize("episode", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues(tmp_path, monkeypatch, capsys, finished, episode, number):
    status, folder = stop_in_episode(tmp_path, monkeypatch, episode, number)
    assert status == 128 + number
    assert capsys.readouterr().err == "main.py: interrupted; the same command continues\n"
    assert json.loads((folder / "config.json").read_text())["state"] == "interrupted"
    assert len(pd.read_csv(folder / "episodes.csv")) == episode - 1
    assert start(tmp_path)[0] == 0
    assert without_times(folder) == without_times(finished)
    config = json.loads((folder / "config.json").read_text())
    assert config["state"] == "finished"
    assert [s["first_episode"] for s in config["sessions"]] == [1, episode]
    assert not (folder / "checkpoint.npz").exists()
    assert not (folder / "transitions.npy").exists()
    a, b = (records.read_arrays(f / "agent.npz") for f in (folder, finished))
    assert all((a[name] == b[name]).all() for name in a)


OPTIONS = {
    "OBSERVATION": "both",
    "PCA_SIGNS": "holder",
    "Q_NETWORKS": 2,
    "DUELING": True,
    "Q_RATE_DECAY": 0.3,
    "Q_WEIGHT_DECAY": 0.1,
    "N_STEP": 3,
    "BOOTSTRAP_AT_LIMIT": True,
    "TARGET_UPDATE": 2,
    "EXPLORATION_REPEAT": 0.6,
    "EXPLORATION_PERSIST": 0.5,
}


@pytest.mark.parametrize("overrides", [{"REPLAY_CAPACITY": 8}, OPTIONS])
def test_a_run_stopped_twice_continues_twice(tmp_path, monkeypatch, capsys, overrides):
    """Four transitions an episode: a memory of eight has forgotten the first by episode 4."""
    for episode in (2, 4):
        status, folder = stop_in_episode(tmp_path, monkeypatch, episode, **overrides)
        assert status == 130
    assert start(tmp_path, **overrides)[0] == 0
    assert re.findall(r"after episode (\d)", capsys.readouterr().out) == ["1", "3"]
    _, whole = start(tmp_path, "whole", **overrides)
    assert without_times(folder) == without_times(whole)
    a, b = (records.read_arrays(f / "agent.npz") for f in (folder, whole))
    assert all((a[name] == b[name]).all() for name in a)


def test_the_file_of_transitions_goes_on_where_it_was_closed(tmp_path):
    path = tmp_path / "transitions.npy"
    arrays = [np.arange(count, dtype=np.float32) + 10 * count for count in (3, 2)]
    for array in arrays:
        file = records.TransitionFile(path)
        file.add(array)
        state = file.state()
        file.close()
        assert state == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    size = path.stat().st_size
    assert records.TransitionFile.read(path, size, 5).tolist() == [30, 31, 32, 20, 21]
    # Whole arrays only, and as few as will do.
    for last, count in ((6, 5), (3, 5), (2, 2), (1, 2)):
        assert len(records.TransitionFile.read(path, size, last)) == count


LONGER = {"EPISODES": 6, "MAX_ROUNDS": 10}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """A run on all of the digits, as another process loads them."""
    patch = pytest.MonkeyPatch()
    patch.setitem(data.DATASETS, "digits", lambda settings: digits)
    patch.setattr(plot, "save_figure", lambda path, draw, tables: None)
    status, folder = start(tmp_path_factory.mktemp("whole"), **LONGER)
    patch.undo()
    assert status == 0
    return folder


def test_a_killed_process_continues(tmp_path, monkeypatch, capsys, digits, whole):
    """The real command, killed in the middle, then started again (in this process)."""
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: digits)
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME="killed", **LONGER)
    folder = tmp_path / "killed"
    with subprocess.Popen(
        command(*as_flags(settings)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            table = folder / "episodes.csv"
            if table.exists() and table.read_text().count("\n") >= 3:
                break
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert 2 <= len(pd.read_csv(folder / "episodes.csv")) < 6
    assert main.main(settings) == 0
    assert "continuing" in capsys.readouterr().out
    assert without_times(folder) == without_times(whole)


def test_rows_after_the_checkpoint_are_cut(tmp_path, stopped, finished):
    """What a power cut leaves: an episode in progress, half a row, files without a checkpoint."""
    with (stopped / "rounds.csv").open("a") as file:
        file.write("digits,3,3,1,ran")
    with (stopped / "episodes.csv").open("a") as file:
        file.write("digits,3,")
    with (stopped / "transitions.npy").open("ab") as file:
        file.write(b"half an array")
    (stopped / ".checkpoint.npz.part").write_bytes(b"half")
    assert start(tmp_path)[0] == 0
    assert without_times(stopped) == without_times(finished)


def test_a_finished_run_is_left_alone(tmp_path, finished, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert start(tmp_path)[0] == 0
    assert "finished already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_settings_never_overwrite(tmp_path, finished, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert start(tmp_path, EPSILON=0.5, SEED=2)[0] == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for words in ("EPSILON = 1.0 there, 0.5 now", "SEED = 0 there, 2 now", "another --name"):
        assert words in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_data_never_continue(tmp_path, stopped, capsys):
    config = json.loads((stopped / "config.json").read_text())
    config["dataset"]["sha256"]["x_train"] = "0" * 64
    (stopped / "config.json").write_text(json.dumps(config))
    assert start(tmp_path)[0] == 2
    assert "data = 'digits' there, 'digits' now" in capsys.readouterr().err


def test_auto_and_the_dataset_that_it_found_are_the_same_run(tmp_path, monkeypatch, stopped, few):
    monkeypatch.setitem(data.DATASETS, "auto", lambda settings: few)
    assert start(tmp_path, DATASET="auto")[0] == 0


def test_two_runs_at_once(tmp_path, few, capsys):
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME="run")
    with Run(settings, few, 1):
        assert start(tmp_path)[0] == 2
    assert "another run is writing there" in capsys.readouterr().err


# --- Spoiled ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("checkpoint.npz", lambda b: b[: len(b) // 2], "checkpoint.npz: damaged"),
        ("checkpoint.npz", lambda b: b[:5000] + b"?" + b[5001:], "checkpoint.npz: damaged"),
        ("checkpoint.npz", lambda b: b"", "checkpoint.npz: damaged"),
        ("config.json", lambda b: b[:100], "config.json: damaged"),
        ("config.json", lambda b: b"[]", "config.json: damaged"),
        ("rounds.csv", lambda b: b[:200], "rounds.csv: damaged since the last checkpoint"),
        ("episodes.csv", lambda b: b.replace(b"1.0", b"2.0"), "episodes.csv: damaged since"),
        ("transitions.npy", lambda b: b[:-1], "transitions.npy: damaged since"),
        ("transitions.npy", lambda b: b[:500] + b"?" + b[501:], "transitions.npy: damaged since"),
    ],
)
def test_damaged_files_are_named_and_left(tmp_path, stopped, capsys, name, spoil, words):
    path = stopped / name
    path.write_bytes(spoil(path.read_bytes()))
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert start(tmp_path)[0] == 2
    message = capsys.readouterr().err
    assert words in message
    assert "another --name" in message
    assert message.count("\n") == 1
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_a_missing_table_is_named(tmp_path, stopped, capsys):
    (stopped / "rounds.csv").unlink()
    assert start(tmp_path)[0] == 2
    assert "rounds.csv: missing" in capsys.readouterr().err


def test_a_checkpoint_of_another_agent_is_refused(tmp_path, stopped, capsys):
    arrays = records.read_arrays(stopped / "checkpoint.npz")
    arrays["agent/weights"] = arrays["agent/weights"][:-1]
    records.write_arrays(stopped / "checkpoint.npz", arrays)
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert start(tmp_path)[0] == 2
    assert "checkpoint.npz: damaged (agent: weights has shape" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_a_checkpoint_of_an_earlier_version_is_named(tmp_path, stopped, capsys):
    """Before the transitions had a file of their own, a checkpoint told of none."""
    arrays = records.read_arrays(stopped / "checkpoint.npz")
    del arrays["files"]
    records.write_arrays(stopped / "checkpoint.npz", arrays)
    assert start(tmp_path)[0] == 2
    message = capsys.readouterr().err
    assert "checkpoint.npz: written by an earlier version; move the folder away" in message


def test_a_missing_checkpoint_is_named_and_nothing_is_cut(tmp_path, stopped, capsys):
    (stopped / "checkpoint.npz").unlink()
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert start(tmp_path)[0] == 2
    assert "checkpoint.npz: missing" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_an_end_is_told_only_of_what_has_ended(tmp_path, stopped, few):
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME="run")
    assert json.loads((stopped / "config.json").read_text())["ended"]
    with Run(settings, few, 1) as again:
        again.start(data.make_shards(few, settings))
        config = json.loads((stopped / "config.json").read_text())
        assert (config["state"], config["ended"]) == ("running", None)
        assert [bool(s["ended"]) for s in config["sessions"]] == [True, False]


def test_a_checkpoint_left_by_a_finished_run_goes(tmp_path, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    left = [folder / name for name in ("checkpoint.npz", "transitions.npy")]
    for path in left:
        path.write_bytes(b"left by a kill at the very end")
    assert start(tmp_path)[0] == 0
    assert not any(path.exists() for path in left)


def test_figures_that_fail_do_not_cost_the_agent(tmp_path, monkeypatch, finished):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(main.plot, "draw_run", fail)
        assert start(tmp_path)[0] == 1
    assert (tmp_path / "run" / "agent.npz").exists()
    monkeypatch.setattr(plot, "save_figure", SAVE_FIGURE)
    assert start(tmp_path)[0] == 0
    assert (tmp_path / "run" / "walk.png").exists()
    assert without_times(tmp_path / "run") == without_times(finished)


def test_a_folder_that_is_no_run_is_left(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert start(tmp_path)[0] == 2
    assert "holds thesis.txt but no config.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_an_unwritable_folder(tmp_path, capsys):
    """A file where the folder should be: root may write everywhere, so no mode bits here."""
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file")[0] == 2
    message = capsys.readouterr().err
    assert message.startswith(f"main.py: {tmp_path / 'file' / 'run'}: can't be written (")
    assert "choose another RESULTS_DIR" in message
    assert message.count("\n") == 1


def test_a_full_disk(tmp_path, capsys):
    """A limit on file sizes stands for it: the first checkpoint does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        status, _ = start(tmp_path, "full", EPISODES=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "File too large" in error
    assert "what was finished is kept" in error
    assert start(tmp_path, "full", EPISODES=2)[0] == 0
    assert start(tmp_path, "whole", EPISODES=2)[0] == 0
    assert without_times(tmp_path / "full") == without_times(tmp_path / "whole")


def test_a_failing_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys, finished):
    """The disk is full from episode 3 on; with room again, the run goes on from episode 2."""
    savez = np.savez
    calls = []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) >= 3:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    assert start(tmp_path)[0] == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(np, "savez", savez)
    assert not list((tmp_path / "run").glob(".*.part"))
    assert start(tmp_path)[0] == 0
    assert "after episode 2" in capsys.readouterr().out
    assert without_times(tmp_path / "run") == without_times(finished)


# --- The command -----------------------------------------------------------------------------


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    settings = small_settings(RESULTS_DIR=str(tmp_path / "results"), NAME="x")
    process = subprocess.Popen(command(*as_flags(settings)), stderr=subprocess.PIPE)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in errors


def test_threads_can_not_change_in_a_process(tmp_path, capsys):
    assert start(tmp_path, THREADS=1000)[0] == 2
    message = capsys.readouterr().err
    assert "THREADS: got 1000, takes" in message
    assert not (tmp_path / "run").exists()


def test_results_are_relative_to_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert small_settings().results_dir == PROJECT / "results"


def test_the_command_on_a_terminal_from_another_folder(tmp_path):
    """A progress bar on stderr, a summary on stdout."""
    settings = small_settings(RESULTS_DIR=str(tmp_path), NAME="x", EPISODES=2)
    controller, terminal = pty.openpty()
    # Without a size the terminal has no columns, and the bar none to fill.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    process = subprocess.Popen(
        command(*as_flags(settings)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    summary, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0
    assert summary.count("\n") == 6
    assert str(tmp_path / "x") in summary
    text = shown.decode()
    assert re.search(
        r"episode 1/2 \|.*\| \d\d:\d\d left, round 5, accuracy 0\.\d+, cost 0\.\d+, epsilon 0\.98",
        text,
    )


def test_mnist_with_the_default_settings(tmp_path, mnist_path):
    """The first rounds on real MNIST, as the reference run has them."""
    flags = ["--dataset", "mnist", "--episodes", "1", "--set", f"RESULTS_DIR={tmp_path}"]
    flags += ["--set", "MAX_ROUNDS=8"]
    done = run(*flags, env={**os.environ, data.DATA_VARIABLE: str(mnist_path)})
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "mnist-seed0"
    config = json.loads((folder / "config.json").read_text())
    assert config["dataset"]["verdict"] == "canonical"
    assert str(mnist_path.parent) not in (folder / "config.json").read_text()
    rounds = pd.read_csv(folder / "rounds.csv")
    reference = pd.read_csv(PROJECT / "results" / "reference" / "mnist-seed0" / "rounds.csv")
    reference = reference[reference["episode"] == 1]
    # Another machine rounds otherwise, so only what does not depend on rounding: the walk.
    assert rounds["node"].tolist() == reference["node"][:8].tolist()
    # The first rounds have not grown apart yet.
    np.testing.assert_allclose(rounds["accuracy"][:3], reference["accuracy"][:3], atol=0.02)

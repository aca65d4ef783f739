import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import small_settings

import records
from config import Settings, UserError
from data import make_shards
from environment import distance_matrix
from records import Run, append_rows

# --- Files -----------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    with contextlib.suppress(ZeroDivisionError), records.replacing(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with records.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^{folder}: ") as error, records.locked(folder, "run"):
            pass
        assert "\n" not in str(error.value)


# --- Tables ----------------------------------------------------------------------------------


def test_rows_by_hand(tmp_path):
    path = tmp_path / "table.csv"
    columns = ("node", "a", "b", "c", "d")
    append_rows(path, columns)
    assert path.read_text() == "node,a,b,c,d\n"
    append_rows(path, columns, {"node": [3, 15], "a": True, "b": None, "c": 0.1, "d": 2})
    row = {"a": np.False_, "b": np.float64(1e-17), "c": np.float32(0.1), "d": np.int64(7)}
    append_rows(path, columns, {"other": 5, "node": "x", **row})
    lines = ["node,a,b,c,d", "3+15,1,,0.1,2", "x,0,1e-17,0.10000000149011612,7"]
    assert path.read_text().splitlines() == lines
    # A misspelt column leaves the file as it is.
    with pytest.raises(KeyError, match="'d'"):
        append_rows(path, columns, {"node": 1, "a": 1, "b": 2, "c": 3, "e": 4})
    append_rows(path, columns, dict.fromkeys(columns, 4), dict.fromkeys(columns, 5))
    assert path.read_text().splitlines() == [*lines, "4,4,4,4,4", "5,5,5,5,5"]


def test_numbers_are_read_with_the_bits_that_were_written(tmp_path):
    numbers = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-100, 100).repeat(10)
    rows = [{"a": number, "b": 1} for number in numbers]
    append_rows(tmp_path / "rows.csv", ("a", "b"), *rows)
    records.write_table(tmp_path / "frame.csv", pd.DataFrame({"a": numbers, "b": 1}))
    for name in ("rows.csv", "frame.csv"):
        read = records.read_table(tmp_path / name, ("a", "b"))
        assert (read["a"].to_numpy() == numbers).all()


def test_text_columns_and_a_last_row_that_was_cut_off(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("node,method,rounds,q_loss\n07,,5,\n3+5,nan,6,0.5\n4,hl,7,0")
    table = records.read_table(path, ("node", "method", "rounds", "q_loss"))
    assert table["node"].tolist() == ["07", "3+5"]
    assert table["method"].tolist() == ["", ""]
    assert table["rounds"].tolist() == [5, 6]
    assert table["q_loss"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ""),
        (b"", ""),
        (b"a,b\n1,\xff\n", ""),
        (b"a,b\n1,2\n1,2,3\n", ""),
        (b"a,b\n1,2\n1,many\n", ""),
        (b"a,c\n1,2\n", "got the columns a, c, takes a, b"),
        (b"b,a\n1,2\n", "got the columns b, a, takes a, b"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*{words}") as error:
        records.read_table(path, ("a", "b"))
    assert "\n" not in str(error.value)


def test_shards_and_distances_by_hand(few):
    labels = np.array([0, 1, 2, 2, 0, 2])
    images = np.zeros((6, 16, 16), np.uint8)
    three = dataclasses.replace(
        few, name="three", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    shards = records.shard_table(three, [np.array([0, 2, 3]), np.array([5, 5, 1])])
    assert tuple(shards) == records.SHARD_COLUMNS
    assert shards.to_numpy().tolist() == [
        ["three", 0, 0, 1],
        ["three", 0, 1, 0],
        ["three", 0, 2, 2],
        ["three", 1, 0, 0],
        ["three", 1, 1, 1],
        ["three", 1, 2, 2],
    ]
    matrix = np.array([[0, 0.5, 0.25], [0.5, 0, 0.125], [0.25, 0.125, 0]])
    distances = records.distance_table("three", matrix)
    assert tuple(distances) == records.DISTANCE_COLUMNS
    assert distances.to_numpy().tolist() == [
        ["three", 0, 1, 0.5],
        ["three", 0, 2, 0.25],
        ["three", 1, 2, 0.125],
    ]


# --- Arrays ----------------------------------------------------------------------------------

WEIGHTS = {
    "0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "0/bias": np.zeros(3, np.float32),
}


def test_arrays_are_never_pickled(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.array([{}]))
    with pytest.raises(UserError, match=f"^{path}: damaged"):
        records.read_arrays(path)


def test_an_agent_and_what_it_was_trained_with(tmp_path, few):
    path = tmp_path / "agent.npz"
    settings = Settings(SEED=3, NAME="somewhere", HIDDEN_UNITS=(64, 64), DISCOUNT=0.5)
    records.save_agent(path, WEIGHTS, settings, few)
    arrays, about = records.load_agent(path)
    assert list(arrays) == list(WEIGHTS)
    for name, array in WEIGHTS.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], array)
    assert Settings(**about["settings"]) == settings.replace(NAME="")
    assert about["dataset"] == {"name": "digits", "sha256": few.sha256}


def as_npz(path, **arrays):
    np.savez(path, **arrays)
    return path.read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.read_bytes()[:-100],
        lambda path: path.read_bytes()[:140] + b"?" + path.read_bytes()[141:],
        lambda path: b"",
        lambda path: b"weights",
        lambda path: as_npz(path, **WEIGHTS),
        lambda path: as_npz(path, config=np.array('{"settings": {"SEED": 0}}')),
    ],
    ids=["cut", "byte", "empty", "text", "no config", "no dataset"],
)
def test_a_damaged_agent_is_named(tmp_path, few, spoil):
    path = tmp_path / "agent.npz"
    records.save_agent(path, WEIGHTS, Settings(), few)
    path.write_bytes(spoil(path))
    with pytest.raises(UserError, match=f"^{path}: ") as error:
        records.load_agent(path)
    assert "\n" not in str(error.value)


def test_what_is_no_agent_is_named(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    for path in (tmp_path / "agent.npz", tmp_path, tmp_path / "array.npy"):
        with pytest.raises(UserError, match=f"^{path}: .*agent"):
            records.load_agent(path)


# --- Where a result comes from ---------------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_revision_of_a_clone(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    (clone / "results").mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(records, "PROJECT", clone)

    def git(*arguments):
        name = ["-c", "user.name=x", "-c", "user.email=x@y"]
        command = ["git", "-C", str(clone), *name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert records.git_revision() is None
    git("init")
    assert records.git_revision() is None
    for path in (clone / "main.py", clone / "results" / "rounds.csv"):
        path.write_text("one")
    git("add", "--all")
    git("commit", "--message", "x")
    head = git("rev-parse", "HEAD")
    (clone / "new.py").write_text("not tracked")
    (clone / "results" / "rounds.csv").write_text("two")
    assert records.git_revision() == head
    (clone / "main.py").write_text("two")
    assert records.git_revision() == f"{head}+changes"
    # A copy inside another repository is not that repository.
    monkeypatch.setattr(records, "PROJECT", clone / "results")
    assert records.git_revision() is None


def test_differences_by_hand():
    assert records.differences({"a": 1, "b": [2], "c": 3}, {"b": [2], "c": 4, "d": 5}) == [
        "c = 3 there, 4 now",
        "d = None there, 5 now",
        "a = 1 there, None now",
    ]


# --- A run -----------------------------------------------------------------------------------

NODES = 4


def settings_of(tmp_path, **overrides):
    return small_settings(RESULTS_DIR=str(tmp_path), **{"NAME": "run", **overrides})


def begin(run):
    run.start(make_shards(run.dataset, run.settings), distance_matrix(run.settings))


def record_round(run, number):
    row = dict.fromkeys(records.ROUND_COLUMNS[2:], 0)
    run.add("rounds.csv", {**row, "round": number, "chosen_by": "random"})


def record(run):
    """Record an episode of three rounds, and the checkpoint that follows it."""
    for number in (1, 2, 3):
        record_round(run, number)
    episode = run.episodes_finished + 1
    row = dict.fromkeys(records.EPISODE_COLUMNS[2:], 0)
    run.add("episodes.csv", {**row, "rounds": 3, "q_loss": None})
    state = {"episode": np.array(episode + 1), "weights": np.full(1000, episode, np.float32)}
    run.checkpoint(state, np.arange(2) + 10.0 * episode)


def restored(run):
    """Return the weights and transitions that an agent gets from a run's last checkpoint."""
    got = []

    def load_state(state, transitions):
        got.extend([state["weights"].tolist(), transitions.tolist()])

    run.restore(SimpleNamespace(load_state=load_state))
    return got


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, few):
    """A run that was interrupted in episode 3."""
    folder = tmp_path_factory.mktemp("stopped")
    with contextlib.suppress(KeyboardInterrupt), Run(settings_of(folder), few, 2) as run:
        begin(run)
        record(run)
        record(run)
        record_round(run, 1)
        raise KeyboardInterrupt
    return folder / "run"


@pytest.fixture
def stopped(tmp_path, stopped_run):
    """A copy of it, where ``settings_of(tmp_path)`` finds it."""
    return shutil.copytree(stopped_run, tmp_path / "run")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_new_run_writes_nothing_before_it_starts(tmp_path, few):
    settings = settings_of(tmp_path, NAME="", SEED=7)
    with Run(settings, few, 2) as run:
        assert run.folder == tmp_path / "digits-seed7"
        assert (run.episodes_finished, run.finished, restored(run)) == (0, False, [])
        assert contents(run.folder) == {}
        begin(run)
        assert config_of(run.folder)["state"] == "running"
        assert set(contents(run.folder)) == {
            "config.json",
            "rounds.csv",
            "episodes.csv",
            "shards.csv",
            "distances.csv",
        }


def test_config_of_a_run(stopped_run, few):
    config = config_of(stopped_run)
    assert list(config) == ["state", "dataset", "settings", "sessions"]
    assert config["state"] == "running"
    assert config["settings"] == small_settings().stored()
    assert config["dataset"]["sha256"] == few.sha256
    assert config["dataset"]["verdict"] == "stand-in"
    assert (config["dataset"]["training_images"], config["dataset"]["test_images"]) == (2000, 359)
    (session,) = config["sessions"]
    assert (session["first_episode"], session["machine"]["threads"]) == (1, 2)
    assert session["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert session["started"]
    assert session["ended"] is None


def test_tensorflow_may_come_from_a_package_of_another_name(monkeypatch):
    installed = {name: "1" for name in records._PACKAGES}  # and tensorflow-cpu, say
    monkeypatch.setattr(records, "version", installed.__getitem__)
    assert records.provenance(1, "cpu")["versions"]["tensorflow"] == tf.__version__


def test_a_run_continues_after_its_last_checkpoint(tmp_path, stopped, few):
    """A power cut leaves half a row, half an array and a file that was not renamed yet."""
    for name, rest in (("rounds.csv", b"3,3,1,ran"), ("transitions.npy", b"half an array")):
        with (stopped / name).open("ab") as file:
            file.write(rest)
    (stopped / ".checkpoint.npz.part").write_bytes(b"half")
    with Run(settings_of(tmp_path), few, 2) as run:
        assert run.episodes_finished == 2
        assert restored(run) == [[2.0] * 1000, [10, 11, 20, 21]]
        begin(run)
        config = config_of(stopped)
        assert [session["first_episode"] for session in config["sessions"]] == [1, 3]
        record(run)
        record(run)
        run.finish()
        assert run.finished
    rounds = records.read_table(stopped / "rounds.csv", records.ROUND_COLUMNS)
    assert rounds["episode"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    episodes = records.read_table(stopped / "episodes.csv", records.EPISODE_COLUMNS)
    assert episodes["episode"].tolist() == [1, 2, 3, 4]
    config = config_of(stopped)
    assert config["state"] == "finished"
    assert [bool(session["ended"]) for session in config["sessions"]] == [False, True]
    assert config["sessions"][1]["started"] <= config["sessions"][1]["ended"]
    assert not {"checkpoint.npz", "transitions.npy"} & set(contents(stopped))


def test_a_checkpoint_is_named_once_all_that_it_counts_on_is_on_the_disk(
    tmp_path, few, monkeypatch
):
    """So a power cut finds this checkpoint whole, or the former one."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(*paths):
        done.append("renamed")
        replace(*paths)

    with Run(settings_of(tmp_path), few, 2) as run:
        begin(run)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)
        record(run)
        monkeypatch.undo()
        names = {path.stat().st_ino: path.name for path in (run.folder, *run.folder.iterdir())}
        order = [names.get(place, place) for place in done]
    assert set(order[:3]) == {"rounds.csv", "episodes.csv", "transitions.npy"}
    assert order[3:] == ["checkpoint.npz", "renamed", "run"]


def test_other_circumstances_are_warned_of(tmp_path, few, stopped, monkeypatch, recwarn):
    with Run(settings_of(tmp_path), few, 2) as run:
        begin(run)
    assert not [warning for warning in recwarn if warning.category is UserWarning]
    monkeypatch.setattr(records, "git_revision", lambda: "0123abc")
    with Run(settings_of(tmp_path, THREADS=3), few, 3) as run:
        begin(run)
    with Run(settings_of(tmp_path, DEVICE="gpu"), few, 3) as run:
        begin(run)
    warned = [str(w.message).split("(")[-1] for w in recwarn if w.category is UserWarning]
    assert warned[0].endswith("there, '0123abc' now; threads = 2 there, 3 now)")
    assert warned[1] == "device = 'cpu' there, 'gpu' now)"
    assert len(warned) == 2
    machines = [session["machine"] for session in run.config["sessions"]]
    assert [machine["threads"] for machine in machines] == [2, 2, 3, 3]
    assert [machine["device"] for machine in machines] == ["cpu", "cpu", "cpu", "gpu"]


def test_other_settings_never_overwrite(tmp_path, few, stopped):
    before = contents(stopped)
    words = "EPISODES = 4 there, 9 now; SEED = 0 there, 2 now"
    with pytest.raises(UserError, match=rf"^{stopped}: .*\({words}\)") as error:
        Run(settings_of(tmp_path, SEED=2, EPISODES=9), few, 2).__enter__()
    assert "\n" not in str(error.value)
    assert contents(stopped) == before


def test_other_data_never_continue(tmp_path, few, stopped):
    other = dataclasses.replace(few, name="other")
    other.sha256["x_train"] = "0" * 64
    with pytest.raises(UserError, match=r"data = 'digits .* there, 'other 000000 .* now"):
        Run(settings_of(tmp_path), other, 2).__enter__()


def test_the_data_counts_and_not_the_name_that_led_to_it(tmp_path, few, stopped):
    with Run(settings_of(tmp_path, DATASET="auto"), few, 2) as run:
        assert run.config["state"] == "running"


def test_two_runs_at_once(tmp_path, few):
    with Run(settings_of(tmp_path), few, 2), pytest.raises(UserError, match=f"^{tmp_path}/run: "):
        Run(settings_of(tmp_path), few, 2).__enter__()


def test_a_folder_that_is_no_run_is_left(tmp_path, few):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.txt .* config.json"):
        Run(settings_of(tmp_path), few, 2).__enter__()
    assert contents(tmp_path / "run") == {"thesis.txt": b"years of work"}
    # The refusal has released the folder.
    (tmp_path / "run" / "thesis.txt").unlink()
    with Run(settings_of(tmp_path), few, 2) as run:
        assert not run.finished


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("checkpoint.npz", lambda b: b[: len(b) // 2], "damaged"),
        ("checkpoint.npz", lambda b: b[:2000] + b"?" + b[2001:], "damaged"),
        ("checkpoint.npz", lambda b: b"", "damaged"),
        ("checkpoint.npz", None, "missing"),
        ("config.json", lambda b: b[:100], "damaged"),
        ("config.json", lambda b: b"[]", "damaged"),
        ("rounds.csv", lambda b: b[:100], "shorter"),
        ("rounds.csv", None, "shorter"),
        ("episodes.csv", lambda b: b[:-1], "shorter"),
        ("transitions.npy", lambda b: b[:-1], "shorter"),
        ("transitions.npy", None, "shorter"),
    ],
)
def test_damaged_files_are_named_and_left(tmp_path, stopped, few, name, spoil, words):
    path = stopped / name
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    before = contents(stopped)
    with pytest.raises(UserError, match=f"^{path}: {words}") as error:
        Run(settings_of(tmp_path), few, 2).__enter__()
    assert "--name" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(stopped) == before

"""Comparisons as users start, stop, continue and spoil them."""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT, SMALL, refusal, small_settings, without_rights, without_times

import baselines
import compare
import config
import data
import estimates
import jobs
import main
import models
import plot
from config import JOINED_LATER, UserError, episode_seed, make_settings, seeds_of, stream
from environment import DecentralizedLearning, distance_matrix
from node import DQNAgent
from records import check_claim, claimed, read_arrays

METHODS = "hl,random,stay,fedavg"

# Fast enough to learn something within a round, and a goal that some episodes reach.
QUICK = {**SMALL, "LEARNING_RATE": 0.01, "GOAL_ACCURACY": 0.3}


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    """Jobs within this process take a dataset that is loaded already, and are not drawn again."""
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    monkeypatch.setattr(plot, "save_figure", lambda path, draw, tables: None)
    jobs._dataset.cache_clear()


def flags(folder, *more, methods=METHODS, **overrides):
    """A small comparison in this process, with the threads that the tests have."""
    settings = {**QUICK, "RESULTS_DIR": str(folder), "THREADS": models.use_cpu(0), **overrides}
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    processes = [] if "--cluster" in more else ["--jobs", "1"]
    return [*processes, "--test-episodes", "2", "--methods", methods, *more, *sets]


def start(folder, *more, **options):
    return compare.main(compare.parse(flags(folder, *more, **options)))


def tables(folder):
    """All jobs' rows without the column of seconds."""
    rows = {}
    for path in sorted(folder.glob("*-seed*")):
        episodes = (path / "episodes.csv").read_text().splitlines()
        rounds = (path / "rounds.csv").read_text().splitlines()
        rows[path.name] = [line.rpartition(",")[0] for line in episodes], rounds
    return rows


def name_figure(path, draw, tables):
    for suffix in (".png", ".pdf"):
        path.with_suffix(suffix).touch()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few):
    """One small comparison from start to end: do not write into it."""
    patch = pytest.MonkeyPatch()
    patch.setitem(data.DATASETS, "digits", lambda settings: few)
    patch.setattr(plot, "save_figure", name_figure)
    jobs._dataset.cache_clear()
    folder = tmp_path_factory.mktemp("finished")
    assert start(folder) == 0
    patch.undo()
    return folder / "paper-digits"


# --- What a comparison writes ----------------------------------------------------------------


def test_files_of_a_comparison(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {f"{m}-seed{s}" for m in [*METHODS.split(","), "training"] for s in (0, 1)}
    figures = ("methods", "accuracy", "reduction", "walks", "training")
    expected |= {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "pdf")}
    assert names == expected | {"comparison.json", "jobs.csv", "estimates.csv", ".lock"}
    table = pd.read_csv(finished / "jobs.csv", keep_default_na=False)
    assert list(table) == list(estimates.JOB_COLUMNS)
    assert (table["state"] == "finished").all()
    assert table["folder"].tolist()[:3] == ["hl-seed0", "hl-seed1", "random-seed0"]


def test_seeds_are_paired_and_training_has_others(finished):
    """Rounds 1 and 2 of who stays at the starter show the initialisation and the shuffling."""
    stay = pd.read_csv(finished / "stay-seed0" / "rounds.csv")
    for method in ("hl", "random"):
        rounds = pd.read_csv(finished / f"{method}-seed0" / "rounds.csv")
        for episode in (1, 2):
            own, other = (t[t["episode"] == episode].reset_index() for t in (rounds, stay))
            alike = (own["node"] == other["node"]).cummin()
            assert alike[0]
            alike = alike[alike].index
            assert own["accuracy"][alike].equals(other["accuracy"][alike])
    # The test can tell initialisations apart.
    accuracies = stay.pivot(index="round", columns="episode", values="accuracy")
    assert accuracies[1].tolist() != accuracies[2].tolist()
    for seed in range(10):
        training = {episode_seed(seed, episode) for episode in range(1, 121)}
        test = {episode_seed(seed, episode, "test") for episode in range(1, 121)}
        assert len(training | test) == 240


def test_a_method_is_not_changed_by_the_others(finished, tmp_path):
    assert start(tmp_path, "--seeds", "1,", methods="random") == 0
    alone = tables(tmp_path / "paper-digits")
    assert alone == {"random-seed1": tables(finished)["random-seed1"]}


def test_the_test_of_a_trained_agent_step_by_step(finished, few):
    settings = make_settings(**QUICK, SEED=1)
    environment = DecentralizedLearning(settings, few)
    agent = DQNAgent(environment.observation_space.shape[0], 4, settings)
    arrays = read_arrays(finished / "training-seed1" / "agent.npz")
    agent.weights = agent.q.network.from_named_arrays(arrays)
    rows, model_megabytes = [], environment.foundation.network.size * 4 / 1e6
    for episode in (1, 2):
        observation, info = environment.reset(seed=episode_seed(1, episode, "test"))
        rewards, hops, node = [info["reward"]], 0, 0
        done = info["goal_reached"]
        while not done:
            action = int(agent.q.values(agent.weights, observation[None])[0].argmax())
            observation, reward, terminated, truncated, info = environment.step(action)
            hops, node = hops + (action != node), action
            rewards.append(reward)
            done = terminated or truncated
        rows.append((info["round"], info["goal_reached"], info["accuracy"], sum(rewards), hops))
    episodes = pd.read_csv(finished / "hl-seed1" / "episodes.csv")
    found = episodes[["rounds", "goal_reached", "final_accuracy", "episode_reward", "transfers"]]
    np.testing.assert_allclose(found.to_numpy(float), np.array(rows, float), rtol=1e-12)
    np.testing.assert_allclose(episodes["megabytes"], episodes["transfers"] * model_megabytes)
    seen = episodes["rounds"] * 3 * model_megabytes
    np.testing.assert_allclose(episodes["observation_megabytes"], seen)
    rounds = pd.read_csv(finished / "hl-seed1" / "rounds.csv")
    cost = rounds.groupby("episode")["distance"].sum()
    np.testing.assert_allclose(episodes["communication_cost"], cost)


def test_training_is_main_s(finished, tmp_path, few):
    settings = make_settings(
        **QUICK, SEED=1, THREADS=models.use_cpu(0), RESULTS_DIR=str(tmp_path), NAME="own"
    )
    assert main.main(settings) == 0
    assert without_times(tmp_path / "own") == without_times(finished / "training-seed1")
    own, there = (p / "agent.npz" for p in (tmp_path / "own", finished / "training-seed1"))
    assert own.read_bytes() == there.read_bytes()


def test_random_uses_its_own_stream(finished):
    rounds = pd.read_csv(finished / "random-seed0" / "rounds.csv")
    for episode in (1, 2):
        rng = stream(0, "policy", episode)
        nodes = rounds[rounds["episode"] == episode]["node"].tolist()
        assert nodes[1:] == [int(rng.integers(4)) for _ in nodes[1:]]


def test_fedavg_counts_what_the_server_sends(finished):
    episodes = pd.read_csv(finished / "fedavg-seed0" / "episodes.csv")
    assert (episodes["transfers"] == episodes["rounds"] * 6).all()
    way = 2 * distance_matrix(small_settings())[0].sum()
    np.testing.assert_allclose(episodes["communication_cost"], episodes["rounds"] * way)


# --- Stopping, continuing, failing -----------------------------------------------------------


def test_finished_jobs_are_left_alone(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*-seed*/*.csv")}
    assert start(finished.parent) == 0
    assert "jobs: 8 finished before, 0 started, 0 finished, 0 failed" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in finished.glob("*-seed*/*.csv")}


def test_other_settings_are_refused_before_anything_is_written(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert start(finished.parent, MAX_ROUNDS=4) == 2
    error = capsys.readouterr().err
    assert "MAX_ROUNDS = 5 there, 4 now" in error
    assert start(finished.parent, "--test-episodes", "3") == 2
    assert "test_episodes = 2 there, 3 now" in capsys.readouterr().err
    more = ["--name", "paper-digits", "heterogeneity"]
    assert start(finished.parent, *more, methods="random") == 2
    assert "comparison = 'paper' there, 'heterogeneity' now" in capsys.readouterr().err
    # Jobs that are not there yet, whose results would be averaged with those that are.
    assert start(finished.parent, "--seeds", "7,", methods="nearest", MAX_ROUNDS=4) == 2
    assert "MAX_ROUNDS = 5 there, 4 now" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


@pytest.mark.parametrize("stop_at", [3, 12])
def test_a_stopped_comparison_continues(finished, tmp_path, monkeypatch, capsys, stop_at):
    """In the middle of training, and of a test: the rows are those of one that never stopped."""
    steps = 0
    step = DecentralizedLearning.step

    def interrupted(self, action):
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise KeyboardInterrupt
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(DecentralizedLearning, "step", interrupted)
        assert start(tmp_path, "--seeds", "1", methods="hl,random") == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert start(tmp_path, "--seeds", "1", methods="hl,random") == 0
    expected = tables(finished)
    names = ("hl-seed0", "random-seed0", "training-seed0")
    assert tables(tmp_path / "paper-digits") == {name: expected[name] for name in names}


def test_other_data_is_refused(finished, few, monkeypatch, capsys):
    other = dataclasses.replace(few, y_test=few.y_test[::-1].copy(), sha256={})
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: other)
    jobs._dataset.cache_clear()
    assert start(finished.parent, "--seeds", "7,", methods="stay") == 2
    assert "(the data = 'other' there, 'this' now)" in capsys.readouterr().err


def test_the_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert start(tmp_path, "--name", "mine") == 2
    assert "holds notes.txt but no comparison.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_two_at_the_same_time_in_one_folder(tmp_path, capsys):
    (tmp_path / "paper-digits").mkdir()
    with filelock.FileLock(tmp_path / "paper-digits" / ".lock"):
        assert start(tmp_path, methods="stay") == 2
    assert "another compare.py is writing there" in capsys.readouterr().err


def test_a_job_that_was_finished_when_compare_was_killed_counts(finished, tmp_path):
    """A kill leaves its row as it was: the next call looks into the job's folder."""
    folder = shutil.copytree(finished, tmp_path / "paper-digits")
    before = (folder / "jobs.csv").read_text()
    stale = before.replace("stay-seed1,finished", "stay-seed1,waiting")
    assert stale != before
    (folder / "jobs.csv").write_text(stale)
    assert "7 finished, 1 waiting, 0 failed" in estimates.report(folder)
    assert start(tmp_path, "--seeds", "1,", methods="random") == 0
    assert (folder / "jobs.csv").read_text() == before


class Pool:
    """Stands for joblib: the call of a doomed job takes its process along, and its neighbours'."""

    def __init__(self, doomed, times):
        self.doomed, self.times, self.calls = doomed, times, []

    def side_by_side(self, waiting, processes, cluster, under_way):
        self.calls.append([job.method for job in waiting])
        waiting = list(waiting)
        while waiting:
            under_way[:] = waiting[:processes]
            if any(job.method == self.doomed for job in under_way) and self.times:
                self.times -= 1
                raise jobs._Died("its process died (Killed)")
            yield jobs.Outcome(waiting.pop(0), "finished", 1.0)


@pytest.mark.parametrize(("times", "failed"), [(1, []), (2, []), (9, ["c"])])
def test_only_who_dies_alone_has_failed(tmp_path, monkeypatch, times, failed):
    pool = Pool("c", times)
    monkeypatch.setattr(jobs, "_side_by_side", pool.side_by_side)
    settings = small_settings(RESULTS_DIR=str(tmp_path))
    asked = [jobs.Job(name, settings, "", 2) for name in "abcdef"]
    outcomes = jobs.run_all(asked, 3)
    assert sorted(o.job.method for o in outcomes) == list("abcdef")
    assert [o.job.method for o in outcomes if o.error] == failed
    # The neighbours were tried again beside it, then each alone.
    expected = [list("abcdef"), list("def"), list("abc"), ["a"], ["b"], ["c"]]
    assert pool.calls[: min(times, 3) + 1] == expected[: min(times, 3) + 1]


def test_what_telling_raises_is_not_a_death(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_side_by_side", Pool("", 0).side_by_side)

    def full(outcome):
        raise OSError(28, "No space left on device")

    job = jobs.Job("stay", small_settings(RESULTS_DIR=str(tmp_path)), "", 2)
    with pytest.raises(OSError, match="No space"):
        jobs.run_all([job], 2, tell=full)


def test_one_failing_job_stops_no_other(finished, tmp_path, monkeypatch, capsys):
    def broken(environment):
        def policy(observation, info, rng):
            raise ZeroDivisionError("no such luck")

        return policy

    monkeypatch.setitem(baselines.METHODS, "broken", baselines.Method("broken", broken))
    assert start(tmp_path, methods="broken,stay", GOAL_ACCURACY=1.0) == 1
    folder = tmp_path / "paper-digits"
    out = capsys.readouterr().out
    assert "jobs: 0 finished before, 4 started, 2 finished, 2 failed" in out
    assert f"failed: {folder / 'broken-seed1'}: ZeroDivisionError: no such luck" in out
    with (folder / "jobs.csv").open() as file:
        states = {row["folder"]: (row["state"], row["error"]) for row in csv.DictReader(file)}
    assert states["broken-seed0"] == ("failed", "ZeroDivisionError: no such luck")
    trace = (folder / "broken-seed0" / "error.txt").read_text()
    assert "in policy\n" in trace
    assert states["stay-seed1"] == ("finished", "")


def test_a_damaged_job_stops_no_other(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "paper-digits")
    (folder / "stay-seed0" / "config.json").write_text("{broken")
    (folder / "random-seed0" / "rounds.csv").unlink()
    torn = folder / "random-seed1" / "episodes.csv"
    torn.write_text("".join(torn.read_text().splitlines(keepends=True)[:-1]))
    assert start(tmp_path, "--seeds", "1", methods="stay,random,nearest") == 1
    out = capsys.readouterr().out
    assert "jobs: 0 finished before, 1 started, 1 finished, 2 failed" in out
    assert f"failed: {folder / 'stay-seed0' / 'config.json'}: damaged" in out
    missing = folder / "random-seed0" / "rounds.csv"
    assert f"failed: {missing}: can't be read (No such file" in out
    table = pd.read_csv(folder / "jobs.csv", index_col="folder")
    assert table.loc[["stay-seed0", "random-seed0"], "state"].tolist() == ["failed", "failed"]
    assert table.loc["nearest-seed0", "state"] == "finished"
    # Of those that were not asked for, the report counts and names what is damaged.
    assert "random-seed1: the tables are damaged; delete the job's folder" in out
    shutil.rmtree(folder / "random-seed0")
    assert start(tmp_path, "--seeds", "1", methods="random") == 0
    assert tables(folder)["random-seed0"] == tables(finished)["random-seed0"]


def test_results_from_before_a_constant_joined(finished, tmp_path, capsys):
    """They are what its first value gives, and nothing else."""
    folder = shutil.copytree(finished, tmp_path / "paper-digits")
    for path in [folder / "comparison.json", *folder.glob("*/config.json")]:
        stored = json.loads(path.read_text())
        for name in JOINED_LATER:
            del stored["settings"][name]
        path.write_text(json.dumps(stored))
    assert start(tmp_path, "--seeds", "1") == 0
    assert "0 to do" in capsys.readouterr().out
    assert start(tmp_path, "--seeds", "1", KEEP_MOMENTS=False) == 2
    assert "(KEEP_MOMENTS = True there, False now)" in capsys.readouterr().err


def test_a_worker_ends_with_its_parent(monkeypatch):
    ended = threading.Event()
    parent = [4711]
    monkeypatch.setattr(jobs.os, "getppid", lambda: parent[0])
    monkeypatch.setattr(jobs.os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(jobs, "_watched", 0)
    jobs.end_with(1)  # somebody else's child
    jobs.end_with(4711)
    assert not ended.wait(0.7)
    parent[0] = 1
    assert ended.wait(5)


def test_a_trained_agent_can_be_tested_alone(finished, tmp_path):
    agent = str(finished / "training-seed1")
    arguments = ["--agent", agent, "--methods", "hl,random", "--test-episodes", "2", "--jobs", "1"]
    arguments += ["--set", f"RESULTS_DIR={tmp_path}", "--set", f"THREADS={models.use_cpu(0)}"]
    assert compare.main(compare.parse(arguments)) == 0
    expected = tables(finished)
    found = tables(tmp_path / "paper-digits")
    assert found == {name: expected[name] for name in ("hl-seed1", "random-seed1")}


def test_a_trained_agent_on_other_data(finished, few, tmp_path, monkeypatch, capsys):
    other = dataclasses.replace(few, y_test=few.y_test[::-1].copy(), sha256={})
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: other)
    jobs._dataset.cache_clear()
    agent = ["--agent", str(finished / "training-seed1"), "--methods", "hl", "--jobs", "1"]
    agent += ["--set", f"RESULTS_DIR={tmp_path}", "--set", f"THREADS={models.use_cpu(0)}"]
    assert compare.main(compare.parse(agent)) == 2
    assert "--agent: was trained on other digits data than is at hand" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert compare.main(compare.parse([*agent, "--dataset", "digits"])) == 0


def test_what_a_tested_agent_is_known_by(finished, tmp_path, capsys):
    agent = str(finished / "training-seed1")
    arguments = ["--agent", agent, "--methods", "hl", "--test-episodes", "1", "--jobs", "1"]
    arguments += ["--set", f"RESULTS_DIR={tmp_path}", "--set", f"THREADS={models.use_cpu(0)}"]
    # Its goal and its reward are the test's, here a goal that nobody reaches.
    arguments += ["--set", "GOAL_ACCURACY=1.0", "--set", "MISS_PENALTY=30"]
    arguments += ["--set", "REWARD_CEILING=0.02"]
    assert compare.main(compare.parse(arguments)) == 0
    episode = pd.read_csv(tmp_path / "paper-digits" / "hl-seed1" / "episodes.csv").iloc[0]
    walk = pd.read_csv(tmp_path / "paper-digits" / "hl-seed1" / "rounds.csv")
    assert (32.0 ** (walk["accuracy"] - 1.0) > 0.02).all()
    expected = (0.02 - walk["distance"] - 1).sum() - 30
    assert episode["episode_reward"] == pytest.approx(expected, rel=1e-12)
    about = json.loads((tmp_path / "paper-digits" / "hl-seed1" / "config.json").read_text())
    weights = (finished / "training-seed1" / "agent.npz").read_bytes()
    assert about["about"]["agent_sha256"] == hashlib.sha256(weights).hexdigest()
    # Not where things lie on one machine: the place within the project, or else the name alone.
    assert about["about"]["agent"] == "training-seed1"
    committed = "results/reference/mnist-seed0"
    for given in (committed, str(PROJECT / committed)):
        assert jobs.Job("hl", small_settings(), "", 1, given).about()["agent"] == committed
    # The same agent elsewhere is the same: what is finished is left alone.
    shutil.copytree(agent, tmp_path / "elsewhere")
    capsys.readouterr()
    arguments[1] = str(tmp_path / "elsewhere")
    assert compare.main(compare.parse(arguments)) == 0
    assert "jobs: 1 finished before, 0 started" in capsys.readouterr().out


def test_an_unwritable_folder(tmp_path, capsys):
    """A file where the folder should be, or where its lock: root may write everywhere."""
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file", methods="random") == 2
    folder = tmp_path / "file" / "paper-digits"
    assert capsys.readouterr().err.startswith(f"compare.py: {folder}: can't be written (")
    (tmp_path / "paper-digits" / ".lock").mkdir(parents=True)
    assert start(tmp_path, methods="random") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"compare.py: {tmp_path / 'paper-digits'}: can't be written (")
    assert message.endswith("; choose another RESULTS_DIR or --name\n")


def test_a_folder_of_somebody_else():
    """One that may be locked, but not written; and one that may not even be listed."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "paper-digits"
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / ".lock").chmod(0o666)
        folder.chmod(0o555)
        with (
            without_rights(),
            pytest.raises(UserError, match=rf"{folder}: can't be written \(.*denied\)$"),
            claimed(folder, "comparison.json", {}, "compare.py", lambda: None),
        ):
            pytest.fail("claimed")
        folder.chmod(0o111)
        with (
            without_rights(),
            pytest.raises(UserError, match=rf"{folder}: can't be read \(.*denied\); choose"),
        ):
            check_claim(folder, "comparison.json", "comparison", "holds {found}", pytest.fail)
        folder.chmod(0o755)


def test_a_folder_that_another_claims_meanwhile(tmp_path, monkeypatch, capsys):
    check_cluster = compare.check_cluster

    def claim(cluster):
        monkeypatch.setattr(compare, "check_cluster", check_cluster)
        assert start(tmp_path, methods="random", GOAL_ACCURACY=0.9) == 0

    monkeypatch.setattr(compare, "check_cluster", claim)
    assert start(tmp_path, "--seeds", "2", methods="random") == 2
    assert "holds another comparison (GOAL_ACCURACY = 0.9 there" in capsys.readouterr().err
    assert (tmp_path / "paper-digits" / "random-seed0").exists()


def test_a_comparison_of_values(tmp_path, capsys):
    more = ["observation", "--seeds", "1", "--test-episodes", "1"]
    assert start(tmp_path, *more, methods="hl", EPISODES=1) == 0
    folder = tmp_path / "observation-digits"
    table = pd.read_csv(folder / "estimates.csv")
    expected = list(config.RULES["OBSERVATION"].choices)
    assert list(dict.fromkeys(table["variant"])) == expected
    for variant in ("broadcast", "zeros"):
        stored = json.loads((folder / variant / "hl-seed0" / "config.json").read_text())
        assert stored["settings"]["OBSERVATION"] == variant
    out = capsys.readouterr().out
    assert "| OBSERVATION | method |" in out
    assert "Against random" not in out


def test_several_nodes_per_round(tmp_path):
    assert start(tmp_path, "--seeds", "1", methods="hl,random", NODES_PER_ROUND=2) == 0
    for method in ("hl", "random"):
        rounds = pd.read_csv(tmp_path / "paper-digits" / f"{method}-seed0" / "rounds.csv")
        assert rounds["node"].iloc[1].count("+") == 1


# --- Command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papr"], "comparison: got 'papr', takes one of paper, goal"),
        (
            ["--seeds", "five"],
            "argument --seeds: got 'five', takes a number of seeds (5 is 0 to 4)",
        ),
        (["--seeds", "0"], "argument --seeds: got '0', takes a number of seeds"),
        (["--test-episodes", "0"], "argument --test-episodes: got '0', takes an integer >= 1"),
        (["--jobs", "-1"], "argument --jobs: got '-1', takes an integer >= 1"),
        (["--seed", "3"], "--seed: got '3', takes --seeds in a comparison"),
        (["--set", "SEED=3"], "SEED: got it with --set, takes --seeds in a comparison"),
        (["--set", "MAX_ROUNDS=1"], "MAX_ROUNDS: got 1, takes an integer >= 2"),
        (["--agent", "results/none"], "takes the folder of a run"),
        (["--agent", "x", "--seeds", "2"], "--seeds: got it beside --agent"),
        (["--agent", "x", "--methods", "random"], "takes methods with hl"),
        (["--agent", "x", "--set", "DISCOUNT=0.5"], "DISCOUNT: got it beside --agent"),
        (["--agent", "x", "--set", "REWARD_IMAGES=9"], "REWARD_IMAGES: got it beside --agent"),
        (["observation", "--agent", "x"], "OBSERVATION: got it beside --agent"),
        (["departures", "--agent", "x"], "BOOTSTRAP_AT_LIMIT: got it beside --agent"),
        (["goal", "--set", "GOAL_ACCURACY=0.9"], "GOAL_ACCURACY: got 0.9, takes what the compar"),
        (["--methods", ","], "--methods: got none, takes names"),
        (["--jobs", "2", "--cluster", "tcp://x:1"], "--jobs: got it beside --cluster"),
        (["--settings", "best"], "--settings: got 'best', takes paper or tuned"),
        (["departures", "--settings", "tuned"], "--settings: got it in departures, takes none"),
        (["headline", "--settings", "tuned"], "got 'tuned' with the methods hl,tuned,random,"),
        (
            ["worlds", "--settings", "paper"],
            "--settings: got it with the methods tuned,random,nearest_twice, takes methods "
            "with hl, for tuned has its own",
        ),
        (["headline", "--agent", "x"], "takes hl alone that learns"),
        (["--agent", "x", "--settings", "tuned"], "--settings: got it beside --agent"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    error = refusal(compare.parse, arguments, capsys)
    assert error.startswith("compare.py: ")
    assert message in error


def test_wrong_methods_and_settings_write_nothing(tmp_path, capsys):
    assert start(tmp_path, methods="hl,rnadom") == 2
    assert (
        "--methods: got 'rnadom', takes some of hl, tuned, random, stand" in capsys.readouterr().err
    )
    assert start(tmp_path, SAMPLES_PER_NODE=100_000) == 2
    assert "SAMPLES_PER_NODE: got 100000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_is_the_one_that_is_named(monkeypatch):
    assert compare.parse([]).settings.DATASET == "digits"
    assert compare.parse(["--dataset", "mnist"]).settings.DATASET == "mnist"
    assert compare.parse(["--set", "DATASET=mnist"]).settings.DATASET == "mnist"
    monkeypatch.setattr(config, "DATASET", "fashion_mnist")  # the constant in config.py
    assert compare.parse([]).settings.DATASET == "fashion_mnist"


def test_departures_are_the_public_codes_but_for_one_option():
    variants = compare.COMPARISONS["departures"].variants
    assert make_settings(**variants["public-code"]) == make_settings()
    for name in list(variants)[1:]:
        changed = {k for k, v in variants[name].items() if v != variants["public-code"][k]}
        assert len(changed) == 1 + (name == "double-q")


def test_the_tuned_settings_and_their_changes_taken_back():
    """Each setting is taken back, and all of them at once are the public code's agent."""
    variants = dict(compare.COMPARISONS["changes"].variants)
    tuned = variants.pop("nothing")
    assert make_settings(**tuned) == baselines.METHODS["tuned"].settings(make_settings())
    paper = config.AGENTS["paper"]
    taken_back = set()
    for variant in variants.values():
        make_settings(**variant)
        names = [name for name in variant if variant[name] != tuned[name]]
        assert names
        assert all(variant[name] == paper[name] for name in names)
        taken_back |= set(names)
    assert taken_back == {n for n in paper if paper[n] != tuned[n]}


def test_hl_with_the_tuned_settings_is_a_method_of_its_own(tmp_path, monkeypatch, capsys):
    """It trains in its own folder and is tested on the same episodes."""
    monkeypatch.setitem(config.AGENTS["tuned"], "REPLAY_SAMPLE", 8)
    monkeypatch.setitem(config.AGENTS["tuned"], "UPDATES_PER_EPISODE", 3)
    assert start(tmp_path, "--seeds", "1,", methods="hl,tuned", EPISODES=2) == 0
    folder = tmp_path / "paper-digits"
    stored = {
        name: json.loads((folder / name / "config.json").read_text())["settings"]
        for name in ("training-seed1", "training-tuned-seed1", "tuned-seed1")
    }
    for name, value in config.AGENTS["tuned"].items():
        expected = list(value) if isinstance(value, tuple) else value
        assert stored["training-tuned-seed1"][name] == stored["tuned-seed1"][name] == expected
    assert stored["training-seed1"]["Q_NETWORKS"] == 1
    rounds = [pd.read_csv(folder / n / "rounds.csv") for n in ("hl-seed1", "tuned-seed1")]
    assert rounds[0]["accuracy"][0] == rounds[1]["accuracy"][0]
    training = estimates.read_comparison(folder)["training"]
    assert training.groupby("method").size().to_dict() == {"hl": 2, "tuned": 2}
    assert training["q_loss"].notna().sum() >= 2
    # Settings that changed meanwhile are not mixed with those of seeds that are there.
    monkeypatch.setitem(config.AGENTS["tuned"], "DISCOUNT", 0.5)
    before = tables(folder)
    assert start(tmp_path, "--seeds", "2,", methods="tuned", EPISODES=2) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'tuned-seed1'}: holds a run with other settings (DISCOUNT = 0.96" in error
    assert tables(folder) == before
    # A training whose table is lost ends nothing, and is named.
    (folder / "training-seed1" / "rounds.csv").unlink()
    assert start(tmp_path, "--seeds", "1,", methods="hl", EPISODES=2) == 1
    capsys.readouterr()
    monkeypatch.undo()
    assert plot.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "; hl-seed1: of its training: " in out
    assert "delete the training's folder and the job's, and the same command makes both" in out
    assert "| tuned | 1 x 2 | " in out
    assert set(estimates.read_comparison(folder)["training"]["method"]) == {"tuned"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["observation"], "OBSERVATION: got 'broadcast', takes 'both' with the method tuned"),
        (["--set", "DISCOUNT=0.5"], "DISCOUNT: got 0.5, takes 0.96 with the method tuned"),
    ],
)
def test_what_a_method_sets_itself_cannot_be_set(tmp_path, capsys, arguments, words):
    assert start(tmp_path, *arguments, methods="hl,tuned") == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nodes_of_standalone_that_do_not_come_up_alike(tmp_path, capsys):
    def warns(seeds, episodes):
        parsed = compare.parse(
            flags(tmp_path, "--seeds", seeds, "--test-episodes", episodes, methods="standalone")
        )
        return "do not weigh the 4 nodes" in compare._plan(
            parsed, tmp_path, compare.make_jobs(parsed, tmp_path), [], "digits"
        )

    assert not warns("2", "2")  # nodes 0 1, 2 3
    assert warns("0,2", "2")  # 0 1, 0 1
    assert not warns("0,3", "2")  # 0 1, 2 3
    assert warns("1", "2")


def test_the_counts_are_printed_whatever_happens_to_a_figure(
    finished, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(finished, tmp_path / "paper-digits")

    def refuse(path, draw, tables):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plot, "save_figure", refuse)
    assert start(tmp_path) == 1
    captured = capsys.readouterr()
    assert "jobs: 8 finished before, 0 started, 0 finished, 0 failed" in captured.out
    assert "No space left on device" in captured.err
    assert (folder / "jobs.csv").exists()


def test_an_agent_with_a_basis_of_its_own(finished, tmp_path, capsys):
    """It is trained and tested in the same basis, and not where the basis would be another."""
    shared = ["--methods", "hl", "--test-episodes", "1", "--jobs", "1"]
    shared += ["--set", f"RESULTS_DIR={tmp_path}", "--set", f"THREADS={models.use_cpu(0)}"]
    settings = {**QUICK, "OBSERVATION": "fixed", "EPISODES": 1}
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert compare.main(compare.parse([*shared, "--seeds", "1", *sets])) == 0
    folder = tmp_path / "paper-digits"
    agent = ["--agent", str(folder / "training-seed0"), *shared]
    assert compare.main(compare.parse([*agent, "--name", "again"])) == 0
    assert tables(tmp_path / "again")["hl-seed0"] == tables(folder)["hl-seed0"]
    compare.parse([*agent, "--set", "GOAL_ACCURACY=0.5"])
    error = refusal(compare.parse, [*agent, "--set", "MAX_ROUNDS=7"], capsys)
    assert "MAX_ROUNDS: got it beside --agent, takes what its basis was made with" in error
    error = refusal(compare.parse, [*agent, "--set", "DATA_FILE=other.npz"], capsys)
    assert "DATA_FILE: got it beside --agent, takes what its basis was made with" in error


def test_what_the_teller_raises_ends_all(tmp_path):
    parsed = compare.parse(flags(tmp_path, "--seeds", "2", methods="stay"))
    waiting = compare.make_jobs(parsed, tmp_path / "jobs")

    def tell(outcome):
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        jobs.run_all(waiting, 1, tell=tell)
    assert not waiting[1].folder.exists()


def test_seeds():
    assert seeds_of("3") == [0, 1, 2]
    assert seeds_of("3,") == [3]
    assert seeds_of("0,7-9,8") == [0, 7, 8, 9]
    for wrong in ("", "x", "0,5-3", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="takes a number of seeds"):
            seeds_of(wrong)


def test_every_comparison_is_made_of_settings_that_exist(tmp_path):
    for name, comparison in compare.COMPARISONS.items():
        made = compare.make_jobs(compare.parse([name, "--seeds", "2"]), tmp_path)
        assert len({job.folder for job in made}) == len(made)
        assert len(made) == 2 * len(comparison.methods) * len(comparison.variants)
        for variant in comparison.variants:
            # A variant's name is a folder's.
            assert variant == "" or "/" not in variant, name


# --- Other processes -------------------------------------------------------------------------

# Long enough to be killed in the middle.
OUTSIDE = {**SMALL, "EPISODES": 4, "GOAL_ACCURACY": 0.95, "MAX_ROUNDS": 8}


def _outside(folder, *more):
    # With the threads that this process has, for the dataset is loaded here as well.
    sets = {**OUTSIDE, "RESULTS_DIR": folder, "THREADS": models.use_cpu(0)}
    sets = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    return compare.parse(["--methods", "hl", "--test-episodes", "2", *more, *sets])


def _with_a_killed_worker(folder, *more):
    """A comparison whose workers, other processes, do the real thing; one dies in the middle.

    Returns status, and the process that was killed.
    """
    killed = []

    def kill():
        _wait_for_rounds(folder, "training-seed0")
        killed.append(_writer(folder / "paper-digits" / "training-seed0"))
        os.kill(killed[0], signal.SIGKILL)

    parsed = _outside(folder, *more)
    killer = threading.Thread(target=kill)
    killer.start()
    status = compare.main(parsed)
    killer.join()
    return status, killed[0]


@pytest.fixture(scope="module")
def outside(digits):
    """The digits whole, in this process, and nothing drawn: see ``quick``."""
    patch = pytest.MonkeyPatch()
    patch.setitem(data.DATASETS, "digits", lambda settings: digits)
    patch.setattr(plot, "save_figure", lambda path, draw, tables: None)
    jobs._dataset.cache_clear()
    yield
    patch.undo()
    jobs._dataset.cache_clear()


@pytest.fixture(scope="module")
def killed(tmp_path_factory, outside):
    """What processes of this machine make, the first of which is killed in the middle."""
    folder = tmp_path_factory.mktemp("outside") / "a"
    status, _ = _with_a_killed_worker(folder, "--seeds", "1", "--jobs", "2")
    return status, folder / "paper-digits"


def _wait_for_rounds(folder, name):
    path = folder / "paper-digits" / name / "rounds.csv"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline, "no round was written"
        time.sleep(0.05)


def _writer(folder):
    """The process that holds the lock of a folder."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                open_files = [
                    os.readlink(f"/proc/{entry}/fd/{n}") for n in os.listdir(f"/proc/{entry}/fd")
                ]
            except OSError:
                continue
            if str(folder / ".lock") in open_files:
                return int(entry)
    raise AssertionError("nobody holds the lock")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, outside):
    """The same jobs in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert compare.main(_outside(folder, "--seeds", "2", "--jobs", "1")) == 0
    return tables(folder / "paper-digits")


def test_a_killed_process_stops_nothing(killed, undisturbed):
    status, folder = killed
    assert status == 0
    table = pd.read_csv(folder / "jobs.csv")
    assert table["state"].tolist() == ["finished"]
    # The killed training was continued by another process.
    config = json.loads((folder / "training-seed0" / "config.json").read_text())
    assert len(config["sessions"]) == 2
    assert tables(folder) == {n: undisturbed[n] for n in ("hl-seed0", "training-seed0")}


def test_a_dask_cluster_that_loses_a_worker(undisturbed, tmp_path, monkeypatch, digits, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: digits)
    jobs._dataset.cache_clear()
    dask = [sys.executable, "-m", "dask"]
    started = []

    def spawn(*arguments):
        log = (tmp_path / f"{len(started)}.log").open("w")
        started.append(subprocess.Popen([*dask, *arguments], stdout=log, stderr=log))

    file = tmp_path / "scheduler.json"
    at = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    try:
        spawn("scheduler", *at, "--scheduler-file", str(file))
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        for _ in range(2):
            spawn("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        more = ["--seeds", "2", "--cluster", address]
        status, worker = _with_a_killed_worker(tmp_path / "b", *more)
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert status == 0
    assert worker in [process.pid for process in started[1:]]
    assert "jobs: 0 finished before, 2 started, 2 finished, 0 failed" in capsys.readouterr().out
    assert tables(tmp_path / "b" / "paper-digits") == undisturbed


def test_no_cluster_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "_CLUSTER_TIMEOUT", 0.5)
    assert start(tmp_path, "--cluster", "tcp://127.0.0.1:1") == 2
    error = capsys.readouterr().err
    assert "--cluster: no Dask scheduler at tcp://127.0.0.1:1" in error
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_without_dask(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert start(tmp_path, "--cluster", "tcp://127.0.0.1:1") == 2
    error = capsys.readouterr().err
    assert error == "compare.py: --cluster: needs Dask: pip install -r requirements-cluster.txt\n"
    assert list(tmp_path.iterdir()) == []

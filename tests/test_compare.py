"""Comparisons as users start, stop, continue and spoil them."""

import csv
import dataclasses
import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
from conftest import (
    PROJECT,
    QUICK,
    interrupt_step,
    refusal,
    run,
    set_flags,
    stand_in,
    tables_of,
)

import data
import main
import models
import plot
from config import NAMED_SETTINGS, ConfigError, Settings, UserError
from environment import distance_matrix
from experiments import compare, figures, jobs, methods
from experiments.tables import EPISODE_COLUMNS, JOB_COLUMNS
from records import load_agent, read_table, write_arrays

METHODS = "hl,random,stay"


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    stand_in(monkeypatch, few)


def flags(folder, *more, methods=METHODS, **overrides):
    """A small comparison in this process, with the threads that the tests have."""
    sets = set_flags({**QUICK, "RESULTS_DIR": folder, **overrides})
    return ["--jobs", "1", "--test-episodes", "2", "--methods", methods, *more, *sets]


def start(folder, *more, **options):
    return compare.main(flags(folder, *more, **options))


def same(first, second):
    return all(first[name].equals(second[name]) for name in first)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def counts(out):
    """The jobs that were finished before, started, finished and failed, as the command prints."""
    last = re.findall("^jobs: .*", out, re.MULTILINE)[-1]
    return [int(number) for number in re.findall(r"\d+", last)]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few):
    """One small comparison from start to end, with its figures: do not write into it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "load_dataset", lambda name, folder: few)
    folder = tmp_path_factory.mktemp("finished")
    assert start(folder) == 0
    patch.undo()
    return folder / "paper-digits"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy that a test may change; its jobs' working folders are deleted."""
    shutil.copytree(finished, tmp_path / "paper-digits")
    shutil.rmtree(tmp_path / "paper-digits" / "jobs")
    return tmp_path / "paper-digits"


# --- What a comparison writes ----------------------------------------------------------------


def test_files_of_a_comparison(finished):
    names = {path.name for path in finished.iterdir() if path.suffix != ".png"}
    expected = {f"{t}.csv" for t in ("jobs", "episodes", "rounds", "training", "estimates")}
    assert names == expected | {"distances.csv", "config.json", "agents", "jobs", ".lock"}
    agents = {path.name for path in (finished / "agents").iterdir()}
    assert agents == {"hl-seed0.npz", "hl-seed1.npz"}
    assert list(finished.glob("*.png"))
    table = read_table(finished / "jobs.csv", JOB_COLUMNS)
    asked = [(method, seed) for method in METHODS.split(",") for seed in (0, 1)]
    assert list(zip(table["method"], table["seed"], strict=True)) == asked
    assert (table["state"] == "finished").all()
    assert (table["tensorflow"] != "").all()
    stored = json.loads((finished / "config.json").read_text())
    assert set(stored["settings"]) == set(Settings().stored()) - {"SEED", "THREADS", "DEVICE"}
    del stored["settings"], stored["dataset"]
    assert stored == {
        "comparison": "paper",
        "parameter": "",
        "variants": {"": {}},
        "methods": {name: {} for name in METHODS.split(",")},
        "episodes": "test",
        "test_episodes": 2,
        "first_episode": 1,
    }


def test_the_tables_are_those_of_the_jobs(finished):
    parts = {"episodes": [], "rounds": [], "training": []}
    for method in METHODS.split(","):
        for seed in (0, 1):
            folder = finished / "jobs" / f"{method}-seed{seed}"
            for name in ("episodes", "rounds"):
                parts[name] += rows(folder / f"{name}.csv")
            training = finished / "jobs" / f"training-{method}-seed{seed}"
            for row in rows(training / "episodes.csv") if method == "hl" else []:
                parts["training"].append({**row, "variant": "", "method": "hl", "seed": str(seed)})
    assert {name: rows(finished / f"{name}.csv") for name in parts} == parts
    assert len(parts["episodes"]) == 12
    assert len(parts["training"]) == 6
    for seed in (0, 1):
        agent = finished / "agents" / f"hl-seed{seed}.npz"
        trained = finished / "jobs" / f"training-hl-seed{seed}" / "agent.npz"
        assert agent.read_bytes() == trained.read_bytes()
        assert load_agent(agent)[1]["settings"]["SEED"] == seed


def test_a_method_is_not_changed_by_the_others(finished, tmp_path):
    assert start(tmp_path, "--seeds", "1,", methods="random") == 0
    alone, all_ = tables_of(tmp_path / "paper-digits"), tables_of(finished)
    for name in ("episodes", "rounds"):
        own = all_[name].query("method == 'random' and seed == '1'").reset_index(drop=True)
        assert alone[name].equals(own)


# --- Continuing ------------------------------------------------------------------------------


def test_jobs_of_other_code_are_warned_of(copy, monkeypatch, capsys):
    assert start(copy.parent, "--seeds", "1") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("records.git_revision", lambda: "another")
    assert start(copy.parent, "--seeds", "1") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{copy}: holds jobs of other code" in warning
    # A job that failed runs again, with this code.
    jobs_of = copy / "jobs.csv"
    jobs_of.write_text(jobs_of.read_text().replace(",finished,", ",failed,"))
    assert start(copy.parent, "--seeds", "1") == 0
    assert capsys.readouterr().err == ""


def test_what_the_tables_hold_is_finished(copy, finished, capsys):
    """The jobs' folders are deleted; seeds and methods are added to the same folder."""
    assert start(copy.parent) == 0
    out = capsys.readouterr().out
    assert counts(out) == [6, 0, 0, 0]
    assert out.endswith("\nthe report\n")
    assert same(tables_of(copy), tables_of(finished))
    assert not (copy / "jobs").exists()
    assert start(copy.parent, "--seeds", "2", methods="nearest,random") == 0
    assert start(copy.parent, "--seeds", "2,3", methods="stay") == 0
    table = read_table(copy / "jobs.csv", JOB_COLUMNS)
    sizes = table.groupby("method", sort=False).size().to_dict()
    assert list(sizes.items()) == [("hl", 2), ("random", 2), ("stay", 4), ("nearest", 2)]
    assert list(json.loads((copy / "config.json").read_text())["methods"]) == list(sizes)
    old = tables_of(copy)["episodes"].query("method in ['hl', 'random']").reset_index(drop=True)
    assert old.equals(tables_of(finished)["episodes"].query("method in ['hl', 'random']"))


def test_other_settings_and_data_are_refused_before_anything_is_written(
    copy, few, capsys, monkeypatch
):
    before = times(copy)
    for more, overrides, words in (
        (["--test-episodes", "3"], {}, "test_episodes = 2 there, 3 now"),
        (["--first-episode", "3"], {}, "first_episode = 1 there, 3 now"),
        (["--vary", "DISCOUNT=0.5", "--name", "paper-digits"], {}, "'paper' there, 'discount' now"),
        # Jobs that are not there yet, whose results would be averaged with those that are.
        (["--seeds", "7,"], {"GOAL_ACCURACY": 0.4}, "GOAL_ACCURACY = 0.3 there, 0.4 now"),
    ):
        assert start(copy.parent, *more, methods="random", **overrides) == 2
        assert words in capsys.readouterr().err
    changed = dataclasses.replace(methods.METHODS["random"], overrides=lambda _: {"DISCOUNT": 0.1})
    monkeypatch.setitem(methods.METHODS, "random", changed)
    assert start(copy.parent, "--seeds", "7,", methods="random") == 2
    assert "methods random = {} there, {'DISCOUNT': 0.1} now" in capsys.readouterr().err
    other = dataclasses.replace(few, y_test=few.y_test[::-1].copy())
    monkeypatch.setattr(jobs, "load_dataset", lambda name, folder: other)
    assert start(copy.parent, "--seeds", "7,", methods="stay") == 2
    assert "data = " in capsys.readouterr().err
    assert before == times(copy)


def test_the_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert start(tmp_path, "--name", "mine") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_runs_and_comparisons_are_kept_apart(finished, tmp_path, few, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "digits", lambda data_dir: few)
    monkeypatch.setattr(plot, "draw_run", lambda folder: None)
    settings = Settings(**{**QUICK, "EPISODES": 1, "RESULTS_DIR": str(tmp_path), "NAME": "run"})
    assert main.main(settings) == 0
    shutil.copytree(finished, tmp_path / "comparison")
    before = times(tmp_path)
    capsys.readouterr()
    assert start(tmp_path, "--name", "run") == 2
    assert main.main(settings.replace(NAME="comparison")) == 2
    errors = capsys.readouterr().err.splitlines()
    configs = [f"{tmp_path / name / 'config.json'}" for name in ("run", "comparison")]
    assert [line.split(": ")[1] for line in errors] == configs
    assert times(tmp_path) == before


def test_two_at_the_same_time_in_one_folder(tmp_path, capsys):
    (tmp_path / "paper-digits").mkdir()
    with filelock.FileLock(tmp_path / "paper-digits" / ".lock"):
        assert start(tmp_path, methods="stay") == 2
    assert f"{tmp_path / 'paper-digits'}: " in capsys.readouterr().err


def test_a_stopped_comparison_continues(finished, tmp_path, monkeypatch):
    """In the middle of a test: the rows are those of one that never stopped."""
    with monkeypatch.context() as patch:
        interrupt_step(patch, 14)
        assert start(tmp_path, "--seeds", "1", methods="hl,random") == 130
    training = tmp_path / "paper-digits" / "jobs" / "training-hl-seed0" / "config.json"
    assert json.loads(training.read_text())["state"] == "finished"
    assert {row["state"] for row in rows(tmp_path / "paper-digits" / "jobs.csv")} == {"waiting"}
    assert start(tmp_path, "--seeds", "1", methods="hl,random") == 0
    found, expected = tables_of(tmp_path / "paper-digits"), tables_of(finished)
    for name in ("episodes", "rounds", "training"):
        of_seed = expected[name].query("seed == '0' and method != 'stay'").reset_index(drop=True)
        assert found[name].equals(of_seed)


def test_a_job_that_was_finished_when_the_command_was_killed_is_collected(finished, tmp_path):
    """A kill leaves its row as it was and the tables as they were: the job's folder counts."""
    folder = shutil.copytree(finished, tmp_path / "paper-digits")
    table = pd.read_csv(folder / "jobs.csv", dtype=str, keep_default_na=False)
    table.loc[(table["method"] == "stay") & (table["seed"] == "1"), "state"] = "waiting"
    table.to_csv(folder / "jobs.csv", index=False)
    for name in ("episodes", "rounds"):
        lines = (folder / f"{name}.csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines if ",stay,1," not in line]
        # A kill between the two tables: all rounds are there already.
        (folder / f"{name}.csv").write_text("".join(kept if name == "episodes" else lines))
    assert start(tmp_path, "--seeds", "1,", methods="stay") == 0
    assert same(tables_of(folder), tables_of(finished))
    assert {row["state"] for row in rows(folder / "jobs.csv")} == {"finished"}


# --- Failing ---------------------------------------------------------------------------------


def test_a_failing_job_is_noted_and_tried_again(tmp_path, monkeypatch, capsys):
    def broken(environment):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setitem(methods.METHODS, "broken", methods.Method("broken", broken))
    assert start(tmp_path, methods="broken,stay") == 1
    folder = tmp_path / "paper-digits"
    out = capsys.readouterr().out
    assert counts(out) == [0, 4, 2, 2]
    assert out.count("broken-seed1 failed: ZeroDivisionError: no such luck") == 1
    assert out.count("ZeroDivisionError") == 2
    found = {(row["method"], row["seed"]): row for row in rows(folder / "jobs.csv")}
    assert found["broken", "0"]["state"] == "failed"
    assert found["broken", "0"]["error"] == "ZeroDivisionError: no such luck"
    assert "in broken\n" in (folder / "jobs" / "broken-seed0" / "error.txt").read_text()
    assert f"traceback: {folder / 'jobs' / 'broken-seed0' / 'error.txt'}\n" in out
    assert (found["stay", "1"]["state"], found["stay", "1"]["error"]) == ("finished", "")
    mended = methods.Method("mended", methods.stay_policy)
    monkeypatch.setitem(methods.METHODS, "broken", mended)
    assert start(tmp_path, methods="broken,stay") == 0
    assert counts(capsys.readouterr().out) == [2, 2, 2, 0]
    assert not (folder / "jobs" / "broken-seed0" / "error.txt").exists()


def test_a_job_whose_files_are_on_another_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "run_job", lambda job: None)
    assert start(tmp_path, "--seeds", "1", methods="stay") == 1
    folder = tmp_path / "paper-digits"
    assert f"not in {folder / 'jobs' / 'stay-seed0'};" in capsys.readouterr().out
    assert [row["state"] for row in rows(folder / "jobs.csv")] == ["failed"]


def test_a_full_disk_fails_the_job_that_meets_it(finished, tmp_path, monkeypatch, capsys):
    append_rows = jobs.append_rows

    def fill_up(path, *row):
        if path.parent.name == "random-seed0":
            path.write_text("half a row")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append_rows(path, *row)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "append_rows", fill_up)
        assert start(tmp_path, methods="random,stay") == 1
    out = capsys.readouterr().out
    assert counts(out) == [0, 4, 3, 1]
    (line,) = [line for line in out.splitlines() if "No space left" in line]
    assert line.startswith("random-seed0 failed: ")
    assert start(tmp_path, methods="random,stay") == 0
    assert counts(capsys.readouterr().out) == [3, 1, 1, 0]
    found, expected = tables_of(tmp_path / "paper-digits"), tables_of(finished)
    for name in ("episodes", "rounds"):
        untrained = expected[name].query("method != 'hl'").reset_index(drop=True)
        assert found[name].equals(untrained)


def test_damaged_jobs_are_made_again_or_fail(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "paper-digits")
    (folder / "episodes.csv").unlink()
    (folder / "jobs" / "random-seed0" / "rounds.csv").unlink()
    for torn in ("random-seed1/episodes.csv", "stay-seed0/rounds.csv"):
        lines = (folder / "jobs" / torn).read_text().splitlines(keepends=True)
        (folder / "jobs" / torn).write_text("".join(lines[:-1]))
    shutil.rmtree(folder / "jobs" / "hl-seed0")
    (folder / "jobs" / "training-hl-seed0" / "config.json").write_text("{broken")
    assert start(tmp_path) == 1
    out = capsys.readouterr().out
    assert counts(out) == [0, 6, 5, 1]
    states = {(row["method"], row["seed"]): row["state"] for row in rows(folder / "jobs.csv")}
    assert [key for key, state in states.items() if state == "failed"] == [("hl", "0")]
    shutil.rmtree(folder / "jobs" / "training-hl-seed0")
    assert start(tmp_path) == 0
    assert same(tables_of(folder), tables_of(finished))


def test_the_counts_are_printed_whatever_happens_to_a_figure(copy, monkeypatch, capsys):
    def refuse(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(figures, "draw_comparison", refuse)
    assert start(copy.parent) == 1
    captured = capsys.readouterr()
    assert counts(captured.out) == [6, 0, 0, 0]
    assert "No space left on device" in captured.err


# --- Values, agents, methods -----------------------------------------------------------------


def test_values_of_a_setting(tmp_path, capsys):
    more = ["--vary", "HIDDEN_UNITS=(8, 4),(16,)", "--seeds", "1", "--test-episodes", "1"]
    assert start(tmp_path, *more, methods="hl", EPISODES=1) == 0
    folder = tmp_path / "hidden_units-digits"
    stored = json.loads((folder / "config.json").read_text())
    variants = {"(8,4)": {"HIDDEN_UNITS": [8, 4]}, "(16,)": {"HIDDEN_UNITS": [16]}}
    assert (stored["parameter"], stored["variants"]) == ("HIDDEN_UNITS", variants)
    assert tables_of(folder)["episodes"]["variant"].tolist() == ["(8,4)", "(16,)"]
    for variant, units in (("(8,4)", [8, 4]), ("(16,)", [16])):
        about = load_agent(folder / "agents" / variant / "hl-seed0.npz")[1]
        assert about["settings"]["HIDDEN_UNITS"] == units
    # Another value joins them; the same value with other overrides can't be.
    more[1] = "HIDDEN_UNITS=(5,),(16,)"
    assert start(tmp_path, *more, methods="hl", EPISODES=1) == 0
    assert tables_of(folder)["episodes"]["variant"].tolist() == ["(8,4)", "(16,)", "(5,)"]
    assert counts(capsys.readouterr().out) == [1, 1, 1, 0]


def test_the_walks_of_methods_that_learn_nothing(tmp_path, few):
    world = {"NUM_NODES": 6, "MAX_ROUNDS": 4, "GOAL_ACCURACY": 1.0}
    names = "balanced,metropolis,metropolis_jumps,shortest,shortest_twice,nearest_twice,best_walk"
    assert start(tmp_path, "--seeds", "1", "--test-episodes", "1", methods=names, **world) == 0
    rounds = tables_of(tmp_path / "paper-digits")["rounds"].astype({"node": int})
    walks = rounds.groupby("method")["node"].agg(list)
    assert walks.map(len).to_dict() == dict.fromkeys(names.split(","), 4)
    assert walks["best_walk"] == [0, 5, 5, 5]
    settings = Settings(**{**QUICK, **world})
    distances, shards = distance_matrix(settings), data.make_shards(few, settings)
    near = 1 + distances[0, 1:].argmin()
    assert walks["nearest_twice"] == [0, 0, near, near]
    tours = [[0, *rest, 0] for rest in itertools.permutations(range(1, 6))]
    tour = min(tours, key=lambda tour: distances[tour[:-1], tour[1:]].sum())
    assert walks["shortest"] in (tour[:4], tour[::-1][:4])
    assert walks["shortest_twice"] == np.repeat(walks["shortest"][:2], 2).tolist()
    balanced = [0]

    def unevenness(node):
        labels = few.y_train[np.concatenate([shards[n] for n in (*balanced, node)])]
        return np.square(np.bincount(labels)).sum(), distances[balanced[-1], node]

    for _ in range(3):
        balanced.append(min(range(6), key=unevenness))
    assert walks["balanced"] == balanced


def test_a_value_of_the_world_changes_every_method(tmp_path):
    more = ["--vary", "DISTANCE_SCALE=0,0.5", "--seeds", "1"]
    assert start(tmp_path, *more, methods="nearest") == 0
    folder = tmp_path / "distance_scale-digits"
    distances = read_table(folder / "distances.csv", ("variant", "node", "other_node", "distance"))
    assert distances.groupby("variant")["distance"].max()["0.0"] == 0
    scale = distance_matrix(Settings(**QUICK, DISTANCE_SCALE=0.5)).max()
    assert distances["distance"].max() == pytest.approx(scale, abs=1e-15)
    cost = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
    costs = cost.groupby("variant")["communication_cost"].sum()
    assert costs["0.0"] == 0 < costs["0.5"]


def agent_flags(finished, folder, *more, methods="random"):
    agent = str(finished / "agents" / "hl-seed1.npz")
    common = f"--agent {agent} --methods {methods} --test-episodes 2 --jobs 1"
    sets = set_flags({"RESULTS_DIR": folder, "THREADS": QUICK["THREADS"]})
    return [*common.split(), *sets, *more]


def test_a_trained_agent_can_be_tested_alone(finished, tmp_path, capsys):
    assert compare.main(agent_flags(finished, tmp_path)) == 0
    folder = tmp_path / "paper-digits"
    found, expected = tables_of(folder), tables_of(finished)
    for name in ("episodes", "rounds"):
        own = expected[name].query("method != 'stay' and seed == '1'").reset_index(drop=True)
        assert found[name].equals(own.replace({"method": {"hl": "agent"}}))
    assert found["training"].empty
    assert not (folder / "agents").exists()
    hashes = {row["method"]: row["agent"] for row in rows(folder / "jobs.csv")}
    assert (len(hashes["agent"]), hashes["random"]) == (64, "")
    # The same agent elsewhere is the same; another one is refused.
    shutil.copy(finished / "agents" / "hl-seed1.npz", tmp_path / "agent.npz")
    again = agent_flags(finished, tmp_path)
    again[1] = str(tmp_path / "agent.npz")
    assert compare.main(again) == 0
    assert counts(capsys.readouterr().out) == [2, 0, 0, 0]
    weights, about = load_agent(tmp_path / "agent.npz")
    weights["0/bias"] += 1
    write_arrays(tmp_path / "agent.npz", {**weights, "config": np.array(json.dumps(about))})
    assert compare.main(again) == 2
    assert "agent-seed1 of another agent" in capsys.readouterr().err


def test_a_trained_agent_joins_a_comparison(copy, tmp_path, capsys):
    before = tables_of(copy)["episodes"]
    agent = str(copy / "agents" / "hl-seed1.npz")
    assert start(tmp_path, "--agent", agent, methods="stay") == 0
    assert counts(capsys.readouterr().out) == [1, 1, 1, 0]
    after = tables_of(copy)["episodes"]
    added = after.query("method == 'agent'")
    assert after.drop(added.index).reset_index(drop=True).equals(before)
    own = before.query("method == 'hl' and seed == '1'").replace({"method": {"hl": "agent"}})
    assert added.reset_index(drop=True).equals(own.reset_index(drop=True))


def test_a_trained_agent_keeps_its_settings_beside_others(finished):
    agent = str(finished / "agents" / "hl-seed1.npz")
    assert compare.parse(["--agent", agent]).methods == ["agent", "random"]
    plan = compare.parse(agent_flags(finished, "x", methods="hl,tuned"))
    found = {
        job.method: (job.settings.EPISODES, job.settings.N_STEP, job.settings.NUM_NODES)
        for job in compare.make_jobs(plan, Path())
    }
    assert found == {"agent": (3, 1, 4), "hl": (120, 1, 4), "tuned": (120, 12, 4)}


def test_a_trained_agent_in_another_world_and_on_other_data(
    finished, few, tmp_path, monkeypatch, capsys
):
    goal = agent_flags(finished, tmp_path, "--set", "GOAL_ACCURACY=1.0", methods="agent")
    assert compare.main(goal) == 0
    assert (tables_of(tmp_path / "paper-digits")["episodes"]["rounds"] == "5").all()
    other = dataclasses.replace(few, y_test=few.y_test[::-1].copy())
    monkeypatch.setattr(jobs, "load_dataset", lambda name, folder: other)
    own = agent_flags(finished, tmp_path, "--name", "other", methods="agent")
    assert compare.main(own) == 2
    assert "--agent" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert compare.main([*own, "--dataset", "digits"]) == 0
    # Another dataset has its own goal and limit; the training had 0.3 and 5.
    limits = {"digits": (0.3, 5), "mnist": (0.8, 36), "fashion_mnist": (0.72, 87)}
    for dataset, expected in limits.items():
        settings = compare.parse([*own, "--dataset", dataset]).settings
        found = (settings.GOAL_ACCURACY, settings.MAX_ROUNDS)
        assert found == expected


def test_the_tuned_agent_is_a_method_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED_SETTINGS["tuned"], "REPLAY_SAMPLE", 8)
    monkeypatch.setitem(NAMED_SETTINGS["tuned"], "UPDATES_PER_EPISODE", 3)
    assert start(tmp_path, "--seeds", "1,", methods="hl,tuned", EPISODES=2) == 0
    folder = tmp_path / "paper-digits"
    for name in ("tuned", "hl"):
        stored = load_agent(folder / "agents" / f"{name}-seed1.npz")[1]["settings"]
        own = {key: stored[key] for key in NAMED_SETTINGS["tuned"]}
        tuned = json.loads(json.dumps(NAMED_SETTINGS["tuned"]))
        assert (own == tuned) == (name == "tuned")
    first = tables_of(folder)["rounds"].query("round == '1'").groupby("episode")["accuracy"]
    assert (first.nunique() == 1).all()
    assert tables_of(folder)["training"].groupby("method").size().to_dict() == {"hl": 2, "tuned": 2}


def test_validation_episodes_have_their_own_folder(tmp_path, capsys):
    values = ["--vary", "DISCOUNT=0.5,0.9", "--seeds", "1"]
    assert start(tmp_path, *values, "--validation", methods="random") == 0
    assert start(tmp_path, *values, methods="random") == 0
    folder = tmp_path / "discount-digits-validation"
    validated, tested = (tables_of(f)["rounds"] for f in (folder, tmp_path / "discount-digits"))
    assert validated["accuracy"].tolist() != tested["accuracy"].tolist()
    assert start(tmp_path, *values, "--name", folder.name, methods="random") == 2
    assert "episodes = 'validation' there, 'test' now" in capsys.readouterr().err


# --- Command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["papr"], "'papr'"),
        (["--seeds", "five"], "--seeds: got 'five'"),
        (["--test-episodes", "0"], "--test-episodes: got '0', takes an integer >= 1"),
        (["--jobs", "-1"], "--jobs: got '-1', takes an integer >= 1"),
        (["--seed", "3"], "SEED: got it, takes --seeds"),
        (["--set", "SEED=3"], "SEED: got it, takes --seeds"),
        (["--methods", ","], "--methods: got ''"),
        (["--methods", "hl,rnadom"], "--methods: got 'rnadom', takes some of hl, tuned, agent"),
        (["--jobs", "2", "--cluster", "tcp://x:1"], "--jobs"),
        (["--settings", "best"], "argument --settings: invalid choice: 'best'"),
        (["ablation", "--settings", "tuned"], "--settings: got it beside"),
        # It would put back what the ablation takes back.
        (["ablation", "--methods", "tuned"], "'progress' with the method tuned"),
        (["--set", "DISCOUNT=0.5", "--methods", "tuned"], "DISCOUNT: got 0.5, takes 0.97"),
        (
            ["--vary", "OBSERVATION=zeros", "--methods", "tuned"],
            "OBSERVATION: got 'zeros', takes 'both'",
        ),
        (["--vary", "GOAL_ACCURACY"], "--vary: got 'GOAL_ACCURACY', takes NAME=v1"),
        (["--vary", "GOAL_ACCURACY=0.5,2"], "GOAL_ACCURACY: got 2, takes a number in [0, 1]"),
        (["--vary", "GAOL=1"], "GAOL: unknown"),
        (["--vary", "SEED=1,2"], "--vary: got 'SEED=1,2'"),
        (["--vary", "DATASET=mnist,digits"], "--vary: got 'DATASET=mnist,digits'"),
        (["worlds", "--vary", "DISCOUNT=0.5"], "--vary"),
        (["--vary", "DISCOUNT=0.5", "--set", "DISCOUNT=0.4"], "DISCOUNT: got it with --set"),
        (
            ["--vary", "NODES_PER_ROUND=1,2"],
            "NODES_PER_ROUND: got 2, takes 1 with the method nearest_twice",
        ),
        (
            ["--methods", "best_walk", "--set", "NUM_NODES=4"],
            "NUM_NODES: got 4, takes at least 6 with the method best_walk",
        ),
        (["--name", "a/b"], "NAME: got 'a/b', takes letters"),
        (["--methods", "agent"], "--methods: got agent, takes it beside --agent"),
        (["--agent", "none.npz"], "none.npz: "),
        (["--agent", "~nosuchuser/none.npz"], "~nosuchuser/none.npz: "),
        (["--agent", "x", "--seeds", "2"], "--seeds"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    assert words in refusal(compare.main, arguments, capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "DISCOUNT=0.5"], "DISCOUNT: got 0.5, takes 0.9 with the method agent"),
        (["--set", "NUM_NODES=6"], "NUM_NODES: got 6, takes 4 with the method agent"),
        (["--vary", "EPISODES=1,2"], "EPISODES: got 1, takes 3 with the method agent"),
        (["--settings", "tuned"], "--settings: got it beside --agent"),
    ],
)
def test_what_an_agent_was_trained_with_stays(finished, more, words, capsys):
    agent = str(finished / "agents" / "hl-seed1.npz")
    assert words in refusal(compare.main, ["--agent", agent, *more], capsys)


def test_the_agent_of_a_walk_search_is_refused(finished, tmp_path, capsys):
    about = load_agent(finished / "agents" / "hl-seed1.npz")[1]
    path = tmp_path / "walk.npz"
    write_arrays(path, {"nodes": np.ones(4), "config": np.array(json.dumps(about))})
    words = f"--agent: got {path}, takes the agent.npz of a DQN"
    assert words in refusal(compare.main, ["--agent", str(path)], capsys)


def test_shards_that_cannot_be_filled_write_nothing(tmp_path, capsys):
    assert start(tmp_path, SAMPLES_PER_NODE=100_000) == 2
    assert "SAMPLES_PER_NODE: got 100000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_is_the_one_that_is_named():
    assert compare.parse([]).settings.DATASET == "digits"
    for named in (["--dataset", "mnist"], ["--set", "DATASET=mnist"], ["--dataset", "auto"]):
        assert named[-1].removeprefix("DATASET=") == compare.parse(named).settings.DATASET


def test_every_comparison_is_made_of_settings_that_exist(tmp_path):
    for name, comparison in compare.COMPARISONS.items():
        plan = compare.parse([name, "--seeds", "2"])
        made = compare.make_jobs(plan, tmp_path)
        assert len({job.folder for job in made}) == len(made)
        assert len(made) == 2 * len(comparison.methods) * len(comparison.variants)
        assert not any("/" in variant for variant in comparison.variants)  # a folder's name
    ablation, tuned = dict(compare.COMPARISONS["ablation"].variants), NAMED_SETTINGS["tuned"]
    assert ablation.pop("nothing") == tuned
    assert set(ablation) == set(tuned)
    for name, variant in ablation.items():
        assert name not in variant
        assert {**variant, name: tuned[name]} == tuned
    others = set(methods.METHODS) - set(compare.COMPARISONS["paper"].methods)
    assert others == {"tuned", "agent", "best_walk", "walk_search"}


def test_the_methods_and_episodes_of_a_plan(tmp_path):
    plan = compare.parse(["--vary", "FIT_ALL_ACTIONS=True,False", "--first-episode", "61"])
    assert list(plan.comparison.variants) == ["True", "False"]
    assert plan.methods == ["hl", "random", "nearest_twice"]
    assert {job.first_episode for job in compare.make_jobs(plan, tmp_path)} == {61}


def test_a_job_computes_on_one_thread(monkeypatch, capsys):
    def stop(plan, folder):
        raise UserError(f"{plan.settings.THREADS} a job")

    monkeypatch.setattr(models, "use_device", lambda *_: None)
    monkeypatch.setattr(compare, "make_jobs", stop)
    assert "1 a job" in refusal(compare.main, ["--methods", "stay"], capsys)


def test_values_are_judged_beside_the_other_settings():
    named = ["--vary", "STARTER_NODE=5,15", "--methods", "random"]
    starters = compare.parse([*named, "--set", "NUM_NODES=20"]).variants()
    assert {name: settings.STARTER_NODE for name, settings in starters.items()} == {
        "5": 5,
        "15": 15,
    }
    with pytest.raises(ConfigError, match="STARTER_NODE: got 15, takes at most NUM_NODES - 1 = 9"):
        compare.parse(named)


def test_help_and_list_load_no_tensorflow():
    done = run("--list", script="experiments.compare")
    assert (done.returncode, done.stderr) == (0, "")
    for name in [*compare.COMPARISONS, *methods.METHODS]:
        assert f"\n  {name} " in done.stdout
    code = "import sys\nfrom experiments import compare\ncompare.parse([])\n"
    code += "print({'tensorflow', 'distributed', 'scipy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "set()\n"

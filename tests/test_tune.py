"""Trials of settings: what they run, what their log says, and how they refuse."""

import csv

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, refusal, run

import config
import data
import jobs
import models
import tune
from environment import DecentralizedLearning
from records import read_table

QUICK = {**SMALL, "LEARNING_RATE": 0.01, "GOAL_ACCURACY": 0.3, "EPISODES": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    jobs._dataset.cache_clear()
    yield
    jobs._dataset.cache_clear()


def start(folder, *arguments, goal=QUICK["GOAL_ACCURACY"]):
    settings = {**QUICK, "RESULTS_DIR": folder, "THREADS": models.use_cpu(0)}
    settings["GOAL_ACCURACY"] = goal
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    episodes = ["--validation-episodes", "2", "--jobs", "1"]
    return tune.main(tune.parse([*arguments, *episodes, *sets]))


def rows(folder):
    with (folder / "tuning.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_trial_s_rows_are_means_of_its_tables(tmp_path, capsys):
    assert start(tmp_path, "wide", "--seeds", "2,", "--set", "DISCOUNT=0.5") == 0
    assert "trial=wide dataset=digits seed=2" in capsys.readouterr().out
    found = rows(tmp_path)
    assert [row["seed"] for row in found] == ["2"]
    for row in found:
        folder = tmp_path / "tuning" / "wide-digits"
        training = pd.read_csv(folder / f"training-seed{row['seed']}" / "episodes.csv")
        test = pd.read_csv(folder / f"hl-seed{row['seed']}" / "episodes.csv")
        assert (len(training), len(test)) == (3, 2)
        assert row["training_episodes"] == "3"
        assert float(row["training_rounds"]) == pytest.approx(
            training["rounds"].sum() / 3, abs=0.01
        )
        assert float(row["rounds"]) == test["rounds"].sum() / 2
        assert float(row["goal_reached"]) == test["goal_reached"].sum() / 2
        cost = test["communication_cost"].sum() / 2
        assert float(row["communication_cost"]) == pytest.approx(cost, abs=1e-4)
        # The public code's agent, but for what was asked for.
        assert {"DISCOUNT=0.5", "REPLAY_SAMPLE=8"} <= set(row["settings"].split())
        assert not any(part.startswith("DOUBLE_Q") for part in row["settings"].split())
        assert row["error"] == ""


def test_validation_episodes_are_not_those_of_a_test(tmp_path):
    assert start(tmp_path, "one", "--seeds", "1,") == 0
    stored = (tmp_path / "tuning" / "one-digits" / "hl-seed1" / "config.json").read_text()
    assert '"episodes": "validation"' in stored
    kinds = ("episode", "test", "validation")
    seeds = {config.episode_seed(1, e, kind) for kind in kinds for e in range(1, 121)}
    assert len(seeds) == 3 * 120
    # The same walk on the three kinds of episodes.
    environment = DecentralizedLearning(
        config.make_settings(**QUICK, SEED=1, THREADS=models.use_cpu(0))
    )
    tested = pd.read_csv(tmp_path / "tuning" / "one-digits" / "hl-seed1" / "rounds.csv")
    tested = tested[tested["episode"] == 1]
    accuracies = {}
    for kind in kinds:
        _, info = environment.reset(seed=config.episode_seed(1, 1, kind))
        accuracies[kind] = [info["accuracy"]]
        for node in tested["node"].astype(int)[1:]:
            if info["goal_reached"]:
                break
            info = environment.step(node)[4]
            accuracies[kind].append(info["accuracy"])
    assert accuracies["validation"] == pytest.approx(tested["accuracy"].tolist(), abs=1e-12)
    assert accuracies["test"] != accuracies["validation"] != accuracies["episode"]


def test_however_rounds_are_judged_in_training_all_images_judge_the_validation(tmp_path):
    """With the goal 1 a share has no standard error: the few judge whatever is not perfect."""
    assert start(tmp_path, "few", "--seeds", "1,", "--set", "REWARD_IMAGES=100", goal=1.0) == 0
    folder = tmp_path / "tuning" / "few-digits"
    trained, tested = (
        pd.read_csv(folder / f"{n}-seed1" / "rounds.csv") for n in ("training", "hl")
    )

    def are_shares_of(accuracies, count):
        return np.allclose(accuracies * count, (accuracies * count).round())

    assert are_shares_of(trained["accuracy"], 100)
    assert are_shares_of(tested["accuracy"], 359)
    assert not are_shares_of(tested["accuracy"], 100)


def test_a_second_call_adds_seeds_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(config.AGENTS["tuned"], "UPDATES_PER_EPISODE", 2)
    assert start(tmp_path, "one", "--seeds", "1,") == 0
    training = tmp_path / "tuning" / "one-digits" / "training-seed1" / "rounds.csv"
    before, first = training.stat().st_mtime_ns, rows(tmp_path)[0]
    assert start(tmp_path, "one", "--seeds", "2") == 0
    assert training.stat().st_mtime_ns == before
    assert start(tmp_path, "other", "--seeds", "1,", "--settings", "tuned") == 0
    found = rows(tmp_path)
    assert found[0] == first  # with the seconds that it took
    assert [(row["trial"], row["seed"]) for row in found] == [
        ("one", "1"),
        ("one", "0"),
        ("other", "1"),
    ]
    assert {"DUELING=True", "HIDDEN_UNITS=(64,64)"} <= set(found[2]["settings"].split())
    read_table(tmp_path / "tuning.csv", tune.LOG_COLUMNS)


def test_other_settings_under_the_same_name_change_nothing(tmp_path, capsys):
    assert start(tmp_path, "one", "--seeds", "1,") == 0
    before = rows(tmp_path)
    assert start(tmp_path, "one", "--seeds", "2", "--set", "DISCOUNT=0.1") == 2
    assert "holds a run with other settings (DISCOUNT = 0.9 there" in capsys.readouterr().err
    assert rows(tmp_path) == before
    assert not (tmp_path / "tuning" / "one-digits" / "training-seed0").exists()


def test_an_unwritable_folder(tmp_path, capsys):
    """A file where the folder should be: root may write everywhere, so no mode bits here."""
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file", "wide", "--seeds", "1") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"tune.py: {tmp_path / 'file'}: can't be written (")
    assert message.endswith("; choose another RESULTS_DIR\n")


def test_a_seed_that_is_stopped_has_its_row(tmp_path, monkeypatch):
    def stop(environment, run, quiet):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs.main, "train", stop)
        assert start(tmp_path, "one", "--seeds", "1,3") == 130
    errors = [(row["seed"], row["error"], row["rounds"]) for row in rows(tmp_path)]
    assert errors == [("1", "not finished", ""), ("3", "not finished", "")]
    assert start(tmp_path, "one", "--seeds", "1,") == 0
    assert {row["seed"]: row["error"] for row in rows(tmp_path)} == {"1": "", "3": "not finished"}


def test_a_seed_that_fails_is_noted_and_tried_again(tmp_path, monkeypatch):
    def fail(environment, run, quiet):
        raise OSError(28, "No space left on device", "rounds.csv")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.main, "train", fail)
        assert start(tmp_path, "one", "--seeds", "1,") == 1
    (row,) = rows(tmp_path)
    assert (row["error"], row["rounds"]) == ("rounds.csv: No space left on device", "")
    monkeypatch.setattr(tune, "_LAST", 2)
    assert start(tmp_path, "one", "--seeds", "1,") == 0
    (row,) = rows(tmp_path)
    assert row["error"] == ""
    training = pd.read_csv(tmp_path / "tuning" / "one-digits" / "training-seed1" / "episodes.csv")
    # The mean is that of the last episodes, here two of three.
    assert float(row["training_rounds"]) == training["rounds"][1:].mean()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: trial"),
        (["a/b"], "trial: got 'a/b', takes letters"),
        (["one", "--set", "SEED=3"], "SEED: got it with --set, takes --seeds"),
        (["one", "--set", "DISCOUNT=2"], "DISCOUNT: got 2, takes a number in [0, 1]"),
        (["one", "--settings", "best"], "--settings: got 'best', takes paper or tuned"),
        (["one", "--seeds", "x"], "argument --seeds: got 'x'"),
        (["one", "--set", "FILENAME=1"], "tune.py: FILENAME: unknown"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert words in refusal(tune.parse, arguments, capsys)


def test_a_foreign_log_is_refused(tmp_path):
    (tmp_path / "tuning.csv").write_text("a,b\n1,2\n")
    assert start(tmp_path, "one", "--seeds", "1,") == 2
    assert (tmp_path / "tuning.csv").read_text() == "a,b\n1,2\n"


def test_help_outside(tmp_path):
    done = run("--help", script="tune.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--validation-episodes" in done.stdout

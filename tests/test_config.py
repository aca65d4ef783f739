import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT

import cli
import config
from config import NAMED_SETTINGS, ConfigError, Settings


def test_defaults_are_the_public_codes():
    s = Settings()
    assert (s.EPISODES, s.GOAL_ACCURACY, s.MAX_ROUNDS) == (120, 0.8, 36)
    assert (s.NUM_NODES, s.STARTER_NODE, s.NODES_PER_ROUND) == (10, 0, 1)
    assert (s.SAMPLES_PER_NODE, s.HETEROGENEITY) == (500, 0.8)
    assert (s.DISTANCE_SCALE, s.DISTANCE_SEED) == (0.1, 0)
    assert s.REWARD_BASE == 32
    assert (s.LEARNING_RATE, s.BATCH_SIZE, s.LOCAL_EPOCHS) == (1e-3, 32, 1)
    assert s.OBSERVATION == "broadcast"
    assert (s.HIDDEN_UNITS, s.Q_LEARNING_RATE, s.DISCOUNT) == ((500, 200), 1e-3, 0.9)
    assert (config.REPLAY_CAPACITY, s.REPLAY_SAMPLE, s.Q_BATCH_SIZE) == (50_000, 128, 16)
    assert (s.FIT_ALL_ACTIONS, s.UPDATES_PER_EPISODE) == (True, 1)
    assert (s.REWARD, s.ROUNDS_PER_CHOICE, s.N_STEP, s.TARGET_RATE) == ("power", 1, 1, 0)
    assert (s.EPSILON, s.EPSILON_DECAY) == (1.0, 0.02)


def test_every_setting_is_declared_once():
    names = [name for group in config.GROUPS for name in group.model_fields]
    assert len(names) == len(set(names)) == 39
    assert set(names) == set(Settings.model_fields)
    assert set(NAMED_SETTINGS["tuned"]) < config.names_of(config.AgentSettings)


def test_the_environment_names_the_folder_of_the_data():
    code = "import config; print(config.Settings().DATA_DIR)"
    for found, expected in (({}, "data"), ({"HL_DATA_DIR": "/x/mnist"}, "/x/mnist")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            env={**os.environ, **found},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{expected}\n"


def test_replace_changes_a_copy_and_validates():
    settings = Settings(STARTER_NODE=9)
    assert settings.replace(SEED=4) == Settings(STARTER_NODE=9, SEED=4)
    assert settings.SEED == 0
    with pytest.raises(ConfigError, match=r"^STARTER_NODE: got 9, takes at most NUM_NODES - 1 = 4"):
        settings.replace(NUM_NODES=5)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("EPISODES", 0, "an integer >= 1"),
        ("EPISODES", 1.0, "an integer >= 1"),
        ("GOAL_ACCURACY", 1.01, r"a number in \[0, 1\]"),
        ("GOAL_ACCURACY", math.nan, r"a number in \[0, 1\]"),
        ("REWARD_BASE", 0, "a number > 0"),
        ("REWARD_BASE", math.inf, "a number > 0"),
        ("REWARD_BASE", 10**400, "a number > 0"),
        ("MAX_ROUNDS", 1, "an integer >= 2"),
        ("DISTANCE_SEED", 2**32, r"an integer in \[0, 4294967295\]"),
        ("OBSERVATION", "fixed", "one of broadcast, local, both, last_node, zeros"),
        ("HIDDEN_UNITS", (), "a tuple of integers >= 1"),
        ("HIDDEN_UNITS", 500, "a tuple of integers >= 1"),
        ("HIDDEN_UNITS", {500, 200}, "a tuple of integers >= 1"),
        ("HIDDEN_UNITS", (500, 0), "a tuple of integers >= 1"),
        ("FIT_ALL_ACTIONS", 1, "True or False"),
        ("REPLAY_SAMPLE", 50_001, r"an integer in \[1, 50000\]"),
        ("NAME", "../elsewhere", "letters, digits"),
        ("NAME", ".", "letters, digits"),
        ("DATASET", 3, "text"),
        ("RESULTS_DIR", "", "text"),
        ("THREADS", 1025, r"an integer in \[0, 1024\]"),
        ("STARTER_NODE", 10, "at most NUM_NODES - 1 = 9"),
        ("NODES_PER_ROUND", 11, "at most NUM_NODES = 10"),
    ],
)
def test_refuses_values(name, value, takes):
    with pytest.raises(ConfigError, match=rf"^{name}: got .*, takes {takes}") as error:
        Settings(**{name: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_project_or_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config.absolute("~/hl") == Path("/home/somebody/hl")
    assert config.absolute("/scratch") == Path("/scratch")
    assert config.absolute("a/b") == PROJECT / "a" / "b"
    # No such user: a folder of that name, and no error.
    assert config.absolute("~nosuchuser/x") == PROJECT / "~nosuchuser" / "x"


def test_lists_do_for_tuples_and_integers_of_numpy_for_integers():
    s = Settings(HIDDEN_UNITS=[7], SEED=np.int64(5))
    assert (s.HIDDEN_UNITS, s.SEED) == ((7,), 5)
    assert type(s.SEED) is int


def test_a_dataset_may_have_defaults_of_its_own(monkeypatch):
    own = {"GOAL_ACCURACY": 0.5, "MAX_ROUNDS": 7}
    monkeypatch.setitem(config.DATASET_SETTINGS, "fashion_mnist", own)
    found = Settings(DATASET="fashion_mnist")
    assert (found.GOAL_ACCURACY, found.MAX_ROUNDS, found.STARTER_NODE) == (0.5, 7, 0)
    assert Settings(DATASET="mnist") == Settings(DATASET="mnist", GOAL_ACCURACY=0.8, MAX_ROUNDS=36)
    named = Settings(DATASET="fashion_mnist", MAX_ROUNDS=9)
    assert (named.GOAL_ACCURACY, named.MAX_ROUNDS) == (0.5, 9)
    line = ["--dataset", "fashion_mnist", "--set", "GOAL_ACCURACY=0.6"]
    run, _ = cli.settings_of_run(line)
    assert (run.GOAL_ACCURACY, run.MAX_ROUNDS) == (0.6, 7)
    assert named.replace(DATASET="mnist").MAX_ROUNDS == 9


def test_streams_are_named_and_independent():
    draws = {
        (seed, name, index): config.stream(seed, name, index).integers(2**63)
        for seed in (0, 1, 10**400)
        for name in config.STREAMS
        for index in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    # The definition, spelled out: what a stored seed means must not change.
    expected = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(5, 2))).integers(2**63)
    assert config.stream(3, "replay", 2).integers(2**63) == expected
    first = "episode initialisation shuffling network exploration replay shards test policy"
    later = {"validation": 10, "judging": 11, "audit": 12}
    numbers = {name: number for number, name in enumerate(first.split())} | later
    assert numbers == config.STREAMS
    kinds = [config.episode_seed(0, 1, kind) for kind in ("episode", "test", "validation")]
    assert kinds == [draws[0, kind, 1] for kind in ("episode", "test", "validation")]

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, refusal, run

import config
import data
import main
from config import ConfigError, make_settings


def test_defaults_are_the_public_codes():
    s = make_settings()
    assert (s.EPISODES, s.GOAL_ACCURACY, s.MAX_ROUNDS) == (120, 0.8, 36)
    assert (s.NUM_NODES, s.STARTER_NODE, s.NODES_PER_ROUND) == (10, 0, 1)
    assert (s.SAMPLES_PER_NODE, s.HETEROGENEITY) == (500, 0.8)
    assert (s.DISTANCE_SCALE, s.DISTANCE_SEED) == (0.1, 0)
    assert (s.REWARD_BASE, s.STEP_PENALTY) == (32, 1)
    assert (s.LEARNING_RATE, s.BATCH_SIZE, s.LOCAL_EPOCHS) == (1e-3, 32, 1)
    assert (s.OBSERVATION, s.components) == ("broadcast", 10)
    assert (s.HIDDEN_UNITS, s.Q_LEARNING_RATE, s.DISCOUNT) == ((500, 200), 1e-3, 0.9)
    assert (s.REPLAY_CAPACITY, s.REPLAY_SAMPLE, s.Q_BATCH_SIZE) == (50_000, 128, 16)
    assert (s.NORMALIZE_TARGETS, s.UPDATES_PER_EPISODE) == (True, 1)
    assert s.KEEP_MOMENTS is True
    assert (s.TARGET_UPDATE, s.DOUBLE_Q) == (0, False)
    assert (s.EPSILON, s.EPSILON_DECAY) == (1.0, 0.02)


def test_settings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_settings().EPISODES = 3


def test_replace_validates():
    with pytest.raises(ConfigError, match=r"STARTER_NODE: got 9, takes a node below NUM_NODES = 5"):
        dataclasses.replace(make_settings(STARTER_NODE=9), NUM_NODES=5)


def test_every_constant_is_documented_with_its_range_and_source():
    meanings = config._meanings()
    assert set(meanings) == set(config.RULES)
    for name, rule in config.RULES.items():
        assert str(rule) in meanings[name], name
        assert re.search(r"\((public code|ours|paper)[^)]*\)$", meanings[name]), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EPISODES", 0),
        ("EPISODES", 1.0),
        ("EPISODES", True),
        ("EPISODES", "many"),
        ("GOAL_ACCURACY", 1.01),
        ("GOAL_ACCURACY", math.nan),
        ("REWARD_BASE", 0),
        ("REWARD_BASE", math.inf),
        ("MAX_ROUNDS", 1),
        ("DISTANCE_SEED", 2**32),
        ("OBSERVATION", "global"),
        ("HIDDEN_UNITS", ()),
        ("HIDDEN_UNITS", (500, 0)),
        ("HIDDEN_UNITS", (500, 2.5)),
        ("NORMALIZE_TARGETS", 1),
        ("NORMALIZE_TARGETS", "yes"),
        ("NAME", "../elsewhere"),
        ("NAME", "."),
        ("DATASET", 3),
        ("REWARD_BASE", 10**400),
        ("THREADS", 2**31),
    ],
)
def test_refuses_values(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: got .*, takes .*"):
        make_settings(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"STARTER_NODE": 10},
        {"NODES_PER_ROUND": 11},
        {"PCA_COMPONENTS": 11},
        {"REPLAY_SAMPLE": 129, "REPLAY_CAPACITY": 128},
        {"DOUBLE_Q": True},
        {"RESULTS_DIR": ""},
    ],
)
def test_refuses_combinations(values):
    with pytest.raises(ConfigError, match=rf"^{next(iter(values))}: got .*, takes .*"):
        make_settings(**values)


def test_paths_are_relative_to_the_project_or_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert make_settings(RESULTS_DIR="~/hl").results_dir == Path("/home/somebody/hl")
    assert make_settings(RESULTS_DIR="/scratch").results_dir == Path("/scratch")
    assert make_settings(RESULTS_DIR="a/b").results_dir == PROJECT / "a" / "b"
    # No such user: a folder of that name, and no error.
    assert config.absolute("~nosuchuser/x") == PROJECT / "~nosuchuser" / "x"


def test_a_seed_may_be_long():
    config.stream(make_settings(SEED=10**400).SEED, "replay").random()


def test_integers_do_for_numbers_and_lists_for_tuples():
    s = make_settings(REWARD_BASE=2, HIDDEN_UNITS=[7], SEED=np.int64(5))
    assert (s.REWARD_BASE, s.HIDDEN_UNITS, s.SEED) == (2.0, (7,), 5)
    assert isinstance(s.REWARD_BASE, float)
    assert type(s.SEED) is int


def test_unknown_and_missing_constants_in_the_file_are_named(monkeypatch):
    monkeypatch.setattr(config, "EPISDOES", 3, raising=False)
    with pytest.raises(ConfigError, match=r"EPISDOES: unknown.*did you mean EPISODES"):
        make_settings()
    monkeypatch.undo()
    monkeypatch.delattr(config, "EPSILON")
    with pytest.raises(ConfigError, match=r"EPSILON: missing from config\.py"):
        make_settings()


def test_command_line():
    parse = config.from_command_line
    assert parse([]) == make_settings()
    assert parse(["--episode", "7"]).EPISODES == parse(["--episodes", "7"]).EPISODES == 7
    s = parse(
        "--starter=1 --step=2 --epsilon=0.5 --epsilon_decay=0 --seed=9 --dataset=digits --name=x "
        "--set HIDDEN_UNITS=(8,4) --set NORMALIZE_TARGETS=False --set NUM_NODES=5".split()
    )
    assert (s.STARTER_NODE, s.NODES_PER_ROUND, s.EPSILON, s.EPSILON_DECAY) == (1, 2, 0.5, 0.0)
    assert (s.SEED, s.DATASET, s.NAME, s.NUM_NODES) == (9, "digits", "x", 5)
    assert (s.HIDDEN_UNITS, s.NORMALIZE_TARGETS) == ((8, 4), False)
    # A text setting is text, whatever it looks like.
    assert parse(["--set", "NAME=123"]).NAME == "123"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "EPISDOES=3"], "EPISDOES: unknown"),
        (["--set", "EPISODES=none"], "EPISODES: got 'none', takes an integer >= 1"),
        (["--episodes", "1.5"], "EPISODES: got 1.5, takes an integer >= 1"),
        (["--epsilon", "2"], "EPSILON: got 2, takes a number in [0, 1]"),
        (["--starter", "10"], "STARTER_NODE: got 10, takes a node below NUM_NODES = 10"),
        (["--step", "11"], "NODES_PER_ROUND: got 11, takes at most NUM_NODES = 10"),
        (["--set", "EPISODES"], "--set: got 'EPISODES', takes NAME=VALUE"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_command_line_is_one_line_and_status_2_and_writes_nothing(tmp_path, arguments, words):
    results = tmp_path / "results"
    done = run(*arguments, "--set", f"RESULTS_DIR={results}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "cifar"], "DATASET: got 'cifar', takes one of auto, mnist"),
        (["--dataset", "digits", "--set", "SHARD_RULE=mine"], "SHARD_RULE: got 'mine', takes one"),
        (
            ["--dataset", "digits", "--set", "SAMPLES_PER_NODE=9000"],
            "node 0 needs 7200 training images of class 0, the dataset has 6000",
        ),
        (["--dataset", "mnist", "--set", "DATA_FILE=/nowhere/x.npz"], "/nowhere/x.npz does not"),
    ],
)
def test_what_only_the_data_can_tell_is_refused_the_same_way(
    tmp_path, monkeypatch, capfd, digits, arguments, words
):
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: digits)
    results = tmp_path / "results"
    arguments = [*arguments, "--set", f"RESULTS_DIR={results}"]
    assert main.main(config.from_command_line(arguments)) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not results.exists()


def test_a_wrong_constant_in_the_file_is_named(tmp_path):
    for path in PROJECT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / "config.py").read_text()
    (tmp_path / "config.py").write_text(text.replace("EPISODES = 120", "EPISODES = 'many'"))
    done = run(script=tmp_path / "main.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "config.py: EPISODES: got 'many', takes an integer >= 1\n"


def test_help_shows_default_and_meaning_of_each():
    done = run("--help")
    assert done.returncode == 0
    for name, meaning in config._meanings().items():
        assert f"{name} = {getattr(make_settings(), name)!r}" in done.stdout
        assert meaning in done.stdout
    assert "\n  DISCOUNT = 0.9; tuned: 0.96\n" in done.stdout
    assert "\n  EPSILON = 1.0\n" in done.stdout


def test_named_settings_of_the_agent():
    """The first are the defaults, so that nobody has to name them; --set comes after them."""
    defaults = make_settings()
    assert make_settings(**config.AGENTS["paper"]) == defaults
    assert set(config.AGENTS["tuned"]) == set(config.AGENTS["paper"])
    tuned = config.from_command_line(["--settings", "tuned", "--set", "DISCOUNT=0.5"])
    assert tuned == make_settings(**{**config.AGENTS["tuned"], "DISCOUNT": 0.5})
    assert tuned.DUELING
    assert not defaults.DUELING


def test_an_unknown_name_of_settings(capsys):
    error = refusal(config.from_command_line, ["--settings", "best"], capsys)
    assert error == "main.py: --settings: got 'best', takes paper or tuned\n"


def test_streams_are_named_and_independent():
    draws = {
        (seed, name, index): config.stream(seed, name, index).integers(2**63)
        for seed in (0, 1)
        for name in config.STREAMS
        for index in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    # The definition, spelled out: what a stored seed means must not change.
    expected = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(5, 2))).integers(2**63)
    assert config.stream(3, "replay", 2).integers(2**63) == expected
    assert config.episode_seed(0, 1) != config.episode_seed(0, 2)

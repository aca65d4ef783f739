import json
import subprocess
import sys
import warnings

import pytest
from conftest import PROJECT, command, main_of_run, refusal, run, small_settings

import cli
import data
import main
from config import NAMED_SETTINGS, Settings, UserError


def parse(text):
    settings, _ = cli.settings_of_run(text.split())
    return settings


def test_flags():
    assert parse("") == Settings()
    assert parse("--episode 7").EPISODES == parse("--episodes 7").EPISODES == 7
    s = parse(
        "--starter=1 --step=2 --epsilon=0.5 --epsilon_decay=0 --seed=9 --dataset=digits --name=x "
        "--set HIDDEN_UNITS=(8,4) --set FIT_ALL_ACTIONS=False --set NUM_NODES=5"
    )
    assert (s.STARTER_NODE, s.NODES_PER_ROUND, s.EPSILON, s.EPSILON_DECAY) == (1, 2, 0.5, 0.0)
    assert (s.SEED, s.DATASET, s.NAME, s.NUM_NODES) == (9, "digits", "x", 5)
    assert (s.HIDDEN_UNITS, s.FIT_ALL_ACTIONS) == ((8, 4), False)
    # A text setting is text, whatever it looks like; a short flag wins over --set.
    assert parse("--set NAME=123").NAME == "123"
    assert parse("--seed 2 --set SEED=1").SEED == 2


def test_named_settings_come_before_set():
    s = parse("--settings tuned --set DISCOUNT=0.5")
    assert s == Settings(**{**NAMED_SETTINGS["tuned"], "DISCOUNT": 0.5})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--set EPISDOES=3",
            "EPISDOES: unknown, takes the name of a setting; did you mean EPISODES?",
        ),
        ("--set EPISODES=none", "EPISODES: got 'none', takes an integer >= 1"),
        ("--episodes 1.5", "EPISODES: got 1.5, takes an integer >= 1"),
        ("--epsilon 2", "EPSILON: got 2, takes a number in [0, 1]"),
        ("--set EPISODES", "--set: got 'EPISODES', takes NAME=VALUE"),
        ("--settings best", "argument --settings: invalid choice: 'best'"),
        ("--config /nowhere/config.json", "--config: /nowhere/config.json: "),
        ("--config ~nosuchuser/config.json", "--config: ~nosuchuser/config.json: "),
        ("--speed 9", "--speed 9"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(capsys, arguments, words):
    assert words in refusal(main_of_run, arguments.split(), capsys)


def test_a_bad_command_line_is_refused_without_tensorflow(tmp_path):
    results = tmp_path / "results"
    check = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import main\n"
        "print(main.main(), 'tensorflow' in sys.modules)"
    )
    arguments = ["--episodes", "0", "--set", f"RESULTS_DIR={results}"]
    done = subprocess.run(
        [sys.executable, "-c", check, str(PROJECT), *arguments], capture_output=True, text=True
    )
    assert done.stdout == "2 False\n"
    assert done.stderr.count("\n") == 1
    assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset cifar", "DATASET: got 'cifar', takes one of auto, mnist"),
        ("--dataset digits --set SHARD_RULE=mine", "SHARD_RULE: got 'mine', takes one of"),
    ],
)
def test_what_only_the_data_can_tell_is_refused_the_same_way(
    tmp_path, monkeypatch, capfd, digits, arguments, words
):
    monkeypatch.setitem(data.DATASETS, "digits", lambda data_dir: digits)
    results = tmp_path / "results"
    assert main.main(parse(f"{arguments} --set RESULTS_DIR={results}")) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not results.exists()


def test_a_wrong_default_in_the_file_is_named(tmp_path):
    for path in PROJECT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / "config.py").read_text()
    assert "EPISODES: Count = 120" in text
    (tmp_path / "config.py").write_text(text.replace("Count = 120", "Count = 'many'"))
    done = run(script=str(tmp_path / "main.py"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "config.py: EPISODES: got 'many', takes an integer >= 1\n"


def test_help_lists_every_setting_in_groups():
    done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) <= 100
    assert sum(line.startswith("  python3 main.py") for line in lines[:10]) == 3
    shown = [line.split()[0] for line in lines if line.startswith("    ") and " = " in line]
    assert shown == list(Settings.model_fields)
    assert "    DISCOUNT = 0.9; 0.97" in done.stdout
    assert "    EPSILON = 1.0  " in done.stdout


def test_config_repeats_a_run(tmp_path):
    settings = Settings(SEED=3, NAME="first", DISCOUNT=0.5, DATASET="auto")
    path = tmp_path / "config.json"
    about = {"name": "digits", "sha256": {"x_train": "ab"}}
    config = {"settings": settings.stored(), "dataset": about}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="sessions"):  # a comparison has none
        cli.settings_of_run(["--config", str(path)])
    for name, damaged in (
        *(("settings", []), ("settings", None)),
        *(("dataset", "digits"), ("dataset", {}), ("dataset", ["name", "sha256"])),
    ):
        path.write_text(json.dumps({**config, "sessions": [], name: damaged}))
        with pytest.raises(UserError, match="damaged"):
            cli.settings_of_run(["--config", str(path)])
    path.write_text(json.dumps({**config, "sessions": []}))
    again, sha256 = cli.settings_of_run(["--config", str(path), "--name", "second"])
    assert again == settings.replace(NAME="second", DATASET="digits")
    assert sha256 == {"x_train": "ab"}
    with pytest.raises(UserError, match=r"DATASET: got 'mnist', takes 'digits'"):
        cli.settings_of_run(["--config", str(path), "--dataset", "mnist"])
    changed, _ = cli.settings_of_run(["--config", str(path), "--seed", "4"])
    assert changed.SEED == 4
    tuned, _ = cli.settings_of_run(["--config", str(path), "--settings", "tuned"])
    assert tuned == settings.replace(**NAMED_SETTINGS["tuned"], NAME="", DATASET="digits")


def test_config_insists_on_the_data_of_that_run(tmp_path, monkeypatch, capsys, few):
    monkeypatch.setitem(data.DATASETS, "digits", lambda data_dir: few)
    path, results = tmp_path / "config.json", tmp_path / "results"
    about = {"name": "digits", "sha256": {**few.sha256, "x_train": "0"}}
    config = {"settings": small_settings().stored(), "dataset": about, "sessions": []}
    path.write_text(json.dumps(config))
    arguments = ["--config", str(path), "--set", f"RESULTS_DIR={results}"]
    assert "--config: the digits data" in refusal(main_of_run, arguments, capsys)
    assert not results.exists()


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("0,7,3", [0, 3, 7]), ("4,", [4]), ("0,", [0]), ("2,1,2", [1, 2])],
)
def test_seeds(text, seeds):
    assert cli.seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "00", "a", "7-9", "-1", "1.5", ",", "1,,2"])
def test_wrong_seeds(text):
    with pytest.raises(cli.argparse.ArgumentTypeError):
        cli.seeds_of(text)


def test_a_command_warns_in_one_line(capsys):
    def work():
        warnings.warn("NOT MNIST", stacklevel=1)
        return 3

    assert cli.exit_status("main.py", work) == 3
    assert capsys.readouterr().err == "warning: NOT MNIST\n"


def test_nouns_agree_with_their_numbers():
    counted = [cli.counted(count, "seed") for count in (0, 1, 2)]
    assert counted == ["0 seeds", "1 seed", "2 seeds"]


def test_the_page_of_settings_is_up_to_date():
    page = subprocess.run(
        [sys.executable, "cli.py"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert (PROJECT / "docs" / "settings.md").read_text() == page

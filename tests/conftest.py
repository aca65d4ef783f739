"""What the tests share: a small dataset, small settings, and ways to run the commands."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

# Two test processes, each with a core of its own, are quicker than two that share both.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw").removeprefix("gw")
if CORES and WORKER:
    os.sched_setaffinity(0, [CORES[int(WORKER) % len(CORES)]])

import config
import data
import models

# Before anything computes, as main.py does it: the number can't be changed later.
models.use_cpu(0)

# The MNIST that a user names.
MNIST = os.environ.get(data.DATA_VARIABLE, "")

# Small enough for a run of several episodes in seconds: 4 nodes, 64 images each, 5 rounds.
SMALL = {
    "DATASET": "digits",
    "NUM_NODES": 4,
    "SAMPLES_PER_NODE": 64,
    "MAX_ROUNDS": 5,
    "REPLAY_SAMPLE": 8,
    "EPISODES": 4,
}


def small_settings(**overrides):
    return config.make_settings(**{**SMALL, **overrides})


# Files that take long come first, so that both processes end at about the same time.
LONG = ("test_compare", "test_main", "test_reference", "test_plot", "test_readme", "test_data")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*LONG, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True)
def no_named_file(monkeypatch):
    """Only tests that ask for ``mnist_path`` may depend on it."""
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def digits():
    return data.load_digits(small_settings())


@pytest.fixture(scope="session")
def few(digits):
    """A dataset of the first 2,000 training digits."""
    return dataclasses.replace(
        digits, x_train=digits.x_train[:2000], y_train=digits.y_train[:2000], sha256={}
    )


@pytest.fixture(scope="session")
def mnist_path():
    if not MNIST:
        pytest.skip(f"{data.DATA_VARIABLE} names no MNIST file")
    return Path(MNIST)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No file of any dataset on this machine, and a download that fails at once."""

    def refuse(published):
        raise OSError("no network")

    monkeypatch.setattr(data, "_download", refuse)
    monkeypatch.setattr(data, "PROJECT", tmp_path / "project")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


def as_flags(settings):
    """The --set flags that give ``settings``."""
    defaults = config.make_settings()
    flags = []
    for name in config.RULES:
        if getattr(settings, name) != getattr(defaults, name):
            flags += ["--set", f"{name}={getattr(settings, name)}"]
    return flags


def command(*arguments, script="main.py"):
    return [sys.executable, str(PROJECT / script), *map(str, arguments)]


def run(*arguments, script="main.py", cwd=None, **options):
    """Runs a script as a user does and returns the finished process."""
    return subprocess.run(
        command(*arguments, script=script),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        **options,
    )


@contextlib.contextmanager
def without_rights():
    """What root does here, it does as nobody: modes of files mean nothing to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def refusal(parse, arguments, capsys):
    """The one line with which a command line is refused, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def without_times(folder):
    """A run's CSVs as lines, without the column that holds seconds."""
    episodes = (folder / "episodes.csv").read_text().splitlines()
    assert episodes[0].endswith(",seconds")
    return {
        "episodes": [line.rpartition(",")[0] for line in episodes],
        "rounds": (folder / "rounds.csv").read_text().splitlines(),
        "shards": (folder / "shards.csv").read_text().splitlines(),
    }

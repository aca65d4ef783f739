"""What the tests share: a small dataset, small settings, and ways to run the commands."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from dask.system import CPU_COUNT  # noqa: F401  # counted before this process gets one core

PROJECT = Path(__file__).resolve().parent.parent

# Two test processes, each with a core of its own, are quicker than two that share both.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw").removeprefix("gw")
if CORES and WORKER:
    os.sched_setaffinity(0, [CORES[int(WORKER) % len(CORES)]])

# The folder of datasets that a user names. Only tests that ask for ``mnist_dir`` depend on it.
# Test processes that this one starts find it under another name.
DATA_DIR = os.environ.pop("HL_DATA_DIR", "") or os.environ.get("HL_TESTS_DATA_DIR", "")
os.environ["HL_TESTS_DATA_DIR"] = DATA_DIR

import config
import data
import environment
import main
import models

# Before anything computes, as main.py does it: the number can't be changed later.
THREADS = models.use_device()

# Small enough for a run of several episodes in seconds: 4 nodes, 64 images each, 5 rounds.
SMALL = {
    "DATASET": "digits",
    "NUM_NODES": 4,
    "SAMPLES_PER_NODE": 64,
    "MAX_ROUNDS": 5,
    "REPLAY_SAMPLE": 8,
    "EPISODES": 4,
}

# Fast enough to learn something within a round, and a goal that some episodes reach.
QUICK = {
    **SMALL,
    "LEARNING_RATE": 0.01,
    "GOAL_ACCURACY": 0.3,
    "EPISODES": 3,
    "THREADS": THREADS,
}


def small_settings(**overrides):
    return config.Settings(**{**SMALL, **overrides})


# Files that take long come first, so that both processes end at about the same time.
LONG = "jobs compare main docs reference audit benchmarks data plot".split()


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def digits():
    return data.load_digits()


@pytest.fixture(scope="session")
def few(digits):
    """A dataset of the first 2,000 training digits."""
    return dataclasses.replace(digits, x_train=digits.x_train[:2000], y_train=digits.y_train[:2000])


@pytest.fixture(scope="session")
def mnist_dir():
    if not DATA_DIR:
        pytest.skip("HL_DATA_DIR names no folder with MNIST")
    return Path(DATA_DIR)


def set_flags(settings):
    """Return the --set flags that give settings these values."""
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def stand_in(patch, dataset):
    """Let jobs in this process take a dataset that is loaded already; nothing is drawn."""
    patch.setattr("experiments.jobs.load_dataset", lambda name, folder: dataset)
    patch.setattr("experiments.figures.draw_comparison", lambda folder: {})
    patch.setattr("experiments.figures.report", lambda folder, tables: "the report")


def command(*arguments, script="main.py"):
    """A command line; a script without a suffix is a module: experiments.compare."""
    program = [str(PROJECT / script)] if script.endswith(".py") else ["-m", script]
    return [sys.executable, *program, *map(str, arguments)]


def run(*arguments, script="main.py", cwd=PROJECT, **options):
    """Run a script as a user does and return the finished process."""
    return subprocess.run(
        command(*arguments, script=script),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        **options,
    )


def interrupt_step(patch, number):
    """Let the environment's step of this number be interrupted, as by Ctrl-C."""
    steps, step = 0, environment.DecentralizedLearning.step

    def interrupted(self, action):
        nonlocal steps
        steps += 1
        if steps == number:
            raise KeyboardInterrupt
        return step(self, action)

    patch.setattr(environment.DecentralizedLearning, "step", interrupted)


def main_of_run(arguments):
    """Run main.py in this process with a command line and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *arguments])
        return main.main()


def refusal(command, arguments, capsys):
    """Return the one line with which a command refuses its arguments, status 2."""
    capsys.readouterr()
    try:
        status = command(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def without_times(folder):
    """Return a run's CSVs as lines, without the column that holds seconds."""
    episodes = (folder / "episodes.csv").read_text().splitlines()
    assert episodes[0].endswith(",seconds")
    return {
        "episodes": [line.rpartition(",")[0] for line in episodes],
        "rounds": (folder / "rounds.csv").read_text().splitlines(),
        "shards": (folder / "shards.csv").read_text().splitlines(),
    }


def tables_of(folder):
    """Return the tables of a comparison as text, without the column that holds seconds."""
    found = {}
    for name in ("episodes", "rounds", "training", "distances"):
        table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
        found[name] = table.drop(columns="seconds", errors="ignore")
    return found

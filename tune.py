"""Trials of settings for the agent, judged on validation episodes; a log keeps every one of them.

A seed has its row from its start on, so trials that are stopped because they go badly stay in it.

Usage: python3 tune.py TRIAL [--help]; a trial trains an agent per seed as main.py does it, freezes
it, and tests it on episodes whose initialisations neither a training nor a comparison's test has.
So settings can be chosen by it, and compare.py tells what they are worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
from pathlib import Path
from typing import Any

from config import (
    AGENTS,
    RULES,
    Parser,
    UserError,
    available_cores,
    count_of,
    default_dataset,
    make_settings,
    named_settings,
    overrides,
    seeds_of,
    setting_flags,
)

_FLAGS = {"--dataset": "DATASET", "--episodes": "EPISODES"}
_SEEDS, _EPISODES = "2", 10

LOG_COLUMNS = (
    "trial",
    "dataset",
    "seed",
    "settings",
    "training_episodes",
    "training_rounds",
    "validation_episodes",
    "rounds",
    "goal_reached",
    "communication_cost",
    "seconds",
    "git_revision",
    "error",
)

# Episodes at the end of a training whose mean number of rounds is noted.
_LAST = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with ``settings`` and ``changes`` (what is not the public code's) from it.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong; 0 after
            ``--help``.
    """
    parser = Parser(
        prog="tune.py",
        description="Try settings of the agent; results go to results/tuning/ and tuning.csv.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("trial", help="its name, and that of its folder")
    add("--seeds", type=seeds_of, help=f"a number (5 is 0 to 4) or a list (0,3,7-9) [{_SEEDS}]")
    add(
        "--validation-episodes",
        type=count_of,
        default=_EPISODES,
        metavar="N",
        help=f"episodes on which each agent is tested, per seed [{_EPISODES}]",
    )
    cores = available_cores()
    add("--jobs", type=count_of, default=cores, metavar="N", help=f"processes [{cores}, all cores]")
    setting_flags(parser, _FLAGS, {"DATASET": ("as compare.py's", default_dataset())})
    parsed = parser.parse_args(arguments)
    explicit = overrides(parser, parsed)
    for name, flag in (("SEED", "--seeds"), ("NAME", "its first argument")):
        if name in explicit:
            parser.error(f"{name}: got it with --set, takes {flag}")
    parsed.seeds = parsed.seeds or seeds_of(_SEEDS)
    explicit.setdefault("DATASET", default_dataset())
    try:
        parsed.settings = make_settings(
            **AGENTS["paper"] | named_settings(parser, parsed) | explicit, NAME=parsed.trial
        )
    except UserError as error:
        parser.error(re.sub("^NAME:", "trial:", str(error)))
    values = dataclasses.asdict(parsed.settings)
    asked = set(explicit) - {"DATASET", "DATA_FILE", "RESULTS_DIR", "THREADS"}
    parsed.changes = {
        name: values[name]
        for name in RULES
        if name in asked or values[name] != AGENTS["paper"].get(name, values[name])
    }
    return parsed


if __name__ == "__main__":
    # Before TensorFlow, which takes seconds to import: a typo is reported at once, and Ctrl-C
    # ends the program without a traceback.
    PARSED = parse()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock
import pandas as pd

import data
import estimates
from jobs import Job, Outcome, dataset_of, is_finished, own_settings, run_all
from main import exit_status
from records import EPISODE_COLUMNS, entering, git_revision, read_table, replacing


def row_of(parsed: argparse.Namespace, outcome: Outcome, dataset: str) -> dict[str, Any]:
    """A seed's row of the log.

    Raises:
        UserError: a table of its folders is damaged.
    """
    job = outcome.job
    row: dict[str, Any] = dict.fromkeys(LOG_COLUMNS, "")
    row |= {
        "trial": parsed.trial,
        "dataset": dataset,
        "seed": job.settings.SEED,
        "settings": " ".join(f"{k}={v!r}".replace(" ", "") for k, v in parsed.changes.items()),
        "seconds": round(outcome.seconds, 1),
        "git_revision": git_revision() or "",
        "error": outcome.error,
    }
    if not outcome.error:
        assert job.training is not None
        training = job.settings.results_dir / job.training.NAME / "episodes.csv"
        rounds = read_table(training, EPISODE_COLUMNS)["rounds"]
        episodes = estimates.read_job(job.folder, job.test_episodes)["episodes"]
        row |= {
            "training_episodes": len(rounds),
            "training_rounds": round(rounds[-_LAST:].mean(), 2),
            "validation_episodes": len(episodes),
            "rounds": round(episodes["rounds"].mean(), 2),
            "goal_reached": round(episodes["goal_reached"].mean(), 3),
            "communication_cost": round(episodes["communication_cost"].mean(), 4),
        }
    return row


def note(path: Path, row: dict[str, Any]) -> None:
    """Writes a row into the log, in place of an earlier one of the same trial, dataset and seed.

    Raises:
        UserError: its folder can't be written.
        OSError: it can't be written.
    """
    key = ["trial", "dataset", "seed"]
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with entering(path.parent, "trial", "another RESULTS_DIR"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        new = pd.DataFrame([row], columns=list(LOG_COLUMNS)).astype(str)
        if path.exists():
            old = pd.read_csv(path, dtype=str, keep_default_na=False)
            new = pd.concat([old, new]).drop_duplicates(key, keep="last")
        with replacing(path) as file:
            file.write(new.to_csv(index=False, lineterminator="\n").encode())
    finally:
        lock.release()


def tune(parsed: argparse.Namespace) -> int:
    """Runs what is left of a trial, notes its seeds in the log, and prints their rows.

    Returns:
        0, or 1 if a seed's job failed.

    Raises:
        UserError: the log or a table is damaged, or the trial was made with other settings.
    """
    settings = parsed.settings
    dataset = dataset_of(dataclasses.replace(settings, THREADS=settings.THREADS or 1))
    data.make_shards(dataset, settings)  # refuses what it can't fill before a file is written
    log = settings.results_dir / "tuning.csv"
    noted = set()
    if log.exists():
        table = read_table(log, LOG_COLUMNS)  # refuses another file before hours of work
        table = table[(table["trial"] == parsed.trial) & (table["dataset"] == dataset.name)]
        noted = set(table[table["error"] == ""]["seed"].astype(int))
    folder = settings.results_dir / "tuning" / f"{parsed.trial}-{dataset.name}"
    jobs = [
        Job(
            "hl",
            own_settings(settings, seed, folder),
            "",
            parsed.validation_episodes,
            kind="validation",
        )
        for seed in parsed.seeds
    ]

    def tell(outcome: Outcome) -> None:
        row = row_of(parsed, outcome, dataset.name)
        note(log, row)
        print(" ".join(f"{k}={v}" for k, v in row.items() if v != ""), flush=True)

    # Refuses other settings under the same name before anything is run or noted.
    waiting = [job for job in jobs if not is_finished(job)]
    for job in jobs:
        if job not in waiting and job.settings.SEED not in noted:
            tell(Outcome(job, "finished", 0.0))
    for job in waiting:
        note(log, row_of(parsed, Outcome(job, "waiting", 0.0, "not finished"), dataset.name))
    outcomes = run_all(waiting, parsed.jobs, tell=tell)
    return int(any(outcome.error for outcome in outcomes))


def main(parsed: argparse.Namespace) -> int:
    """Runs a trial; returns the exit status, as main.py's, and 1 if a job failed."""
    return exit_status("tune.py", lambda: tune(parsed), "mend this")


if __name__ == "__main__":
    sys.exit(main(PARSED))

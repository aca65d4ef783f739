"""The log of tuning trials: one row for each trial, dataset and seed, from its start on.

A trial trains an agent and tests it on validation episodes. Validation episodes share no initial
weights with training or test episodes, so settings may be chosen by them.
"""

from __future__ import annotations

from typing import Any

import filelock
import pandas as pd

import records
from config import GROUPS, Settings, names_of
from experiments.estimates import EPISODE_COLUMNS
from experiments.jobs import Job

LOG_COLUMNS = tuple(
    "trial dataset seed settings training_episodes training_rounds validation_episodes rounds "
    "goal_reached communication_cost seconds git_revision error".split()
)

_LAST = 20  # episodes at the end of a training whose mean number of rounds is logged


class Log:
    """``tuning.csv`` in RESULTS_DIR.

    Args:
        settings: of the trial; NAME is its name.
        named: the settings that the command line named.

    Raises:
        UserError: another file is in its place, or it is damaged.
    """

    def __init__(self, settings: Settings, named: set[str]) -> None:
        self._path = settings.results_dir / "tuning.csv"
        self._trial = settings.NAME
        self._named = named & names_of("world", "agent") - {"DATASET"}
        if self._path.exists():
            records.read_table(self._path, LOG_COLUMNS)

    def write(self, job: Job, error: str, seconds: float = 0.0) -> None:
        """Write a job's row, in place of an earlier one; without an error the job is finished."""
        key = {"trial": self._trial, "dataset": job.settings.DATASET, "seed": job.settings.SEED}
        row = {**dict.fromkeys(LOG_COLUMNS, ""), **key, "settings": self._changes(job)}
        row |= {"seconds": seconds, "error": error, "git_revision": records.git_revision() or ""}
        if not error:
            row |= _means(job)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self._path.with_name(f".{self._path.name}.lock")):
            table = pd.DataFrame([row]).astype(str)
            if self._path.exists():
                old = pd.read_csv(self._path, dtype=str, keep_default_na=False)
                table = pd.concat([old, table]).drop_duplicates(list(key), keep="last")
            records.write_table(self._path, table)
        if error != "not finished":
            print(" ".join(f"{k}={v}" for k, v in row.items() if v != ""), flush=True)

    def _changes(self, job: Job) -> str:
        """Return the agent's settings that are not the default, and what the command line named."""
        default, agents = Settings(), names_of("agent")
        settings = job.training_settings
        return " ".join(
            f"{name}={getattr(settings, name)!r}".replace(" ", "")
            for group in GROUPS
            for name in group.model_fields
            if name in self._named
            or (name in agents and getattr(settings, name) != getattr(default, name))
        )


def _means(job: Job) -> dict[str, Any]:
    training = records.read_table(job.training_folder / "episodes.csv", records.EPISODE_COLUMNS)
    episodes = records.read_table(job.folder / "episodes.csv", EPISODE_COLUMNS)
    return {
        "training_episodes": len(training),
        "training_rounds": round(training["rounds"][-_LAST:].mean(), 2),
        "validation_episodes": len(episodes),
        "rounds": round(episodes["rounds"].mean(), 2),
        "goal_reached": round(episodes["goal_reached"].mean(), 3),
        "communication_cost": round(episodes["communication_cost"].mean(), 4),
    }

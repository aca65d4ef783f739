"""A comparison's jobs, its tables and their columns, and the folder that holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

import records
from config import Settings, UserError, absolute
from experiments.methods import METHODS

JOB_COLUMNS = tuple(
    "variant method seed state seconds error agent git_revision tensorflow cpu device".split()
)
EPISODE_COLUMNS = tuple(
    "dataset variant method seed episode rounds goal_reached final_accuracy episode_reward "
    "communication_cost transfers megabytes observation_megabytes diverged goal_accuracy "
    "max_rounds seconds".split()
)
ROUND_COLUMNS = tuple("dataset variant method seed episode round node distance accuracy".split())
TRAINING_COLUMNS = ("dataset", "variant", "method", "seed", *records.EPISODE_COLUMNS[1:])

JOB_KEY = ["variant", "method", "seed"]  # what identifies a job

# Tables of a comparison. episodes.csv is written last: a job that is in it is in all others.
TABLES = {
    "jobs": JOB_COLUMNS,
    "rounds": ROUND_COLUMNS,
    "training": TRAINING_COLUMNS,
    "episodes": EPISODE_COLUMNS,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One method with one seed."""

    method: str  # a name in METHODS
    settings: Settings  # with the method's overrides; RESULTS_DIR is the variant's folder
    variant: str  # value of what the comparison varies; "" if nothing varies
    test_episodes: int
    first_episode: int = 1  # number of the first test episode
    agent: str = ""  # path of the agent.npz that is tested; "" to train one, if the method learns
    kind: str = "test"  # the stream of the episodes' seeds, test or validation

    @property
    def key(self) -> tuple[Any, ...]:
        """The job's values of JOB_KEY."""
        return self.variant, self.method, self.settings.SEED

    @property
    def labels(self) -> dict[str, Any]:
        """The key with its columns' names."""
        return dict(zip(JOB_KEY, self.key, strict=True))

    @property
    def folder(self) -> Path:
        """Where the test is recorded; its name is unique within a variant."""
        return absolute(self.settings.RESULTS_DIR) / f"{self.method}-seed{self.settings.SEED}"

    @property
    def training_folder(self) -> Path:
        """Where the training is recorded, if the job has one."""
        return self.folder.with_name(f"training-{self.folder.name}")

    @property
    def trains(self) -> bool:
        """Whether the job trains an agent before it tests it."""
        return METHODS[self.method].policy is None and not self.agent

    @property
    def episodes(self) -> int:
        """Number of episodes of training and test together."""
        return self.test_episodes + self.trains * self.settings.EPISODES

    def agent_sha256(self) -> str:
        """Return the checksum of the given agent's file; "" without one."""
        return hashlib.sha256(Path(self.agent).read_bytes()).hexdigest() if self.agent else ""

    def episodes_finished(self) -> int:
        """Count the finished episodes of training and test in the folders."""
        count = 0
        for folder in (self.folder, self.training_folder):
            with contextlib.suppress(OSError):  # none yet, or a worker is replacing it
                count += max(0, (folder / "episodes.csv").read_bytes().count(b"\n") - 1)
        return count


def _read(folder: Path, name: str) -> pd.DataFrame:
    """Return one of TABLES in a folder; without a file it has no rows."""
    path = folder / f"{name}.csv"
    columns = TABLES[name]
    return records.read_table(path, columns) if path.exists() else pd.DataFrame(columns=columns)


def finished_jobs(folder: Path, test_episodes: int) -> set[tuple[Any, ...]]:
    """Return the keys of jobs all of whose test episodes and rounds are in a folder's tables."""
    return _whole_jobs(_read(folder, "episodes"), _read(folder, "rounds"), test_episodes)


def _whole_jobs(
    episodes: pd.DataFrame, rounds: pd.DataFrame, test_episodes: int
) -> set[tuple[Any, ...]]:
    wanted = episodes.groupby(JOB_KEY)["rounds"].agg(["size", "sum"])
    found = rounds.groupby(JOB_KEY).size().reindex(wanted.index)
    return set(wanted.index[(wanted["size"] == test_episodes) & (wanted["sum"] == found)])


@dataclasses.dataclass
class ComparisonFolder:
    """The tables of a comparison's folder, to which a finished job's rows are added.

    A job whose rows are all there is finished, and its folder in ``jobs/`` may be deleted.
    """

    folder: Path
    config: dict[str, Any]  # content of config.json

    def create(self, settings: Settings) -> None:
        """Write ``config.json``, ``distances.csv``, and the missing tables without rows."""
        from environment import distance_matrix  # imports TensorFlow, which reading does not need

        records.write_json(self.folder / "config.json", self.config)
        for name in TABLES:
            if not (self.folder / f"{name}.csv").exists():
                records.write_table(self.folder / f"{name}.csv", _read(self.folder, name))
        table = pd.concat(
            records.distance_table(variant, distance_matrix(settings.replace(**changes)))
            for variant, changes in self.config["variants"].items()
        ).rename(columns={"dataset": "variant"})
        records.write_table(self.folder / "distances.csv", table)

    def jobs(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return the rows of ``jobs.csv`` by the jobs' keys."""
        return _read(self.folder, "jobs").set_index(JOB_KEY, drop=False).to_dict("index")

    def set_jobs(self, states: dict[Job, str], **values: Any) -> None:
        """Write the jobs' rows of ``jobs.csv``: their states, and the values that all get."""
        old, rows = self.jobs(), []
        for job, state in states.items():
            row = old.get(job.key, dict.fromkeys(TABLES["jobs"], "")) | job.labels
            rows.append(row | {"state": state, "error": "", "agent": job.agent_sha256(), **values})
        self._add("jobs", pd.DataFrame(rows))

    def collect(self, job: Job) -> None:
        """Add a finished job's rows to the tables, and copy its trained agent."""
        if job.trains:
            rows = records.read_table(job.training_folder / "episodes.csv", records.EPISODE_COLUMNS)
            self._add("training", rows.assign(**job.labels)[list(TABLES["training"])])
            agent = self.folder / "agents" / job.variant / f"{job.folder.name}.npz"
            agent.parent.mkdir(parents=True, exist_ok=True)
            with records.replacing(agent) as file:
                file.write((job.training_folder / "agent.npz").read_bytes())
        for name in ("rounds", "episodes"):
            self._add(name, _read(job.folder, name))

    def _add(self, name: str, rows: pd.DataFrame) -> None:
        """Add the rows of jobs to a table, in place of earlier rows of the same jobs."""

        def place(column: pd.Series) -> pd.Series:  # an unknown method comes last
            order = {"variant": self.config["variants"], "method": METHODS}.get(column.name)
            return column.map({n: i for i, n in enumerate(order)}) if order else column

        old = _read(self.folder, name)
        replaced = old.set_index(JOB_KEY).index.isin(rows.set_index(JOB_KEY).index)
        # As objects, so that a column without values changes no type.
        table = pd.concat([old[~replaced].astype(object), rows.astype(object)])
        table = table.sort_values(JOB_KEY, kind="stable", key=place)
        records.write_table(self.folder / f"{name}.csv", table)


def read_comparison(folder: Path) -> dict[str, Any]:
    """Return ``config``, a dictionary, and the tables: ``jobs``, and the finished ones' rows.

    UserError if a file is missing or damaged, or no job is finished.
    """
    needed = ("comparison", "parameter", "episodes", "test_episodes")
    config = records.read_config(folder / "config.json", *needed)
    jobs = records.read_table(folder / "jobs.csv", TABLES["jobs"])
    finished = pd.MultiIndex.from_frame(jobs.loc[jobs["state"] == "finished", JOB_KEY])
    if finished.empty:
        raise UserError(f"{folder}: got no finished job, takes at least one")
    tables = {"config": config, "jobs": jobs}
    for name in ("episodes", "rounds", "training"):
        table = records.read_table(folder / f"{name}.csv", TABLES[name])
        tables[name] = table[pd.MultiIndex.from_frame(table[JOB_KEY]).isin(finished)]
    whole = _whole_jobs(tables["episodes"], tables["rounds"], config["test_episodes"])
    for job in finished:
        if job not in whole:
            name = " ".join(map(str, job)).strip()
            lost = f"{folder}: lacks test episodes or rounds of {name}"
            raise UserError(f"{lost}; run the comparison again")
    return tables

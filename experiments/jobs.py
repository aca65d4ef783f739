"""Jobs of a comparison: one method with one seed. Dask runs many, here or on a cluster.

A job trains an agent, if its method learns, and tests the policy on episodes that no training has.
A training that was cut off continues, as any run of main.py. A test that was cut off starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import data
import main
import models
from config import PROJECT, Settings, UserError, episode_seed, reason, stream
from environment import DecentralizedLearning, rollout
from experiments.estimates import EPISODE_COLUMNS, ROUND_COLUMNS
from experiments.methods import METHODS, Policy, Sent
from node import DQNAgent
from records import CsvTable, Run, circumstances, load_agent, locked, read_table


@dataclasses.dataclass(frozen=True)
class Job:
    """One method with one seed."""

    method: str  # a name in METHODS
    settings: Settings  # the variant's; SEED and RESULTS_DIR, the variant's folder, are the job's
    variant: str  # value of what the comparison varies; "" if nothing varies
    test_episodes: int
    agent: str = ""  # path of the agent.npz that is tested; "" to train one, if the method learns
    kind: str = "test"  # the stream of the episodes' seeds, test or validation

    @property
    def key(self) -> tuple[str, str, int]:
        """Variant, method and seed: what tells the jobs of a comparison apart."""
        return self.variant, self.method, self.settings.SEED

    @property
    def name(self) -> str:
        """Name of the test's folder, unique within a variant."""
        return f"{self.method}-seed{self.settings.SEED}"

    @property
    def folder(self) -> Path:
        """Where the test is recorded."""
        return self.settings.results_dir / self.name

    @property
    def training_folder(self) -> Path:
        """Where the training is recorded, if the job has one."""
        return self.settings.results_dir / f"training-{self.name}"

    @property
    def trains(self) -> bool:
        """Whether the job trains an agent before it tests it."""
        return METHODS[self.method].learns and not self.agent

    @property
    def training_settings(self) -> Settings:
        """Settings of the training: the method's own, and the training's folder."""
        return METHODS[self.method].settings(self.settings).replace(NAME=self.training_folder.name)

    @property
    def test_settings(self) -> Settings:
        """Settings of the test. However rounds are rewarded, all test images judge it."""
        return METHODS[self.method].settings(self.settings).replace(REWARD_IMAGES=0)

    @property
    def episodes(self) -> int:
        """Number of episodes of training and test together."""
        return self.test_episodes + (self.settings.EPISODES if self.trains else 0)

    def episodes_finished(self) -> int:
        """Count the finished episodes of training and test in the folders."""
        return _rows(self.folder) + (_rows(self.training_folder) if self.trains else 0)


def _rows(folder: Path) -> int:
    """Return the number of finished episodes in a folder."""
    with contextlib.suppress(OSError):  # a worker may be replacing the file
        return max(0, (folder / "episodes.csv").read_bytes().count(b"\n") - 1)
    return 0


# --- One job ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def load_dataset(name: str, folder: str) -> data.Dataset:
    """Load the dataset of DATASET and DATA_DIR, once for all jobs of a process."""
    return data.load(Settings(DATASET=name, DATA_DIR=folder))


def run_job(job: Job) -> None:
    """Train the agent, if there is one to train, and test the policy on ``test_episodes`` episodes.

    Their seeds come from a separate stream, so no training uses them. All methods with the same
    SEED use the same ones.

    Raises:
        UserError, OSError: what the user or the system has to correct.
    """
    if _is_tested(job):
        return
    method, settings = METHODS[job.method], job.test_settings
    models.use_cpu(settings.THREADS)
    environment = DecentralizedLearning(settings, load_dataset(settings.DATASET, settings.DATA_DIR))
    sent_before = method.prepare(environment)
    policy = method.policy(environment) if method.policy else _learned_policy(job, environment)
    with locked(job.folder, "job"), contextlib.ExitStack() as stack:
        tables = []
        for name, columns in (("rounds.csv", ROUND_COLUMNS), ("episodes.csv", EPISODE_COLUMNS)):
            (job.folder / name).unlink(missing_ok=True)
            tables.append(CsvTable(job.folder / name, columns))
            stack.callback(tables[-1].close)
        rounds, episodes = tables
        for episode in range(1, job.test_episodes + 1):
            episodes.add(_test_episode(job, environment, policy, episode, sent_before, rounds))


def _is_tested(job: Job) -> bool:
    """Return whether the test's folder holds all episodes with all their rounds."""
    try:
        episodes = read_table(job.folder / "episodes.csv", EPISODE_COLUMNS)
        rounds = read_table(job.folder / "rounds.csv", ROUND_COLUMNS)
    except UserError:
        return False
    return len(episodes) == job.test_episodes and episodes["rounds"].sum() == len(rounds)


def _learned_policy(job: Job, environment: DecentralizedLearning) -> Policy:
    """Return the DQN's greedy policy: trained as by main.py unless it was given, then frozen."""
    path = Path(job.agent) if job.agent else job.training_folder / "agent.npz"
    if job.trains:
        settings = job.training_settings
        with Run(settings, environment.dataset, models.use_cpu(settings.THREADS)) as run:
            if not run.finished:
                main.train(DecentralizedLearning(settings, environment.dataset), run, quiet=True)
                run.finish()
    agent = DQNAgent(environment.observation_size, environment.settings)
    try:
        agent.weights = agent.q.network.from_named_arrays(load_agent(path)[0])
    except ValueError as error:
        raise UserError(f"{path}: does not fit the settings ({error})") from error
    return lambda observation, info, rng: agent.best_actions(observation)


def _test_episode(
    job: Job,
    environment: DecentralizedLearning,
    policy: Policy,
    episode: int,
    sent_before: Sent,
    rounds: CsvTable,
) -> dict[str, Any]:
    """Play a test episode, record its rounds and return its row of EPISODE_COLUMNS."""
    started = time.perf_counter()
    method, settings, seed = METHODS[job.method], environment.settings, job.settings.SEED
    rng = stream(seed, "policy", episode)
    first_nodes = method.first_nodes(settings, seed * job.test_episodes + episode - 1)
    model_megabytes = environment.foundation.network.size * 4 / 1e6  # float32
    whose = {
        "dataset": environment.dataset.name,
        "variant": job.variant,
        "method": job.method,
        "seed": seed,
        "episode": episode,
    }
    transfers, cost, megabytes = sent_before
    holder, episode_reward = first_nodes[0], 0.0
    played = rollout(
        environment,
        lambda seen, info: (policy(seen, info, rng), job.method),
        episode_seed(seed, episode, job.kind),
        first_nodes,
    )
    for round_ in played:
        info = round_.info
        rounds.add(whose | {name: info[name] for name in ROUND_COLUMNS if name not in whose})
        hops, distance = communication(environment.distances, holder, info["node"])
        transfers, cost = transfers + hops, cost + distance
        megabytes += hops * model_megabytes
        episode_reward += round_.reward
        holder = np.atleast_1d(info["node"])[0]
    # An agent that sees all nodes' weights needs them: each new model goes to all other nodes.
    sees_weights = method.learns and settings.sees_weights
    models_seen = info["round"] * settings.NODES_PER_ROUND * (settings.NUM_NODES - 1)
    return {
        **whose,
        "rounds": info["round"],
        "goal_reached": info["goal_reached"],
        "final_accuracy": info["accuracy"],
        "episode_reward": episode_reward,
        "communication_cost": cost,
        "transfers": transfers,
        "megabytes": megabytes,
        "observation_megabytes": sees_weights * models_seen * model_megabytes,
        "diverged": info["diverged"],
        "goal_accuracy": settings.GOAL_ACCURACY,
        "max_rounds": settings.MAX_ROUNDS,
        "seconds": round(time.perf_counter() - started, 3),
    }


def communication(distances: np.ndarray, holder: int, nodes: int | list[int]) -> tuple[int, float]:
    """Return a round's number of transfers of a model, and the sum of their distances.

    The holder sends the model to each node that trains. The first of these gets the others'
    results, which it averages. With one node per round that is the paper's distance. With several,
    the public code counts the way to the first alone.

    Args:
        distances: (N, N) float64, no unit.
        holder: node that has the model before the round.
        nodes: the node that trains, or several, the one that averages first.
    """
    nodes = [int(node) for node in np.atleast_1d(nodes)]
    ways = [(holder, node) for node in nodes if node != holder]
    ways += [(node, nodes[0]) for node in nodes[1:]]
    return len(ways), float(sum(distances[a, b] for a, b in ways))


# --- Many jobs -------------------------------------------------------------------------------


def attempt(fields: dict[str, Any]) -> dict[str, Any]:
    """Run a job, given as plain values; a worker calls this.

    Returns:
        ``seconds`` that it took, ``error`` (one line, or ""), ``git_revision``, ``tensorflow`` and
        ``cpu``. The traceback of an unexpected error is in ``error.txt`` in the job's folder.
    """
    started = time.perf_counter()
    job = Job(**{**fields, "settings": Settings(**fields["settings"])})
    error = ""
    try:
        if job.method not in METHODS:
            raise UserError(f"method: got {job.method!r}, takes one in methods.py, or --jobs 1")
        run_job(job)
    except UserError as problem:
        error = str(problem)
    except OSError as problem:
        error = reason(problem)
    except Exception as problem:
        error = _line(problem)
        with contextlib.suppress(OSError):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    where = circumstances(1)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "error": error,
        "git_revision": where["git_revision"] or "",
        "tensorflow": where["versions"]["tensorflow"],
        "cpu": where["machine"]["cpu"],
    }


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def run_jobs(jobs: list[Job], client: Any) -> Iterator[tuple[Job, dict[str, Any]] | None]:
    """Run jobs side by side, started in their order; without a Dask client, in this process.

    A job that fails stops no other. If a worker dies, Dask gives its job to another one. A job has
    failed when that happened more than ``distributed.scheduler.allowed-failures`` times.

    Yields:
        Each job as it ends, with what ``attempt`` returned. With a client, None at least every two
        seconds.
    """
    # Plain values, and a function that is pickled by value: a worker may not know this project yet.
    plain = [{**vars(job), "settings": job.settings.model_dump()} for job in jobs]

    def call(fields: dict[str, Any], project: str = str(PROJECT)) -> dict[str, Any]:
        if project not in sys.path:
            sys.path.insert(0, project)
        from experiments.jobs import attempt as attempt_here

        return attempt_here(fields)

    if client is None:
        yield from ((job, attempt(fields)) for job, fields in zip(jobs, plain, strict=True))
        return
    from distributed import wait

    waiting = {client.submit(call, f, pure=False): j for j, f in zip(jobs, plain, strict=True)}
    while waiting:
        with contextlib.suppress(asyncio.TimeoutError):
            wait(list(waiting), timeout=2, return_when="FIRST_COMPLETED")
        for future in [future for future in waiting if future.done()]:
            problem = None if future.status == "finished" else future.exception()
            died = {"error": f"its worker died ({_line(problem)})"} if problem else None
            yield waiting.pop(future), died or future.result()
        yield None


CLUSTER_TIMEOUT = 10.0  # seconds until a Dask scheduler has to answer


@contextlib.contextmanager
def dask_client(workers: int, address: str) -> Iterator[Any]:
    """Connect to the Dask scheduler at an address, or start one with workers on this machine.

    Without an address, up to one worker needs no Dask: the client is None. A local worker ends with
    this process: it holds a pipe from it. Memory limits are off, for a job that needs much memory
    must not be killed for it.

    Raises:
        UserError: no scheduler answers.
    """
    if workers <= 1 and not address:
        yield None
        return
    import dask
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # A worker gets one job at a time: its death counts against no other.
    dask.config.set({"distributed.scheduler.worker-saturation": 1.0})
    local = {
        "n_workers": workers,
        "threads_per_worker": 1,
        "memory_limit": 0,
        "dashboard_address": None,
        "scheduler_kwargs": {"dashboard_address": ":0"},  # any port that is free
        "silence_logs": logging.CRITICAL,
    }
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT) if address else Client(**local)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        where = f"--cluster: no Dask scheduler at {address}" if address else "--jobs: no workers"
        raise UserError(f"{where} ({_line(error)})") from error
    with client:
        yield client

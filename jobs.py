"""Jobs of a comparison: one method with one seed, tested in a folder of its own; many at a time.

A job's folder is a run's folder (records.py): it is resumable, holds a lock while it is written,
and is left alone once it is finished. So jobs may be run in any order, in any number of processes,
on several machines that share the folders, and again after any failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np

import data
import main
import models
from baselines import METHODS, Policy, training_name
from config import (
    PROJECT,
    Settings,
    UserError,
    absolute,
    episode_seed,
    make_settings,
    reason,
    stream,
)
from environment import DecentralizedLearning
from node import DQNAgent
from records import TEST_TABLES, Run, RunError, read_arrays, stored_progress


@dataclasses.dataclass(frozen=True)
class Job:
    """One method with one seed.

    Attributes:
        method: a name in ``baselines.METHODS``.
        settings: of the environment and the agent; SEED is the job's, RESULTS_DIR the folder of the
            comparison's variant.
        variant: value of what the comparison varies; "" if nothing.
        test_episodes: how many.
        agent: folder of a run of main.py whose agent is tested, or "" to train one, if the method
            learns.
        kind: the stream of the episodes' seeds, ``test`` or ``validation``.
    """

    method: str
    settings: Settings
    variant: str
    test_episodes: int
    agent: str = ""
    kind: str = "test"

    @property
    def name(self) -> str:
        """The folder's name, unique within a variant."""
        return f"{self.method}-seed{self.settings.SEED}"

    @property
    def folder(self) -> Path:
        """Where the test is recorded."""
        return self.settings.results_dir / self.name

    @property
    def training(self) -> Settings | None:
        """The settings of the run that trains the agent, or None if there is nothing to train."""
        method = METHODS.get(self.method)
        if method is None or not method.learns or self.agent:
            return None
        name = training_name(self.method, self.settings.SEED)
        return dataclasses.replace(method.settings(self.settings), NAME=name)

    @property
    def episodes(self) -> int:
        """Of training and test together."""
        return self.test_episodes + (self.settings.EPISODES if self.training else 0)

    def episodes_finished(self) -> int:
        """Of training and test together, as the folders tell."""
        folders = [self.folder]
        if self.training:
            folders.append(self.settings.results_dir / self.training.NAME)
        return sum(max(0, _lines(folder / "episodes.csv") - 1) for folder in folders)

    def first_nodes(self) -> list[int]:
        """Who trains round 1, first of several, in each test episode."""
        return [self.nodes_of(episode)[0] for episode in range(1, self.test_episodes + 1)]

    def nodes_of(self, episode: int) -> list[int]:
        """Who trains round 1 of a test episode, numbered from 1."""
        method = METHODS[self.method]
        number = self.settings.SEED * self.test_episodes + episode - 1
        return method.first_nodes(method.settings(self.settings), number)

    def about(self) -> dict[str, Any]:
        """What makes it this job, beside its settings: for ``config.json``."""
        about = {"method": self.method, "test_episodes": self.test_episodes}
        if self.kind != "test":
            about["episodes"] = self.kind
        if self.agent:
            weights = (absolute(self.agent) / "agent.npz").read_bytes()
            about["agent_sha256"] = hashlib.sha256(weights).hexdigest()
            # Not where it lies on one machine: the place within the project, or the name alone.
            folder = absolute(self.agent)
            inside = folder.is_relative_to(PROJECT)
            about["agent"] = folder.relative_to(PROJECT).as_posix() if inside else folder.name
        return about


def own_settings(settings: Settings, seed: int, folder: Path) -> Settings:
    """Those of a job: its seed, its variant's folder, and one thread, for many run side by side."""
    return dataclasses.replace(
        settings, SEED=seed, NAME="", RESULTS_DIR=str(folder), THREADS=settings.THREADS or 1
    )


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


# --- One job ---------------------------------------------------------------------------------


@functools.lru_cache(1)
def _dataset(settings: Settings, variable: str | None) -> data.Dataset:
    return data.load(settings)


def dataset_of(settings: Settings) -> data.Dataset:
    """The dataset that the settings name, loaded once per process."""
    models.use_cpu(settings.THREADS)  # before a dataset is made, which may compute as well
    # A user's own dataset may depend on any setting but these; ours depend on two.
    key = dataclasses.replace(settings, NAME="", RESULTS_DIR="results", THREADS=0)
    if settings.DATASET in data.BUILT_IN:
        key = make_settings(DATASET=settings.DATASET, DATA_FILE=settings.DATA_FILE)
    return _dataset(key, os.environ.get(data.DATA_VARIABLE))


def run_job(job: Job) -> None:
    """Trains what is to be trained, and tests the policy on ``test_episodes`` episodes.

    The seeds of these episodes are a stream of their own: no training episode has them, and all
    methods with the same SEED have the same ones.

    Raises:
        UserError, OSError: see ``data``, ``environment`` and ``records``.
    """
    if job.method not in METHODS:
        raise UserError(
            f"{job.folder}: this process does not know the method {job.method}; what a script adds "
            "to baselines.METHODS runs with --jobs 1"
        )
    method = METHODS[job.method]
    # However an agent was rewarded, the whole test set judges its test.
    settings = dataclasses.replace(method.settings(job.settings), REWARD_IMAGES=0)
    environment = DecentralizedLearning(settings, dataset_of(settings))
    sent = method.prepare(environment)
    threads = models.use_cpu(settings.THREADS)
    with _run_of(job, environment.dataset, threads) as run:
        if run.finished:
            return
        run.start(environment.shards)
        policy = method.policy(environment) if method.policy else _learned_policy(job, environment)
        for episode in range(run.episodes_finished + 1, job.test_episodes + 1):
            _test_episode(job, environment, policy, run, episode, sent)
            run.checkpoint({"episode": np.array(episode + 1)})
        run.finish()


def _test_episode(
    job: Job,
    environment: DecentralizedLearning,
    policy: Policy,
    run: Run,
    episode: int,
    sent: tuple[int, float, float],
) -> None:
    started = time.perf_counter()
    settings = environment.settings
    rng = stream(settings.SEED, "policy", episode)
    transfers, cost, megabytes = sent
    model_megabytes = environment.foundation.network.size * 4 / 1e6  # float32

    nodes = job.nodes_of(episode)
    holder, episode_reward, done = nodes[0], 0.0, False
    observation, info = environment.reset(
        seed=episode_seed(settings.SEED, episode, job.kind), options={"nodes": nodes}
    )
    while True:
        run.record_test_round(job.method, episode, info)
        hops, distance = communication(environment.distances, holder, info["node"])
        transfers, cost, megabytes = (
            transfers + hops,
            cost + distance,
            megabytes + hops * model_megabytes,
        )
        episode_reward += info["reward"]
        holder = np.atleast_1d(info["node"])[0]
        if done or info["goal_reached"]:
            break
        action = policy(observation, info, rng)
        observation, _, terminated, truncated, info = environment.step(action)
        done = terminated or truncated
    # What seeing all nodes' weights takes, taken literally: each new model is sent to all others,
    # the next node among them.
    sees_weights = METHODS[job.method].learns and settings.sees_weights
    run.record_test_episode(
        job.method,
        episode,
        info,
        episode_reward=episode_reward,
        communication_cost=cost,
        transfers=transfers,
        megabytes=megabytes,
        observation_megabytes=sees_weights
        * info["round"]
        * settings.NODES_PER_ROUND
        * (settings.NUM_NODES - 1)
        * model_megabytes,
        seconds=time.perf_counter() - started,
    )


def communication(distances: np.ndarray, holder: int, nodes: int | list[int]) -> tuple[int, float]:
    """A round's transfers of a model, and the sum of their distances.

    The holder sends the model to each node that trains, and the first of these gets the others'
    results to average. With one node per round that is the paper's distance; with several, the
    public code counts the way to the first alone.
    """
    nodes = [int(node) for node in np.atleast_1d(nodes)]
    ways = [(holder, node) for node in nodes if node != holder]
    ways += [(node, nodes[0]) for node in nodes[1:]]
    return len(ways), float(sum(distances[a, b] for a, b in ways))


def _learned_policy(job: Job, environment: DecentralizedLearning) -> Policy:
    """The DQN's greedy policy: trained as main.py does it if it is not yet, then frozen."""
    settings = environment.settings
    if job.training:
        with Run(job.training, environment.dataset, models.use_cpu(settings.THREADS)) as run:
            if not run.finished:
                training = DecentralizedLearning(job.training, environment.dataset)
                main.train(training, run, quiet=True)
        folder = run.folder
    else:
        folder = absolute(job.agent)
    agent = DQNAgent(
        environment.observation_space.shape[0],
        settings.NUM_NODES,
        settings,
        settings.NODES_PER_ROUND,
    )
    path = folder / "agent.npz"
    try:
        agent.weights = agent.q.network.from_named_arrays(read_arrays(path))
    except ValueError as error:
        raise RunError(f"{path}: does not fit the settings ({error})") from error
    several = settings.NODES_PER_ROUND > 1

    def policy(observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> Any:
        best = agent.best_actions(observation)
        return best if several else best[0]

    return policy


# --- Many jobs -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        job: whose it is.
        state: ``finished`` or ``failed``.
        seconds: that it took this time; 0 if it was finished before.
        error: one line, empty if it is finished.
    """

    job: Job
    state: str
    seconds: float
    error: str = ""


def is_finished(job: Job) -> bool:
    """Whether its folder says so, and that with the present settings.

    Raises:
        RunError: the folder holds another run, or is damaged.
    """
    return _run_of(job, dataset_of(job.settings), 1).peek() == "finished"


def _run_of(job: Job, dataset: data.Dataset, threads: int) -> Run:
    settings = dataclasses.replace(METHODS[job.method].settings(job.settings), NAME=job.name)
    return Run(settings, dataset, threads, TEST_TABLES, job.about())


class NoCluster(UserError):
    """No Dask scheduler answers, or Dask is not installed."""


def check_cluster(address: str) -> None:
    """Whether a Dask scheduler answers there; "" is none, and all right.

    Raises:
        NoCluster: it does not, or Dask is not installed.
    """
    if address:
        with contextlib.redirect_stdout(None), _backend(1, address):
            pass


def run_all(
    jobs: list[Job],
    processes: int,
    cluster: str = "",
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs jobs side by side; none stops another.

    A process that dies (killed, out of memory) takes along the jobs that run beside it, and which
    of them was the cause is not known. So all of them are tried again, once side by side and, if
    it happens again, one by one: only a job whose process dies while it is alone has failed.

    Args:
        jobs: in the order in which they are started.
        processes: how many on this machine; one is this process, and dies with its job.
        cluster: address of a Dask scheduler that runs them instead; its workers have to see this
            project's folder and that of the results under the same paths.
        tell: is called with each outcome as soon as it is known; what it raises ends all.

    Returns:
        An outcome for each job, in the order of their ends.
    """
    outcomes: list[Outcome] = []
    deaths: dict[Job, int] = dict.fromkeys(jobs, 0)

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        tell(outcome)

    while deaths:
        # First those that never saw a process die, then those that saw one, then one at a time.
        fewest = min(deaths.values())
        now = [job for job, count in deaths.items() if count == fewest]
        if fewest >= 2:
            now = now[:1]
        under_way: list[Job] = []
        try:
            # Two processes for a single job: with one, joblib would run it in this process.
            for outcome in _side_by_side(now, max(processes, 1 + fewest // 2), cluster, under_way):
                del deaths[outcome.job]
                add(outcome)
        except _Died as death:
            left = [job for job in now if job in deaths]
            for job in [job for job in left if job in under_way] or left[:1]:
                deaths[job] += 1
                if len(now) == 1 and deaths[job] > 2:
                    del deaths[job]
                    add(Outcome(job, "failed", 0.0, str(death)))
        except NoCluster as error:  # any more
            for job in list(deaths):
                del deaths[job]
                add(Outcome(job, "failed", 0.0, str(error)))
    return outcomes


class _Died(Exception):
    """A process ended that should have returned an outcome, or could not start."""


def _side_by_side(
    jobs: list[Job], processes: int, cluster: str, under_way: list[Job]
) -> Iterator[Outcome]:
    """The outcomes as they come; after ``_Died``, ``under_way`` has those that were started."""
    by_folder = {str(job.folder): job for job in jobs}
    before = {job: stored_progress(job.folder) for job in jobs}

    def calls() -> Iterator[Any]:
        for job in jobs:
            if not cluster:  # a process is free for it
                under_way.append(job)
            yield joblib.delayed(_there())(str(PROJECT), _as_dict(job), os.getpid())

    with _backend(processes, cluster):
        parallel = joblib.Parallel(
            n_jobs=-1 if cluster else processes,
            batch_size=1,
            pre_dispatch="all" if cluster else processes,
            return_as="generator_unordered",
        )
        results = parallel(calls())
        while True:
            try:
                folder, state, seconds, error = next(results)
            except StopIteration:
                return
            except Exception as problem:  # ``attempt`` catches whatever a job itself raises
                if cluster:
                    under_way += [j for j in jobs if stored_progress(j.folder)[1] > before[j][1]]
                raise _Died(f"its process died ({_line(problem)})") from problem
            yield Outcome(by_folder[folder], state, seconds, error)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


_CLUSTER_TIMEOUT = 10.0  # seconds until a Dask scheduler has to answer


@contextlib.contextmanager
def _backend(processes: int, cluster: str) -> Iterator[None]:
    if not cluster:
        with joblib.parallel_config("loky", n_jobs=processes):
            yield
        return
    try:
        from distributed import Client
        from joblib._dask import DaskDistributedBackend
    except ImportError as error:
        raise NoCluster("--cluster: needs Dask: pip install -r requirements-cluster.txt") from error
    try:
        client = Client(cluster, timeout=_CLUSTER_TIMEOUT)
    except (OSError, ValueError, TimeoutError) as error:
        raise NoCluster(f"--cluster: no Dask scheduler at {cluster} ({_line(error)})") from error

    class Cluster(DaskDistributedBackend):
        """joblib's, which would run everything here while the cluster has one thread or none."""

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, super().effective_n_jobs(n_jobs))

    with client:
        if not client.ncores():
            print("the cluster has no worker yet: the jobs wait for one", flush=True)
        backend = Cluster(client=client, wait_for_workers_timeout=None)
        with joblib.parallel_config(backend):
            yield


def _as_dict(job: Job) -> dict[str, Any]:
    return {**dataclasses.asdict(job), "settings": dataclasses.asdict(job.settings)}


def _there() -> Callable[[str, dict[str, Any], int], tuple[str, str, float, str]]:
    """What a worker calls. Pickled by value, for a worker does not know this module."""

    def call(project: str, job: dict[str, Any], parent: int) -> tuple[str, str, float, str]:
        if project not in sys.path:
            sys.path.insert(0, project)
        jobs = importlib.import_module("jobs")
        jobs.end_with(parent)
        return jobs.attempt(job)

    return call


_watched = 0  # the process without which this one ends; 0: none


def end_with(parent: int) -> None:
    """Ends this process when its parent does, whose next call would find the folders locked.

    Args:
        parent: process number of compare.py; a process that is no child of it is left alone.
    """
    global _watched
    if os.getppid() != parent or _watched == parent:
        return
    _watched = parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(fields: dict[str, Any]) -> tuple[str, str, float, str]:
    """Runs a job, given as plain values, and catches whatever stops it.

    What is none of this project's own errors leaves its traceback in ``error.txt``.

    Returns:
        Folder, state, seconds and error of the outcome.
    """
    started = time.perf_counter()
    job = Job(**{**fields, "settings": Settings(**fields["settings"])})
    state, error = "finished", ""
    try:
        run_job(job)
    except UserError as problem:
        state, error = "failed", str(problem)
    except OSError as problem:
        state, error = "failed", reason(problem)
    except Exception as problem:
        state, error = "failed", _line(problem)
        with contextlib.suppress(OSError):
            (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    return str(job.folder), state, time.perf_counter() - started, error


class Watch:
    """Calls a function every few seconds with how many episodes of some jobs are finished.

    A context manager; what the folders hold is the only source, wherever the jobs run.
    """

    def __init__(self, jobs: list[Job], show: Callable[[int], None], seconds: float = 2.0) -> None:
        self._jobs, self._show, self._seconds = jobs, show, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            self._show(sum(job.episodes_finished() for job in self._jobs))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

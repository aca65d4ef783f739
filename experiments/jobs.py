"""Jobs of a comparison: one method with one seed. Dask runs many, here or on a cluster.

A job trains an agent, if its method learns, and tests the policy on episodes that no training has.
A training that was cut off continues, as any run of main.py. A test that was cut off starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import data
import main
import models
import records
from config import PROJECT, Settings, UserError, episode_seed, reason, stream
from environment import DecentralizedLearning, rollout
from experiments.methods import METHODS, MethodPolicy, Sent
from experiments.tables import TABLES, Job, finished_jobs
from node import DQNAgent
from records import Run, append_rows, episode_row, load_agent, locked

CLUSTER_TIMEOUT = 10.0  # seconds until a Dask scheduler has to answer

# tqdm's own lock is a semaphore between processes, of which Python warns when a worker is killed.
tqdm.set_lock(threading.RLock())


# --- One job ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def load_dataset(name: str, folder: str) -> data.Dataset:
    """Load the dataset of DATASET and DATA_DIR, once for all jobs of a process."""
    return data.load(Settings(DATASET=name, DATA_DIR=folder))


def run_job(job: Job) -> None:
    """Train the agent, if there is one to train, and test the policy.

    All methods with the same SEED are tested on the same episodes, whose seeds no training uses.

    Raises:
        UserError, OSError: what the user or the system has to correct.
    """
    with contextlib.suppress(UserError):  # a table is damaged
        if job.key in finished_jobs(job.folder, job.test_episodes):
            return
    method = METHODS[job.method]
    # All test images judge a test, and its rewards are by power, whatever the method.
    settings = job.settings.replace(REWARD="power")
    models.use_device(settings.THREADS, settings.DEVICE)
    environment = DecentralizedLearning(settings, load_dataset(settings.DATASET, settings.DATA_DIR))
    sent_before = method.prepare(environment)
    policy = method.policy(environment) if method.policy else _learned_policy(job, environment)
    with locked(job.folder, "job"):
        for name in ("rounds", "episodes"):
            (job.folder / f"{name}.csv").unlink(missing_ok=True)
        for episode in range(job.first_episode, job.first_episode + job.test_episodes):
            row = _test_episode(job, environment, policy, episode, sent_before)
            append_rows(job.folder / "episodes.csv", TABLES["episodes"], row)


def _learned_policy(job: Job, environment: DecentralizedLearning) -> MethodPolicy:
    """Return an agent's greedy policy: trained as by main.py unless it was given, then frozen."""
    path = Path(job.agent) if job.agent else job.training_folder / "agent.npz"
    settings = job.settings.replace(NAME=job.training_folder.name)
    make_agent = METHODS[job.method].agent or DQNAgent
    agent = make_agent(environment.observation_size, settings)
    if job.trains:
        with Run(settings, environment.dataset, environment.threads) as run:
            if not run.finished:
                training = DecentralizedLearning(settings, environment.dataset)
                main.train(training, run, agent, quiet=True)
                run.finish()
    try:
        agent.load(load_agent(path)[0])
    except ValueError as error:
        raise UserError(f"{path}: does not fit the settings ({error})") from error
    return lambda observation, info, rng: agent.greedy(observation, info)


def _test_episode(
    job: Job,
    environment: DecentralizedLearning,
    policy: MethodPolicy,
    episode: int,
    sent_before: Sent,
) -> dict[str, Any]:
    """Play a test episode, record its rounds and return its row of ``episodes.csv``."""
    started = time.perf_counter()
    method, settings = METHODS[job.method], environment.settings
    rng = stream(settings.SEED, "policy", episode)
    # Numbered over all seeds: `standalone` gives each node its share, with few episodes as well.
    first_nodes = method.first_nodes(settings, settings.SEED * job.test_episodes + episode - 1)
    model_megabytes = environment.foundation.network.size * 4 / 1e6  # float32
    whose = {**job.labels, "dataset": environment.dataset.name, "episode": episode}
    transfers, cost, megabytes = sent_before
    holder = first_nodes[0]
    for round_ in rollout(
        environment,
        lambda seen, info: (policy(seen, info, rng), job.method),
        episode_seed(settings.SEED, episode, job.kind),
        first_nodes,
    ):
        info = round_.info
        append_rows(job.folder / "rounds.csv", TABLES["rounds"], info | whose)
        hops, distance = communication(environment.distances, holder, info["node"])
        transfers, cost = transfers + hops, cost + distance
        megabytes += hops * model_megabytes
        holder = np.atleast_1d(info["node"])[0]
    # An agent that sees all nodes' weights needs them: each new model goes to all other nodes.
    sees_weights = method.policy is None and settings.OBSERVATION in ("broadcast", "local", "both")
    models_trained = len(first_nodes) + (info["round"] - 1) * settings.NODES_PER_ROUND
    models_sent = sees_weights * models_trained * (settings.NUM_NODES - 1)
    return {
        **episode_row(info, settings, started),
        **whose,
        "communication_cost": cost,
        "transfers": transfers,
        "megabytes": megabytes,
        "observation_megabytes": models_sent * model_megabytes,
    }


def communication(distances: np.ndarray, holder: int, nodes: int | list[int]) -> tuple[int, float]:
    """Return a round's number of transfers of a model, and the sum of their distances, no unit.

    ``distances`` is (N, N) float64. The holder of the model sends it to each node that trains. The
    first of these gets the others' results, which it averages. With one node per round that is the
    environment's distance. Departure: with several, the public code counts the way to the first.
    """
    training = np.atleast_1d(nodes).tolist()
    ways = [(holder, node) for node in training if node != holder]
    ways += [(node, training[0]) for node in training[1:]]
    return len(ways), float(sum(distances[way] for way in ways))


# --- Many jobs -------------------------------------------------------------------------------


def attempt(job: Job) -> dict[str, Any]:
    """Run a job in this process and return what ``jobs.csv`` notes of it.

    ``error`` is one line, or "". The traceback of an unexpected one is the job's ``error.txt``.
    """
    started, revision = time.perf_counter(), records.git_revision() or ""
    error = ""
    try:
        (job.folder / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
        if job.method not in METHODS:
            raise UserError(f"method: got {job.method!r}, takes one in methods.py, or --jobs 1")
        run_job(job)
    except (UserError, OSError) as problem:
        error = reason(problem)
    except Exception as problem:
        error = _line(problem)
        with contextlib.suppress(OSError):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "error": error,
        "git_revision": revision,
        "tensorflow": records.tensorflow_version(),
        "cpu": records.cpu_name(),
        "device": job.settings.DEVICE,
    }


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def run_jobs(jobs: list[Job], client: Any) -> Iterator[tuple[Job, dict[str, Any]] | None]:
    """Run jobs side by side, started in their order; without a Dask client, in this process.

    A job that fails stops no other. If a worker dies, Dask gives its job to another one, up to
    ``distributed.scheduler.allowed-failures`` times.

    Yields:
        Each job as it ends, with ``attempt``'s result; with a client, None every two seconds.
    """
    if client is None:
        yield from ((job, attempt(job)) for job in jobs)
        return
    from distributed import wait

    # Dask sends this function by value, a job as plain values: a worker may not know the project.
    def call(fields: dict[str, Any], project: str = str(PROJECT)) -> dict[str, Any]:
        if project not in sys.path:
            sys.path.insert(0, project)
        from config import Settings as SettingsHere
        from experiments import jobs as here

        job = here.Job(**{**fields, "settings": SettingsHere(**fields["settings"])})
        return here.attempt(job)

    waiting = {}
    for job in jobs:
        fields = {**vars(job), "settings": job.settings.model_dump()}
        waiting[client.submit(call, fields, pure=False)] = job
    while waiting:
        with contextlib.suppress(asyncio.TimeoutError):
            wait(list(waiting), timeout=2, return_when="FIRST_COMPLETED")
        for future in [future for future in waiting if future.done()]:
            if future.status == "finished":
                outcome = future.result()
            else:
                cause = future.exception()
                outcome = {"error": f"no result ({_line(cause) if cause else future.status})"}
            yield waiting.pop(future), outcome
        yield None


def dask_client(workers: int, address: str) -> contextlib.AbstractContextManager[Any]:
    """Connect to the Dask scheduler at an address, or start one with workers on this machine.

    Without an address, one worker needs no Dask: the client is None. Local workers end with this
    process, and no limit of memory kills a job. UserError if no scheduler answers, or no worker
    starts.
    """
    if workers <= 1 and not address:
        return contextlib.nullcontext()
    import dask
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    # A worker gets one job at a time: its death counts against no other. Ctrl-C reaches workers as
    # well, and this process ends them: they ignore it, also those that Dask starts again.
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    dask.config.set(
        {"distributed.scheduler.worker-saturation": 1.0, "distributed.worker.preload": [ignored]}
    )
    local = {
        "n_workers": workers,
        "threads_per_worker": 1,
        "memory_limit": 0,
        "dashboard_address": None,
        "scheduler_kwargs": {"dashboard_address": ":0"},  # any port that is free
        "silence_logs": logging.CRITICAL,
    }
    # The first workers inherit this: they ignore Ctrl-C from their first moment.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return Client(address, timeout=CLUSTER_TIMEOUT) if address else Client(**local)
    except (OSError, RuntimeError, ValueError, asyncio.TimeoutError) as error:
        where = f"--cluster: no Dask scheduler at {address}" if address else "--jobs: no workers"
        raise UserError(f"{where} ({_line(error)})") from error
    finally:
        signal.signal(signal.SIGINT, handler)

"""Jobs: what a test records, and many jobs in processes that fail, die and are killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import pandas as pd
import pytest
from conftest import (
    QUICK,
    command,
    interrupt_step,
    set_flags,
    small_settings,
    stand_in,
    tables_of,
)

import main
from config import Settings, UserError, episode_seed, stream
from environment import DecentralizedLearning, distance_matrix
from experiments import compare, jobs, search
from experiments.methods import METHODS
from experiments.tables import Job
from node import DQNAgent
from records import Run, load_agent


@pytest.fixture(autouse=True)
def quick(monkeypatch, few):
    stand_in(monkeypatch, few)


def job_of(folder, method, seed=0, episodes=2, kind="test", **overrides):
    settings = Settings(**{**QUICK, "SEED": seed, "RESULTS_DIR": str(folder), **overrides})
    if method in METHODS:
        settings = settings.replace(**METHODS[method].overrides(settings))
    return Job(method, settings, "", episodes, kind=kind)


def tables(job, training=False):
    """A job's tables of test or training, without the column of seconds."""
    folder = job.training_folder if training else job.folder
    episodes = pd.read_csv(folder / "episodes.csv").drop(columns="seconds")
    return episodes, pd.read_csv(folder / "rounds.csv", dtype={"node": str})


def same(first, second):
    return all(a.equals(b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory, few):
    """Finished jobs by method: do not write into them."""
    folder = tmp_path_factory.mktemp("done")
    finished = {name: job_of(folder, name, seed=1) for name in ("hl", "random", "fedavg")}
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, few)
        for job in finished.values():
            jobs.run_job(job)
    return finished


# --- What a job records ----------------------------------------------------------------------


def test_communication_by_hand():
    distances = np.array([[0, 1, 2], [1, 0, 4], [2, 4, 0.0]])
    assert jobs.communication(distances, 0, 0) == (0, 0)
    assert jobs.communication(distances, 0, 2) == (1, 2)
    # From 1 to 2 and 0, and from 0 to 2, who averages.
    assert jobs.communication(distances, 1, [2, 0]) == (3, 4 + 1 + 2)
    # A server on node 0 sends to 1 and 2, and they send back.
    assert jobs.communication(distances, 0, [0, 1, 2]) == (4, 2 * (1 + 2))


def test_the_test_of_a_trained_agent_step_by_step(done, few):
    settings = Settings(**QUICK, SEED=1)
    environment = DecentralizedLearning(settings, few)
    agent = DQNAgent(environment.observation_size, settings)
    weights, about = load_agent(done["hl"].training_folder / "agent.npz")
    assert about["settings"]["SEED"] == 1
    agent.weights = agent.q.network.from_named_arrays(weights)
    rows, model_megabytes = [], environment.foundation.network.size * 4 / 1e6
    for episode in (1, 2):
        observation, info = environment.reset(seed=episode_seed(1, episode, "test"))
        rewards, hops, node = [info["reward"]], 0, 0
        over = info["goal_reached"]
        while not over:
            action = int(agent.q.values(agent.weights, observation[None])[0].argmax())
            observation, reward, terminated, truncated, info = environment.step(action)
            hops, node = hops + (action != node), action
            rewards.append(reward)
            over = terminated or truncated
        rows.append((info["round"], info["goal_reached"], info["accuracy"], sum(rewards), hops))
    episodes, rounds = tables(done["hl"])
    found = episodes[["rounds", "goal_reached", "final_accuracy", "episode_reward", "transfers"]]
    np.testing.assert_allclose(found.to_numpy(float), np.array(rows, float), rtol=1e-12)
    np.testing.assert_allclose(episodes["megabytes"], episodes["transfers"] * model_megabytes)
    to_all_others = episodes["rounds"] * 3 * model_megabytes
    np.testing.assert_allclose(episodes["observation_megabytes"], to_all_others)
    cost = rounds.groupby("episode")["distance"].sum()
    np.testing.assert_allclose(episodes["communication_cost"], cost)
    assert done["hl"].episodes_finished() == 3 + 2


def test_training_is_that_of_main(done, tmp_path, few):
    settings = Settings(**QUICK, SEED=1, RESULTS_DIR=str(tmp_path), NAME="training-hl-seed1")
    with Run(settings, few, settings.THREADS) as run:
        environment = DecentralizedLearning(settings, few)
        agent = DQNAgent(environment.observation_size, settings)
        main.train(environment, run, agent, quiet=True)
    trained = done["hl"].training_folder
    assert (run.folder / "rounds.csv").read_bytes() == (trained / "rounds.csv").read_bytes()
    own, there = (load_agent(folder / "agent.npz")[0] for folder in (run.folder, trained))
    assert {k: a.tobytes() for k, a in own.items()} == {k: a.tobytes() for k, a in there.items()}


def test_random_uses_its_own_stream(done):
    rounds = tables(done["random"])[1]
    for episode in (1, 2):
        rng = stream(1, "policy", episode)
        nodes = rounds[rounds["episode"] == episode]["node"].astype(int).tolist()
        assert nodes[1:] == [int(rng.integers(4)) for _ in nodes[1:]]


def test_centralized_counts_the_shards_that_are_sent(tmp_path):
    job = job_of(tmp_path, "centralized", episodes=1, STARTER_NODE=1)
    jobs.run_job(job)
    episode = tables(job)[0].loc[0]
    way = distance_matrix(job.settings)[1].sum()
    sent = 3 * 64 * (28 * 28 + 1) / 1e6  # images of one byte a pixel, and their labels
    found = episode[["transfers", "communication_cost", "megabytes", "observation_megabytes"]]
    assert found.tolist() == pytest.approx([3, way, sent, 0])


def test_each_node_is_alone_in_turn_over_all_seeds(tmp_path):
    job = job_of(tmp_path, "standalone", seed=1, episodes=3, MAX_ROUNDS=2)
    jobs.run_job(job)
    nodes = tables(job)[1].groupby("episode")["node"].unique()
    assert nodes.map(list).tolist() == [["3"], ["0"], ["1"]]  # seed 0 has 0, 1 and 2


def test_fedavg_counts_what_the_server_sends(done):
    episodes = tables(done["fedavg"])[0]
    assert (episodes["transfers"] == episodes["rounds"] * 6).all()
    way = 2 * distance_matrix(small_settings())[0].sum()
    np.testing.assert_allclose(episodes["communication_cost"], episodes["rounds"] * way)


def test_several_nodes_per_round(tmp_path):
    for method in ("hl", "random"):
        job = job_of(tmp_path, method, NODES_PER_ROUND=2, EPISODES=1, GOAL_ACCURACY=1.0)
        jobs.run_job(job)
        rounds = tables(job)[1]
        assert rounds["node"][1].count("+") == 1
        assert rounds["method"].unique().tolist() == [method]
        # The starter's round makes a model, four more make two each. Three nodes get each of them.
        size = (1 + 4 * 2) * 3 * 33_580 * 4 / 1e6
        megabytes = tables(job)[0]["observation_megabytes"]
        assert megabytes.tolist() == pytest.approx([size if method == "hl" else 0] * 2)


def test_later_test_episodes(tmp_path, done):
    job = dataclasses.replace(job_of(tmp_path, "random", 1, episodes=1), first_episode=2)
    jobs.run_job(job)
    for own, both in zip(tables(job), tables(done["random"]), strict=True):
        assert own.equals(both[both["episode"] == 2].reset_index(drop=True))


def test_validation_episodes_are_not_those_of_a_test(tmp_path, few):
    job = job_of(tmp_path, "round_robin", 1, episodes=1, kind="validation", GOAL_ACCURACY=1.0)
    jobs.run_job(job)
    environment = DecentralizedLearning(job.settings, few)
    accuracies = {}
    for kind in ("test", "validation"):
        _, info = environment.reset(seed=episode_seed(1, 1, kind))
        steps = [environment.step(node)[4]["accuracy"] for node in (1, 2, 3, 0)]
        accuracies[kind] = [info["accuracy"], *steps]
    assert tables(job)[1]["accuracy"].tolist() == pytest.approx(accuracies["validation"], abs=1e-12)
    assert accuracies["test"] != accuracies["validation"]


def test_a_test_has_the_papers_rewards_and_all_images_judge_it(tmp_path, monkeypatch):
    """With the goal 1 a share has no standard error: the few judge whatever is not perfect."""
    monkeypatch.setattr("environment._EVALUATION_SIZES", (100,))
    job = job_of(tmp_path, "hl", REWARD="progress", GOAL_ACCURACY=1.0, EPISODES=2)
    jobs.run_job(job)
    for episode, rounds in tables(job)[1].groupby("episode"):
        paid = 32 ** (rounds["accuracy"] - 1) - rounds["distance"] - 1
        assert tables(job)[0]["episode_reward"][episode - 1] == pytest.approx(paid.sum())

    def are_shares_of(accuracies, count):
        return np.allclose(accuracies * count, (accuracies * count).round())

    assert are_shares_of(tables(job, training=True)[1]["accuracy"], 100)
    assert are_shares_of(tables(job)[1]["accuracy"], 359)
    assert not are_shares_of(tables(job)[1]["accuracy"], 100)


def test_a_searched_walk_is_recorded_and_continues(tmp_path, monkeypatch):
    job = job_of(tmp_path, "walk_search", EPISODES=3)
    whole = job_of(tmp_path / "whole", "walk_search", EPISODES=3)
    jobs.run_job(whole)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            jobs.run_job(job)
    jobs.run_job(job)
    for training in (False, True):
        assert same(tables(job, training), tables(whole, training))
    probabilities = load_agent(job.training_folder / "agent.npz")[0]
    stays = np.array([probabilities[name].argmax(1) for name in ("nodes", "lengths")])
    nodes = search.walk_nodes(stays, 4)
    episodes, rounds = tables(job)
    for _, walk in rounds.groupby("episode"):
        assert walk["node"].astype(int).tolist() == [0, *nodes][: len(walk)]
    assert not episodes["observation_megabytes"].any()


# --- Many jobs -------------------------------------------------------------------------------


def test_a_method_that_a_worker_does_not_know(tmp_path):
    ((_, end),) = jobs.run_jobs([job_of(tmp_path, "unknown")], None)
    assert end["error"].startswith("method: got 'unknown'")


def test_no_scheduler_there(monkeypatch):
    monkeypatch.setattr(jobs, "CLUSTER_TIMEOUT", 0.5)
    with pytest.raises(UserError, match=r"--cluster: .* tcp://127.0.0.1:1"):
        jobs.dask_client(1, "tcp://127.0.0.1:1")


def test_no_workers_here():
    nowhere = {"temporary-directory": "/dev/null/none"}
    with dask.config.set(nowhere), pytest.raises(UserError, match=r"--jobs: no workers .*/none"):
        jobs.dask_client(2, "")


# Long enough to be killed in the middle.
LONG = {**QUICK, "GOAL_ACCURACY": 0.95, "MAX_ROUNDS": 8}


def outside(folder, *more):
    """The command line of a comparison whose workers, other processes, do the real thing."""
    sets = set_flags({**LONG, "RESULTS_DIR": folder})
    return ["--methods", "hl,stay,standalone", "--seeds", "1", "--test-episodes", "2", *more, *sets]


def wait_until(holds, seconds=240):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def holder_of(folder):
    """The process that holds the lock of a folder."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            for number in os.listdir(f"/proc/{entry}/fd"):
                with contextlib.suppress(OSError):  # a file that is closed again
                    if os.readlink(f"/proc/{entry}/fd/{number}") == str(folder / ".lock"):
                        return int(entry)
    raise AssertionError("nobody holds the lock")


def session_of(leader):
    """The living processes that a process in a session of its own has started, and itself."""
    alive = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(int(entry))
    return alive


def results(folder):
    """A comparison's tables and its agents."""
    folder = folder / "paper-digits"
    found = {name: table.to_dict("list") for name, table in tables_of(folder).items()}
    agents = {p.name: load_agent(p)[0] for p in folder.glob("agents/*.npz")}
    return found, {(n, k): a.tobytes() for n, own in agents.items() for k, a in own.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits):
    """The same jobs in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, digits)
        assert compare.main(outside(folder, "--jobs", "1")) == 0
    return results(folder)


def test_a_comparison_with_local_workers_of_which_one_is_killed(undisturbed, tmp_path):
    folder = tmp_path / "paper-digits" / "jobs" / "training-hl-seed0"

    def goes_on(session):
        rounds = folder / "rounds.csv"
        if not rounds.exists() or rounds.read_bytes().count(b"\n") < 4:
            return False
        config = json.loads((folder / "config.json").read_text())
        return (config["state"], len(config["sessions"])) == ("running", session)

    with subprocess.Popen(
        command(*outside(tmp_path, "--jobs", "2"), script="experiments.compare"),
        cwd=jobs.PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            wait_until(lambda: goes_on(1))
            killed = holder_of(folder)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: goes_on(2))  # Dask gave the job to another worker
            assert killed != holder_of(folder)
            status = Path(f"/proc/{holder_of(folder)}/status").read_text()
            ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
            assert ignored >> (signal.SIGINT - 1) & 1  # Ctrl-C, which the parent handles
            out, errors = parent.communicate(timeout=120)
        finally:
            parent.kill()
    assert parent.returncode == 0
    assert "3 started, 3 finished, 0 failed\n" in out
    assert "distributed" not in errors
    assert results(tmp_path) == undisturbed


def test_an_interrupted_comparison_with_local_workers_continues(
    undisturbed, tmp_path, digits, monkeypatch, capsys
):
    rounds = tmp_path / "paper-digits" / "jobs" / "training-hl-seed0" / "rounds.csv"

    def interrupt():
        wait_until(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 4)
        os.kill(os.getpid(), signal.SIGINT)

    stand_in(monkeypatch, digits)
    threading.Thread(target=interrupt, daemon=True).start()
    assert compare.main(outside(tmp_path, "--jobs", "2")) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not multiprocessing.active_children()
    assert compare.main(outside(tmp_path, "--jobs", "1")) == 0
    assert results(tmp_path) == undisturbed


def test_a_killed_parent_leaves_no_process():
    code = "import time; from experiments import jobs; client = jobs.dask_client(2, '')\n"
    code += "job = client.submit(time.sleep, 600); print(flush=True); time.sleep(600)"
    options = {"cwd": jobs.PROJECT, "start_new_session": True, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **options) as parent:
        parent.stdout.readline()
        alive = session_of(parent.pid)
        parent.kill()
    assert len(alive) >= 3
    wait_until(lambda: not session_of(parent.pid), seconds=30)


@pytest.fixture
def interruptible():
    """A process that the shell started in the background ignores Ctrl-C, and so do its children."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_local_workers_end_with_their_client():
    with jobs.dask_client(2, "") as client:
        workers = set(client.run(os.getpid).values())
        assert len(workers - {os.getpid()}) == 2
        assert client.submit(os.getpid).result() in workers
        # Its settings can't be made in the worker: Dask gives the job up.
        broken = SimpleNamespace(model_dump=lambda: {"EPISODES": 0})
        job = dataclasses.replace(job_of("x", "stay"), settings=broken)
        ends = [end for end in jobs.run_jobs([job], client) if end]
        assert [end["error"].partition(":")[0] for _, end in ends] == ["no result (ConfigError"]
        # Ctrl-C reaches them as well; the parent ends them.
        handlers = client.run(signal.getsignal, signal.SIGINT).values()
        assert set(handlers) == {signal.SIG_IGN} != {signal.getsignal(signal.SIGINT)}
    wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))


def test_workers_of_a_dask_cluster(undisturbed, tmp_path, digits, monkeypatch):
    """A scheduler and a worker that know nothing of this project."""
    stand_in(monkeypatch, digits)
    file, started = tmp_path / "scheduler.json", []

    def spawn(*arguments):
        dask = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        started.append(subprocess.Popen(dask, cwd=tmp_path, stdout=-3, stderr=-3))

    try:
        spawn("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        wait_until(file.exists, seconds=60)
        address = json.loads(file.read_text())["address"]
        spawn("worker", address, "--nthreads", "1", "--no-nanny")
        assert compare.main(outside(tmp_path / "b", "--cluster", address)) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert results(tmp_path / "b") == undisturbed

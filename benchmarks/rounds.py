"""Measure what a round costs: against the machine, plain Keras, and with more nodes.

Usage: ``python3 -m benchmarks.rounds [--output results/benchmark]``

Takes MNIST as main.py does, or else the bundled digits. Prints one table and writes it as
``report.md``. Nothing else should use the cores meanwhile. Linux only: it reads memory from /proc.

What is compared takes turns within one run, and a ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import data
import main
from cli import Parser, available_cores
from config import NAMED_SETTINGS, PROJECT, Settings, absolute, stream
from environment import DecentralizedLearning, rollout
from models import Moments, tf, use_cpu
from node import DQNAgent
from records import Run, cpu_name

# Floating-point operations of the foundation model on one image: a multiplication and an addition
# count as two. Convolutions of 24 * 24 positions, 20 filters, 5 * 5 * 1 weights and of 8 * 8, 50,
# 5 * 5 * 20; 800 * 10 dense weights. Training adds the gradients by weights and, but for the first
# layer, by inputs.
FORWARD = 576_000 + 3_200_000 + 16_000
BACKWARD = FORWARD + 3_200_000 + 16_000

# The product of two matrices of this size takes about as long as a local epoch.
MATRIX = 2048
PRODUCT = 2 * MATRIX**3

REPEATS = 5  # turns, or starts of main.py
PARTS = ("training", "evaluation", "agent")

# Trainings by the settings of main.py; those in one list run side by side. Of the trainings with N
# nodes only the rest of a round counts, beside local training and evaluation: few images will do.
_FEW = {"REWARD_IMAGES": 100, "SAMPLES_PER_NODE": 32, "OBSERVATION": "local", "PCA_COMPONENTS": 10}
SIZES = {f"N = {nodes}": [{**_FEW, "NUM_NODES": nodes}] for nodes in (10, 100, 1000)}
SIDE_BY_SIDE = {
    "one": [{"MAX_ROUNDS": 6}],
    "two": [{"MAX_ROUNDS": 6, "THREADS": 1, "SEED": seed} for seed in (0, 1)],
}
TUNED = {"tuned": [{**NAMED_SETTINGS["tuned"], "MAX_ROUNDS": 18, "THREADS": 1}]}  # it needs 17

# The run whose memory is watched. Its DQN is trained from about episode 33 on.
MEMORY_RUN = {"DATASET": "digits", "EPISODES": 120, "MAX_ROUNDS": 5, "SAMPLES_PER_NODE": 100}

Row = tuple[str, str, str]  # what, measured, compared
Episodes = dict[str, list[list[dict[str, float]]]]  # by kind, turn and process


def measure_round(dataset: data.Dataset, repeats: int) -> dict[str, np.ndarray]:
    """Return (repeats,) seconds each of a round, its parts, a matrix product and the reference."""
    settings = Settings(GOAL_ACCURACY=1.0, MAX_ROUNDS=repeats + 1)
    environment = DecentralizedLearning(settings, dataset)
    foundation = environment.foundation
    matrix = tf.random.normal((MATRIX, MATRIX))
    weights = foundation.network.initial_weights(stream(0, "initialisation"))
    fresh = Moments.fresh(foundation.network.size)
    order = tf.constant(environment.shards[0])
    reference = importlib.import_module("tests.reference").Reference(
        ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)),
        [part.numpy() for part in foundation.network.split(weights)],
        (np.random.default_rng(i).permutation(500) for i in range(repeats + 1)),
    )
    # The model goes around all nodes here. The reference stays at node 0, for Keras compiles a
    # node's model in its first round.
    rounds = rollout(environment, lambda _, info: (info["round"] % settings.NUM_NODES, ""), seed=0)
    actions: dict[str, Callable[[], object]] = {
        "product": lambda: tf.matmul(matrix, matrix).numpy(),
        "evaluation": lambda: foundation.evaluate(weights),
        "training": lambda: foundation.train_epoch(weights, fresh, order)[0].numpy(),
        "round": lambda: next(rounds),
        "reference": lambda: reference.round([0]),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in times.items()}  # the first compiles


def round_rows(times: dict[str, np.ndarray], test_images: int, samples: int) -> list[Row]:
    """Return the table's rows for the seconds of ``measure_round``'s actions."""
    product = times["product"]
    rate = f"{PRODUCT / np.median(product) / 1e9:.0f} GFLOP/s"
    rows = [(f"matrix product, {MATRIX} x {MATRIX}, float32", _seconds(product), rate)]
    work = {"evaluation": FORWARD * test_images, "training": (FORWARD + BACKWARD) * samples}
    for (name, flop), images in zip(work.items(), (test_images, samples), strict=True):
        rate = f"{flop / np.median(times[name]) / 1e9:.0f} GFLOP/s"
        share = f"{np.median(product / times[name]) * flop / PRODUCT:.0%} of the matrix product's"
        rows.append((f"{name}, {images} images", _seconds(times[name]), f"{rate}, {share}"))
    ratio = f"{np.median(times['reference'] / times['round']):.2f} times a round"
    rows.append(("round", _seconds(times["round"]), ""))
    return [*rows, ("round of the reference", _seconds(times["reference"]), ratio)]


def _seconds(values: np.ndarray) -> str:
    return f"{np.median(values):.4f} s"


def memory(name: str, process: int | str = "self") -> float:
    """Return VmRSS, what a process holds, or VmHWM, the most that it ever held, in MB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def _time(owner: Any, name: str, seconds: dict[str, float], part: str) -> None:
    """Let each call of a method add its seconds to a part."""
    method = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments)
        seconds[part] += time.perf_counter() - started
        return result

    setattr(owner, name, timed)


def play_training(settings: Settings) -> Iterator[dict[str, float]]:
    """Play episodes as ``main.train`` does at its end, with a full replay buffer.

    Yields:
        Seconds per round, in all (``round``) and of its parts (``training``, ``evaluation``,
        ``agent``), and ``memory``, the most that the process ever held in MB.
    """
    environment = DecentralizedLearning(settings)
    agent = DQNAgent(environment.observation_size, settings)
    agent.epsilon = 0.0
    observation = np.zeros(environment.observation_size, np.float32)
    for _ in range(settings.EPISODES * (settings.MAX_ROUNDS - 1)):
        agent.replay.add(observation, [0], 0.0, observation, False)
    seconds = dict.fromkeys(PARTS, 0.0)
    _time(environment.foundation, "train_epoch", seconds, "training")
    _time(environment.foundation, "evaluate", seconds, "evaluation")
    _time(agent, "act", seconds, "agent")
    _time(agent, "train", seconds, "agent")

    def policy(observation: np.ndarray, info: dict[str, Any]) -> tuple[list[int], str]:
        # The agent's choice is not taken: with all nodes in turn, most nodes' models differ.
        return [info["round"] % settings.NUM_NODES], agent.act(observation)[1]

    with Run(settings, environment.dataset, environment.threads) as run:
        run.start(environment.shards, environment.distances)
        while True:
            seconds.update(dict.fromkeys(PARTS, 0.0))
            started, rounds = time.perf_counter(), []
            for round_ in rollout(environment, policy, seed=0):
                rounds.append(round_)
                main.record_round(run, round_)
                if round_.observation is not None:
                    done = round_.terminated or round_.truncated
                    kept = round_.observation, round_.action, round_.reward, round_.next_observation
                    agent.remember(*kept, done=done)
            main.record_episode(run, rounds, agent.epsilon, agent.train(), started)
            run.checkpoint(agent.state(), agent.replay.latest(len(rounds) - 1))
            whole = {**seconds, "round": time.perf_counter() - started}
            per_round = {part: value / len(rounds) for part, value in whole.items()}
            yield {**per_round, "memory": memory("VmHWM")}


@functools.cache
def _training(folder: str, **overrides: Any) -> Iterator[dict[str, float]]:
    own = tempfile.mkdtemp(dir=folder)
    return play_training(Settings(GOAL_ACCURACY=1.0, RESULTS_DIR=own, **overrides))


def play_episode(folder: str, overrides: dict[str, Any]) -> dict[str, float]:
    """Play the next episode of this process's training with these settings."""
    return next(_training(folder, **overrides))


def play_in_turns(kinds: dict[str, list[dict[str, Any]]], repeats: int) -> Episodes:
    """Play an episode of each kind in turns; a kind's trainings run side by side."""
    episodes: Episodes = {kind: [] for kind in kinds}
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        processes = {
            kind: [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in trainings]
            for kind, trainings in kinds.items()
        }
        for _ in range(repeats + 1):
            for kind, trainings in kinds.items():
                pairs = zip(processes[kind], trainings, strict=True)
                futures = [process.submit(play_episode, folder, own) for process, own in pairs]
                episodes[kind].append([future.result() for future in futures])
    return {kind: turns[1:] for kind, turns in episodes.items()}  # the first one compiles


def training_rows(episodes: Episodes) -> list[Row]:
    """Return the table's rows for the episodes of SIDE_BY_SIDE, TUNED and SIZES."""

    def values(kind: str, part: str) -> np.ndarray:
        return np.array([turn[0][part] for turn in episodes[kind]])

    one = 1 / values("one", "round")
    two = np.array([sum(1 / episode["round"] for episode in turn) for turn in episodes["two"]])
    ratio, tuned = f"{np.median(two / one):.2f} times one run", values("tuned", "round")
    rows = [
        ("one run on all threads", f"{np.median(one):.2f} rounds/s", ""),
        ("two runs side by side, one thread each", f"{np.median(two):.2f} rounds/s", ratio),
        ("round of a tuned training, one thread", _seconds(tuned), ""),
    ]
    for part in PARTS:
        share = f"{np.median(values('tuned', part) / tuned):.0%} of it"
        rows.append((f"its {part}", _seconds(values("tuned", part)), share))
    for size in SIZES:
        rest = values(size, "round") - values(size, "training") - values(size, "evaluation")
        peak = f"{values(size, 'memory').max():.0f} MB at the peak"
        rows.append((f"{size}: round without training and evaluation", _seconds(rest), peak))
    return rows


def watch_main(table: str, counts: tuple[int, ...], **overrides: Any) -> list[tuple[float, float]]:
    """Run main.py until a table has so many rows; return seconds and memory in MB at each count."""
    found, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / table
        flags = {"RESULTS_DIR": folder, "NAME": "run", **overrides}
        options = [f"--set={name}={value}" for name, value in flags.items()]
        command = [sys.executable, str(PROJECT / "main.py"), *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            for count in counts:
                while not (path.exists() and path.read_bytes().count(b"\n") > count):
                    if process.poll() is not None:
                        raise RuntimeError(f"main.py ended with status {process.returncode}")
                    time.sleep(0.005)
                found.append((time.perf_counter() - started, memory("VmRSS", process.pid)))
            process.kill()
    return found


def report(rows: list[Row], dataset: str) -> str:
    """Return the table as Markdown, below a line with data, machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras", "numpy"))
    machine = f"{available_cores()} cores of {cpu_name() or 'an unknown processor'}"
    table = [("what", "measured", "compared"), ("---", "---", "---"), *rows]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table)
    return f"{dataset}, {machine}, {versions}; medians of {REPEATS}.\n\n{lines}"


def run(arguments: list[str] | None = None) -> None:
    """Measure everything, print the report and write it."""
    parser = Parser("benchmarks.rounds", "Measure what a round costs.")
    parser.add_argument("--output", default="results/benchmark", help="folder of report.md")
    output = absolute(parser.parse_args(arguments).output)
    use_cpu(0)
    dataset = data.load(Settings())
    times = measure_round(dataset, REPEATS)
    rows = round_rows(times, len(dataset.y_test), Settings().SAMPLES_PER_NODE)
    episodes = play_in_turns(SIDE_BY_SIDE, REPEATS)
    rows += training_rows({**episodes, **play_in_turns({**TUNED, **SIZES}, REPEATS)})
    starts = [watch_main("rounds.csv", (1,))[0][0] for _ in range(REPEATS)]
    rows.append(("start of main.py to the end of round 1", _seconds(np.array(starts)), ""))
    (_, before), (_, after) = watch_main("episodes.csv", (40, 120), **MEMORY_RUN)
    growth = f"{after - before:+.1f} MB since episode 40"
    rows.append(("memory of a run after episode 120", f"{after:.1f} MB", growth))
    text = report(rows, dataset.name)
    print(text, end="")
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run()

"""Measure what a round costs: against the machine, plain Keras, and with more nodes.

Usage: ``python3 -m benchmarks.rounds``

Takes MNIST as main.py does, or else the bundled digits. Prints one table and writes it to
``results/benchmark/report.md``. Nothing else should use the cores meanwhile. Linux only: it reads
memory from /proc.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

import data
import main
from cli import Parser
from config import NAMED_SETTINGS, PROJECT, Settings
from environment import DecentralizedLearning
from models import cpu_count, tf, use_device
from node import DQNAgent
from records import Run, cpu_name, tensorflow_version

# Floating-point operations of the foundation model on one image: a multiplication and an addition
# count as two. Convolutions of 24 * 24 positions, 20 filters, 5 * 5 * 1 weights and of 8 * 8, 50,
# 5 * 5 * 20; 800 * 10 dense weights. Training adds the gradients by weights and, but for the first
# layer, by inputs.
FORWARD = 576_000 + 3_200_000 + 16_000
BACKWARD = FORWARD + 3_200_000 + 16_000

# The product of two matrices of this size takes about as long as a local epoch.
MATRIX = 2048
PRODUCT = 2 * MATRIX**3

TURNS = 5

Kinds = Mapping[str, Sequence[Callable[[], dict[str, float]]]]
Turns = list[list[dict[str, float]]]  # what was measured, by turn and process

_load = cache(data.load)  # once in a process


def multiply() -> dict[str, float]:
    """Return the seconds of a matrix product."""
    use_device()
    matrix = tf.random.normal((MATRIX, MATRIX))
    return {"seconds": timeit(lambda: tf.matmul(matrix, matrix).numpy(), number=1)}


def play_reference() -> dict[str, float]:
    """Return the seconds of a round of tests/reference.py."""
    use_device()
    # Always the same node: Keras compiles a node's model in its first round.
    return {"seconds": timeit(lambda: _reference().round([0]), number=1)}


@cache
def _reference() -> Any:
    module, dataset = importlib.import_module("tests.reference"), _load(Settings())
    images = (dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)
    orders = itertools.repeat(np.random.default_rng(0).permutation(500))
    return module.Reference(images, module.foundation_model().get_weights(), orders)


def start(*flags: str) -> dict[str, float]:
    """Return the seconds from the start of main.py to the end of round 1."""
    code = "import os, sys, main, records; records.Run.add = lambda *_: os._exit(0)\n"
    code += "sys.exit(main.main())"
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, f"--set=RESULTS_DIR={folder}", *flags]
        started = time.perf_counter()
        subprocess.run(command, cwd=PROJECT, check=True)
        return {"seconds": time.perf_counter() - started}


def play(**overrides: Any) -> dict[str, float]:
    """Run ``main.train`` for an episode, with epsilon 0.4 and the replay buffer of 120 episodes.

    Returns:
        Seconds per round (``seconds``) and of its parts (``training``, ``evaluation``, ``agent``,
        ``checkpoint``), and ``memory``, the most that the process ever held, in MB.
    """
    parts: defaultdict[str, float] = defaultdict(float)

    def clock(part: str, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments)
            parts[part] += time.perf_counter() - started
            return result

        stack.enter_context(patch.object(owner, name, timed))

    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        fixed = {"EPISODES": 1, "EPSILON": 0.4, "GOAL_ACCURACY": 1.0, "RESULTS_DIR": folder}
        settings = Settings(**overrides, **fixed)
        use_device(settings.THREADS)  # before data is loaded, which may start TensorFlow
        environment = DecentralizedLearning(settings, _load(Settings(DATASET=settings.DATASET)))
        agent = DQNAgent(environment.observation_size, settings.replace(EPISODES=120))
        empty = np.zeros(environment.observation_size, np.float32)
        for _ in range(120 * (settings.MAX_ROUNDS - 1)):
            agent.replay.add(empty, [0], 0.0, empty, False)
        with Run(settings, environment.dataset, environment.threads) as run:
            clock("training", environment.foundation, "train_epoch")
            clock("evaluation", environment.foundation, "evaluate")
            clock("agent", agent, "act")
            clock("agent", agent, "train")
            clock("checkpoint", run, "checkpoint")
            main.train(environment, run, agent, quiet=True)
        episode = pd.read_csv(run.folder / "episodes.csv").iloc[0]
    parts["seconds"] = episode["seconds"] + parts["checkpoint"]
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {part: float(s / episode["rounds"]) for part, s in parts.items()} | {"memory": memory}


# With N nodes only the time beside training and evaluation counts, so few images will do.
SIZES = (10, 100, 1000)
FEW = {"REWARD": "progress", "SAMPLES_PER_NODE": 32, "OBSERVATION": "both"}
TUNED = {**NAMED_SETTINGS["tuned"], "MAX_ROUNDS": 15, "THREADS": 1}  # rounds that it needs

# What takes turns, by kind. The calls of one kind run side by side.
MEASURES: list[Kinds] = [
    {
        "product": [multiply],
        "one": [partial(play, MAX_ROUNDS=3)],
        "two": [partial(play, MAX_ROUNDS=3, THREADS=1, SEED=seed) for seed in (0, 1)],
        "reference": [play_reference],
    },
    {"tuned": [partial(play, **TUNED)]},
    *[{f"N = {nodes}": [partial(play, **FEW, NUM_NODES=nodes)]} for nodes in SIZES],
    {"start": [start]},
]


def measure(kinds: Kinds, turns: int) -> dict[str, Turns]:
    """Measure each kind in turns, each call of a kind in a process of its own."""
    found: dict[str, Turns] = {kind: [] for kind in kinds}
    spawn = get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            kind: [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in calls]
            for kind, calls in kinds.items()
        }
        for _ in range(turns + 1):
            for kind, calls in kinds.items():
                futures = [pool.submit(c) for pool, c in zip(pools[kind], calls, strict=True)]
                found[kind].append([future.result() for future in futures])
    return {kind: measured[1:] for kind, measured in found.items()}  # the first one compiles


def report(found: dict[str, Turns], dataset: str, images: int) -> str:
    """Return the table as Markdown; ``images`` is the size of the test set."""

    def values(kind: str, part: str = "seconds") -> np.ndarray:
        return np.array([turn[0][part] for turn in found[kind]])

    def add(what: str, seconds: np.ndarray, compared: str = "") -> None:
        lines.append(f"| {what} | {np.median(seconds):.4f} s | {compared} |")

    def add_rate(what: str, seconds: np.ndarray, flop: int) -> None:
        share = np.median(product / seconds) * flop / PRODUCT
        add(what, seconds, f"{share:.0%} of the matrix product's rate")

    versions = (
        f"tensorflow {tensorflow_version()}, keras {version('keras')}, numpy {version('numpy')}"
    )
    machine = f"{cpu_count()} cores of {cpu_name() or 'an unknown processor'}"
    lines = [f"{dataset}, {machine}, {versions}; medians of {TURNS}.", ""]
    lines += ["| what | measured | compared |", "| --- | --- | --- |"]
    product, one, tuned, reference = map(values, ("product", "one", "tuned", "reference"))
    rate = PRODUCT / np.median(product) / 1e9
    add(f"matrix product, {MATRIX} x {MATRIX}, float32", product, f"{rate:.0f} GFLOP/s")
    add_rate(f"evaluation, {images} images", values("one", "evaluation"), FORWARD * images)
    add_rate("training, 500 images", values("one", "training"), (FORWARD + BACKWARD) * 500)
    add("round", one)
    add("round of the reference", reference, f"{np.median(reference / one):.2f} of a round")
    two = np.array([1 / sum(1 / run["seconds"] for run in turn) for turn in found["two"]])
    add("round of two runs side by side", two, f"{np.median(two / one):.2f} of a round")
    add("round of a tuned training, one thread", tuned)
    for part in ("training", "evaluation", "agent"):
        share = np.median(values("tuned", part) / tuned)
        add(f"its {part}", values("tuned", part), f"{share:.0%} of it")
    for size in [f"N = {nodes}" for nodes in SIZES]:
        rest = values(size) - values(size, "training") - values(size, "evaluation")
        memory = values(size, "memory")
        peak = f"{memory[-1]:.0f} MB at the peak, {memory[-1] - memory[0]:+.1f} MB since turn 1"
        add(f"{size}: round without training and evaluation", rest, peak)
    add("start of main.py to the end of round 1", values("start"))
    return "\n".join(lines) + "\n"


def run(arguments: list[str] | None = None) -> None:
    """Measure everything, print the report and write it."""
    parser = Parser("benchmarks.rounds", "Measure what a round costs.")
    parser.parse_args(arguments)
    output = PROJECT / "results" / "benchmark"
    found: dict[str, Turns] = {}
    for kinds in MEASURES:
        found |= measure(kinds, TURNS)
    dataset = data.load(Settings())
    text = report(found, dataset.name, len(dataset.y_test))
    print(text, end="")
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run()

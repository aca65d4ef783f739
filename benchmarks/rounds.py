"""How long a round takes, against plain Keras and against the machine's matrix products.

Usage: python3 benchmarks/rounds.py [--repeats 5]

All figures are medians of several repeats that alternate within one run, so that a machine that
gets slower or faster meanwhile changes the seconds, and much less the ratios. Takes MNIST as
main.py does, or else the bundled digits with their small test set; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import data
import models
from config import make_settings, stream
from environment import DecentralizedLearning
from models import Moments, tf
from node import DQNAgent
from reference import Reference

# Floating-point operations of the foundation model on one image, a multiplication and an addition
# counted as two:
#   first convolution   24 * 24 positions * 20 filters * 5 * 5 * 1 weights * 2 =   576,000
#   second convolution    8 * 8 positions * 50 filters * 5 * 5 * 20 weights * 2 = 3,200,000
#   dense                                       800 inputs * 10 outputs * 2    =    16,000
# Training adds the gradient by the weights of all three layers, and by the inputs of the last two.
FORWARD = 576_000 + 3_200_000 + 16_000
BACKWARD = FORWARD + 3_200_000 + 16_000

_MATRIX = 2048


def seconds(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each action, which take turns; each has run once before."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement [default: 5]")
    parser.add_argument("--threads", type=int, default=0, help="0 for all cores [default: 0]")
    arguments = parser.parse_args()

    settings = make_settings(THREADS=arguments.threads, GOAL_ACCURACY=1.0, MAX_ROUNDS=10**6)
    threads = models.use_cpu(settings.THREADS)
    dataset = data.load(settings)
    env = DecentralizedLearning(settings, dataset)
    agent = DQNAgent(env.observation_space.shape[0], settings.NUM_NODES, settings)
    agent.epsilon = 0.0

    matrix = tf.random.normal((_MATRIX, _MATRIX))
    product = tf.function(lambda a: a @ a)
    weights = env.foundation.network.initial_weights(stream(0, "initialisation"))
    fresh = Moments.fresh(env.foundation.network.size)
    order = tf.constant(env.shards[0])
    shuffling = np.random.default_rng(0)
    reference = Reference(
        ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)),
        [part.numpy() for part in env.foundation.network.split(weights)],
        (shuffling.permutation(settings.SAMPLES_PER_NODE) for _ in range(10**6)),
    )
    observation, _ = env.reset(seed=0)
    nodes = iter(range(10**6))

    def round_here() -> None:
        nonlocal observation
        agent.best_actions(observation)
        observation = env.step(next(nodes) % settings.NUM_NODES)[0]

    def products() -> None:
        for _ in range(4):
            product(matrix).numpy()

    times = seconds(
        {
            "product": products,
            "reference": lambda: reference.round([next(nodes) % settings.NUM_NODES]),
            "round": round_here,
            "evaluation": lambda: env.foundation.evaluate(weights),
            "training": lambda: env.foundation.train_epoch(weights, fresh, order)[0].numpy(),
            "observation": lambda: env._observe(env._own, env._initial),
            "decision": lambda: agent.best_actions(observation),
        },
        arguments.repeats,
    )
    median = {name: float(np.median(values)) for name, values in times.items()}
    rate = 4 * 2 * _MATRIX**3 / median["product"]
    evaluation_flop = FORWARD * len(dataset.y_test)
    training_flop = (FORWARD + BACKWARD) * settings.SAMPLES_PER_NODE

    def paired(name: str, other: str) -> float:
        return float(np.median(np.divide(times[name], times[other])))

    packages = ", ".join(f"{p} {version(p)}" for p in ("tensorflow", "keras", "numpy"))
    print(f"{dataset.name}, {threads} threads of {os.cpu_count()} CPUs, {packages}")
    print(f"medians of {arguments.repeats}\n")
    print("| what | seconds | GFLOP | GFLOP/s | share of the matrix product's rate |")
    print("|---|---|---|---|---|")
    print(f"| matrix product, {_MATRIX} | {median['product'] / 4:.4f} | ", end="")
    print(f"{2 * _MATRIX**3 / 1e9:.1f} | {rate / 1e9:.0f} | 100 % |")
    for name, flop in (("evaluation", evaluation_flop), ("training", training_flop)):
        share = flop / median[name] / rate
        print(f"| {name} | {median[name]:.4f} | {flop / 1e9:.1f} | ", end="")
        print(f"{flop / median[name] / 1e9:.0f} | {share:.0%} |")
    for name in ("observation", "decision"):
        print(
            f"| {name} | {median[name]:.4f} | | | ({median[name] / median['round']:.1%} of ", end=""
        )
        print("the round) |")
    print(f"| round | {median['round']:.4f} | | | |")
    print(f"| round of the reference | {median['reference']:.4f} | | | |")
    print(f"\nthe reference takes {paired('reference', 'round'):.2f} times as long per round")


if __name__ == "__main__":
    main()

"""How long a round takes and what it needs: against plain Keras, the machine, and more nodes.

Usage: python3 benchmarks/rounds.py [--repeats 5] [--output results/benchmark]

Takes MNIST as main.py does, or else the bundled digits. Prints the report and writes it as
``report.md``, with the sizes' table ``scaling.csv`` and its plot. Nine minutes on two cores,
which nothing else should use. Linux only: it reads memory from /proc.

Whatever is compared takes turns within one run, and ratios are the medians of the turns' ratios:
a machine that gets slower or faster meanwhile changes the seconds, and much less the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import data
import models
import plot
from config import Settings, make_settings, stream
from environment import DecentralizedLearning
from models import Moments, tf
from node import DQNAgent
from records import Run, cpu_name
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
_PRODUCTS = 4  # in a turn, so that it takes about as long as a local epoch

_ROUNDS = 6  # in a turn of the comparison of processes
_SIZES = (10, 100, 1000)
_SIZES_SAMPLES = 50  # images on a node: 1,000 nodes of the default 500 would need 500,000
_SIZES_COMPONENTS = 10

# The complete run whose memory is watched: every episode is played to its limit.
_MEMORY_RUN = {"DATASET": "digits", "GOAL_ACCURACY": 1.0, "MAX_ROUNDS": 8}
_MEMORY_FROM = 5

_MB = 1e6


class Bench:
    """An environment, an agent and a run's folder, as main.py has them, and what is timed of them.

    Args:
        settings: the environment's and the agent's; the goal should be out of reach.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        dataset = data.load(settings)
        threads = models.use_cpu(settings.THREADS)
        self.env = DecentralizedLearning(settings, dataset)
        self.agent = DQNAgent(self.env.observation_space.shape[0], settings.NUM_NODES, settings)
        self.agent.epsilon = 0.0
        self.run = Run(settings, dataset, threads)
        self.run.__enter__()  # until the process ends; the folder is a temporary one
        self.run.start(self.env.shards)
        self._begin()
        self.round()

    def _begin(self) -> None:
        self.observation, self.info = self.env.reset(seed=0)
        self._over = False

    def round(self) -> float:
        """Seconds of one round; the model goes around all nodes in turn."""
        if self._over:
            self._begin()
        started = time.perf_counter()
        self.decision()
        node = self.info["round"] % self.settings.NUM_NODES
        self.observation, _, terminated, truncated, self.info = self.env.step(node)
        self.record()
        self._over = terminated or truncated
        return time.perf_counter() - started

    def rounds(self, count: int) -> list[float]:
        """Seconds of each of several rounds."""
        return [self.round() for _ in range(count)]

    def observe(self) -> None:
        """The observation in which every node that was visited has a model of its own."""
        self.env.observe("local")

    def decision(self) -> None:
        """The Q-network's choice."""
        self.agent.best_actions(self.observation)

    def record(self) -> None:
        """A row of rounds.csv."""
        self.run.record_round(1, self.info, "greedy")

    def rest(self, repeats: int) -> dict[str, float]:
        """Median seconds of what a round needs beside training and evaluation.

        At its dearest: at the end of an episode whose every round was on another node, with the
        tables and the replay memory of a whole run of such episodes; each checkpoint reads the
        tables again. What is done once per episode is divided by its rounds.
        """
        while self.info["round"] < self.settings.MAX_ROUNDS:
            self.round()
        rounds = self.settings.MAX_ROUNDS
        for _ in range(self.settings.EPISODES):
            for _ in range(rounds):
                self.record()
            for _ in range(rounds - 1):
                self.agent.memory.add(self.observation, 0, 0.0, self.observation, False)
            self.run.record_episode(
                1, self.info, episode_reward=0.0, epsilon=0.0, q_loss=None, seconds=0.0
            )
        parts: dict[str, Callable[[], object]] = {
            "observation": self.observe,
            "decision": self.decision,
            "records": self.record,
            "checkpoint": lambda: self.run.checkpoint(
                self.agent.state(), self.agent.memory.latest(rounds - 1)
            ),
            "agent's training": self.agent.train,
        }
        times = seconds(parts, repeats)
        for name in ("checkpoint", "agent's training"):
            times[name] = [value / rounds for value in times[name]]
        median = {name: float(np.median(values)) for name, values in times.items()}
        median["records"] += median.pop("checkpoint")
        return median

    def peak_memory(self) -> float:
        """The most memory that this process ever held, in MB.

        ``round`` stores no transition and trains no agent, so neither is part of it.
        """
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / _MB


class Worker:
    """A ``Bench`` in a process of its own, for other threads or settings; a context manager.

    Args:
        overrides: of the settings.
        deterministic: with TensorFlow's op determinism.
    """

    def __init__(self, deterministic: bool = False, **overrides: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, overrides, deterministic), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        self._connection.recv()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def begin(self, name: str, *arguments: object) -> None:
        """Starts a method of the bench."""
        self._connection.send((name, arguments))

    def result(self) -> Any:
        """What it returned.

        Raises:
            EOFError: the process has failed.
        """
        return self._connection.recv()

    def call(self, name: str, *arguments: object) -> Any:
        """``begin`` and ``result``."""
        self.begin(name, *arguments)
        return self.result()


def _work(connection: Connection, overrides: dict[str, Any], deterministic: bool) -> None:
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(make_settings(**{"GOAL_ACCURACY": 1.0, "RESULTS_DIR": folder} | overrides))
        connection.send(None)
        while True:
            try:
                name, arguments = connection.recv()
            except EOFError:
                return
            connection.send(getattr(bench, name)(*arguments))


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


def table(header: str, rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the header's cells are divided by ``|``."""
    lines = [header, "|".join("---" for _ in header.split("|"))]
    return "\n".join(f"|{line}|" for line in lines + ["|".join(f" {c} " for c in r) for r in rows])


def measure_round(bench: Bench, repeats: int) -> str:
    """One round, its parts' share of the matrix product's rate, and the reference's round."""
    settings, env = bench.settings, bench.env
    dataset = env.dataset
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
    # Keras compiles each node's model at its first fit: those rounds are timed on their own. The
    # public code makes new models in every episode, so both kinds are part of its rounds.
    nodes = iter(range(10**6))
    for node in (0, 1):
        reference.round([node])
    unvisited = iter(range(2, settings.NUM_NODES))

    def first_visit() -> None:
        reference.round([next(unvisited)])

    def products() -> None:
        for _ in range(_PRODUCTS):
            product(matrix).numpy()

    times = seconds(
        {
            "product": products,
            "reference": lambda: reference.round([next(nodes) % 2]),
            "reference, a node's first round": first_visit,
            "round": bench.round,
            "evaluation": lambda: env.foundation.evaluate(weights),
            "training": lambda: env.foundation.train_epoch(weights, fresh, order)[0].numpy(),
        },
        repeats,
    )
    median = {name: float(np.median(values)) for name, values in times.items()}
    product_flop = _PRODUCTS * 2 * _MATRIX**3
    flop = {
        "evaluation": FORWARD * len(dataset.y_test),
        "training": (FORWARD + BACKWARD) * settings.SAMPLES_PER_NODE,
    }
    one = product_flop / _PRODUCTS
    rate = product_flop / median["product"]
    rows = [
        (
            f"matrix product, {_MATRIX} x {_MATRIX}, float32",
            f"{median['product'] / _PRODUCTS:.4f}",
            f"{one / 1e9:.1f}",
            f"{rate / 1e9:.0f}",
            "100 %",
        )
    ]
    for name, count in flop.items():
        share = np.median(np.divide(times["product"], times[name])) * count / product_flop
        gflops = f"{count / median[name] / 1e9:.0f}"
        rows.append(
            (name, f"{median[name]:.4f}", f"{count / 1e9:.1f}", gflops, f"{share * 100:.0f} %")
        )
    whole = ("round", "reference", "reference, a node's first round")
    rows += [(name, f"{median[name]:.4f}", "", "", "") for name in whole]
    ratios = [np.median(np.divide(times[name], times["round"])) for name in whole[1:]]
    header = " what | seconds | GFLOP | GFLOP/s | share of the matrix product's rate "
    return (
        f"{table(header, rows)}\n\n"
        f"A round of the reference takes {ratios[0]:.2f} times as long as a round here, on a node "
        f"that it visits for the first time {ratios[1]:.2f} times."
    )


def measure_processes(bench: Bench, repeats: int) -> str:
    """Rounds per second of one process, of two side by side, and with op determinism."""
    threads = models.use_cpu(bench.settings.THREADS)
    kinds = {
        f"one run on {threads} threads": [{"THREADS": threads}],
        "two runs side by side, one thread each": [{"THREADS": 1, "SEED": s} for s in (0, 1)],
        f"one run on {threads} threads with op determinism": [
            {"THREADS": threads, "deterministic": True}
        ],
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        groups = {
            kind: [stack.enter_context(Worker(**overrides)) for overrides in group]
            for kind, group in kinds.items()
        }
        for _ in range(repeats):
            for kind, workers in groups.items():
                for worker in workers:
                    worker.begin("rounds", _ROUNDS)
                rates[kind].append(sum(_ROUNDS / sum(worker.result()) for worker in workers))
    baseline = next(iter(rates.values()))
    rows = [
        (
            kind,
            f"{np.median(values):.2f}",
            f"{np.median(np.divide(values, baseline)):.2f}",
        )
        for kind, values in rates.items()
    ]
    return table(" what | rounds per second | against the first ", rows)


def measure_rest(bench: Bench, repeats: int) -> str:
    """What a round needs beside training and evaluation, at N = 10 and N = 100."""
    threads = models.use_cpu(bench.settings.THREADS)
    rows = []
    for nodes in (10, 100):
        with Worker(NUM_NODES=nodes, THREADS=threads, OBSERVATION="local") as worker:
            rest = worker.call("rest", repeats)
            whole = float(np.median(worker.call("rounds", repeats)))
        training = rest.pop("agent's training")
        cells = [f"{value * 1e3:.1f}" for value in (*rest.values(), training)]
        share = sum(rest.values()) / whole
        rows.append((str(nodes), f"{whole * 1e3:.0f}", *cells, f"{share * 100:.1f} %"))
    header = (
        " N | round, ms | observation | decision | records | agent's training | "
        "observation, decision and records in a round "
    )
    return table(header, rows)


def measure_scaling(bench: Bench) -> pd.DataFrame:
    """Seconds per round and memory of 10 to 1,000 nodes, each in a process of its own.

    Both without the replay memory and the agent's training.
    """
    threads = models.use_cpu(bench.settings.THREADS)
    rows = []
    for observation in ("broadcast", "local"):
        for nodes in _SIZES:
            with Worker(
                NUM_NODES=nodes,
                SAMPLES_PER_NODE=_SIZES_SAMPLES,
                PCA_COMPONENTS=_SIZES_COMPONENTS,
                OBSERVATION=observation,
                THREADS=threads,
            ) as worker:
                # The constructor has taken two rounds of the episode; the last ten are counted,
                # when most nodes' models differ.
                times = worker.call("rounds", bench.settings.MAX_ROUNDS - 2)[-10:]
                rows.append(
                    {
                        "observation": observation,
                        "nodes": nodes,
                        "seconds_per_round": round(float(np.median(times)), 4),
                        "peak_memory_mb": round(worker.call("peak_memory")),
                    }
                )
    return pd.DataFrame(rows)


def draw_scaling(scaling: pd.DataFrame) -> plot.Figure:
    """Seconds per round and memory by number of nodes, both axes logarithmic."""
    quantities = {"seconds_per_round": "seconds per round", "peak_memory_mb": "peak memory (MB)"}
    figure, axes = plot.plt.subplots(1, 2, figsize=(7.2, 3.0))
    for axis, (column, label) in zip(axes, quantities.items(), strict=True):
        for observation, rows in scaling.groupby("observation"):
            marker = "o" if observation == "broadcast" else "s"
            axis.loglog(rows["nodes"], rows[column], marker=marker, label=observation)
        sizes = np.array(sorted(scaling["nodes"].unique()))
        least = scaling[column].min()
        axis.loglog(sizes, least * sizes / sizes[0], ":", color="0.5", label="linear in N")
        axis.set(xlabel="nodes N", ylabel=label, ylim=(least / 3, least * 100))
    axes[0].legend()
    figure.suptitle(f"{_SIZES_SAMPLES} images per node, {_SIZES_COMPONENTS} components")
    return figure


def measure_start(folder: Path, repeats: int, threads: int) -> float:
    """Median seconds from the end of the imports to the end of the first round."""
    command = [sys.executable, "-c", "import main, os; os._exit(0)"]

    def imports() -> None:
        subprocess.run(command, cwd=PROJECT, check=True)

    runs = iter(range(10**6))

    def first_round() -> None:
        name = f"start{next(runs)}"
        with _started_main(folder, NAME=name, THREADS=threads) as process:
            _wait_for_rows(folder / name / "rounds.csv", 1, process)

    times = seconds({"imports": imports, "first round": first_round}, repeats)
    return float(np.median(np.subtract(times["first round"], times["imports"])))


def measure_memory(folder: Path, threads: int) -> tuple[float, float]:
    """MB that a complete run of 120 episodes holds after episode 5 and after the last."""
    held = []
    # It is killed while it draws its figures, which is not what is asked.
    with _started_main(folder, NAME="memory", THREADS=threads, **_MEMORY_RUN) as process:
        for episode in (_MEMORY_FROM, make_settings().EPISODES):
            _wait_for_rows(folder / "memory" / "episodes.csv", episode, process)
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            held.append(pages * os.sysconf("SC_PAGE_SIZE") / _MB)
    return held[0], held[1]


@contextmanager
def _started_main(folder: Path, **overrides: object) -> Iterator[subprocess.Popen[bytes]]:
    """main.py in a process of its own, killed at the end."""
    options = [f"--set={k}={v}" for k, v in {"RESULTS_DIR": folder, **overrides}.items()]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *options], stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for_rows(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while not (path.exists() and path.read_bytes().count(b"\n") > count):
        if process.poll() is not None:
            raise RuntimeError(f"main.py ended with status {process.returncode}")
        time.sleep(0.005)


def measured_on(dataset: data.Dataset, threads: int) -> str:
    """Data, machine and versions, in a line."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("tensorflow", "keras", "numpy"))
    return f"{dataset.name}, {threads} threads of {os.cpu_count()} CPUs ({cpu_name()}), {packages}"


def report(bench: Bench, scaling: pd.DataFrame, sections: dict[str, str]) -> str:
    """The whole report as Markdown."""
    threads = models.use_cpu(bench.settings.THREADS)
    rows = [tuple(str(cell) for cell in row) for row in scaling.itertuples(index=False)]
    title = (
        f"Number of nodes ({_SIZES_SAMPLES} images each, {_SIZES_COMPONENTS} components; without "
        "the replay memory and the agent's training)"
    )
    sections = sections | {
        title: table(" observation | N | seconds per round | peak memory, MB ", rows)
    }
    text = f"{measured_on(bench.env.dataset, threads)}\n"
    return text + "".join(f"\n### {title}\n\n{content}\n" for title, content in sections.items())


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement [default: 5]")
    parser.add_argument("--threads", type=int, default=0, help="0 for all cores [default: 0]")
    parser.add_argument(
        "--output", type=Path, default=PROJECT / "results" / "benchmark", help="folder"
    )
    arguments = parser.parse_args()
    repeats = arguments.repeats
    if not 1 <= repeats <= 7:
        parser.error(f"--repeats: got {repeats}, takes 1 to 7")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = make_settings(
            THREADS=arguments.threads, GOAL_ACCURACY=1.0, RESULTS_DIR=name, NAME="here"
        )
        bench = Bench(settings)
        threads = models.use_cpu(settings.THREADS)
        sections = {"A round": measure_round(bench, repeats)}
        sections["Processes"] = measure_processes(bench, repeats)
        sections["The rest of a round"] = measure_rest(bench, repeats)
        scaling = measure_scaling(bench)
        start = measure_start(folder, repeats, threads)
        before, after = measure_memory(folder, threads)
        sections["Start and memory"] = table(
            " what | measured ",
            [
                ("from the end of the imports to the end of the first round", f"{start:.2f} s"),
                (f"memory after episode {_MEMORY_FROM}", f"{before:.1f} MB"),
                ("memory after the last episode of 120", f"{after:.1f} MB"),
                ("growth", f"{after - before:.1f} MB"),
            ],
        )
        text = report(bench, scaling, sections)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "report.md").write_text(text, encoding="utf-8")
    scaling.to_csv(arguments.output / "scaling.csv", index=False)
    plot.save_figure(arguments.output / "scaling", draw_scaling, scaling)


if __name__ == "__main__":
    main()

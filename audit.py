"""What the observations tell: how well accuracies can be predicted from what the agent sees.

Usage: python3 audit.py [--help]. Walks of random choices are recorded, with every kind of
observation after each round; a regression that never saw a walk predicts from an observation the
accuracy after that round, and, told which node trains next, the one after the next round. What
trees can't find in an observation, the DQN will hardly find with its fewer and noisier data.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from pathlib import Path
from typing import Any

from config import (
    AGENTS,
    JOINED_LATER,
    Parser,
    Settings,
    UserError,
    count_of,
    default_dataset,
    make_settings,
    overrides,
    setting_flags,
)

_EPISODES = 60

# Of the agent's and the distances' settings those that say how walks choose and what is recorded.
_USED = {
    "OBSERVATION",
    "PCA_COMPONENTS",
    "PCA_SIGNS",
    "BROADCAST_SCALE",
    "LOCAL_SCALE",
    "EXPLORATION_REPEAT",
    "REWARD_IMAGES",
}
_UNUSED = {"EPISODES", "DISTANCE_SCALE", "DISTANCE_SEED", *AGENTS["paper"]} - _USED


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with ``settings`` made from it.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong; 0 after
            ``--help``.
    """
    parser = Parser(
        prog="audit.py",
        description="Audit the observations; results go to results/<name>/.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--walks",
        type=count_of,
        default=_EPISODES,
        metavar="N",
        help=f"recorded episodes of random choices [{_EPISODES}]",
    )
    own = {
        "DATASET": ("as compare.py's", default_dataset()),
        "NAME": ("folder below RESULTS_DIR", "audit-<dataset>"),
    }
    setting_flags(parser, {"--dataset": "DATASET", "--seed": "SEED", "--name": "NAME"}, own)
    parsed = parser.parse_args(arguments)
    if parsed.agent_settings:
        parser.error("--settings: got it in an audit, which has no agent and takes none")
    changes = overrides(parser, parsed)
    for name in sorted(_UNUSED & set(changes)):
        parser.error(
            f"{name}: got {changes[name]!r}, takes none in an audit, which has no agent and counts "
            "no distances"
        )
    fixed = {"OBSERVATION": "fixed", "PCA_SIGNS": "loading", "NODES_PER_ROUND": 1}
    for name, value in fixed.items():
        if changes.get(name, value) != value:
            parser.error(f"{name}: got {changes[name]!r}, takes {value!r} in an audit")
    changes.setdefault("DATASET", default_dataset())
    # Choices that often repeat the last one show what staying does as well.
    changes.setdefault("EXPLORATION_REPEAT", 0.6)
    try:
        parsed.settings = make_settings(**changes | fixed)
        if parsed.walks < _FOLDS:
            raise UserError(f"--walks: got {parsed.walks}, takes at least {_FOLDS}")
    except UserError as error:
        parser.error(str(error))
    return parsed


# Parts into which the walks are divided: each is predicted by what the others taught.
_FOLDS = 6
_RESAMPLES = 2000


if __name__ == "__main__":
    # Before TensorFlow, which takes seconds to import: a typo is reported at once, and Ctrl-C
    # ends the program without a traceback.
    PARSED = parse()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import pandas as pd
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

import data
import plot
from config import episode_seed, stream
from environment import DecentralizedLearning, turned_to
from main import exit_status
from models import use_cpu
from records import (
    check_claim,
    circumstances,
    claimed,
    differences,
    read_arrays,
    replacing,
    write_arrays,
)


def record_walk(environment: DecentralizedLearning, episode: int) -> dict[str, np.ndarray]:
    """One episode of random choices, which repeat the last one with EXPLORATION_REPEAT.

    Returns:
        For its R rounds ``nodes`` (R,) int64, ``accuracies`` (R,) float64, and a float32 matrix
        of R rows for each of ``plot.OBSERVATIONS`` but those that ``made`` and ``references`` give.
    """
    settings = environment.settings
    rng = stream(settings.SEED, "exploration", episode)
    observation, info = environment.reset(seed=episode_seed(settings.SEED, episode))
    rows: dict[str, list[Any]] = {"nodes": [], "accuracies": []}
    done = info["goal_reached"]
    while True:
        node = info["node"]
        seen = {k: environment.observe(k) for k in ("zeros", "last_node", "broadcast", "local")}
        broadcast, local = (
            turned_to(node, seen[k].reshape(settings.NUM_NODES, -1)) for k in ("broadcast", "local")
        )
        seen |= {
            "last_node_moved": np.append(seen["last_node"], np.linalg.norm(broadcast)),
            "local_holder": local.ravel(),
            "fixed": observation,
            "first_both": np.concatenate([broadcast[:, 0], local[:, 0]]),
            "nodes": node,
            "accuracies": info["accuracy"],
        }
        for name, value in seen.items():
            rows.setdefault(name, []).append(value)
        if done:
            return {name: np.array(values) for name, values in rows.items()}
        if rng.random() >= settings.EXPLORATION_REPEAT:
            node = int(rng.integers(settings.NUM_NODES))
        observation, _, terminated, truncated, info = environment.step(node)
        done = terminated or truncated


def references(nodes: np.ndarray, n: int, longest: int) -> dict[str, np.ndarray]:
    """What the agent is not told: a walk's round and history, float32 with a row per round.

    Args:
        nodes: (R,) int, of each round.
        n: number of nodes.
        longest: number of rounds that no walk exceeds.
    """
    visited = np.eye(n, dtype=np.float32)[nodes]
    rounds = np.arange(1, len(nodes) + 1, dtype=np.float32)[:, None]
    ago = np.full((len(nodes), n), 2.0 * longest, np.float32)  # never: longer ago than any walk
    for row, node in enumerate(nodes):
        ago[row:, node] = np.arange(len(nodes) - row)
    return {
        "last_node_round": np.hstack([visited, rounds]),
        "history": np.hstack([visited.cumsum(axis=0), ago, rounds]),
    }


def made(walk: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Observations that recorded ones contain: float32, with a row for each of the R rounds.

    Args:
        walk: with ``broadcast`` and ``local``, (R, n * C) float32.
        n: number of nodes.
    """
    both = np.hstack([walk["broadcast"], walk["local"]])
    return {"both": both, "first_both_loading": both[:, :: both.shape[1] // (2 * n)]}


def predicted(features: np.ndarray, values: np.ndarray, walks: np.ndarray, seed: int) -> np.ndarray:
    """(n,) float64: each value as predicted by extremely randomised trees from other walks.

    Args:
        features: (n, D) float32.
        values: (n,) float64.
        walks: (n,) int, the walk that a row belongs to.
        seed: of the trees.
    """
    found = np.empty(len(values))
    for train, test in GroupKFold(_FOLDS).split(features, values, walks):
        trees = ExtraTreesRegressor(150, min_samples_leaf=3, random_state=seed, n_jobs=1)
        found[test] = trees.fit(features[train], values[train]).predict(features[test])
    return found


def explained(
    values: np.ndarray, found: np.ndarray, walks: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """R2, the share of the values' variance that is predicted, and its 95 % interval.

    The interval is that of percentiles when walks are drawn with replacement; draws whose values
    are all the same, as those of a single short walk may be, have no variance to explain, and
    are left out.

    Args:
        values: (n,) float64.
        found: (n,) float64, what was predicted.
        walks: (n,) int, the walk that a value belongs to.
        rng: draws the walks.
    """
    numbers, index = np.unique(walks, return_inverse=True)
    sums = np.zeros((len(numbers), 4))
    for column, part in enumerate(((values - found) ** 2, values**2, values, np.ones(len(values)))):
        sums[:, column] = np.bincount(index, part)

    def r2(total: np.ndarray) -> np.ndarray:
        error, squares, value, count = np.moveaxis(total, -1, 0)
        # The threshold is rounding's share of the sum of squares.
        spread = squares - value**2 / count
        spread = np.where(spread > 1e-12 * squares, spread, np.nan)
        return 1 - error / spread

    draws = rng.integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    low, high = np.nanpercentile(r2(sums[draws].sum(axis=1)), [2.5, 97.5])
    return float(r2(sums.sum(axis=0))), float(low), float(high)


def table_of(walks: list[dict[str, np.ndarray]], dataset: str, settings: Settings) -> pd.DataFrame:
    """A row of ``plot.AUDIT_COLUMNS`` for each observation and target.

    Args:
        walks: as ``record_walk`` gives them, each of two rounds or more, at least ``_FOLDS``.
        dataset: its name.
        settings: NUM_NODES, MAX_ROUNDS and SEED count.
    """
    n = settings.NUM_NODES
    walks = [w | made(w, n) | references(w["nodes"], n, settings.MAX_ROUNDS) for w in walks]
    number = np.concatenate([np.full(len(w["nodes"]) - 1, i) for i, w in enumerate(walks)])
    action = np.concatenate([np.eye(n, dtype=np.float32)[w["nodes"][1:]] for w in walks])
    values = {
        "accuracy": np.concatenate([w["accuracies"][:-1] for w in walks]),
        "next_accuracy": np.concatenate([w["accuracies"][1:] for w in walks]),
    }
    rows = []
    for name in plot.OBSERVATIONS:
        seen = np.concatenate([w[name][:-1] for w in walks])
        for target in plot.TARGETS:
            features = np.hstack([seen, action]) if target == "next_accuracy" else seen
            rng = stream(settings.SEED, "audit")  # the same draws for all
            found = predicted(features, values[target], number, int(rng.integers(2**32)))
            r2 = explained(values[target], found, number, rng)
            rows.append((dataset, name, target, *r2, len(walks), len(number)))
    return pd.DataFrame(rows, columns=list(plot.AUDIT_COLUMNS))


def audit(parsed: argparse.Namespace) -> int:
    """Records what walks are missing, writes ``audit.csv`` and its figure, and prints the table.

    Returns:
        0.

    Raises:
        UserError: the folder holds another audit, or something is damaged.
        OSError: a file can't be written.
    """
    settings: Settings = parsed.settings
    threads = use_cpu(settings.THREADS)
    dataset = data.load(settings)
    data.make_shards(dataset, settings)  # refuses what it can't fill before a file is written
    folder = settings.results_dir / (settings.NAME or f"audit-{dataset.name}")
    about = {"sha256": dataset.sha256, "settings": settings.stored()}
    for name in {"NAME", "THREADS", "DATASET", *_UNUSED}:
        del about["settings"][name]
    check = functools.partial(_check_folder, folder, about)
    check()
    with claimed(folder, "audit.json", about | circumstances(threads), "audit.py", check):
        environment = DecentralizedLearning(settings, dataset)
        walks = []
        for episode in tqdm(range(1, parsed.walks + 1), desc="walks", disable=None):
            path = folder / f"walk-{episode}.npz"
            if not path.exists():
                write_arrays(path, record_walk(environment, episode))
            walk = read_arrays(path)
            if len(walk["nodes"]) > 1:  # else the starter reached the goal, and nobody chose
                walks.append(walk)
        if len(walks) < _FOLDS:
            raise UserError(f"{len(walks)} walks with a second round, takes {_FOLDS} or more")
        table = table_of(walks, dataset.name, settings)
        with replacing(folder / "audit.csv") as file:
            file.write(table.to_csv(index=False, lineterminator="\n").encode())
        plot.draw_audit(folder)
    print(plot.audit_report(folder))
    return 0


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    def differing(there: dict[str, Any]) -> list[str]:
        before = JOINED_LATER | there["settings"]
        other = differences({k: before.get(k) for k in about["settings"]}, about["settings"])
        return other + ["other data"] * (there["sha256"] != about["sha256"])

    check_claim(folder, "audit.json", "audit", "holds no audit", differing)


def main(parsed: argparse.Namespace) -> int:
    """Runs an audit; returns the exit status, as main.py's."""
    return exit_status("audit.py", lambda: audit(parsed), "mend this")


if __name__ == "__main__":
    sys.exit(main(PARSED))

"""Audit the observations: measure how well they predict the accuracy.

Usage: ``python3 -m experiments.audit [options]``

Random walks are recorded with every kind of observation after each round. A regression then
predicts, for walks that it was not fitted to, the accuracy after that round. A second one is also
given the next node and predicts the accuracy after the next round. The DQN has fewer and noisier
data: what the regression can't find in an observation, the DQN will hardly find.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import data
from cli import Parser, add_setting_flags, count_of, exit_status, overrides_of
from config import ConfigError, Settings, UserError, episode_seed, names_of, stream
from records import (
    circumstances,
    fingerprint,
    locked,
    read_arrays,
    read_own,
    read_table,
    write_arrays,
    write_json,
    write_table,
)

# TensorFlow, Matplotlib and scikit-learn take seconds to import. The functions below import what
# needs them, so that a mistake on the command line is reported at once.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from environment import DecentralizedLearning

PROGRAM = "experiments.audit"

# Probability that a walk stays at its node for one more round. Independent choices hardly ever stay
# for several rounds, so their walks would not show how staying changes the accuracy.
REPEAT = 0.6

# Agent's settings that change what a walk records. All its others belong to the DQN or the reward,
# or choose one of the observations that are recorded anyway.
_AGENT_SETTINGS = {"PCA_COMPONENTS", "BROADCAST_SCALE", "LOCAL_SCALE", "REWARD_IMAGES"}
_USED_SETTINGS = (names_of("world") - {"DATASET"}) | {"SEED"} | _AGENT_SETTINGS

_WALKS = 60
_FOLDS = 6  # parts of the walks; each is predicted by a regression fitted to the other parts
_TREES = 150  # of a regression
_RESAMPLES = 2000  # of a bootstrap interval

AUDIT_COLUMNS = ("dataset", "observation", "target", "r2", "low", "high", "episodes", "rounds")

# What the accuracy is predicted from, with the label in table and figure. No agent observes the
# last two, which show what there is to know.
OBSERVATIONS = {
    "zeros": "zeros",
    "last_node": "last_node",
    "last_node_moved": "last_node, and how far the model moved",
    "broadcast": "broadcast",
    "local": "local",
    "local_holder": "local, PCA_SIGNS=holder",
    "both": "both",
    "first_both_loading": "both, PCA_COMPONENTS=1",
    "first_both": "both, PCA_COMPONENTS=1, PCA_SIGNS=holder",
    "last_node_round": "not observed: last node and round",
    "history": "not observed: visits of all nodes and round",
}
TARGETS = {"accuracy": "accuracy now", "next_accuracy": "accuracy after the next round"}


# --- Command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[Settings, int]:
    """Return the settings and the number of walks of a command line.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong; 0 after
            ``--help``.
    """
    examples = (
        f"  python3 -m {PROGRAM} --dataset mnist       # {_WALKS} walks of random choices\n"
        f"  python3 -m {PROGRAM} --set PCA_COMPONENTS=3"
    )
    parser = Parser(PROGRAM, "Audit the observations; results go to results/<name>/.", examples)
    parser.add_argument(
        "--walks",
        type=count_of,
        default=_WALKS,
        metavar="N",
        help=f"episodes of random choices, at least {_FOLDS} [{_WALKS}]",
    )
    add_setting_flags(parser, {"--dataset": "DATASET", "--seed": "SEED", "--name": "NAME"})
    parsed = parser.parse_args(arguments)
    try:
        return _settings_of(parser, parsed), parsed.walks
    except ConfigError as error:
        parser.error(str(error))


def _settings_of(parser: Parser, parsed: argparse.Namespace) -> Settings:
    if parsed.walks < _FOLDS:
        raise ConfigError(f"--walks: got {parsed.walks}, takes at least {_FOLDS}")
    if parsed.settings != "paper":
        raise ConfigError(f"--settings: got {parsed.settings!r}, takes none: no agent is audited")
    values = overrides_of(parser, parsed)
    for name in sorted((names_of("agent") - _AGENT_SETTINGS) & set(values)):
        raise ConfigError(f"{name}: got {values[name]!r}, takes none: no agent is audited")
    # What config.py says of the agent does not count. "zeros" is the cheapest observation.
    settings = Settings(**{**values, "OBSERVATION": "zeros", "PCA_SIGNS": "loading"})
    if settings.NODES_PER_ROUND != 1:
        raise ConfigError(f"NODES_PER_ROUND: got {settings.NODES_PER_ROUND}, takes 1 in an audit")
    if "DATASET" not in values and settings.DATASET == "auto":
        settings = settings.replace(DATASET="digits")  # takes minutes, where MNIST takes an hour
    return settings


# --- Walks -----------------------------------------------------------------------------------


def record_walk(environment: DecentralizedLearning, episode: int) -> dict[str, np.ndarray]:
    """Play one episode of random choices, of which a share of REPEAT repeats the last node.

    Args:
        environment: with one node per round and PCA_SIGNS = ``loading``.
        episode: number of the training episode that has the same initial weights.

    Returns:
        For its R rounds ``nodes`` (R,) int64, ``accuracies`` (R,) float64, and a float32 matrix
        of R rows for each of OBSERVATIONS that ``all_features`` does not add.
    """
    from environment import positive_at, rollout

    settings = environment.settings
    rng = stream(settings.SEED, "exploration", episode)

    def policy(observation: np.ndarray, info: dict[str, Any]) -> tuple[int, str]:
        if rng.random() < REPEAT:
            return info["node"], "repeated"
        return int(rng.integers(settings.NUM_NODES)), "random"

    rows = []
    for round_ in rollout(environment, policy, episode_seed(settings.SEED, episode)):
        node = round_.info["node"]
        row = {k: environment.observe(k) for k in ("zeros", "last_node", "broadcast", "local")}
        broadcast, local = (
            positive_at(node, row[kind].reshape(settings.NUM_NODES, -1))
            for kind in ("broadcast", "local")
        )
        row |= {
            "last_node_moved": np.append(row["last_node"], np.linalg.norm(broadcast)),
            "local_holder": local.ravel(),
            "first_both": np.concatenate([broadcast[:, 0], local[:, 0]]),
            "nodes": node,
            "accuracies": round_.info["accuracy"],
        }
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def all_features(walk: dict[str, np.ndarray], n: int, max_rounds: int) -> dict[str, np.ndarray]:
    """Return a walk with all OBSERVATIONS: those that are made of recorded ones are added.

    Args:
        walk: as ``record_walk`` returns it; ``broadcast`` and ``local`` are (R, n * C) float32.
        n: number of nodes.
        max_rounds: MAX_ROUNDS; the age of a node's last visit is twice that before its first.
    """
    nodes = walk["nodes"]
    both = np.hstack([walk["broadcast"], walk["local"]])
    visited = np.eye(n, dtype=np.float32)[nodes]
    rounds = np.arange(1, len(nodes) + 1, dtype=np.float32)[:, None]
    age = np.full((len(nodes), n), 2.0 * max_rounds, np.float32)
    for row, node in enumerate(nodes):
        age[row:, node] = np.arange(len(nodes) - row)
    return {
        **walk,
        "both": both,
        "first_both_loading": both[:, :: both.shape[1] // (2 * n)],
        "last_node_round": np.hstack([visited, rounds]),
        "history": np.hstack([visited.cumsum(axis=0), age, rounds]),
    }


# --- Predictions -----------------------------------------------------------------------------


def cross_predictions(
    features: np.ndarray, values: np.ndarray, walks: np.ndarray, seed: int
) -> np.ndarray:
    """Return (n,) float64: each value as predicted by extremely randomised trees from other walks.

    Args:
        features: (n, D) float32.
        values: (n,) float64.
        walks: (n,) int, the walk that a row belongs to.
        seed: of the trees.
    """
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.model_selection import GroupKFold

    predictions = np.empty(len(values))
    for train, test in GroupKFold(_FOLDS).split(features, values, walks):
        trees = ExtraTreesRegressor(_TREES, min_samples_leaf=3, random_state=seed, n_jobs=1)
        predictions[test] = trees.fit(features[train], values[train]).predict(features[test])
    return predictions


def r2_interval(
    values: np.ndarray, predictions: np.ndarray, walks: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return R2, the share of the values' variance that is predicted, and its 95 % interval.

    The interval is a percentile bootstrap over walks. Resamples whose values are all the same have
    no variance to predict and are left out: a single short walk may be such a resample.

    Args:
        values: (n,) float64.
        predictions: (n,) float64.
        walks: (n,) int, the walk that a value belongs to.
        rng: draws the walks.
    """
    numbers, index = np.unique(walks, return_inverse=True)
    terms = ((values - predictions) ** 2, values**2, values, np.ones(len(values)))
    sums = np.stack([np.bincount(index, term) for term in terms], axis=1)

    def r2(total: np.ndarray) -> np.ndarray:
        error, squares, value, count = np.moveaxis(total, -1, 0)
        # The threshold is rounding's share of the sum of squares.
        spread = squares - value**2 / count
        spread = np.where(spread > 1e-12 * squares, spread, np.nan)
        return 1 - error / spread

    draws = rng.integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    low, high = np.nanpercentile(r2(sums[draws].sum(axis=1)), [2.5, 97.5])
    return float(r2(sums.sum(axis=0))), float(low), float(high)


def audit_table(
    walks: list[dict[str, np.ndarray]], dataset: str, settings: Settings
) -> pd.DataFrame:
    """Return AUDIT_COLUMNS with a row for each observation and target.

    Args:
        walks: as ``record_walk`` returns them, at least 6, each of two rounds or more.
        dataset: its name.
        settings: NUM_NODES, MAX_ROUNDS and SEED count.
    """
    n = settings.NUM_NODES
    walks = [all_features(walk, n, settings.MAX_ROUNDS) for walk in walks]
    number = np.concatenate([np.full(len(w["nodes"]) - 1, i) for i, w in enumerate(walks)])
    next_node = np.concatenate([np.eye(n, dtype=np.float32)[w["nodes"][1:]] for w in walks])
    values = {
        "accuracy": np.concatenate([w["accuracies"][:-1] for w in walks]),
        "next_accuracy": np.concatenate([w["accuracies"][1:] for w in walks]),
    }
    rows = []
    for name, target in itertools.product(OBSERVATIONS, TARGETS):
        features = np.concatenate([w[name][:-1] for w in walks])
        if target == "next_accuracy":
            features = np.hstack([features, next_node])
        rng = stream(settings.SEED, "audit")  # the same draws for all
        seed = int(rng.integers(2**32))
        predictions = cross_predictions(features, values[target], number, seed)
        r2 = r2_interval(values[target], predictions, number, rng)
        rows.append((dataset, name, target, *r2, len(walks), len(number)))
    return pd.DataFrame(rows, columns=list(AUDIT_COLUMNS))


# --- Figure and report -----------------------------------------------------------------------


def draw_audit(table: pd.DataFrame) -> Figure:
    """Draw R2 of each observation with its interval, one mark per target."""
    import matplotlib
    from matplotlib.figure import Figure

    from plot import BLACK, BLUE, DOUBLE, GREY, STYLE, data_note

    places = np.arange(len(OBSERVATIONS))
    marks: dict[str, dict[str, Any]] = {
        "accuracy": {"fmt": "o", "color": BLACK, "mfc": "white"},
        "next_accuracy": {"fmt": "s", "color": BLUE},
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(DOUBLE, 3.4), layout="constrained")
        axis = figure.subplots()
        for (target, mark), offset in zip(marks.items(), (-0.15, 0.15), strict=True):
            rows = table[table["target"] == target].set_index("observation")
            rows = rows.loc[list(OBSERVATIONS)]
            errors = np.array([rows["r2"] - rows["low"], rows["high"] - rows["r2"]])
            mark |= {"xerr": errors, "ms": 4.5, "elinewidth": 1, "label": TARGETS[target]}
            axis.errorbar(rows["r2"], places + offset, **mark)
        axis.set_yticks(places, list(OBSERVATIONS.values()))
        axis.set_ylim(len(OBSERVATIONS) - 0.5, -0.5)
        axis.axvline(0, color=BLACK, lw=0.8)
        unobserved = sum(label.startswith("not observed") for label in OBSERVATIONS.values())
        axis.axhline(len(OBSERVATIONS) - unobserved - 0.5, color=GREY, lw=0.8, ls="--")
        axis.set_xlabel("R2, share of the accuracies' variance that is predicted (95 % interval)")
        axis.legend(loc="upper right")  # the first rows, which have little, are at the left
        episodes, rounds = table["episodes"].iloc[0], table["rounds"].iloc[0]
        note = data_note(table["dataset"].iloc[0])
        figure.suptitle(
            f"Accuracy predicted from an observation: {episodes} walks, {rounds} rounds "
            f"(data: {note})"
        )
    return figure


def report(table: pd.DataFrame) -> str:
    """Return the audit's table as Markdown: R2 with its 95 % interval."""
    lines = [f"| observation | {' | '.join(TARGETS.values())} |", "|---" * (1 + len(TARGETS)) + "|"]
    for name, label in OBSERVATIONS.items():
        rows = table[table["observation"] == name].set_index("target").loc[list(TARGETS)]
        cells = [f"{r.r2:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows.itertuples()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- The command -----------------------------------------------------------------------------


def audit(settings: Settings, count: int) -> int:
    """Record the walks that are missing, write ``audit.csv`` and its figure, print the table.

    A folder whose ``audit.csv`` is made of as many walks is only drawn and printed.

    Args:
        settings: as ``parse`` returns them.
        count: number of walks.

    Returns:
        0.

    Raises:
        UserError: the folder holds another audit, or something is damaged.
        OSError: a file can't be written.
    """
    import plot
    from models import use_cpu

    threads = use_cpu(settings.THREADS)
    dataset = data.load(settings)
    data.make_shards(dataset, settings)  # refuses what it can't fill before a file is written
    folder = settings.results_dir / (settings.NAME or f"audit-{dataset.name}")
    used = {name: value for name, value in settings.stored().items() if name in _USED_SETTINGS}
    about = {"sha256": dataset.sha256, "settings": used}

    def comparable(stored: dict[str, Any]) -> dict[str, Any]:
        of_audit = {name: stored["settings"].get(name) for name in used}
        return {**of_audit, "data": fingerprint(dataset.name, stored["sha256"])}

    with locked(folder, "audit"):
        if read_own(folder / "audit.json", "audit", comparable, comparable(about)) is None:
            write_json(folder / "audit.json", {**about, **circumstances(threads)})
        table = _read_finished(folder / "audit.csv", count)
        if table is None:
            table = audit_table(_walks(settings, dataset, folder, count), dataset.name, settings)
            write_table(folder / "audit.csv", table)
        plot.save_figure(folder / "audit.png", draw_audit(table))
    print(report(table))
    print(f"results and figure: {folder}")
    return 0


def _read_finished(path: Path, count: int) -> pd.DataFrame | None:
    """The table of ``audit.csv`` if it is complete and made of ``count`` walks, else None."""
    if not path.exists():
        return None
    table = read_table(path, AUDIT_COLUMNS)
    rows = list(zip(table["observation"], table["target"], strict=True))
    complete = rows == list(itertools.product(OBSERVATIONS, TARGETS))
    return table if complete and (table["episodes"] == count).all() else None


def _walks(
    settings: Settings, dataset: data.Dataset, folder: Path, count: int
) -> list[dict[str, np.ndarray]]:
    """Walks 1 to ``count``, but for those of one round; what is missing is recorded."""
    from tqdm import tqdm

    from environment import DecentralizedLearning

    environment = DecentralizedLearning(settings, dataset)
    (folder / "walks").mkdir(exist_ok=True)
    walks = []
    for episode in tqdm(range(1, count + 1), desc="walks", disable=None):
        path = folder / "walks" / f"walk-{episode}.npz"
        if not path.exists():
            write_arrays(path, record_walk(environment, episode))
        walks.append(read_arrays(path))
    # A walk of one round reached the goal with the starter's training: it holds no choice.
    walks = [walk for walk in walks if len(walk["nodes"]) > 1]
    if len(walks) < _FOLDS:
        raise UserError(f"--walks: got {len(walks)} with a second round, takes at least {_FOLDS}")
    return walks


def main(arguments: list[str] | None = None) -> int:
    """Run an audit; return the exit status, as main.py's."""
    settings, walks = parse(arguments)
    return exit_status(PROGRAM, lambda: audit(settings, walks))


if __name__ == "__main__":
    sys.exit(main())

"""Audit the observations: measure how well they predict the accuracy.

Usage: ``python3 -m experiments.audit [options]``

Random walks are recorded with every kind of observation after each round. A regression then
predicts, for walks that it was not fitted to, the accuracy after that round. A second one is also
given the next node and predicts the accuracy after the next round. The DQN has fewer and noisier
data: what the regression can't find in an observation, the DQN will hardly find.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict
from tqdm import tqdm

import plot
import records
from cli import Parser, add_setting_flags, count_of, exit_status, overrides_of
from config import NAMED_SETTINGS, ConfigError, Settings, UserError, episode_seed, names_of, stream

# TensorFlow takes seconds to import. The functions below import what needs it, so that a mistake
# on the command line is reported at once.
if TYPE_CHECKING:
    from environment import DecentralizedLearning

PROGRAM = "experiments.audit"

# Probability that a walk stays at its node for one more round. Independent choices hardly ever stay
# for several rounds, so their walks would not show how staying changes the accuracy.
REPEAT = 0.6

# Agent's settings of a recording, whatever config.py says. All observations are recorded anyway;
# "zeros" is the cheapest for the environment to make besides.
_RECORDING: dict[str, Any] = {
    "OBSERVATION": "zeros",
    "PCA_COMPONENTS": 0,
    "PCA_SIGNS": "loading",
    "BROADCAST_SCALE": 1.0,
    "LOCAL_SCALE": 1.0,
    "REWARD_IMAGES": 0,
}

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

Walk = dict[str, np.ndarray]  # as record_walk returns it


def parse(arguments: list[str] | None = None) -> tuple[Settings, int]:
    """Return the settings and the number of walks of a command line.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong.
    """
    examples = f"  python3 -m {PROGRAM} --dataset mnist --set HETEROGENEITY=0.5"
    parser = Parser(PROGRAM, "Audit the observations; results go to results/<name>/.", examples)
    help_ = f"episodes of random choices, at least {_FOLDS} [{_WALKS}]"
    parser.add_argument("--walks", type=count_of, default=_WALKS, metavar="N", help=help_)
    add_setting_flags(parser, {"--dataset": "DATASET", "--seed": "SEED", "--name": "NAME"})
    parsed = parser.parse_args(arguments)
    if parsed.walks < _FOLDS:
        parser.error(f"--walks: got {parsed.walks}, takes at least {_FOLDS}")
    values = {**NAMED_SETTINGS[parsed.settings], **overrides_of(parsed)}
    for name in sorted(names_of("agent") & set(values)):
        parser.error(f"{name}: got {values[name]!r}, takes none: no agent is audited")
    try:
        settings = Settings(**{**values, **_RECORDING})
    except ConfigError as error:
        parser.error(str(error))
    if settings.NODES_PER_ROUND != 1:
        parser.error(f"NODES_PER_ROUND: got {settings.NODES_PER_ROUND}, takes 1 in an audit")
    if "DATASET" not in values and settings.DATASET == "auto":
        settings = settings.replace(DATASET="digits")  # takes minutes, where MNIST takes an hour
    return settings, parsed.walks


# --- Walks -----------------------------------------------------------------------------------


def record_walk(environment: DecentralizedLearning, episode: int) -> Walk:
    """Play one episode of random choices, of which a share of REPEAT repeats the last node.

    The environment has one node per round and PCA_SIGNS = ``loading``. The training episode of the
    same number has the same initial weights.

    Returns:
        For its R rounds ``nodes`` (R,) int64 and ``accuracies`` (R,) float64. Each of OBSERVATIONS
        that ``all_features`` does not add has a float32 matrix of R rows.
    """
    from environment import positive_at, rollout

    settings = environment.settings
    rng = stream(settings.SEED, "exploration", episode)

    def policy(observation: np.ndarray, info: dict[str, Any]) -> tuple[int, str]:
        if rng.random() < REPEAT:
            return info["node"], "repeated"
        return int(rng.integers(settings.NUM_NODES)), "random"

    n, rows = settings.NUM_NODES, []
    for round_ in rollout(environment, policy, episode_seed(settings.SEED, episode)):
        node = round_.info["node"]
        row = {k: environment.observe(k) for k in ("zeros", "last_node", "broadcast", "local")}
        broadcast = positive_at(node, row["broadcast"].reshape(n, -1))
        local = positive_at(node, row["local"].reshape(n, -1))
        row |= {
            "last_node_moved": np.append(row["last_node"], np.linalg.norm(broadcast)),
            "local_holder": local.ravel(),
            "first_both": np.concatenate([broadcast[:, 0], local[:, 0]]),
            "nodes": node,
            "accuracies": round_.info["accuracy"],
        }
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def all_features(walk: Walk, n: int, max_rounds: int) -> Walk:
    """Return a walk with the OBSERVATIONS that are made of recorded ones.

    Of ``n`` nodes, those not visited yet have an age of twice ``max_rounds`` in ``history``.
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


def r2_interval(
    values: np.ndarray, predictions: np.ndarray, walks: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return R2, the share of the values' variance that is predicted, and its 95 % interval.

    The interval is a percentile bootstrap over walks, which ``rng`` draws. All arrays are (n,), of
    float64 values and predictions, and the int walks that they belong to.
    """
    numbers, index = np.unique(walks, return_inverse=True)
    terms = ((values - predictions) ** 2, values**2, values, np.ones(len(values)))
    sums = np.stack([np.bincount(index, term) for term in terms], axis=1)
    draws = rng.integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    error, squares, value, count = np.vstack([sums.sum(axis=0), sums[draws].sum(axis=1)]).T
    r2, *resampled = 1 - error / (squares - value**2 / count)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(r2), float(low), float(high)


def audit_table(walks: list[Walk], environment: DecentralizedLearning) -> pd.DataFrame:
    """Return AUDIT_COLUMNS with a row for each observation and target.

    ``walks`` are the environment's, at least 6, each of two rounds or more.
    Each value is predicted by extremely randomised trees that were fitted to other walks.
    """
    settings, dataset = environment.settings, environment.dataset.name
    n = settings.NUM_NODES
    walks = [all_features(walk, n, settings.MAX_ROUNDS) for walk in walks]
    number = np.repeat(range(len(walks)), [len(w["nodes"]) - 1 for w in walks])
    next_node = np.concatenate([np.eye(n, dtype=np.float32)[w["nodes"][1:]] for w in walks])
    rounds = {"accuracy": slice(None, -1), "next_accuracy": slice(1, None)}
    rows = []
    for name, target in itertools.product(OBSERVATIONS, TARGETS):
        features = np.concatenate([w[name][:-1] for w in walks])
        values = np.concatenate([w["accuracies"][rounds[target]] for w in walks])
        if target == "next_accuracy":
            features = np.hstack([features, next_node])
        rng = stream(settings.SEED, "audit")  # the same draws for all
        seed = int(rng.integers(2**32))
        trees = ExtraTreesRegressor(_TREES, min_samples_leaf=3, random_state=seed, n_jobs=1)
        folds = GroupKFold(_FOLDS)
        predictions = cross_val_predict(trees, features, values, groups=number, cv=folds)
        r2 = r2_interval(values, predictions, number, rng)
        rows.append((dataset, name, target, *r2, len(walks), len(number)))
    return pd.DataFrame(rows, columns=list(AUDIT_COLUMNS))


# --- Figure and report -----------------------------------------------------------------------


@matplotlib.rc_context(plot.STYLE)
def draw_audit(table: pd.DataFrame) -> Figure:
    """Draw R2 of each observation with its interval, one mark per target."""
    figure = Figure(figsize=(plot.DOUBLE, 3.4), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(OBSERVATIONS))
    marks = (("accuracy", "o", plot.BLACK, -0.15), ("next_accuracy", "s", plot.BLUE, 0.15))
    for target, marker, color, offset in marks:
        rows = table[table["target"] == target].set_index("observation").loc[list(OBSERVATIONS)]
        style: dict[str, Any] = {"fmt": marker, "color": color, "ms": 4.5, "elinewidth": 1}
        style["xerr"] = np.array([rows["r2"] - rows["low"], rows["high"] - rows["r2"]])
        axis.errorbar(rows["r2"], places + offset, label=TARGETS[target], **style)
    axis.set_yticks(places, list(OBSERVATIONS.values()))
    axis.set_ylim(len(OBSERVATIONS) - 0.5, -0.5)
    axis.set_xlabel("R2, share of the accuracies' variance that is predicted (95 % interval)")
    axis.legend(loc="upper right")  # the first rows, which have little, are at the left
    dataset, episodes, rounds = table[["dataset", "episodes", "rounds"]].iloc[0]
    figure.suptitle(
        f"Accuracy predicted from an observation: {episodes} walks, {rounds} rounds "
        f"(data: {plot.data_note(dataset)})"
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
    """Record those of ``count`` walks that are missing, write ``audit.csv`` and its figure.

    A folder whose ``audit.csv`` is made of as many walks is only drawn and printed. Returns 0.

    Raises:
        UserError: the folder holds another audit, or something is damaged.
        OSError: a file can't be written.
    """
    from environment import DecentralizedLearning

    # Whatever the data can't fill is refused here, before a file is written.
    environment = DecentralizedLearning(settings)
    dataset = environment.dataset
    folder = settings.results_dir / (settings.NAME or f"audit-{dataset.name}")
    # The data that DATASET led to counts, not its name.
    used = {k: settings.stored()[k] for k in names_of("world") - {"DATASET"} | {"SEED"}}
    about = {"sha256": dataset.sha256, "settings": used}

    def comparable(stored: dict[str, Any]) -> dict[str, Any]:
        of_audit = {name: stored["settings"].get(name) for name in used}
        return {**of_audit, "data": records.fingerprint(dataset.name, stored["sha256"])}

    path = folder / "audit.csv"
    with records.locked(folder, "audit"):
        if records.read_own(folder / "audit.json", "audit", comparable, comparable(about)) is None:
            about |= records.circumstances(environment.threads)
            records.write_json(folder / "audit.json", about)
        table = records.read_table(path, AUDIT_COLUMNS) if path.exists() else None
        if table is None or (table["episodes"] != count).any():
            table = audit_table(_walks(environment, folder / "walks", count), environment)
            records.write_table(path, table)
        plot.save_figure(folder / "audit.png", draw_audit(table))
    print(f"{report(table)}\nresults and figure: {folder}")
    return 0


def _walks(environment: DecentralizedLearning, folder: Path, count: int) -> list[Walk]:
    """Return walks 1 to ``count``, but for those of one round; record what is missing."""
    folder.mkdir(exist_ok=True)
    walks = []
    for episode in tqdm(range(1, count + 1), desc="walks", disable=None):
        path = folder / f"walk-{episode}.npz"
        if not path.exists():
            records.write_arrays(path, record_walk(environment, episode))
        walks.append(records.read_arrays(path))
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

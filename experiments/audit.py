"""Audit the observations: measure how well they predict the accuracy.

Usage: ``python3 -m experiments.audit [options]``

Random walks are recorded. A regression then predicts, for walks that it was not fitted to, the
accuracy after a round from one kind of observation. A second one is also given the next node and
predicts the accuracy after the next round. The DQN has fewer and noisier data: what the regression
can't find in an observation, the DQN will hardly find.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict
from tqdm import tqdm

import cli
import plot
import records
from config import (
    AgentSettings,
    PlaceSettings,
    RunSettings,
    Settings,
    UserError,
    WorldSettings,
    absolute,
    episode_seed,
    names_of,
    stream,
)

# Functions below import TensorFlow, which takes seconds: a wrong command line is reported at once.
if TYPE_CHECKING:
    from environment import DecentralizedLearning

PROGRAM = "experiments.audit"

# Probability that a walk stays at its node for one more round. Independent choices hardly ever stay
# for several rounds, so they would not show how staying changes the accuracy.
REPEAT = 0.6

# Agent's settings of a recording, whatever config.py says.
_RECORDING: dict[str, Any] = {
    "OBSERVATION": "zeros",  # the cheapest; what is recorded is observed besides
    "REWARD": "power",
}

_FOLDS = 6  # parts of the walks; each is predicted by a regression fitted to the other parts
_TREES = 150  # of a regression
_RESAMPLES = 2000  # of a bootstrap interval

AUDIT_COLUMNS = ("dataset", "observation", "target", "r2", "low", "high", "episodes", "rounds")

# What predicts the accuracy, with its label. No agent observes the last two, which show what there
# is to know.
OBSERVATIONS = {
    "zeros": "zeros",
    "last_node": "last_node",
    "last_node_moved": "last_node, and how far the model moved",
    "broadcast": "broadcast",
    "local": "local",
    "local_holder": "local, signed by the last node",
    "broadcast_and_local": "broadcast and local",
    "first_scores": "first scores of broadcast and local",
    "both": "both: the same, signed by the last node",
    "last_node_round": "not observed: last node and round",
    "history": "not observed: visits of all nodes and round",
}
TARGETS = {"accuracy": "accuracy now", "next_accuracy": "accuracy after the next round"}

Walk = dict[str, np.ndarray]  # as record_walk returns it


def parse(arguments: list[str] | None = None) -> tuple[Settings, int]:
    """Return a command line's settings and walks; UserError or exit with status 2 if wrong."""
    examples = f"  python3 -m {PROGRAM} --dataset mnist --set HETEROGENEITY=0.5"
    text = (
        "Audit the observations; results go to results/<name>/. Without --dataset this takes\n"
        "the bundled digits, unless config.py names data."
    )
    parser = cli.Parser(PROGRAM, text, examples)
    help_ = f"episodes to record, at least {_FOLDS} [%(default)s]"
    parser.add_argument("--walks", type=cli.count_of, default=60, metavar="N", help=help_)
    groups = (WorldSettings, RunSettings, PlaceSettings)
    cli.add_setting_flags(parser, {"DATASET", "SEED", "NAME"}, groups)
    parsed = parser.parse_args(arguments)
    if parsed.walks < _FOLDS:
        parser.error(f"--walks: got {parsed.walks}, takes at least {_FOLDS}")
    values = cli.overrides_of(parsed)
    for name in sorted(names_of(AgentSettings) & set(values)):
        parser.error(f"{name}: got {values[name]!r}, takes none: no agent is audited")
    settings = Settings(**{**cli.dataset_of_experiments(), **values, **_RECORDING})
    if settings.NODES_PER_ROUND != 1:
        parser.error(f"NODES_PER_ROUND: got {settings.NODES_PER_ROUND}, takes 1 in an audit")
    return settings, parsed.walks


def record_walk(environment: DecentralizedLearning, episode: int) -> Walk:
    """Play one episode of random choices, of which a share of REPEAT repeats the last node.

    The environment has the settings of _RECORDING and one node per round. The initial weights are
    those of the training episode of the same number.

    Returns:
        For R rounds ``nodes`` (R,) int64, ``accuracies`` (R,) float64, and the observations
        ``broadcast`` and ``local`` (R, N * N) float32.
    """
    from environment import rollout

    settings = environment.settings
    rng = stream(settings.SEED, "exploration", episode)

    def policy(observation: np.ndarray, info: dict[str, Any]) -> tuple[int, str]:
        if rng.random() < REPEAT:
            return info["node"], "repeated"
        return int(rng.integers(settings.NUM_NODES)), "random"

    rows = []
    for round_ in rollout(environment, policy, episode_seed(settings.SEED, episode)):
        row = {"nodes": round_.info["node"], "accuracies": round_.info["accuracy"]}
        rows.append(row | {kind: environment.observe(kind) for kind in ("broadcast", "local")})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def observations(walk: Walk, n: int, max_rounds: int) -> dict[str, np.ndarray]:
    """Return for each of OBSERVATIONS a float32 matrix with a row per round of a walk.

    Of ``n`` nodes, those not visited yet have an age of twice ``max_rounds`` in ``history``.
    """
    from environment import positive_at

    nodes, broadcast, local = walk["nodes"], walk["broadcast"], walk["local"]
    joined = np.hstack([broadcast, local])
    visited = np.eye(n, dtype=np.float32)[nodes]
    moved = np.array([[np.linalg.norm(scores)] for scores in broadcast])
    rounds = np.arange(1, len(nodes) + 1, dtype=np.float32)[:, None]
    age = np.full((len(nodes), n), 2.0 * max_rounds, np.float32)
    for row, node in enumerate(nodes):
        age[row:, node] = np.arange(len(nodes) - row)

    def by_holder(scores: np.ndarray) -> np.ndarray:
        matrices = scores.reshape(len(nodes), n, -1)
        return np.array([positive_at(*pair) for pair in zip(nodes, matrices, strict=True)])

    return {
        "zeros": np.zeros_like(visited),
        "last_node": visited,
        "last_node_moved": np.hstack([visited, moved]),
        "broadcast": broadcast,
        "local": local,
        "local_holder": by_holder(local).reshape(local.shape),
        "broadcast_and_local": joined,
        "first_scores": joined[:, ::n],
        "both": np.hstack([by_holder(broadcast)[:, :, 0], by_holder(local)[:, :, 0]]),
        "last_node_round": np.hstack([visited, rounds]),
        "history": np.hstack([visited.cumsum(axis=0), age, rounds]),
    }


def r2_interval(
    values: np.ndarray, predictions: np.ndarray, walks: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return R2, the share of the values' variance that is predicted, and its 95 % interval.

    The interval is a percentile bootstrap over walks, which ``rng`` draws. All arrays are (n,):
    float64 values and predictions, and the numbers of their walks.
    """
    index = np.unique(walks, return_inverse=True)[1]
    terms = ((values - predictions) ** 2, values**2, values, np.ones(len(values)))
    sums = [np.bincount(index, term) for term in terms]  # of each walk

    def r2(*sums: np.ndarray, axis: int) -> np.ndarray:
        error, squares, value, count = (part.sum(axis=axis) for part in sums)
        return 1 - error / (squares - value**2 / count)

    options: Any = {"paired": True, "n_resamples": _RESAMPLES, "method": "percentile", "rng": rng}
    low, high = bootstrap(sums, r2, **options).confidence_interval
    return float(r2(*sums, axis=0)), float(low), float(high)


def audit_table(walks: list[Walk], environment: DecentralizedLearning) -> pd.DataFrame:
    """Return AUDIT_COLUMNS with a row for each observation and target.

    ``walks`` are the environment's, at least 6 of them with a second round; one without holds no
    choice and adds no row. Each value is predicted by extremely randomised trees that were fitted
    to other walks.
    """
    settings, n = environment.settings, environment.settings.NUM_NODES
    observed = [observations(walk, n, settings.MAX_ROUNDS) for walk in walks]
    number = np.repeat(range(len(walks)), [len(w["nodes"]) - 1 for w in walks])
    next_node = np.concatenate([np.eye(n, dtype=np.float32)[w["nodes"][1:]] for w in walks])
    rounds = {"accuracy": slice(None, -1), "next_accuracy": slice(1, None)}
    rows = []
    for name, target in itertools.product(OBSERVATIONS, TARGETS):
        features = np.concatenate([o[name][:-1] for o in observed])
        values = np.concatenate([w["accuracies"][rounds[target]] for w in walks])
        if target == "next_accuracy":
            features = np.hstack([features, next_node])
        rng = stream(settings.SEED, "audit")  # the same draws for all
        seed = int(rng.integers(2**32))
        trees = ExtraTreesRegressor(_TREES, min_samples_leaf=3, random_state=seed)
        folds = GroupKFold(_FOLDS)
        predictions = cross_val_predict(trees, features, values, groups=number, cv=folds)
        r2 = r2_interval(values, predictions, number, rng)
        rows.append((environment.dataset.name, name, target, *r2, len(walks), len(number)))
    return pd.DataFrame(rows, columns=list(AUDIT_COLUMNS))


def draw_audit(table: pd.DataFrame) -> Figure:
    """Draw R2 of each observation with its interval, one mark per target."""
    figure, (axis,) = plot.panels(3.4, 1, 1)
    places = np.arange(len(OBSERVATIONS))
    marks = (("accuracy", "o", plot.BLACK, -0.15), ("next_accuracy", "s", plot.BLUE, 0.15))
    for target, marker, color, offset in marks:
        rows = table[table["target"] == target]
        ends = np.array([rows["r2"] - rows["low"], rows["high"] - rows["r2"]])
        style: Any = {"fmt": marker, "color": color, "ms": 4.5, "elinewidth": 1}
        axis.errorbar(rows["r2"], places + offset, xerr=ends, label=TARGETS[target], **style)
    axis.set_yticks(places, list(OBSERVATIONS.values()))
    axis.set_ylim(len(OBSERVATIONS) - 0.5, -0.5)
    axis.set_xlabel("R2, share of the accuracies' variance that is predicted (95 % interval)")
    axis.legend(loc="upper right")  # the first rows, which have little, are at the left
    size = f"{table['episodes'].iloc[0]} walks, {table['rounds'].iloc[0]} rounds"
    plot.set_title(figure, table, f"Accuracy predicted from an observation: {size}")
    return figure


def report(table: pd.DataFrame) -> str:
    """Return the audit's table as Markdown: R2 with its 95 % interval."""
    lines = [f"| observation | {' | '.join(TARGETS.values())} |", "|---" * (1 + len(TARGETS)) + "|"]
    for name, rows in table.groupby("observation", sort=False):
        cells = [f"{r.r2:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows.itertuples()]
        lines.append(f"| {OBSERVATIONS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def audit(settings: Settings, count: int) -> int:
    """Record the missing ones of ``count`` walks, write ``audit.csv`` and its figure; return 0.

    An ``audit.csv`` of as many walks is only drawn and printed. UserError if the folder holds
    another audit, or something is damaged.
    """
    from environment import DecentralizedLearning

    # Whatever the data can't fill is refused here, before a file is written.
    environment = DecentralizedLearning(settings)
    dataset = environment.dataset
    folder = absolute(settings.RESULTS_DIR) / (settings.NAME or f"audit-{dataset.name}")
    # The data that DATASET led to counts, not its name.
    names = names_of(WorldSettings) - {"DATASET"} | {"SEED"}
    used = {name: value for name, value in settings.stored().items() if name in names}
    config = {"dataset": {"name": dataset.name, "sha256": dataset.sha256}, "settings": used}

    def comparable(content: dict[str, Any]) -> dict[str, Any]:
        data = records.fingerprint(**content["dataset"])
        return {"data": data, **{name: content["settings"].get(name) for name in used}}

    now, identity, path = comparable(config), folder / "config.json", folder / "audit.csv"
    with records.locked(folder, "audit"):
        if records.read_matching_config(identity, "audit", comparable, now) is None:
            config |= records.provenance(environment.threads, settings.DEVICE)
            records.write_json(identity, config)
        table = records.read_table(path, AUDIT_COLUMNS) if path.exists() else None
        if table is None or (table["episodes"] != count).any():
            table = audit_table(_walks(environment, folder / "walks", count), environment)
            records.write_table(path, table)
        plot.save_figure(folder / "audit.png", draw_audit(table))
    print(f"{report(table)}\nresults and figure: {folder}")
    return 0


def _walks(environment: DecentralizedLearning, folder: Path, count: int) -> list[Walk]:
    """Return walks 1 to ``count``; record what is missing."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"walk-{episode}.npz" for episode in range(1, count + 1)]
    for episode, path in enumerate(tqdm(paths, desc="walks", disable=None), 1):
        if not path.exists():
            records.write_arrays(path, record_walk(environment, episode))
    walks = [records.read_arrays(path) for path in paths]
    longer = sum(len(walk["nodes"]) > 1 for walk in walks)
    if longer < _FOLDS:
        raise UserError(f"--walks: got {longer} with a second round, takes at least {_FOLDS}")
    return walks


def main(arguments: list[str] | None = None) -> int:
    """Run an audit; return the exit status, as main.py's."""
    return cli.exit_status(PROGRAM, lambda: audit(*parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

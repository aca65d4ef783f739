"""A comparison's tables: written by hand, read, and refused if they are damaged."""

import json

import pandas as pd
import pytest

from config import UserError
from experiments.tables import (
    EPISODE_COLUMNS,
    JOB_COLUMNS,
    ROUND_COLUMNS,
    TRAINING_COLUMNS,
    read_comparison,
)

LIMIT = 36


def write_comparison(folder, values, *, failed=(), training=None, parameter="", node="0", **world):
    """Write a comparison's tables.

    values[variant][method][seed] is a list of (rounds, cost), one per test episode; the variant is
    left out where nothing varies. training[method] is a list of (rounds, cost), for each seed.
    """
    variants = values if parameter else {"": values}
    jobs, episodes, rounds, trained = [], [], [], []
    for variant, methods in variants.items():
        for method, by_seed in methods.items():
            for seed, pairs in by_seed.items():
                state = "failed" if (method, seed) in failed else "finished"
                error = "its disk, was full" if state == "failed" else ""
                ran = (error, "", "abc", "2.21.0", "a processor", "cpu")
                jobs.append([variant, method, seed, state, 1.5, *ran])
                job = ["mnist", variant, method, seed]
                for e, (r, cost) in enumerate(pairs if state == "finished" else [], 1):
                    reached = int(r < LIMIT)
                    row = [r, reached, 0.8, -17.0, cost, 9, 1.2, 0, 0, 0.8, LIMIT, 2.0]
                    episodes.append([*job, e, *row])
                    rounds += [[*job, e, t, node, 0.0, 0.5] for t in range(1, r + 1)]
                for e, (r, cost) in enumerate((training or {}).get(method, []), 1):
                    row = [r, 1, 0.8, -17.0, cost, 1.0, 0.1, 0, 0.8, LIMIT, 2.0]
                    trained.append([*job, e, *row])
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (
        ("jobs", JOB_COLUMNS, jobs),
        ("episodes", EPISODE_COLUMNS, episodes),
        ("rounds", ROUND_COLUMNS, rounds),
        ("training", TRAINING_COLUMNS, trained),
    ):
        pd.DataFrame(rows, columns=list(columns)).to_csv(folder / f"{name}.csv", index=False)
    first = next(iter(next(iter(variants.values())).values()))
    config = {
        "comparison": "paper",
        "parameter": parameter,
        "episodes": "test",
        "test_episodes": len(next(iter(first.values()))),
        "dataset": {"name": "mnist", "sha256": {}},
        "settings": {"NUM_NODES": 10, **world},
    }
    (folder / "config.json").write_text(json.dumps(config))


VALUES = {
    "hl": {0: [(10, 0.2), (20, 0.4)], 1: [(LIMIT, 0.1), (14, 0.1)]},
    "random": {0: [(30, 1.0), (20, 1.2)], 1: [(LIMIT, 0.9), (34, 0.9)], 2: [(25, 1.0), (27, 1)]},
}


@pytest.mark.parametrize("name", ["episodes", "rounds"])
def test_damaged_tables_are_refused(tmp_path, name):
    write_comparison(tmp_path, VALUES)
    whole = (tmp_path / f"{name}.csv").read_text()
    (tmp_path / f"{name}.csv").write_text(whole.rpartition("mnist")[0])
    with pytest.raises(UserError, match=r"lacks .* of random 2;"):
        read_comparison(tmp_path)


def test_nothing_to_estimate(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        read_comparison(tmp_path)
    write_comparison(tmp_path, {"hl": {0: [(10, 0.2)]}}, failed=[("hl", 0)])
    with pytest.raises(UserError, match=str(tmp_path)):
        read_comparison(tmp_path)


@pytest.mark.parametrize("name", ["comparison", "parameter", "episodes", "test_episodes"])
def test_a_config_without_a_name_is_refused(tmp_path, name):
    write_comparison(tmp_path, VALUES)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*\('{name}'\)"):
        read_comparison(tmp_path)

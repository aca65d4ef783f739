"""Estimates and their intervals, against numbers by hand and SciPy's bootstrap."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import records
from config import UserError
from experiments import estimates

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
        ("jobs", estimates.JOB_COLUMNS, jobs),
        ("episodes", estimates.EPISODE_COLUMNS, episodes),
        ("rounds", estimates.ROUND_COLUMNS, rounds),
        ("training", estimates.TRAINING_COLUMNS, trained),
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


def estimated(folder):
    return estimates.estimate(estimates.read_comparison(folder))


def of(table, method, quantity):
    (row,) = table[(table["method"] == method) & (table["quantity"] == quantity)].itertuples()
    return row


def test_means_over_all_episodes_with_the_limit_as_value(tmp_path):
    write_comparison(tmp_path, VALUES)
    table = estimated(tmp_path)
    assert tuple(table) == estimates.ESTIMATE_COLUMNS
    rounds = of(table, "hl", "rounds")
    assert rounds.mean == (10 + 20 + 36 + 14) / 4
    assert (rounds.seeds, rounds.episodes) == (2, 4)
    assert of(table, "hl", "goal_reached").mean == 0.75
    assert of(table, "random", "rounds").mean == pytest.approx((30 + 20 + 36 + 34 + 25 + 27) / 6)


def test_reductions_pair_the_seeds_that_both_have(tmp_path):
    write_comparison(tmp_path, VALUES)
    table = estimated(tmp_path)
    # Random's seed 2 has no counterpart: 80 rounds against 120, cost 0.8 against 4.0.
    rounds = of(table, "hl", "rounds_reduction")
    assert rounds.mean == pytest.approx(1 - 80 / 120)
    assert (rounds.seeds, rounds.episodes) == (2, 4)
    assert of(table, "hl", "communication_cost_reduction").mean == pytest.approx(1 - 0.8 / 4.0)
    # Both seeds by hand: 1 - 30/50 and 1 - 50/70 bound what drawing seeds alone could give.
    assert rounds.low < 1 - 50 / 70 < rounds.mean < 1 - 30 / 50 < rounds.high
    assert not ((table["method"] == "random") & table["quantity"].str.contains("reduction")).any()


def test_each_variant_has_its_own_random(tmp_path):
    pair = [{"hl": {0: [(10, 1.0)]}, "random": {0: [(r, 2.0)]}} for r in (20, 30)]
    write_comparison(tmp_path, {"a": pair[0], "b": pair[1]}, parameter="GOAL_ACCURACY")
    table = estimated(tmp_path)
    reductions = table[table["quantity"] == "rounds_reduction"].set_index("variant")["mean"]
    assert reductions.to_dict() == pytest.approx({"a": 1 / 2, "b": 2 / 3})


def test_misses_more_often_on_the_seeds_that_both_have(tmp_path):
    values = {"hl": {0: [(LIMIT, 0.0), (20, 0.1)]}, "random": {0: [(30, 1.0)] * 2}}
    write_comparison(tmp_path, values)
    episodes = estimates.read_comparison(tmp_path)["episodes"]
    assert estimates.misses_more_often(episodes, "", "hl")
    # A seed of random's that misses all changes nothing, as hl has no such seed.
    values["random"][1] = [(LIMIT, 1.0)] * 2
    values["random"][2] = [(LIMIT, 1.0)] * 2
    write_comparison(tmp_path, values)
    episodes = estimates.read_comparison(tmp_path)["episodes"]
    assert estimates.misses_more_often(episodes, "", "hl")
    assert not estimates.misses_more_often(episodes, "", "random")


def test_break_even_by_hand(tmp_path):
    write_comparison(tmp_path, VALUES, training={"hl": [(30, 1.0), (30, 2.0)]})
    table = estimated(tmp_path)
    # 60 rounds of training on each seed; a test episode takes 20 instead of 30.
    assert of(table, "hl", "rounds_break_even").mean == pytest.approx(60 / 10)
    # A cost of 3 in training; 0.2 instead of 1.
    assert of(table, "hl", "communication_cost_break_even").mean == pytest.approx(3 / 0.8)


def test_break_even_needs_the_training_of_each_seed(tmp_path):
    write_comparison(tmp_path, VALUES, training={"hl": [(30, 1.0), (30, 2.0)]})
    path = tmp_path / "training.csv"
    pd.read_csv(path).query("seed == 0").to_csv(path, index=False)
    assert not estimated(tmp_path)["quantity"].str.contains("break_even").any()


def test_no_break_even_between_costs_that_are_counted_otherwise(tmp_path):
    # With two nodes in a round a training's cost holds the transfer to the first alone.
    write_comparison(tmp_path, VALUES, training={"hl": [(30, 1.0)]}, node="1+2")
    table = estimated(tmp_path)
    assert of(table, "hl", "rounds_break_even").mean == pytest.approx(30 / 10)
    assert "communication_cost_break_even" not in set(table["quantity"])


def test_no_break_even_of_a_policy_that_misses_the_goal_more_often(tmp_path):
    values = {"hl": {0: [(LIMIT, 0.0), (20, 0.1)]}, "random": {0: [(30, 1.0), (34, 1.0)]}}
    write_comparison(tmp_path, values, training={"hl": [(30, 1.0)]})
    table = estimated(tmp_path)
    assert of(table, "hl", "communication_cost_reduction").mean == pytest.approx(0.95)
    assert not table["quantity"].str.contains("break_even").any()


def test_what_saves_nothing_is_never_paid_back():
    ones = np.ones((2, 3))
    mean, low, high = estimates.bootstrap(estimates.break_even, 5 * ones, 2 * ones, ones)
    assert mean == low == high == math.inf
    # Half of the resamples save nothing: the upper bound is infinite, the lower one is not.
    ours, theirs = np.array([[1.0], [3.0]]), np.array([[2.0], [2.0]])
    _, low, high = estimates.bootstrap(estimates.break_even, np.full((2, 1), 10.0), ours, theirs)
    assert (low, high) == (10.0, math.inf)


def test_reduction_of_nothing():
    zeros, ones = np.zeros((2, 2)), np.ones((2, 2))
    assert estimates.reduction(zeros, zeros) == 0
    assert estimates.reduction(zeros, ones) == 1
    assert estimates.reduction(ones, zeros) == -math.inf


def test_with_one_episode_per_seed_the_bootstrap_is_scipys():
    rng = np.random.default_rng(1)
    ours, theirs = rng.gamma(9, 2, (8, 1)), rng.gamma(9, 3, (8, 1))
    mean, low, high = estimates.bootstrap(estimates.reduction, ours, theirs)
    reference = stats.bootstrap(
        (ours[:, 0], theirs[:, 0]),
        lambda a, b, axis: 1 - a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert mean == 1 - ours.mean() / theirs.mean()
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.03 * width)
    assert high == pytest.approx(reference.high, abs=0.03 * width)


def test_the_bootstrap_draws_seeds_and_their_episodes():
    # Episodes alike within a seed: the spread is that of the two seeds' means.
    _, low, high = estimates.bootstrap(estimates.mean, np.array([[1.0] * 50, [3.0] * 50]))
    assert (low, high) == (1.0, 3.0)
    # Seeds alike: the spread is that of 2 x 50 coin flips, 0.5 +- 1.96 * 0.05.
    flips = np.array([[0.0, 1.0] * 25] * 2)
    _, low, high = estimates.bootstrap(estimates.mean, flips)
    assert low == pytest.approx(0.402, abs=0.011)
    assert high == pytest.approx(0.598, abs=0.011)
    one_seed = estimates.bootstrap(estimates.mean, flips[:1])
    np.testing.assert_array_equal(one_seed, (0.5, np.nan, np.nan))


def test_failed_jobs_are_not_averaged(tmp_path):
    write_comparison(tmp_path, VALUES, failed=[("hl", 1)])
    table = estimated(tmp_path)
    assert of(table, "hl", "rounds").mean == 15
    assert (of(table, "hl", "rounds").seeds, of(table, "random", "rounds").seeds) == (1, 3)
    assert np.isnan(of(table, "hl", "rounds").low)
    states = estimates.read_comparison(tmp_path)["jobs"]["state"].value_counts()
    assert states.to_dict() == {"finished": 4, "failed": 1}


def test_without_random_nothing_is_set_against_it(tmp_path):
    write_comparison(tmp_path, {"hl": VALUES["hl"]})
    assert set(estimated(tmp_path)["quantity"]) == set(estimates.QUANTITIES)


def test_damaged_tables_are_refused(tmp_path):
    write_comparison(tmp_path, VALUES)
    whole = (tmp_path / "episodes.csv").read_text()
    (tmp_path / "episodes.csv").write_text(whole.rpartition("mnist")[0])
    with pytest.raises(UserError, match=r"episodes\.csv: got 1 .*random 2, takes 2"):
        estimates.read_comparison(tmp_path)


def test_nothing_to_estimate(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        estimates.read_comparison(tmp_path)
    write_comparison(tmp_path, {"hl": {0: [(10, 0.2)]}}, failed=[("hl", 0)])
    with pytest.raises(UserError, match=str(tmp_path)):
        estimates.read_comparison(tmp_path)


@pytest.mark.parametrize("name", ["comparison", "parameter", "episodes", "test_episodes"])
def test_a_config_without_a_name_is_refused(tmp_path, name):
    write_comparison(tmp_path, VALUES)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*\('{name}'\)"):
        estimates.read_comparison(tmp_path)


# --- The committed results -------------------------------------------------------------------

REFERENCE = estimates.records.PROJECT / "results" / "reference"
COMPARISONS = sorted(path.parent for path in REFERENCE.glob("*/jobs.csv"))


@pytest.mark.parametrize("folder", COMPARISONS, ids=lambda folder: folder.name)
def test_committed_estimates_follow_from_the_committed_tables(folder):
    stored = records.read_table(folder / "estimates.csv", estimates.ESTIMATE_COLUMNS)
    pd.testing.assert_frame_equal(estimated(folder), stored, check_dtype=False, rtol=1e-12)


def test_committed_results_are_few_and_small():
    assert len(COMPARISONS) == 8
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert len(files) < 120
    assert sum(path.stat().st_size for path in files) < 15e6

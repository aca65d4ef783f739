"""Estimates and their intervals, against numbers by hand and SciPy's bootstrap."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT
from scipy import stats
from test_tables import LIMIT, VALUES, write_comparison

import records
from experiments import estimates
from experiments.tables import read_comparison


def estimated(folder):
    return estimates.estimate(read_comparison(folder))


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
    episodes = read_comparison(tmp_path)["episodes"]
    assert estimates.misses_more_often(episodes, "", "hl")
    # A seed of random's that misses all changes nothing, as hl has no such seed.
    values["random"][1] = [(LIMIT, 1.0)] * 2
    values["random"][2] = [(LIMIT, 1.0)] * 2
    write_comparison(tmp_path, values)
    episodes = read_comparison(tmp_path)["episodes"]
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
    states = read_comparison(tmp_path)["jobs"]["state"].value_counts()
    assert states.to_dict() == {"finished": 4, "failed": 1}


def test_without_random_nothing_is_set_against_it(tmp_path):
    write_comparison(tmp_path, {"hl": VALUES["hl"]})
    assert set(estimated(tmp_path)["quantity"]) == set(estimates.QUANTITIES)


# --- The committed results -------------------------------------------------------------------

REFERENCE = PROJECT / "results" / "reference"
COMPARISONS = sorted(path.parent for path in REFERENCE.glob("*/jobs.csv"))


@pytest.mark.parametrize("folder", COMPARISONS, ids=lambda folder: folder.name)
def test_committed_estimates_follow_from_the_committed_tables(folder):
    stored = records.read_table(folder / "estimates.csv", estimates.ESTIMATE_COLUMNS)
    pd.testing.assert_frame_equal(estimated(folder), stored, check_dtype=False, rtol=1e-12)


def test_committed_results_are_few_and_small():
    assert len(COMPARISONS) == 8
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert len(files) < 120
    assert sum(path.stat().st_size for path in files) < 20e6

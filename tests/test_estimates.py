"""Estimates and their intervals, against numbers by hand and SciPy's bootstrap."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import estimates
from config import UserError
from records import EPISODE_COLUMNS, ROUND_COLUMNS, TEST_EPISODE_COLUMNS, TEST_ROUND_COLUMNS

LIMIT = 36


def write_comparison(folder, values, failed=(), training=None, node="1"):
    """A comparison's tables: values[method][seed] is a list of (rounds, cost), one per episode."""
    rows, end = [], [LIMIT, 2.0]
    for method, by_seed in values.items():
        for seed, pairs in by_seed.items():
            name = f"{method}-seed{seed}"
            state = "failed" if name in failed else "finished"
            error = "its disk, was full" if name in failed else ""
            rows.append(["paper", "", "", method, seed, name, state, 1.5, error])
            episodes = [
                [
                    "mnist",
                    method,
                    seed,
                    e,
                    r,
                    int(r < LIMIT),
                    0.8,
                    -17.0,
                    c,
                    9,
                    1.2,
                    0,
                    0,
                    0.8,
                    *end,
                ]
                for e, (r, c) in enumerate(pairs, 1)
            ]
            rounds = [
                ["mnist", method, seed, e, t, 0, 0.0, 0.5, -1.0]
                for e, (r, _) in enumerate(pairs, 1)
                for t in range(1, r + 1)
            ]
            (folder / name).mkdir(parents=True)
            for table, columns, file in (
                (episodes, TEST_EPISODE_COLUMNS, "episodes"),
                (rounds, TEST_ROUND_COLUMNS, "rounds"),
            ):
                path = folder / name / f"{file}.csv"
                pd.DataFrame(table, columns=columns).to_csv(path, index=False)
    pd.DataFrame(rows, columns=estimates.JOB_COLUMNS).to_csv(folder / "jobs.csv", index=False)
    for seed, pairs in (training or {}).items():
        path = folder / f"training-seed{seed}"
        path.mkdir()
        table = pd.DataFrame(pairs, columns=["rounds", "communication_cost"])
        table = table.assign(dataset="mnist", episode=range(1, len(pairs) + 1), diverged=0)
        table.reindex(columns=EPISODE_COLUMNS).to_csv(path / "episodes.csv", index=False)
        rounds = [["mnist", 1, 1, 0], ["mnist", 1, 2, node]]
        rounds = pd.DataFrame(rounds, columns=ROUND_COLUMNS[:4])
        rounds.reindex(columns=ROUND_COLUMNS).to_csv(path / "rounds.csv", index=False)


VALUES = {
    "hl": {0: [(10, 0.2), (20, 0.4)], 1: [(LIMIT, 0.1), (14, 0.1)]},
    "random": {0: [(30, 1.0), (20, 1.2)], 1: [(LIMIT, 0.9), (34, 0.9)], 2: [(25, 1.0), (27, 1)]},
}


def of(table, method, quantity):
    (row,) = table[(table["method"] == method) & (table["quantity"] == quantity)].itertuples()
    return row


def test_means_over_all_episodes_with_the_limit_as_value(tmp_path):
    write_comparison(tmp_path, VALUES)
    table = estimates.write(tmp_path)
    rounds = of(table, "hl", "rounds")
    assert rounds.mean == (10 + 20 + 36 + 14) / 4
    assert (rounds.seeds, rounds.episodes) == (2, 4)
    assert of(table, "hl", "goal_reached").mean == 0.75
    assert of(table, "random", "rounds").mean == pytest.approx((30 + 20 + 36 + 34 + 25 + 27) / 6)
    assert (tmp_path / "estimates.csv").read_text().splitlines()[0] == ",".join(
        estimates.ESTIMATE_COLUMNS
    )


def test_reductions_pair_the_seeds_that_both_have(tmp_path):
    write_comparison(tmp_path, VALUES)
    table = estimates.write(tmp_path)
    # Random's seed 2 has no counterpart: 80 rounds against 120, cost 0.8 against 4.0.
    rounds = of(table, "hl", "rounds_reduction")
    assert rounds.mean == pytest.approx(1 - 80 / 120)
    assert (rounds.seeds, rounds.episodes) == (2, 4)
    assert of(table, "hl", "communication_cost_reduction").mean == pytest.approx(1 - 0.8 / 4.0)
    # Both seeds by hand: 1 - 30/50 and 1 - 50/70 bound what drawing seeds alone could give.
    assert rounds.low < 1 - 50 / 70 < rounds.mean < 1 - 30 / 50 < rounds.high
    # Seed 0: of 10, 20 against 30, 20: 3 less, 1 tie. Seed 1: 36, 14 against 36, 34: 2 less, 1 tie.
    expected = (3.5 / 4 + 2.5 / 4) / 2
    improvement = of(table, "hl", "rounds_improvement")
    assert improvement.mean == pytest.approx(expected)
    assert (improvement.seeds, improvement.episodes) == (2, 4)
    # Episodes are drawn as well: seed 0 alone could give from 1/2 (20 against 20) to 1.
    assert (improvement.low, improvement.high) == (0.5, 1.0)
    assert not ((table["method"] == "random") & table["quantity"].str.contains("reduction")).any()


def test_break_even_by_hand(tmp_path):
    training = {0: [(30, 1.0), (30, 2.0)], 1: [(36, 0.5), (24, 0.5)]}
    write_comparison(tmp_path, VALUES, training=training)
    table = estimates.write(tmp_path)
    # 60 rounds of training on each seed; a test episode takes 20 instead of 30.
    assert of(table, "hl", "rounds_break_even").mean == pytest.approx(60 / 10)
    # Cost 3 and 1 of training, 2 on average; 0.2 instead of 1.
    assert of(table, "hl", "communication_cost_break_even").mean == pytest.approx(2 / 0.8)


def test_no_break_even_between_costs_that_are_counted_otherwise(tmp_path):
    """With two nodes in a round a training's cost holds the way to the first alone."""
    write_comparison(tmp_path, VALUES, training={s: [(30, 1.0)] for s in (0, 1)}, node="1+2")
    table = estimates.write(tmp_path)
    assert of(table, "hl", "rounds_break_even").mean == pytest.approx(30 / 10)
    assert "communication_cost_break_even" not in set(table["quantity"])


def test_no_break_even_of_a_policy_that_misses_the_goal_more_often(tmp_path):
    """It is cheaper, but not for the same result."""
    values = {"hl": {0: [(LIMIT, 0.0), (20, 0.1)]}, "random": {0: [(30, 1.0), (34, 1.0)]}}
    write_comparison(tmp_path, values, training={0: [(30, 1.0)]})
    table = estimates.write(tmp_path)
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


def test_interquartile_mean_by_hand():
    # A quarter of eight is two: 3, 4, 5 and 6 are left.
    values = np.array([[8.0, 1, 100, 4], [5, 3, 6, -50]])
    assert estimates.interquartile_mean(values) == (3 + 4 + 5 + 6) / 4
    stacked = np.stack([values, values + 1])
    assert estimates.interquartile_mean(stacked).tolist() == [4.5, 5.5]


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
    assert estimates.bootstrap(estimates.mean, flips[:1]) == (0.5, None, None)


def test_failed_jobs_are_counted_and_not_averaged(tmp_path):
    write_comparison(tmp_path, VALUES, failed=["hl-seed1"])
    table = estimates.write(tmp_path)
    assert of(table, "hl", "rounds").mean == 15
    assert (of(table, "hl", "rounds").seeds, of(table, "random", "rounds").seeds) == (1, 3)
    report = estimates.report(tmp_path)
    assert "Jobs: 5, 4 finished, 0 waiting, 1 failed; hl-seed1 failed: its disk, was" in report
    assert "0 test episodes diverged" in report
    assert re.search(r"^\| hl \| 1 x 2 \| 15\.0 \|", report, re.MULTILINE)
    assert re.search(r"^\| random \| 3 x 2 \| 28\.7 \[", report, re.MULTILINE)


def test_report(tmp_path):
    write_comparison(tmp_path, VALUES, training={0: [(30, 1.0)] * 2, 1: [(30, 1.0)] * 2})
    estimates.write(tmp_path)
    lines = estimates.report(tmp_path).splitlines()
    assert lines[0].startswith(
        "| method | seeds x episodes | rounds | rounds, interquartile mean |"
    )
    assert lines[2].startswith("| hl | 2 x 2 | 20.0 [")
    assert "| *published, HL (MNIST)* |  | +50.8% | +74.6% |  |  |" in lines
    assert any(line.startswith("| hl | 2 x 2 | 6 [") for line in lines)
    assert any("; 0 test episodes and 0 of training diverged." in line for line in lines)


def test_without_random_nothing_is_set_against_it(tmp_path):
    write_comparison(tmp_path, {"hl": VALUES["hl"]})
    estimates.write(tmp_path)
    report = estimates.report(tmp_path)
    assert "| hl | 2 x 2 | 20.0 [" in report
    assert "Against random" not in report
    assert "published" not in report


def test_a_job_with_fewer_episodes_than_the_comparison_has_is_damaged(tmp_path):
    write_comparison(tmp_path, {"hl": {0: [(10, 0.2)]}, "random": {0: [(10, 0.2), (30, 1.0)]}})
    (tmp_path / "comparison.json").write_text('{"test_episodes": 2}')
    jobs = estimates.read_comparison(tmp_path)["jobs"].set_index("folder")
    assert jobs["state"].to_dict() == {"hl-seed0": "failed", "random-seed0": "finished"}
    assert "the tables are damaged" in jobs["error"]["hl-seed0"]


def test_nothing_to_estimate(tmp_path):
    with pytest.raises(UserError, match=r"jobs\.csv: can't be read"):
        estimates.write(tmp_path)
    write_comparison(tmp_path, {"hl": {0: [(10, 0.2)]}}, failed=["hl-seed0"])
    with pytest.raises(UserError, match="no job is finished"):
        estimates.write(tmp_path)
    (tmp_path / "jobs.csv").write_text("")
    with pytest.raises(UserError, match=r"No columns .* without it compare.py makes it anew"):
        estimates.write(tmp_path)


def test_a_cell_that_is_no_number_is_damage(tmp_path):
    write_comparison(tmp_path, VALUES)
    path = tmp_path / "hl-seed1" / "episodes.csv"
    pd.read_csv(path).assign(final_accuracy="xx").to_csv(path, index=False)
    jobs = estimates.read_comparison(tmp_path)["jobs"].set_index("folder")
    assert jobs["state"]["hl-seed1"] == "failed"
    assert "of final_accuracy not all values are numbers" in jobs["error"]["hl-seed1"]


@pytest.mark.parametrize(("column", "value"), [("dataset", "digits"), ("goal_accuracy", 0.7)])
def test_jobs_of_another_kind_are_not_averaged(tmp_path, column, value):
    write_comparison(tmp_path, VALUES)
    path = tmp_path / "hl-seed1" / "episodes.csv"
    pd.read_csv(path).assign(**{column: value}).to_csv(path, index=False)
    with pytest.raises(UserError, match=f"several values of {column}"):
        estimates.write(tmp_path)


def test_jobs_of_different_size_are_not_averaged(tmp_path):
    write_comparison(tmp_path, {"hl": {0: [(10, 0.2)]}, "random": {0: [(10, 0.2), (30, 1.0)]}})
    with pytest.raises(UserError, match="jobs with 1 and with 2 test episodes"):
        estimates.write(tmp_path)

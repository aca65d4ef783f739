import numpy as np
import pytest
from conftest import small_settings

import data
import environment
import models
from benchmarks import rounds


def test_floating_point_operations_counted_from_the_network():
    # By every layer's output positions, each a sum of as many products as its kernel has.
    layers = [x for x in models.foundation_network((28, 28, 1), 10).layers if x.weights]
    forward = [
        2 * int(np.prod(layer.output.shape[1:-1])) * int(np.prod(layer.kernel.shape))
        for layer in layers
    ]
    assert sum(forward) == rounds.FORWARD == 3_792_000
    # Every layer's gradient by its weights and its inputs, but for the images themselves.
    assert 2 * sum(forward) - forward[0] == rounds.BACKWARD == 7_008_000
    assert rounds.PRODUCT == 17_179_869_184


def test_rows_of_a_round_by_hand():
    # 17.18 GFLOP in 0.1 s; 37.92 in 0.4 s, 0.552 of that rate; 5.4 in 0.1 s, 0.314 of it.
    times = {
        "product": [0.1, 0.1, 0.2],
        "evaluation": [0.4, 0.4, 0.8],
        "training": [0.1, 0.1, 0.1],
        "round": [0.5, 0.4, 1.0],
        "reference": [1.0, 1.2, 2.0],
    }
    times = {name: np.array(values) for name, values in times.items()}
    assert rounds.round_rows(times, test_images=10_000, samples=500) == [
        ("matrix product, 2048 x 2048, float32", "0.1000 s", "172 GFLOP/s"),
        ("evaluation, 10000 images", "0.4000 s", "95 GFLOP/s, 55% of the matrix product's"),
        ("training, 500 images", "0.1000 s", "54 GFLOP/s, 31% of the matrix product's"),
        ("round", "0.5000 s", ""),
        ("round of the reference", "1.2000 s", "2.00 times a round"),  # of 2, 3 and 2
    ]


def episode(seconds, training=0.0, evaluation=0.0, agent=0.0, memory=0.0):
    parts = {"training": training, "evaluation": evaluation, "agent": agent, "memory": memory}
    return {"round": seconds, **parts}


def test_rows_of_trainings_by_hand():
    episodes = {
        "one": [[episode(0.5)], [episode(0.25)], [episode(0.5)]],
        "two": [[episode(1.0), episode(0.5)], [episode(1.0)] * 2, [episode(0.5), episode(0.8)]],
        "tuned": [[episode(0.4, 0.2, 0.1, 0.06)], [episode(0.4, 0.1, 0.1, 0.06)]],
        "N = 10": [[episode(0.5, 0.2, 0.2, memory=900)], [episode(0.6, 0.2, 0.1, memory=1000)]],
        "N = 100": [[episode(0.5, 0.25, 0.125, memory=1100)]] * 2,
        "N = 1000": [[episode(0.5, memory=2000)]] * 2,
    }
    assert [row[1:] for row in rounds.training_rows(episodes)] == [
        ("2.00 rounds/s", ""),
        ("3.00 rounds/s", "1.50 times one run"),  # of 3 / 2, 2 / 4 and 3.25 / 2
        ("0.4000 s", ""),
        ("0.1500 s", "38% of it"),
        ("0.1000 s", "25% of it"),
        ("0.0600 s", "15% of it"),
        ("0.2000 s", "1000 MB at the peak"),
        ("0.1250 s", "1100 MB at the peak"),
        ("0.5000 s", "2000 MB at the peak"),
    ]


def test_the_report_holds_all_rows():
    lines = rounds.report([("round", "0.5 s", ""), ("N = 10", "1 s", "2 MB")], "mnist").splitlines()
    assert lines[0].startswith("mnist, ")
    assert lines[4:] == ["| round | 0.5 s |  |", "| N = 10 | 1 s | 2 MB |"]


def test_the_reference_is_measured(digits):
    times = rounds.measure_round(digits, 1)
    assert set(times) == {"product", "evaluation", "training", "round", "reference"}
    assert all(values.shape == (1,) and values[0] > 0 for values in times.values())
    assert len(rounds.round_rows(times, len(digits.y_test), 500)) == 5


TINY = {
    "DATASET": "digits",
    "NUM_NODES": 3,
    "SAMPLES_PER_NODE": 32,
    "MAX_ROUNDS": 4,
    "EPISODES": 6,
    "REPLAY_SAMPLE": 8,
}


def test_an_episode_is_measured_by_its_parts(tmp_path, monkeypatch, few):
    monkeypatch.setitem(data.DATASETS, "digits", lambda settings: few)
    settings = small_settings(**TINY, GOAL_ACCURACY=1.0, RESULTS_DIR=str(tmp_path))
    episodes = rounds.play_training(settings)
    first, second = next(episodes), next(episodes)
    for seconds in (first, second):
        assert all(seconds[part] > 0 for part in rounds.PARTS)
        assert sum(seconds[part] for part in rounds.PARTS) < seconds["round"]
        assert seconds["memory"] > 100
    episodes.close()
    rows = (tmp_path / "digits-seed0" / "rounds.csv").read_text().splitlines()
    assert [line.split(",")[3:5] for line in rows[1:5]] == [
        ["0", "starter"],
        ["1", "greedy"],
        ["2", "greedy"],
        ["0", "greedy"],
    ]
    assert len(rows) == 1 + 2 * 4
    assert len((tmp_path / "digits-seed0" / "episodes.csv").read_text().splitlines()) == 3


def test_a_training_in_a_process_of_its_own():
    turns = rounds.play_in_turns({"one": [{**TINY, "THREADS": 1}]}, 2)["one"]
    assert [len(turn) for turn in turns] == [1, 1]
    assert all(turn[0]["round"] > turn[0]["training"] > 0 for turn in turns)


def test_main_is_watched():
    (seconds, first), (more, second) = rounds.watch_main("episodes.csv", (1, 2), **TINY)
    assert 0 < seconds < more
    assert min(first, second) > 100
    with pytest.raises(RuntimeError, match="status 2"):
        rounds.watch_main("episodes.csv", (1,), NUM_NODES=1)


@pytest.mark.parametrize("observation", ["broadcast", "local"])
def test_the_pca_has_no_more_models_than_rounds_made(monkeypatch, few, observation):
    # However many nodes there are: each round makes one, and there is the initial one.
    calls = []
    pca_scores = environment.pca_scores

    def spy(models, owners, components):
        calls.append((len(models), len(owners)))
        return pca_scores(models, owners, components)

    monkeypatch.setattr(environment, "pca_scores", spy)
    settings = small_settings(
        NUM_NODES=50, SAMPLES_PER_NODE=20, OBSERVATION=observation, GOAL_ACCURACY=1.0
    )
    env = environment.DecentralizedLearning(settings, few)
    env.reset(seed=0)
    for node in range(1, settings.MAX_ROUNDS):
        env.step(node)
    assert len(calls) == settings.MAX_ROUNDS == 5
    for rounds_made, (distinct, nodes) in enumerate(calls, start=1):
        assert distinct <= rounds_made + 1
        assert nodes == 50

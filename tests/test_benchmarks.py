import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import set_flags, small_settings

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


def turns(**parts):
    """What a kind of one process measured."""
    return [[dict(zip(parts, values, strict=True))] for values in zip(*parts.values(), strict=True)]


def test_the_report_by_hand():
    # 17.18 GFLOP in 0.1 s; 37.92 in 0.4 s, 0.552 of that rate; 5.4 in 0.1 s, 0.314 of it.
    found = {
        "product": turns(seconds=[0.1, 0.1, 0.2]),
        "one": turns(seconds=[0.5, 0.4, 1.0], evaluation=[0.4, 0.4, 0.8], training=[0.1, 0.1, 0.1]),
        "two": [
            [{"seconds": a}, {"seconds": b}]
            for a, b in ((1.0, 0.5), (1.0, 1.0), (1.2, 1.2))  # together 1/3, 0.5 and 0.6
        ],
        "reference": turns(seconds=[1.0, 1.2, 2.0]),
        "tuned": turns(
            seconds=[0.4, 0.4], training=[0.2, 0.1], evaluation=[0.1, 0.1], agent=[0.06, 0.06]
        ),
        "N = 10": turns(
            seconds=[0.5, 0.6], training=[0.2, 0.2], evaluation=[0.2, 0.1], memory=[900, 1000]
        ),
        "N = 100": turns(seconds=[0.5], training=[0.25], evaluation=[0.125], memory=[1100]),
        "N = 1000": turns(seconds=[0.5], training=[0.0], evaluation=[0.0], memory=[2000]),
        "start": turns(seconds=[6.0, 7.0, 9.0]),
    }
    lines = rounds.report(found, "mnist", 10_000).splitlines()
    assert lines[0].startswith("mnist, ")
    assert [tuple(line.split(" | ")[1:]) for line in lines[4:]] == [
        ("0.1000 s", "172 GFLOP/s |"),
        ("0.4000 s", "55% of the matrix product's rate |"),
        ("0.1000 s", "31% of the matrix product's rate |"),
        ("0.5000 s", " |"),
        ("1.2000 s", "2.00 of a round |"),  # of 2, 3 and 2
        ("0.5000 s", "0.67 of a round |"),  # of 0.67, 1.25 and 0.6
        ("0.4000 s", " |"),
        ("0.1500 s", "38% of it |"),
        ("0.1000 s", "25% of it |"),
        ("0.0600 s", "15% of it |"),
        ("0.2000 s", "1000 MB at the peak, +100.0 MB since turn 1 |"),
        ("0.1250 s", "1100 MB at the peak, +0.0 MB since turn 1 |"),
        ("0.5000 s", "2000 MB at the peak, +0.0 MB since turn 1 |"),
        ("7.0000 s", " |"),
    ]


TINY = {"DATASET": "digits", "NUM_NODES": 3, "SAMPLES_PER_NODE": 32, "REPLAY_SAMPLE": 8}


def test_a_training_is_measured_by_its_parts(monkeypatch, few):
    tables, read_csv = [], rounds.pd.read_csv
    monkeypatch.setattr(rounds, "_load", lambda settings: few)

    def spy(path):
        tables.append(read_csv(path))
        return tables[-1]

    monkeypatch.setattr(rounds.pd, "read_csv", spy)
    settings = rounds.Settings(**TINY)
    shared = models.shared_foundation_model(few, settings.BATCH_SIZE, settings.LEARNING_RATE)
    untimed = shared.train_epoch, shared.evaluate
    measured = rounds.play(**TINY, MAX_ROUNDS=4)
    assert measured.pop("memory") > 100
    seconds = measured.pop("seconds")
    assert set(measured) == {"training", "evaluation", "agent", "checkpoint"}
    assert min(measured.values()) > 0
    assert sum(measured.values()) < seconds
    assert tables[0]["rounds"].tolist() == [4]
    assert tables[0]["q_loss"].notna().all()  # the replay buffer is full from the start
    # The next turn shares the foundation model: nothing of it stays timed.
    assert (shared.train_epoch, shared.evaluate) == untimed


def test_the_reference_and_the_matrix_product_are_measured(monkeypatch, digits):
    monkeypatch.setattr(rounds, "_load", lambda settings: digits)
    assert rounds.play_reference()["seconds"] > 0
    assert rounds.multiply()["seconds"] > 0
    rounds._reference.cache_clear()


def test_turns_are_taken_by_processes_that_stay():
    found = rounds.measure({"one": [os.getpid], "two": [os.getpid, os.getpid]}, 2)
    for first, second in found.values():
        assert first == second
    assert len({*found["one"][0], *found["two"][0], os.getpid()}) == 4


def test_all_measures_can_be_sent_to_processes():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        sent = process.submit(list, rounds.MEASURES).result()  # there and back
    kinds = [kind for kinds in sent for kind in kinds]
    assert kinds[:4] == ["product", "one", "two", "reference"]
    assert kinds[4:] == ["tuned", "N = 10", "N = 100", "N = 1000", "start"]
    assert [call.keywords["SEED"] for call in sent[0]["two"]] == [0, 1]


def test_the_start_of_main_is_measured():
    assert rounds.start(*set_flags(TINY))["seconds"] > 0.5
    with pytest.raises(subprocess.CalledProcessError, match="status 2"):
        rounds.start("--set=NUM_NODES=1")


def test_the_pca_has_no_more_models_than_rounds_made(monkeypatch, few):
    # However many nodes there are: each round makes one, and there is the initial one.
    calls, pca_scores = [], environment.pca_scores

    def spy(models, row_of_node, components):
        calls.append((len(models), len(row_of_node)))
        return pca_scores(models, row_of_node, components)

    monkeypatch.setattr(environment, "pca_scores", spy)
    settings = small_settings(
        NUM_NODES=50, SAMPLES_PER_NODE=20, OBSERVATION="local", GOAL_ACCURACY=1.0
    )
    env = environment.DecentralizedLearning(settings, few)
    env.reset(seed=0)
    for node in (1, 2, 3, 4):
        env.step(node)
    assert calls == [(2, 50), (3, 50), (4, 50), (5, 50), (6, 50)]

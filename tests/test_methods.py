"""Methods: their walks, what they change, and what they send."""

import itertools

import numpy as np
import pytest
from conftest import small_settings

from config import ConfigError, Settings, stream
from environment import DecentralizedLearning, distance_matrix
from experiments import methods
from experiments.methods import METHODS


def walk(name, rounds, **overrides):
    """The nodes of rounds 1, 2, ... as a method names them, without training anything."""

    class Untrained:
        settings = small_settings(**{"NUM_NODES": 10, **overrides})
        distances = distance_matrix(settings)

    policy = METHODS[name].policy(Untrained)
    nodes = [Untrained.settings.STARTER_NODE]
    for past in range(1, rounds):
        info = {"round": past, "node": nodes[-1]}
        nodes.append(policy(np.zeros(3), info, stream(0, "policy", 1)))
    return nodes


def symmetric(n, seed):
    points = np.random.default_rng(seed).random((n, n))
    return (points + points.T) * (1 - np.eye(n))


def tour_length(distances, tour):
    return float(sum(distances[a, b] for a, b in zip(tour, [*tour[1:], tour[0]], strict=True)))


def test_staying_and_turns():
    assert walk("stay", 5) == [0] * 5
    assert METHODS["stay"].first_nodes(small_settings(STARTER_NODE=2), 5) == [2]
    assert walk("round_robin", 12, STARTER_NODE=7) == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_two_rounds_on_each_node():
    for name in ("nearest", "shortest"):
        once, twice = walk(name, 20), walk(f"{name}_twice", 20)
        assert sorted(once[:10]) == list(range(10))
        assert once[10:] == once[:10]
        assert twice == [node for node in once[:10] for _ in range(2)]


def test_nearest_neighbours_by_hand():
    distances = np.array(
        [[0, 5, 1, 9, 4], [5, 0, 7, 2, 3], [1, 7, 0, 8, 6], [9, 2, 8, 0, 1], [4, 3, 6, 1, 0.0]]
    )
    # From 0 the nearest is 2; from 2 then 4 (6 < 7 < 8); from 4, 3; 1 is left.
    assert methods.nearest_tour(distances, 0) == [0, 2, 4, 3, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_tour_is_the_shortest_of_all(seed):
    distances = symmetric(7, seed)
    best = min(
        tour_length(distances, [3, *rest]) for rest in itertools.permutations([0, 1, 2, 4, 5, 6])
    )
    tour = methods.shortest_tour(distances, 3)
    assert tour[0] == 3
    assert sorted(tour) == list(range(7))
    assert tour_length(distances, tour) == pytest.approx(best, abs=1e-12)


def test_many_nodes_get_a_tour_that_no_turned_stretch_shortens():
    distances = symmetric(30, 0)
    tour = methods.shortest_tour(distances, 4)
    length = tour_length(distances, tour)
    assert tour[0] == 4
    assert sorted(tour) == list(range(30))
    assert length < 0.95 * tour_length(distances, methods.nearest_tour(distances, 4))
    for i, j in itertools.combinations(range(1, 31), 2):
        turned = [*tour[:i], *reversed(tour[i:j]), *tour[j:]]
        assert tour_length(distances, turned) >= length - 1e-9


def test_random_draws_several_distinct_nodes():
    class Untrained:
        settings = small_settings(NUM_NODES=10, NODES_PER_ROUND=4)

    rng = stream(0, "policy", 1)
    drawn = np.array([methods.random_policy(Untrained)(None, {}, rng) for _ in range(500)])
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert np.bincount(drawn.ravel(), minlength=10).min() > 150


def test_balanced_by_hand():
    class Dataset:
        y_train = np.array([0] * 12 + [1] * 6 + [2] * 6)
        classes = 3

    class Untrained:
        dataset = Dataset
        settings = small_settings(NUM_NODES=4, MAX_ROUNDS=5)
        shards = np.arange(24).reshape(4, 6)
        distances = np.array([[0, 2, 9, 3], [2, 0, 9, 9], [9, 9, 0, 4], [3, 9, 4, 0]]) / 10

    policy = methods.balanced_policy(Untrained)
    nodes = [policy(None, {"round": past}, None) for past in range(1, 5)]
    # After 0 (label 0), nodes 2 and 3 are as good: 3 is nearer. Then label 1 lacks, at 2. Now all
    # are equal: from 2 that is 2 itself. Then labels 0 and 2 lack: 3 is nearer than 0 and 1.
    assert nodes == [3, 2, 2, 3]


def test_the_metropolis_walk_by_hand():
    distances = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0.0]])
    chain = methods.metropolis_chain(distances)  # the mean distance is 2
    near, middle, far = np.exp([-0.5, -1, -1.5])
    # A node proposes by its own sum of weights, and is accepted by the ratio of both nodes' sums if
    # that is below 1: the greater sum counts.
    sums = [near + middle, near + far, middle + far]
    assert chain[0, 1] == pytest.approx(near / max(sums[0], sums[1]))
    assert chain[2, 0] == pytest.approx(middle / max(sums[0], sums[2]))
    assert chain[2, 1] == pytest.approx(far / max(sums[1], sums[2]))
    for seed in range(3):
        chain = methods.metropolis_chain(symmetric(6, seed))
        assert chain.min() >= 0
        np.testing.assert_allclose(chain.sum(axis=1), 1)
        np.testing.assert_allclose(chain.sum(axis=0), 1)  # so all nodes train equally often
    np.testing.assert_allclose(methods.metropolis_chain(np.zeros((3, 3))) * 2, 1 - np.eye(3))
    # Rounding leaves less than 0 for a node that never waits.
    assert methods.metropolis_chain(distance_matrix(Settings())).min() >= 0


def test_metropolis_draws_by_its_chain():
    class Untrained:
        settings = small_settings(NUM_NODES=4)
        distances = np.array([[0, 1, 1, 9], [1, 0, 1, 9], [1, 1, 0, 9], [9, 9, 9, 0]]) / 10

    chain = methods.metropolis_chain(Untrained.distances)
    assert chain[2, 2] == pytest.approx(0, abs=1e-12)  # no node near it is more central
    for name, jumps in (("metropolis", 0.0), ("metropolis_jumps", 0.1)):
        policy, rng = METHODS[name].policy(Untrained), stream(0, "policy", 1)
        drawn = [policy(None, {"node": 2}, rng) for _ in range(4000)]
        shares = np.bincount(drawn, minlength=4) / 4000
        np.testing.assert_allclose(shares, (1 - jumps) * chain[2] + jumps / 4, atol=0.024)
        assert shares[2] == pytest.approx(jumps / 4, abs=0.0075)  # three standard deviations


def test_centralized_trains_on_all_images(few):
    environment = DecentralizedLearning(small_settings(STARTER_NODE=1), few)
    everything = np.concatenate(environment.shards)
    METHODS["centralized"].prepare(environment)
    assert environment.shards[1].tolist() == everything.tolist()


def test_fedavg_takes_equal_shards_only(few):
    environment = DecentralizedLearning(small_settings(), few)
    environment.shards[2] = environment.shards[2][:-1]
    with pytest.raises(ConfigError, match="63 to 64"):
        METHODS["fedavg"].check_shards(environment.shards)


def test_fedavg_starts_with_the_starter():
    assert METHODS["fedavg"].first_nodes(small_settings(STARTER_NODE=2), 1) == [2, 0, 1, 3]


def test_what_the_walk_search_changes_of_the_settings():
    changed = METHODS["walk_search"].overrides(small_settings())
    assert changed == {"REWARD": "progress", "DISCOUNT": 0.97, "OBSERVATION": "zeros"}

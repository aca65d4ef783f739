"""The searched walk: how a walk is followed, what the search finds, and what it may play."""

import numpy as np
import pytest
from conftest import small_settings

from config import episode_seed, stream
from environment import DecentralizedLearning, reward
from experiments import search
from experiments.methods import METHODS


def nodes_of(policy, rounds):
    return [policy(np.zeros(3), {"round": past}, None) for past in range(1, rounds)]


def test_the_last_two_stays_repeat():
    policy = search.follow([(7, 2), (4, 3), (1, 1)])
    expected = [7, 7, 4, 4, 4, 1, 4, 4, 4, 1, 4, 4]
    assert nodes_of(policy, 13) == expected
    assert nodes_of(policy, 4) == expected[:3]  # another episode


def test_the_best_walk():
    policy = METHODS["best_walk"].policy(None)
    assert nodes_of(policy, 17) == [5] * 9 + [1, 1, 5, 1, 1, 5, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_a_walk_whose_return_is_known(seed):
    """Node 2 first, for at least ten rounds: one walk in sixteen has it by chance."""
    played = []

    def play(walk, episode):
        played.append(episode)
        node, length = walk[0]
        return 10.0 * (node == 2) + length

    walk = search.search_walk(play, 4, 130, np.random.default_rng(seed))
    assert played == list(range(1, 131))
    assert walk[0][0] == 2
    assert walk[0][1] >= 10
    assert len(walk) == 6
    assert all(0 <= node < 4 and 1 <= length <= 12 for node, length in walk)


def test_the_search_plays_the_training_episodes_with_their_rewards(digits, monkeypatch):
    method = METHODS["walk_search"]
    plain = small_settings(EPISODES=3, SEED=5)
    settings = plain.replace(**method.overrides(plain))
    for accuracy in (0.1, 0.7):
        assert reward(accuracy, 0.05, settings) == pytest.approx(-1.05)
    assert reward(0.9, 0.05, settings) == pytest.approx(-0.05)
    asked = {}

    def searched(play, nodes, episodes, rng):
        asked.update(nodes=nodes, episodes=episodes, first=play([(1, 2), (2, 1)], 3))
        assert rng.random() == stream(5, "exploration").random()
        return [(3, 1), (0, 1)]

    monkeypatch.setattr(search, "search_walk", searched)
    environment = DecentralizedLearning(settings, digits)
    policy = search.search_policy(environment)
    assert nodes_of(policy, 5) == [3, 0, 3, 0]
    total = environment.reset(seed=episode_seed(5, 3))[1]["reward"]
    for node in (1, 1, 2, 1):
        total += environment.step(node)[1]
    assert asked == {"nodes": 4, "episodes": 3, "first": pytest.approx(total, abs=1e-9)}

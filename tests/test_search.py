"""Walks: how a walk is followed, and what the search learns, stores and takes up again."""

import numpy as np
import pytest
from conftest import small_settings

from config import stream
from environment import Round
from experiments import search
from experiments.methods import METHODS


def nodes_of(policy, rounds):
    return [policy(np.zeros(3), {"round": past}, None) for past in range(1, rounds)]


def test_the_last_two_stays_repeat():
    stays = np.array([[7, 4, 1], [1, 2, 0]])  # for 2, 3 and 1 rounds
    expected = [7, 7, 4, 4, 4, 1, 4, 4, 4, 1, 4, 4]
    assert search.walk_nodes(stays, 12) == expected
    assert search.walk_nodes(stays, 3) == expected[:3]


def test_the_best_walk():
    policy = METHODS["best_walk"].policy(None)
    assert nodes_of(policy, 17) == [5] * 9 + [1, 1, 5, 1, 1, 5, 1]


def play(agent, episodes, reward_of):
    """Train an agent in episodes of ten rounds, and return the walks that it played."""
    walks = []
    for _ in range(episodes):
        walks.append([])
        for _ in range(10):
            actions, chosen_by = agent.act(None, {})
            walks[-1] += actions
            reward = reward_of(*actions)
            agent.remember(Round(None, actions, chosen_by, reward, None, False, False, {}))
        assert agent.train() is None
        agent.end_episode()
    return walks


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_a_walk_whose_return_is_known(seed):
    """Node 2 first, for at least ten rounds: one walk in sixteen has it by chance."""
    settings = small_settings(NUM_NODES=4, EPISODES=130, SEED=seed, MAX_ROUNDS=15)
    agent = search.WalkSearch(0, settings)
    play(agent, 130, lambda node: float(node == 2))
    chosen = [agent.greedy(None, {"round": past}) for past in range(1, 15)]
    assert chosen[:10] == [2] * 10


def test_the_elite_moves_the_probabilities():
    """Of 20 walks the 5 with the greatest discounted return count, by a step of 0.7."""
    agent = search.WalkSearch(0, small_settings(EPISODES=40, DISCOUNT=0.5))
    first, lengths, returns = [], [], []
    for episode in range(20):
        before = [table.copy() for table in agent.probabilities]
        rng = stream(0, "exploration", episode + 1)
        drawn = [[rng.choice(len(row), p=row) for row in table] for table in before]
        assert agent.act(None, {}) == ([drawn[0][0]], "walk")
        first.append(drawn[0][0])
        lengths.append(drawn[1][0])
        agent.remember(Round(None, None, "starter", 1e6 * episode, None, False, False, {}))
        rewards = [-episode, 10.0 * (episode % 7)]
        for reward in rewards:
            agent.remember(Round(None, [0], "walk", reward, None, False, False, {}))
        returns.append(rewards[0] + 0.5 * rewards[1])
        assert all((a == b).all() for a, b in zip(before, agent.probabilities, strict=True))
        agent.train()
        agent.end_episode()
    elite = np.argsort(-np.array(returns), kind="stable")[:5]
    for table, chosen in zip(agent.probabilities, (first, lengths), strict=True):
        shares = np.bincount(np.array(chosen)[elite], minlength=table.shape[1]) / 5
        np.testing.assert_allclose(table[0], 0.3 / table.shape[1] + 0.7 * shares)


@pytest.mark.parametrize("cut", [7, 20, 33])
def test_a_search_goes_on_where_it_was_cut_off(cut):
    settings = small_settings(EPISODES=45, MAX_ROUNDS=12)
    whole, first, second = (search.WalkSearch(0, settings) for _ in range(3))
    walks = play(whole, 45, float)
    begun = play(first, cut, float)
    second.load_state(first.state(), np.zeros(0))
    assert begun + play(second, 45 - cut, float) == walks
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, second.state()[name])

import math

import gymnasium
import numpy as np
import pytest

import node
from config import Settings, stream
from environment import Round
from models import tf
from node import DQNAgent, ReplayBuffer, q_targets

# --- Replay buffer ---------------------------------------------------------------------------


def numbered(buffer, numbers):
    for i in numbers:
        buffer.add(np.full(2, i), [i % 3], float(i), np.full(2, i + 0.5), i % 2 == 0)


def test_buffer_overwrites_the_oldest():
    buffer = ReplayBuffer(5, 2, 3)
    numbered(buffer, range(4))
    assert len(buffer) == 4
    numbered(buffer, range(4, 13))
    assert len(buffer) == 5
    drawn, _ = buffer.sample(1, 5, np.random.default_rng(0))
    assert sorted(drawn["rewards"]) == [8, 9, 10, 11, 12]
    for i, reward in enumerate(drawn["rewards"]):
        assert drawn["observations"][i].tolist() == [reward, reward]
        assert drawn["next_observations"][i].tolist() == [reward + 0.5] * 2
        assert drawn["actions"][i].tolist() == [reward % 3]
        assert drawn["dones"][i] == (reward % 2 == 0)


def test_buffer_draws_distinct_transitions():
    buffer = ReplayBuffer(100, 2, 3)
    numbered(buffer, range(50))
    transitions, draws = buffer.sample(30, 20, np.random.default_rng(0))
    samples = transitions["rewards"][draws]
    assert all(len(set(rewards)) == 20 for rewards in samples)
    assert set(samples.ravel()) == set(range(50))
    rng = np.random.default_rng(0)
    for rewards in samples:  # in the order of the draw
        assert rewards.tolist() == rng.choice(50, 20, replace=False).tolist()
    with pytest.raises(ValueError, match="larger"):
        buffer.sample(1, 51, np.random.default_rng(0))


def test_buffer_latest():
    buffer = ReplayBuffer(5, 2, 3)
    numbered(buffer, range(3))
    assert buffer.latest(2)["rewards"].tolist() == [1, 2]
    assert buffer.latest(9)["rewards"].tolist() == [0, 1, 2]
    numbered(buffer, range(3, 12))
    assert buffer.latest(5)["rewards"].tolist() == [7, 8, 9, 10, 11]
    assert len(buffer.latest(0)) == 0


@pytest.mark.parametrize("steps", [(3,), (5,), (3, 9, 4)])
def test_buffer_restored_from_its_latest(steps):
    """Each place of the ring holds what it held, so that the same draw gives the same."""
    buffer, copy = ReplayBuffer(5, 2, 3), ReplayBuffer(5, 2, 3)
    parts, first = [], 0
    for count in steps:
        numbered(buffer, range(first, first + count))
        first += count
        parts.append(buffer.latest(count))
    copy.restore(np.concatenate(parts), buffer.added)
    for each in (buffer, copy):
        numbered(each, range(9000, 9003))
    assert len(copy) == len(buffer)
    draws = [each.sample(2, len(each), np.random.default_rng(0)) for each in (buffer, copy)]
    for name, field in draws[0][0].items():
        assert (field[draws[0][1]] == draws[1][0][name][draws[1][1]]).all()


@pytest.mark.parametrize(
    ("sizes", "kept"), [((3, 3, 1), 3), ((2, 4, 1), 3), ((2, 3, 2), 3), ((2, 3, 1), 2)]
)
def test_buffer_refuses_transitions_that_do_not_fit(sizes, kept):
    buffer, other = ReplayBuffer(5, 2, 3), ReplayBuffer(5, *sizes)
    numbered(buffer, range(3))
    with pytest.raises(ValueError, match=f"got {kept} transitions, takes 3"):
        other.restore(buffer.latest(kept), 3)
    assert len(other) == 0


def test_the_buffer_holds_every_step_of_the_training(monkeypatch):
    sizes = []
    for capacity in (300, 30):
        monkeypatch.setattr(node, "REPLAY_CAPACITY", capacity)
        sizes.append(make_agent(EPISODES=9, MAX_ROUNDS=6).replay.capacity)
    assert sizes == [45, 30]


# --- Epsilon-greedy --------------------------------------------------------------------------


def make_agent(**overrides):
    """An agent that sees four numbers and takes one of three actions."""
    return DQNAgent(4, Settings(**{"NUM_NODES": 3, "HIDDEN_UNITS": (16,), **overrides}))


def test_epsilon_greedy_choices_by_hand():
    """Each episode has draws of its own: whether to explore, and then which action."""
    agent, seen = make_agent(SEED=4, EPSILON=0.7, EPSILON_DECAY=0.5), np.ones(4, np.float32)
    best = agent.greedy(seen, {"round": 1})
    for episode in (1, 2, 3):
        rng, epsilon = stream(4, "exploration", episode), 0.7 * math.exp(-0.5 * (episode - 1))
        assert agent.epsilon == pytest.approx(epsilon, rel=1e-12)
        for _ in range(20):
            explores = rng.random() < epsilon
            expected = ([rng.permutation(3)[0]], "random") if explores else (best, "greedy")
            assert agent.act(seen, {}) == expected
        agent.end_episode()


def test_a_random_choice_is_repeated_up_to_the_longest_stay():
    agent = make_agent(NUM_NODES=10, EPSILON=1.0, ROUNDS_PER_CHOICE=2, MAX_STAY=7)
    kinds = [agent.act(np.ones(4, np.float32), {})[1] for _ in range(12_000)]
    starts = [*np.flatnonzero(np.array(kinds) == "random"), 12_000]
    lengths = np.diff(starts)[:-1]
    # One, two or three choices of two steps each; about 1,000 of each, standard deviation 26.
    counts = np.bincount(lengths, minlength=7)
    assert counts[[2, 4, 6]].sum() == len(lengths)
    assert abs(counts[[2, 4, 6]] - len(lengths) / 3).max() < 5 * 26


def without(count, *actions):
    """Return an info whose action mask leaves out some actions of so many."""
    return {"action_mask": np.isin(np.arange(count), actions, invert=True).astype(np.int8)}


def test_repetitions_end_with_the_episode_and_where_a_node_is_left_out():
    agent = make_agent(NUM_NODES=10, EPSILON=1.0, MAX_STAY=1000)
    observation = np.ones(4, np.float32)
    (node,), kind = agent.act(observation, {})
    assert kind == "random"
    assert agent.act(observation, {}) == ([node], "repeated")
    assert agent.act(observation, without(10, (node + 1) % 10)) == ([node], "repeated")
    (after,), kind = agent.act(observation, without(10, node))
    assert kind == "random"
    assert after != node
    agent.end_episode()
    agent.epsilon = 0.0
    assert agent.act(observation, {})[1] == "greedy"


@pytest.mark.parametrize("per_step", [1, 3])
def test_actions_that_the_mask_leaves_out_are_never_chosen(per_step):
    agent = make_agent(NUM_NODES=6, NODES_PER_ROUND=per_step, EPSILON=0.5)
    observation = np.ones(4, np.float32)
    best = agent.greedy(observation, {"round": 1})
    order = np.argsort(-agent.q.values(agent.weights, observation[None])[0])
    expected = [action for action in order if action not in best][:per_step]
    info = {"round": 1, "node": best, **without(6, *best)}
    assert agent.greedy(observation, info) == expected
    for _ in range(100):
        assert not set(agent.act(observation, info)[0]) & set(best)


def test_a_choice_lasts_its_rounds():
    agent = make_agent(NUM_NODES=10, EPSILON=0.5, ROUNDS_PER_CHOICE=3)
    chosen = [agent.act(np.ones(4, np.float32), {}) for _ in range(300)]
    for first in range(0, 300, 3):
        nodes, kinds = zip(*chosen[first : first + 3], strict=True)
        assert nodes[0] == nodes[1] == nodes[2]
        assert kinds[0] in ("random", "greedy")
        assert kinds[1:] == ("repeated", "repeated")


def test_the_frozen_policy_chooses_every_few_rounds():
    agent = make_agent(ROUNDS_PER_CHOICE=3)
    observation = np.ones(4, np.float32)
    best = agent.greedy(observation, {"round": 1})
    infos = [{"round": past, "node": 7} for past in range(1, 8)]
    chosen = [agent.greedy(observation, info) for info in infos]
    assert chosen == [best, 7, 7, best, 7, 7, best]


def test_equal_q_values_give_the_lower_number(monkeypatch):
    agent = make_agent(NUM_NODES=5, NODES_PER_ROUND=2)
    monkeypatch.setattr(
        agent.q, "values", lambda weights, observations: np.array([[1.0, 3.0, 2.0, 3.0, 2.0]])
    )
    assert agent.greedy(np.ones(4, np.float32), {"round": 1}) == [1, 3]


# --- Targets ---------------------------------------------------------------------------------

# Q values of a network, and of the network or a target network at the next observation.
Q_NOW = np.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])
Q_NEXT = np.array([[4.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
SAMPLE = {
    "actions": np.array([[1], [2]], np.int32),
    "rewards": np.array([-0.5, 0.75]),
    "dones": np.array([False, True]),
    "steps": np.array([1, 1], np.int32),
    "next_masks": np.ones((2, 3), bool),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # -0.5 + 0.8 * 4 for the action taken; the reward alone at an episode's end.
        ({}, [[1.0, 2.7, 3.0], [0.5, -1.0, 0.75]]),
        # Without action 0 the next value is 1: -0.5 + 0.8 * 1.
        ({"next_masks": [[False, True, True]] * 2}, [[1.0, 0.3, 3.0], [0.5, -1.0, 0.75]]),
        ({"actions": [[1, 0], [2, 1]]}, [[2.7, 2.7, 3.0], [0.5, 0.75, 0.75]]),
        # The stored reward is the sum of three already: -0.5 + 0.8**3 * 4.
        ({"steps": [3, 1]}, [[1.0, 1.548, 3.0], [0.5, -1.0, 0.75]]),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_targets_by_hand(changes, expected, normalize):
    settings = Settings(DISCOUNT=0.8, FIT_ALL_ACTIONS=normalize)
    values = [tf.constant(array, tf.float32) for array in (Q_NOW, Q_NEXT)]
    fields = {
        name: tf.constant(changes.get(name, field), field.dtype) for name, field in SAMPLE.items()
    }
    if normalize:
        expected = np.array(expected) / math.sqrt(np.square(expected).sum())
    np.testing.assert_allclose(q_targets(*values, fields, settings), expected, rtol=1e-6)


def remembered(actions=(1, 2, 0, 1, 2), random=(), **overrides):
    """Rewards 1, 2, 3, 4, 5 in an episode of five steps, and the first two of another.

    The steps ``random`` have random choices.
    """
    agent = make_agent(**{"DISCOUNT": 0.5, **overrides})
    for step in (1, 2, 3, 4, 5, 1, 2):
        chosen_by = "random" if step in random else "greedy"
        seen, following = np.full(4, step), np.full(4, step + 1)
        choice = (seen, [actions[step - 1]], chosen_by)
        agent.remember(Round(*choice, float(step), following, step == 5, False, {}))
    return [
        (
            t["observations"][0],
            t["actions"][0],
            t["rewards"],
            t["next_observations"][0],
            *t.item()[4:6],
        )
        for t in agent.replay.latest(9)
    ]


def test_returns_of_several_steps_by_hand():
    assert remembered(N_STEP=1) == [
        (s, s % 3, s, s + 1, s == 5, 1) for s in (1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0)
    ]
    # 1 + 2 / 2 + 3 / 4, and so on; what is left at the end: 4 + 5 / 2 and 5.
    assert remembered(N_STEP=3) == [
        (1, 1, 2.75, 4, False, 3),
        (2, 2, 4.5, 5, False, 3),
        (3, 0, 6.25, 6, True, 3),
        (4, 1, 6.5, 6, True, 2),
        (5, 2, 5, 6, True, 1),
    ]


def test_returns_are_at_least_those_of_a_choice():
    assert remembered((1, 1, 0, 0, 2), N_STEP=1, ROUNDS_PER_CHOICE=2) == [
        (1, 1, 2, 3, False, 2),  # 1 + 2 / 2; step 2 has other actions after it
        (3, 0, 5, 5, False, 2),
        (5, 2, 5, 6, True, 1),
        (1, 1, 2, 3, False, 2),
    ]


def test_returns_end_before_a_random_choice():
    assert remembered(N_STEP=3, random=(3,)) == [
        (1, 1, 2, 3, False, 2),  # 1 + 2 / 2
        (2, 2, 2, 3, False, 1),
        (3, 0, 6.25, 6, True, 3),
        (4, 1, 6.5, 6, True, 2),
        (5, 2, 5, 6, True, 1),
    ]


def test_a_choice_of_two_rounds_is_stored_where_it_lasted():
    """Steps 2, 4: the next step has another action. Step 5 ends the episode."""
    kept = {1: (1, 1, 2.75, 4, False, 3), 3: (3, 0, 6.25, 6, True, 3), 5: (5, 2, 5, 6, True, 1)}
    assert remembered((1, 1, 0, 0, 2), N_STEP=3, ROUNDS_PER_CHOICE=2) == list(kept.values())
    # A random choice of the same action is a new choice: step 2 did not last before it.
    found = remembered((1, 1, 1, 1, 2), random=(3,), N_STEP=3, ROUNDS_PER_CHOICE=2)
    assert found == [(1, 1, 2, 3, False, 2), (3, 1, 6.25, 6, True, 3), kept[5]]


def test_the_starters_round_is_not_stored():
    agent = make_agent()
    agent.remember(Round(None, None, "starter", 1.0, np.ones(4), False, False, {}))
    assert len(agent.replay) == 0
    agent.remember(Round(np.ones(4), [1], "greedy", 2.0, np.ones(4), False, False, {}))
    assert agent.replay.latest(9)["rewards"].tolist() == [2.0]


# --- Training --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "expected"), [("greedy", 2), ("random", 1)])
def test_the_mask_is_stored_with_the_next_observation(kind, expected):
    """That after the second step, or before it, where a random choice ends the first one's sum."""
    agent = make_agent(N_STEP=2)
    for step in (1, 2):
        seen, following = np.full(4, step), np.full(4, step + 1)
        agent.remember(Round(seen, [0], kind, 1.0, following, False, False, without(3, step)))
    (stored,) = agent.replay.latest(9)
    assert stored["next_masks"].tolist() == [True, expected != 1, expected != 2]
    assert stored["next_observations"][0] == expected + 1


def filled(agent, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        a, b = rng.normal(size=(2, 4))
        agent.replay.add(
            a, [int(rng.integers(3))], float(rng.normal()), b, bool(rng.random() < 0.1)
        )
    return agent


def test_gradient_steps_of_an_episode():
    # The public code's 128 transitions in batches of 16 are 8 steps.
    agent = filled(make_agent(UPDATES_PER_EPISODE=3), 200)
    agent.train()
    assert float(agent.moments.step) == 24


def test_the_target_network_moves_to_the_q_network():
    agent = filled(make_agent(TARGET_RATE=0.25, REPLAY_SAMPLE=32), 50)
    for _ in range(3):
        before = agent.target_weights.numpy()
        agent.train()
        moved = 0.75 * before + 0.25 * agent.weights.numpy()
        np.testing.assert_allclose(agent.target_weights.numpy(), moved, atol=1e-7)
        assert abs(agent.target_weights.numpy() - before).max() > 1e-5
        agent.end_episode()


def test_a_state_of_another_agent_is_refused_and_changes_nothing():
    agent = make_agent()
    before = agent.weights.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[148\].*\[131\]"):
        agent.load_state(make_agent(NUM_NODES=4).state(), agent.replay.latest(0))
    assert (agent.weights.numpy() == before).all()


def test_the_streams_of_a_seed():
    agent = filled(make_agent(SEED=4, REPLAY_SAMPLE=32), 50)
    weights = agent.q.network.initial_weights(stream(4, "network"))
    moments = agent.moments
    for episode in (1, 2):
        assert (agent.weights.numpy() == weights.numpy()).all()
        draws = agent.replay.sample(1, 32, stream(4, "replay", episode))
        weights, moments, _ = agent.q.train(weights, moments, weights, *draws)
        agent.train()
        agent.end_episode()
    assert (agent.weights.numpy() == weights.numpy()).all()


# --- A problem with a known best policy ------------------------------------------------------


class Corridor(gymnasium.Env):
    """Six cells in a row; the goal is to the right of the last.

    Each step costs 1. Action 0 goes left, 1 right, 2 stays. Action 3 leaves by a side door for -10:
    better than wandering about, and worse than the at most six steps to the goal.
    """

    observation_space = gymnasium.spaces.Box(0, 1, (6,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = int(self.np_random.integers(6)), 0
        return np.eye(6, dtype=np.float32)[self.cell], {}

    def step(self, action):
        self.steps += 1
        self.cell = max(0, self.cell + {0: -1, 1: 1, 2: 0, 3: 0}[action])
        done = self.cell == 6 or action == 3
        observation = np.eye(6, dtype=np.float32)[min(self.cell, 5)]
        reward = -10.0 if action == 3 else -1.0
        return observation, reward, done, self.steps >= 30, {}


# What the tuned settings combine. Targets of several rewards include exploring choices, so the
# values are lower than the best policy's.
TOGETHER = {
    "N_STEP": 3,
    "TARGET_RATE": 1.0,
    "Q_WEIGHT_DECAY": 0.01,
    "MAX_STAY": 4,
}


@pytest.mark.parametrize(
    ("seed", "options", "tolerance"),
    [(0, {}, 0.3), (2, TOGETHER, 1.5)],
    ids=["paper", "tuned"],
)
def test_agent_solves_a_problem_with_a_known_best_policy(seed, options, tolerance):
    env = Corridor()
    settings = Settings(
        SEED=seed,
        NUM_NODES=4,
        HIDDEN_UNITS=(32,),
        FIT_ALL_ACTIONS=False,
        REPLAY_SAMPLE=64,
        UPDATES_PER_EPISODE=10,
        Q_LEARNING_RATE=0.005,
        **options,
    )
    agent = DQNAgent(6, settings)
    for episode in range(150):
        observation, _ = env.reset(seed=episode if episode == 0 else None)
        done = False
        while not done:
            actions, chosen_by = agent.act(observation, {})
            following, reward, terminated, truncated, info = env.step(actions[0])
            result = (reward, following, terminated, truncated, info)
            agent.remember(Round(observation, actions, chosen_by, *result))
            observation, done = following, terminated or truncated
        agent.train()
        agent.end_episode()
    # To the right from every cell, with the value of 1 to 6 steps at -1, discounted by 0.9.
    states = np.eye(6, dtype=np.float32)
    assert [agent.greedy(state, {"round": 1})[0] for state in states] == [1] * 6
    values = agent.q.values(agent.weights, states).max(axis=1)
    expected = [-(1 - 0.9**steps) / 0.1 for steps in (6, 5, 4, 3, 2, 1)]
    np.testing.assert_allclose(values, expected, atol=tolerance)

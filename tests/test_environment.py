import warnings

import gymnasium
import numpy as np
import pytest
from conftest import small_settings
from gymnasium.utils.env_checker import check_env
from sklearn.decomposition import PCA

import data
import environment
from config import Settings
from environment import (
    DecentralizedLearning,
    distance_matrix,
    pca_scores,
    positive_at,
    power_reward,
    progress_reward,
    rollout,
)

# --- Distances and reward --------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "seed", "divisor"), [(10, 0, 10), (30, 1, 5)])
def test_distances_of_the_public_code(nodes, seed, divisor):
    settings = Settings(NUM_NODES=nodes, DISTANCE_SEED=seed, DISTANCE_SCALE=1 / divisor, SEED=9)
    np.random.seed(seed)
    b = np.random.random_sample((nodes, nodes)) / divisor
    expected = (b + b.T) / 2
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(distance_matrix(settings), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("accuracy", "distance", "base", "expected"),
    [
        (0.8, 0.0, 32.0, 0.0),  # at the goal: 32^0 - 1
        (1.0, 0.05, 32.0, 0.95),  # 32^0.2 = 2
        (0.6, 0.05, 32.0, -0.55),  # 32^-0.2 = 1/2
        (0.0, 0.1, 32.0, -1.0375),  # 32^-0.8 = 1/16
        (0.3, 0.0, 4.0, -0.5),  # 4^-0.5 = 1/2
    ],
)
def test_reward_by_hand(accuracy, distance, base, expected):
    settings = Settings(REWARD_BASE=base)
    assert power_reward(accuracy, distance, settings) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("accuracy", "before", "missed", "expected"),
    [
        # Potentials: 12 (exp(-1) - 1) = -7.58545, 12 (exp(-5) - 1) = -11.91914, 0 from the goal on.
        (0.7, 0.3, False, 0.9 * -7.58545 + 11.91914 - 1.25),
        (0.3, 0.7, False, 0.9 * -11.91914 + 7.58545 - 1.25),
        (0.3, 0.7, True, 0.9 * -11.91914 + 7.58545 - 1.25 - 15),
        (0.9, 0.7, False, 7.58545 - 0.25),
        (0.8, 0.3, False, 11.91914 - 0.25),
    ],
)
def test_progress_reward_by_hand(accuracy, before, missed, expected):
    settings = Settings(DISCOUNT=0.9, GOAL_ACCURACY=0.8)
    value = progress_reward(accuracy, before, 0.25, missed, settings)
    assert value == pytest.approx(expected, abs=1e-4)


def test_progress_rewards_of_an_episode(few, monkeypatch):
    env = DecentralizedLearning(small_settings(REWARD="progress", DISCOUNT=0.5, MAX_ROUNDS=3), few)
    accuracies = iter([0.2, 0.5, 0.7])
    monkeypatch.setattr(env, "_evaluate", lambda: next(accuracies))
    rewards = [env.reset(seed=0)[1]["reward"], *(env.step(node)[1] for node in (1, 1))]
    way = env.distances[0, 1]
    # Potentials before round 1 and after rounds 1 to 3; the last round misses the goal.
    a, b, c, d = -11.995974, -11.970255, -11.402555, -7.585447
    expected = [b / 2 - a - 1, c / 2 - b - 1 - way, d / 2 - c - 1 - 15]
    assert rewards == pytest.approx(expected, abs=1e-5)


# --- PCA -------------------------------------------------------------------------------------


def check_against_scikit_learn(models, row_of_node, components):
    states = models[row_of_node].astype(np.float64)
    pca = PCA(n_components=components, svd_solver="full")
    expected = pca.fit_transform(states)
    scores = pca_scores(models, np.array(row_of_node), components)
    assert scores.shape == (len(row_of_node), components)
    assert scores.dtype == np.float32
    real = pca.explained_variance_ > 1e-9 * max(pca.explained_variance_.max(), 1e-30)
    np.testing.assert_allclose(scores[:, real], expected[:, real], atol=1e-4)
    assert not scores[:, ~real].any()
    return int(real.sum())


def random_models(count):
    return np.random.default_rng(0).normal(0, 0.05, (count, 33_580)).astype(np.float32)


@pytest.mark.parametrize(
    ("row_of_node", "components", "rank"),
    [
        (range(10), 1, 1),
        (range(10), 3, 3),
        (range(10), 10, 9),
        ([3, 0, 1, 1, 3, 3, 2, 3, 0, 3], 10, 3),  # 4 distinct models on 10 nodes
    ],
)
def test_pca_against_scikit_learn(row_of_node, components, rank):
    models = random_models(max(row_of_node) + 1)
    assert check_against_scikit_learn(models, row_of_node, components) == rank


def test_pca_of_one_model_that_differs():
    """The public code's observation: rank 1, worked out by hand."""
    base = random_models(1)[0]
    moved = base.copy()
    moved[5] += 0.3
    moved[7] -= 0.4  # the greatest loading: its sign is made positive
    models = np.stack([moved, base])
    row_of_node = np.array([1, 1, 0, 1, 1])
    scores = pca_scores(models, row_of_node, 5)
    # The step has length 0.5 and the mean a fifth of it; the axis points the other way.
    expected = np.where(row_of_node == 0, -0.4, 0.1)
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)
    assert not scores[:, 1:].any()
    assert check_against_scikit_learn(models, row_of_node, 5) == 1


def test_pca_without_any_variance_or_with_diverged_weights_is_0():
    assert not pca_scores(random_models(1), np.zeros(4, int), 4).any()
    diverged = random_models(2)
    diverged[0, 3] = np.inf
    assert not pca_scores(diverged, np.array([0, 1, 1]), 3).any()


# --- The Gymnasium interface -----------------------------------------------------------------


@pytest.mark.parametrize("per_round", [1, 2])
def test_check_env_without_warnings(few, per_round):
    settings = small_settings(NODES_PER_ROUND=per_round)
    made = gymnasium.make("HomogeneousLearning-v0", settings=settings, dataset=few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped, skip_render_check=True)


def left_out(nodes, few, **settings):
    """Return the nodes that the action mask leaves out after each round."""
    limits = {"MAX_ROUNDS": 20, "GOAL_ACCURACY": 1.0, "MAX_STAY": 2}
    env = DecentralizedLearning(small_settings(**limits, **settings), few)
    found = [env.reset(seed=0, options={"nodes": nodes[0]})[1]]
    found += [env.step(np.squeeze(action))[-1] for action in nodes[1:]]
    return [np.flatnonzero(info["action_mask"] == 0).tolist() for info in found]


def test_the_action_mask_leaves_out_a_node_after_its_longest_stay(few):
    nodes = [[0], [0], [0], [1], [0], [0]]
    assert left_out(nodes, few, NUM_NODES=3) == [[], [0], [0], [], [], [0]]
    several = [[0, 1], [1, 2], [2, 1], [0, 3]]
    assert left_out(several, few, NUM_NODES=4, NODES_PER_ROUND=2) == [[], [1], [1, 2], []]
    # One of three nodes is too few for the next round.
    assert left_out(several[:3], few, NUM_NODES=3, NODES_PER_ROUND=2) == [[], [1], []]


@pytest.mark.parametrize(
    ("accuracies", "terminated"),
    [([0.1, 0.59, 0.59], False), ([0.59, 0.6], True), ([0.1, 0.2, 0.9], True), ([0.6], True)],
)
def test_an_episode_ends_at_the_goal_or_at_the_limit(few, monkeypatch, accuracies, terminated):
    env = DecentralizedLearning(small_settings(GOAL_ACCURACY=0.6, MAX_ROUNDS=3), few)
    after = iter(accuracies)
    monkeypatch.setattr(env.foundation, "evaluate", lambda weights: next(after))
    rounds = list(rollout(env, lambda *_: (1, "greedy"), seed=0))
    ends = [(round_.terminated, round_.truncated) for round_ in rounds]
    assert ends == [(False, False)] * (len(accuracies) - 1) + [(terminated, not terminated)]
    assert rounds[-1].info["goal_reached"] is terminated
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(1)


def test_images_that_judge_a_round(few, monkeypatch):
    """Drawn anew for each round, by the episode's seed, and enough to tell models apart."""
    monkeypatch.setattr(environment, "_EVALUATION_SIZES", (50,))
    env = DecentralizedLearning(small_settings(REWARD="progress", LEARNING_RATE=0.01), few)
    whole = DecentralizedLearning(small_settings(LEARNING_RATE=0.01), few)
    seen, evaluate = [], env.foundation.evaluate

    def spy(weights, images=None):
        seen.append(images)
        return evaluate(weights, images)

    monkeypatch.setattr(env.foundation, "evaluate", spy)
    accuracies = [env.reset(seed=3)[1]["accuracy"], *(env.step(n)[4]["accuracy"] for n in (0, 1))]
    judges = seen[:3]
    assert len({tuple(images) for images in judges}) == 3
    models = [env._model]
    again = [env.reset(seed=3)[1]["accuracy"], *(env.step(n)[4]["accuracy"] for n in (0, 1))]
    assert again == accuracies
    assert accuracies[-1] == evaluate(models[0], judges[-1])
    env.reset(seed=4)
    assert set(seen[-1]) != set(judges[0])
    # Nothing else differs from an environment that all images judge.
    whole.reset(seed=3)
    for node in (0, 1):
        whole.step(node)
    np.testing.assert_array_equal(whole._model, models[0])


@pytest.mark.parametrize(
    ("counts", "correct", "numbers", "accuracy"),
    [
        # Three standard errors of 50 and 100 images of 359, at 0.6: 0.1931 and 0.1250.
        ((50, 100), (20,), (50,), 20 / 50),  # 0.4 < 0.6 - 0.1931 = 0.4069
        ((50, 100), (21, 26), (50, 50), 47 / 100),  # 0.47 < 0.4750
        ((50, 100), (21, 27, 167), (50, 50, 259), 215 / 359),  # 0.4800; then 0.5989
        ((50, 100), (50, 50, 116), (50, 50, 259), 216 / 359),  # 0.6017: the goal is reached
        ((50, 100), (50, 50, 115), (50, 50, 259), 215 / 359),
        # There are 359 images.
        ((358,), (30,), (358,), 30 / 358),
        ((359,), (30,), (359,), 30 / 359),
        ((2000,), (30,), (359,), 30 / 359),
    ],
)
def test_all_images_judge_whether_the_goal_is_reached(
    few, monkeypatch, counts, correct, numbers, accuracy
):
    """Neither good nor bad luck with the drawn images decides."""
    monkeypatch.setattr(environment, "_EVALUATION_SIZES", counts)
    settings = small_settings(REWARD="progress", GOAL_ACCURACY=0.6, MAX_ROUNDS=6)
    env = DecentralizedLearning(settings, few)
    seen = []

    def evaluate(weights, images):
        seen.append(images.tolist())
        return correct[len(seen) - 1] / len(images)

    monkeypatch.setattr(env.foundation, "evaluate", evaluate)
    info = env.reset(seed=0)[1]
    assert tuple(map(len, seen)) == numbers
    assert len({image for images in seen for image in images}) == sum(numbers)  # each judges once
    assert info["accuracy"] == accuracy
    assert info["goal_reached"] == (accuracy >= 0.6)


@pytest.mark.parametrize("action", [4, -1, [1, 2], [[1]], [], 1.9, True, "1", None])
def test_bad_actions(few, action):
    env = DecentralizedLearning(small_settings(), few)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: got"):
        env.step(action)


def test_several_nodes_must_be_distinct(few):
    env = DecentralizedLearning(small_settings(NODES_PER_ROUND=2), few)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="takes 2 distinct"):
        env.step([1, 1])
    for _ in range(50):
        assert env.action_space.contains(env.action_space.sample())
    assert not env.action_space.contains(np.array([3, 3]))
    mask = np.array([0, 1, 1, 0], np.int8)
    for _ in range(20):
        assert sorted(env.action_space.sample(mask)) == [1, 2]
    with pytest.raises(ValueError, match="probabilities"):
        env.action_space.sample(probability=np.full(4, 0.25))


def test_seed_decides_model_and_order_whatever_the_actions(few):
    env = DecentralizedLearning(small_settings(), few)
    one, first = env.reset(seed=5)
    env.step(3)
    two, second = env.reset(seed=5)
    assert (one == two).all()
    np.testing.assert_equal(first, second)
    other, _ = env.reset(seed=6)
    assert (one != other).any()
    # Without a seed, the generator goes on: a new model, the same in each such sequence.
    env.reset(seed=5)
    third, _ = env.reset()
    env.reset(seed=5)
    fourth, _ = env.reset()
    assert (third == fourth).all()
    assert (third != one).any()


# --- Nodes ------------------------------------------------------------------------------------


def test_another_node_may_train_round_1(few):
    environment = DecentralizedLearning(small_settings(), few)
    _, info = environment.reset(seed=3, options={"nodes": [2]})
    assert (info["round"], info["node"], info["communication_cost"]) == (1, 2, 0.0)
    starter = DecentralizedLearning(small_settings(STARTER_NODE=2), few)
    _, expected = starter.reset(seed=3)
    np.testing.assert_equal(info, expected)


@pytest.mark.parametrize("nodes", [[], [1, 1], 2, None, "1", {1, 2}, [[1]]])
def test_round_1_takes_a_list_of_distinct_nodes(few, nodes):
    environment = DecentralizedLearning(small_settings(), few)
    with pytest.raises(ValueError, match=r"(action|nodes): got"):
        environment.reset(seed=3, options={"nodes": nodes})


# --- Observations ----------------------------------------------------------------------------


def test_any_kind_can_be_observed_whatever_the_agent_sees(few):
    blind = DecentralizedLearning(small_settings(OBSERVATION="zeros"), few)
    blind.reset(seed=3)
    blind.step(1)
    for kind in ("broadcast", "local", "both", "last_node", "zeros"):
        env = DecentralizedLearning(small_settings(OBSERVATION=kind), few)
        env.reset(seed=3)
        np.testing.assert_array_equal(blind.observe(kind), env.step(1)[0])
    with pytest.raises(KeyError, match="fixed"):
        blind.observe("fixed")


def test_signs_by_hand():
    scores = np.array([[1, -2, 0], [-3, 4, -5]], np.float32)
    assert positive_at(0, scores).tolist() == [[1, 2, 0], [-3, -4, -5]]
    assert positive_at(1, scores).tolist() == [[-1, -2, 0], [3, 4, 5]]
    assert positive_at(1, scores).dtype == np.float32


def test_both_observations_side_by_side(few):
    """The first scores, scaled; the last node's is positive, which scikit-learn's rule is not."""
    kinds = ("broadcast", "local", "both")
    envs = {
        kind: DecentralizedLearning(small_settings(OBSERVATION=kind, MAX_ROUNDS=9), few)
        for kind in kinds
    }
    turned = []
    for node in (0, 1, 1, 2, 3, 0):
        seen = {}
        for kind, env in envs.items():
            seen[kind] = (env.step(node) if turned else env.reset(seed=4))[0]
            assert seen[kind].shape == env.observation_space.shape
        assert seen["both"].shape == (8,)
        for kind, scale, both in zip(kinds, (4, 0.4), np.split(seen["both"], 2), strict=False):
            first = seen[kind].reshape(4, 4)[:, 0]
            turned.append(-1 if first[node] < 0 else 1)
            np.testing.assert_array_equal(both, np.float32(scale * turned[-1]) * first)
            assert both[node] >= 0
    assert (np.array(turned) < 0).any()
    assert (np.array(turned) > 0).any()


def test_observations_without_weights(few):
    seen = {}
    for kind in ("last_node", "zeros"):
        env = DecentralizedLearning(small_settings(OBSERVATION=kind), few)
        seen[kind] = [env.reset(seed=0)[0], *(env.step(node)[0] for node in (2, 2, 1))]
        assert all(env.observation_space.contains(o) for o in seen[kind])
    assert np.array(seen["last_node"]).tolist() == np.eye(4)[[0, 2, 2, 1]].tolist()
    assert not np.any(seen["zeros"])
    several = DecentralizedLearning(small_settings(OBSERVATION="last_node", NODES_PER_ROUND=2), few)
    several.reset(seed=0)
    assert several.step(np.array([3, 1]))[0].tolist() == [0, 1, 0, 1]


# --- Rollout ---------------------------------------------------------------------------------


def test_a_rollout_step_by_step(few):
    """The rounds are those of an environment that is stepped by hand, yielded one at a time."""
    env, twin = (DecentralizedLearning(small_settings(MAX_ROUNDS=4), few) for _ in range(2))
    choices, asked = [(2, "random"), (2, "repeated"), (1, "greedy")], []

    def policy(*seen):
        asked.append(seen)
        return choices[len(asked) - 1]

    rounds, (seen, info) = rollout(env, policy, seed=7), twin.reset(seed=7)
    first = (None, None, "starter", info["reward"], seen, False, False, info)
    np.testing.assert_equal(next(rounds), first)
    for number, (node, chosen_by) in enumerate(choices):
        assert len(asked) == number
        round_, (following, value, *ends, after) = next(rounds), twin.step(node)
        np.testing.assert_equal(asked[-1], (seen, info))
        expected = (seen, node, chosen_by, value, following, *ends, after)
        np.testing.assert_equal(round_, expected)
        seen, info = following, after
    assert ends == [False, True]
    assert list(rounds) == []


def test_the_registered_environment_has_the_default_settings(monkeypatch, digits):
    monkeypatch.setitem(data.DATASETS, "auto", lambda data_dir: digits)
    env = gymnasium.make("HomogeneousLearning-v0").unwrapped
    assert env.settings == Settings()
    assert env.dataset is digits
    assert (env.action_space.n, env.observation_space.shape) == (10, (100,))

"""The environment against tests/reference.py, round for round."""

import dataclasses

import gymnasium
import numpy as np
import pytest
from conftest import small_settings
from reference import Reference, flat

import data
from config import make_settings, stream
from environment import DecentralizedLearning

# Both compute in float32, in another order of the same sums: products of matrices against
# convolutions, one batch of 1,000 against 32 in the evaluation. A relative difference of 6e-8 in a
# gradient grows through the steps that follow. Adam divides a gradient by its own running size, so
# a step is about the learning rate, 1e-3, however small the gradient is; a weight whose gradient is
# itself rounding noise takes such a step in a direction of its own. After the walks below (up to
# 64 steps) the largest difference that was seen is 4.2e-7, a rounding of the weights themselves;
# after longer ones a weight or two differ by a part of a step. The bound is one whole step.
WEIGHTS = 1e-3
# Seen: 1.6e-5. Scores lie between -2 and 2.
OBSERVATION = 1e-3
# A test image flips where its two greatest logits are as close as the rounding.
IMAGES = 3


def compare(settings, dataset, walk, seed, skipped=0):
    """Runs both along a walk, after whose first round both count ``skipped`` rounds more.

    The reference is slow and knows both observations: an environment of each kind goes with it.
    """
    kinds = ("broadcast", "local")
    environments = {
        kind: DecentralizedLearning(dataclasses.replace(settings, OBSERVATION=kind), dataset)
        for kind in kinds
    }
    seen = {kind: environments[kind].reset(seed=seed) for kind in kinds}
    env = environments["broadcast"]
    # The same initial weights and the same order of images as the environment draws them.
    episode = int(gymnasium.utils.seeding.np_random(seed)[0].integers(2**63))
    network = env.foundation.network
    initial = network.split(network.initial_weights(stream(episode, "initialisation")))
    shuffling = stream(episode, "shuffling")
    main = round(settings.HETEROGENEITY * settings.SAMPLES_PER_NODE)
    reference = Reference(
        ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)),
        [part.numpy() for part in initial],
        (shuffling.permutation(settings.SAMPLES_PER_NODE) for _ in range(1000)),
        nodes=settings.NUM_NODES,
        main=main,
        rest=settings.SAMPLES_PER_NODE - main,
        kinds=kinds,
        epochs=settings.LOCAL_EPOCHS,
        keep_moments=settings.KEEP_MOMENTS,
    )
    images = 1 / len(dataset.y_test)
    done = False
    for action in [None, *walk]:
        nodes = [settings.STARTER_NODE] if action is None else np.atleast_1d(action).tolist()
        expected, accuracy, reward, expected_done = reference.round(nodes)
        weights = flat(reference.global_model.get_weights())
        for kind, env in environments.items():
            observation, info = seen[kind]
            if action is not None:
                observation, value, terminated, truncated, info = env.step(action)
                assert value == info["reward"]
                done = terminated or truncated
            difference = abs(info["accuracy"] - accuracy)
            assert difference <= (IMAGES + 0.01) * images
            # The reward's slope by the accuracy is ln(32) 32^(accuracy - goal), below 7.
            assert info["reward"] == pytest.approx(reward, abs=7 * difference + 1e-6)
            np.testing.assert_allclose(env._model.numpy(), weights, rtol=0, atol=WEIGHTS)
            np.testing.assert_allclose(observation, expected[kind], rtol=0, atol=OBSERVATION)
            assert done == expected_done
            assert not done or info["round"] == 1 + len(walk) + skipped
            if action is None:
                env._round += skipped
        if action is None:
            reference.rounds += skipped
    return info


def test_a_walk_that_stays_moves_and_comes_back(few):
    settings = small_settings(MAX_ROUNDS=36, SAMPLES_PER_NODE=120)
    compare(settings, few, [0, 0, 0, 1, 2, 1, 2, 2, 0, 1, 0], seed=7)


def test_the_last_round_is_the_same(few):
    """Round 36, below the goal: both end there, and not a round earlier."""
    info = compare(small_settings(MAX_ROUNDS=36), few, [1, 2], seed=9, skipped=33)
    assert info["round"] == 36
    assert not info["goal_reached"]


def test_moments_that_start_anew_at_each_visit(few):
    compare(small_settings(KEEP_MOMENTS=False), few, [0, 1], seed=6)


def test_two_nodes_in_a_round_and_two_epochs(few):
    settings = small_settings(NODES_PER_ROUND=2, LOCAL_EPOCHS=2, MAX_ROUNDS=36)
    compare(settings, few, [[1, 2], [2, 0]], seed=8)


@pytest.fixture(scope="module")
def mnist(mnist_path):
    return data.load(make_settings(DATASET="mnist", DATA_FILE=str(mnist_path)))


def test_mnist_with_the_default_settings(mnist):
    info = compare(make_settings(DATASET="mnist"), mnist, [0, 5, 0], seed=1)
    assert info["accuracy"] > 0.15

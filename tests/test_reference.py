"""The environment against tests/reference.py, round for round."""

import gymnasium
import numpy as np
import pytest
from conftest import small_settings
from reference import Reference, flat

import data
from config import Settings, stream
from environment import DecentralizedLearning

# Both compute in float32, but sum in another order. Adam's step is about the learning rate, 1e-3,
# however small the gradient is. A gradient that is rounding noise gives a step in either direction.
# So a few weights of 33,580 may be some steps apart, and all others agree to less than one.
WEIGHTS = 1e-3
FEW_WEIGHTS = 1e-2
# Scores are between -2 and 2; their largest difference is 2e-5.
OBSERVATION = 1e-3
# A test image whose two greatest logits differ by no more than rounding may flip.
IMAGES = 3


def compare(settings, dataset, walk, seed):
    """Run both along a walk.

    The reference is slow and returns both observations: an environment of each kind follows it.
    """
    kinds = ("broadcast", "local")
    environments = {
        kind: DecentralizedLearning(settings.replace(OBSERVATION=kind), dataset) for kind in kinds
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
    )
    images = 1 / len(dataset.y_test)
    for action in [None, *walk]:
        nodes = [settings.STARTER_NODE] if action is None else np.atleast_1d(action).tolist()
        expected, accuracy, reward = reference.round(nodes)
        weights = flat(reference.global_model.get_weights())
        for kind, env in environments.items():
            observation, info = seen[kind]
            if action is not None:
                observation, value, _, _, info = env.step(action)
                assert value == info["reward"]
            difference = abs(info["accuracy"] - accuracy)
            assert difference <= (IMAGES + 0.01) * images
            # The reward's slope by the accuracy is ln(32) 32^(accuracy - goal), below 7.
            assert info["reward"] == pytest.approx(reward, abs=7 * difference + 1e-6)
            apart = np.abs(env._model.numpy() - weights)
            assert np.quantile(apart, 0.999) <= WEIGHTS
            assert apart.max() <= FEW_WEIGHTS
            np.testing.assert_allclose(observation, expected[kind], rtol=0, atol=OBSERVATION)
    return info


def test_a_walk_that_stays_moves_and_comes_back(few):
    settings = small_settings(NUM_NODES=3, SAMPLES_PER_NODE=120, MAX_ROUNDS=9)
    compare(settings, few, [0, 0, 1, 2, 1, 0], seed=7)


def test_two_nodes_in_a_round_and_two_epochs(few):
    settings = small_settings(NODES_PER_ROUND=2, LOCAL_EPOCHS=2)
    compare(settings, few, [[1, 2], [2, 0]], seed=8)


def test_mnist_with_the_default_settings(mnist_dir):
    settings = Settings(DATASET="mnist", DATA_DIR=str(mnist_dir))
    info = compare(settings, data.load(settings), [5], seed=1)
    assert info["distance"] == pytest.approx(0.060805, abs=1e-6)

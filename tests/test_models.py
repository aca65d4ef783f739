import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, small_settings

import models
from config import ConfigError, stream
from environment import DecentralizedLearning
from models import FlatNetwork, FoundationModel, Moments
from node import DQNAgent, QNetwork, q_targets


def keras_twin(flat, weights, softmax, optimizer=None, loss=None):
    """A plain Keras model with the same layers and weights."""
    twin = keras.models.clone_model(flat.model)
    twin.set_weights([part.numpy() for part in flat.split(weights)])
    if softmax:
        twin = keras.Sequential([twin, keras.layers.Softmax()])
    if optimizer:
        twin.compile(optimizer=optimizer, loss=loss)
    return twin


def flat_weights(twin):
    return np.concatenate([w.ravel() for w in twin.get_weights()])


@pytest.fixture(scope="module")
def foundation(few):
    return FoundationModel(few, 32, 0.001)


def test_initial_weights_are_keras_default(foundation):
    weights = foundation.network.initial_weights(stream(0, "initialisation"))
    shapes = [(5, 5, 1, 20), (20,), (5, 5, 20, 50), (50,), (800, 10), (10,)]
    fans = [25 + 25 * 20, None, 25 * 20 + 25 * 50, None, 810, None]
    for part, shape, fan in zip(foundation.network.split(weights), shapes, fans, strict=True):
        assert part.shape == shape
        if fan is None:
            assert not part.numpy().any()
        else:
            # Glorot uniform: within +-sqrt(6 / (fan in + fan out)), and it fills that range.
            limit = np.sqrt(6 / fan)
            assert np.abs(part).max() <= limit
            assert np.abs(part).max() > 0.98 * limit
            assert abs(np.std(part) - limit / np.sqrt(3)) < 0.06 * limit
    again = foundation.network.initial_weights(stream(0, "initialisation"))
    other = foundation.network.initial_weights(stream(1, "initialisation"))
    assert (weights.numpy() == again.numpy()).all()
    assert (weights.numpy() != other.numpy()).any()


@pytest.mark.parametrize("colour", [False, True])
def test_local_training_is_keras_fit(foundation, few, colour):
    """Two epochs in a given order, the last batch smaller, Adam's moments kept in between.

    Bytes are divided by 255; floats, here of colour images, are taken as they are.
    """
    inputs = few.x_train[:100, ..., None].astype(np.float32) / 255
    batch_size, rate, steps = 32, 0.001, 6  # 32 + 32 + 19 images, twice
    if colour:
        batch_size, rate, steps = 20, 0.002, 10
        inputs = inputs[:, 4:24, 4:24] * np.float32([1, 0.5, 0.2])
        parts = {"x_train": inputs, "x_test": inputs}
        labels = dict.fromkeys(("y_train", "y_test"), few.y_train[:100])
        coloured = dataclasses.replace(few, **parts, **labels)
        foundation = FoundationModel(coloured, batch_size, rate)
    weights = foundation.network.initial_weights(stream(3, "initialisation"))
    twin = keras_twin(
        foundation.network, weights, True, keras.optimizers.Adam(rate), "categorical_crossentropy"
    )
    moments = Moments.fresh(foundation.network.size)
    rng = np.random.default_rng(0)
    for _ in range(2):
        order = rng.permutation(83).astype(np.int32)
        weights, moments = foundation.train_epoch(weights, moments, order)
        y = keras.utils.to_categorical(few.y_train[order], 10)
        twin.fit(inputs[order], y, epochs=1, batch_size=batch_size, shuffle=False, verbose=0)
    assert moments.step.numpy() == steps
    # Steps of at most the rate each: an agreement to 2e-6 leaves room for rounding alone.
    np.testing.assert_allclose(weights.numpy(), flat_weights(twin), atol=2e-6)


def test_evaluation_is_keras_predict(foundation, few):
    weights = foundation.network.initial_weights(stream(0, "initialisation"))
    order = np.arange(2000, dtype=np.int32)
    weights, _ = foundation.train_epoch(weights, Moments.fresh(foundation.network.size), order)
    twin = keras_twin(foundation.network, weights, False)
    logits = twin.predict(few.x_test[..., None].astype(np.float32) / 255, verbose=0)
    correct = int((logits.argmax(axis=1) == few.y_test).sum())
    assert foundation.evaluate(weights) == correct / len(few.y_test)
    assert 0.3 < correct / len(few.y_test) < 1


def test_evaluation_of_some_images_is_that_of_each(foundation, few, monkeypatch):
    foundation.evaluate(tf.zeros(foundation.network.size))  # is compiled with its own batches
    monkeypatch.setattr(models, "_EVALUATION_BATCH", 4)  # 10 = 2 * 4 + 2
    small = FoundationModel(few, 32, 0.001)
    weights = small.network.initial_weights(stream(0, "initialisation"))
    order = np.arange(2000, dtype=np.int32)
    weights, _ = small.train_epoch(weights, Moments.fresh(small.network.size), order)
    images = np.arange(0, 300, 30)
    each = [small.evaluate(weights, np.array([image])) for image in images]
    assert set(each) == {0.0, 1.0}
    assert small.evaluate(weights, images) == np.mean(each)
    assert small.evaluate(weights, np.arange(len(few.y_test))) == foundation.evaluate(weights)


def test_one_compiled_model_serves_a_dataset(few):
    def foundation(dataset, **overrides):
        return DecentralizedLearning(small_settings(**overrides), dataset).foundation

    one = foundation(few)
    assert foundation(few, SEED=3, NUM_NODES=3) is one
    other = dataclasses.replace(few, x_test=few.x_test[:100], y_test=few.y_test[:100])
    latest = one
    for dataset, changes in ((few, {"LEARNING_RATE": 0.1}), (few, {"BATCH_SIZE": 9}), (other, {})):
        model = foundation(dataset, **changes)
        assert model is not latest
        latest = model
    assert latest.test_size == 100


def test_one_compiled_q_network_serves_its_settings():
    def network(inputs=6, **overrides):
        return DQNAgent(inputs, small_settings(**overrides)).q

    base = network()
    assert network(SEED=3, MAX_ROUNDS=9) is base
    for name, value in (("DISCOUNT", 0.5), ("NUM_NODES", 3), ("NODES_PER_ROUND", 2)):
        base = network()
        assert network(**{name: value}) is not base
    base = network()
    assert network(5) is not base


def test_a_diverged_model_has_accuracy_0(foundation):
    assert foundation.evaluate(tf.fill([foundation.network.size], np.nan)) == 0.0


def test_one_trace_for_any_length(foundation):
    weights, moments = tf.zeros(foundation.network.size), Moments.fresh(foundation.network.size)
    for length in (1, 32, 40, 64):
        foundation.train_epoch(weights, moments, np.arange(length, dtype=np.int32))
        foundation.evaluate(weights)
    assert foundation.train_epoch.experimental_get_tracing_count() == 1
    assert foundation._count_correct.experimental_get_tracing_count() == 1


def ended(observations, actions, rewards):
    """Transitions that end their episodes: the targets of their actions are the rewards."""
    count = len(observations)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": np.zeros_like(observations),
        "dones": np.ones(count, bool),
        "steps": np.ones(count, np.int32),
        "next_masks": np.ones((count, 3), bool),
    }


def targets(q, weights, next_weights, sample, settings):
    values = tf.constant(q.values(weights, sample["observations"]))
    next_values = tf.constant(q.values(next_weights, sample["next_observations"]))
    return q_targets(values, next_values, sample, settings)


def fit(q, weights, transitions):
    """Fit once to all transitions in their order; return the new weights and the loss."""
    order = np.arange(len(transitions["rewards"]), dtype=np.int32)[None]
    fitted, _, loss = q.train(weights, Moments.fresh(q.network.size), weights, transitions, order)
    return fitted, float(loss)


def test_only_the_actions_taken_have_an_error():
    """As with Keras, where the other actions' targets are the network's values at each batch."""
    overrides = {"Q_BATCH_SIZE": 16, "REPLAY_SAMPLE": 40, "FIT_ALL_ACTIONS": False}
    q = QNetwork(6, 3, 2, small_settings(HIDDEN_UNITS=(20, 10), **overrides))
    weights = q.network.initial_weights(stream(0, "network"))
    twin = keras_twin(q.network, weights, False, keras.optimizers.Adam(1e-3), "mse")
    rng = np.random.default_rng(0)
    x, rewards = rng.normal(size=(40, 6)).astype("f4"), rng.normal(size=40)
    actions = np.array([rng.permutation(3)[:2] for _ in range(40)], np.int32)
    fitted, loss = fit(q, weights, ended(x, actions, rewards))
    taken, total = (actions[..., None] == np.arange(3)).any(axis=1), 0.0
    for batch in (slice(0, 16), slice(16, 32), slice(32, 40)):
        y = rewards[batch, None].astype("f4")
        wanted = np.where(taken[batch], y, twin(x[batch]))
        twin.reset_metrics()  # older versions of Keras return the mean of all batches since
        total += len(wanted) / 40 * twin.train_on_batch(x[batch], wanted)
    np.testing.assert_allclose(fitted.numpy(), flat_weights(twin), atol=1e-6)
    assert loss == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_training_is_one_keras_fit_after_another(rate):
    """Q(s') is the target network's, or without one that of the network before each fit."""
    overrides = {"TARGET_RATE": rate, "REPLAY_SAMPLE": 6, "Q_BATCH_SIZE": 4}
    settings = small_settings(HIDDEN_UNITS=(16,), **overrides)
    q = QNetwork(4, 3, 1, settings)
    weights, target = (q.network.initial_weights(stream(seed, "network")) for seed in (0, 1))
    rng = np.random.default_rng(0)
    x, following = rng.normal(size=(2, 9, 4)).astype("f4")
    transitions = {
        **ended(x, rng.integers(3, size=(9, 1), dtype=np.int32), rng.normal(size=9)),
        "next_observations": following,
        "dones": np.arange(9) % 4 == 3,
    }
    draws = np.array([rng.choice(9, 6, replace=False) for _ in range(3)], np.int32)
    moments = Moments.fresh(q.network.size)
    trained, moments, loss = q.train(weights, moments, target, transitions, draws)
    twin = keras_twin(q.network, weights, False, keras.optimizers.Adam(1e-3), "mse")
    losses = []
    for draw in draws:
        sample = {name: field[draw] for name, field in transitions.items()}
        before = tf.constant(flat_weights(twin))
        wanted = targets(q, before, target if rate else before, sample, settings)
        history = twin.fit(
            sample["observations"], wanted, epochs=1, batch_size=4, shuffle=False, verbose=0
        )
        losses += history.history["loss"]
    assert float(moments.step) == 6  # 4 + 2 transitions, three times
    np.testing.assert_allclose(trained.numpy(), flat_weights(twin), atol=1e-6)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_weight_decay_by_hand():
    """With its own values, 0, as targets the gradient is 0, and decay alone is left."""
    overrides = {"Q_BATCH_SIZE": 16, "Q_LEARNING_RATE": 0.01, "Q_WEIGHT_DECAY": 0.5}
    q = QNetwork(6, 3, 1, small_settings(HIDDEN_UNITS=(5,), REPLAY_SAMPLE=16, **overrides))
    weights = q.network.initial_weights(stream(0, "network"))
    sample = ended(np.zeros((16, 6), "f4"), np.zeros((16, 1), np.int32), np.zeros(16))
    fitted, loss = fit(q, weights, sample)
    assert loss == 0
    np.testing.assert_allclose(fitted.numpy(), 0.995 * weights.numpy(), rtol=1e-6)


def test_weights_by_layer_and_back():
    q = QNetwork(6, 3, 1, small_settings(HIDDEN_UNITS=(20,)))
    weights = q.network.initial_weights(stream(0, "network"))
    arrays = q.network.named_arrays(weights)
    assert {name: a.shape for name, a in arrays.items()} == {
        "0/kernel": (6, 20),
        "0/bias": (20,),
        "1/kernel": (20, 3),
        "1/bias": (3,),
    }
    assert (q.network.from_named_arrays(arrays).numpy() == weights.numpy()).all()
    with pytest.raises(ValueError, match=r"no weights 1/bias of shape \(3,\)"):
        q.network.from_named_arrays({**arrays, "1/bias": np.zeros(4)})


def test_weights_that_are_not_trainable_are_refused():
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    with pytest.raises(ValueError, match="not trainable"):
        FlatNetwork(model)


def test_threads_can_not_change_in_a_process():
    threads = models.use_device()
    assert threads == models.use_device(threads) == models.cpu_count()
    words = f"THREADS, DEVICE: got 1000, 'cpu', takes what .*: {threads} threads"
    with pytest.raises(ConfigError, match=words):
        models.use_device(1000)


def test_what_starts_tensorflow_decides_the_threads():
    """Other code: as many threads, but several operations run at a time."""
    code = """
from models import tf, use_device

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.zeros(1)
use_device(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("config.ConfigError: THREADS, DEVICE: got 1, 'cpu', takes what")
    assert " 1 threads " in error


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"DEVICE: got 'gpu', takes 'cpu' here: .*device:CPU:0"):
        models.use_device(device="gpu")

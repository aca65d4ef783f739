"""The two Keras networks, and compiled functions that train and apply them.

Departure: there is one compiled Keras model of each kind per process, where the public code builds
one per node and episode. Nodes, rounds and agents differ in one vector of weights, which the
functions take and return. Keras' own optimizers can't do that: the TensorFlow backend disables
their ``stateless_apply``, so ``adam`` is ours.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from config import AgentSettings, ConfigError
from data import Dataset


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what is written to stderr, by native code as well."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# Intel's kernels, which TensorFlow takes by itself on some processors only; docs/performance.md.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
with _without_stderr():  # TensorFlow's start-up notes
    import keras
    import tensorflow as tf

# Adam's constants, as in Keras' default and the public code.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7

# Images in a batch of the evaluation. It changes memory alone: 200 need 9 MB for the first layer.
_EVALUATION_BATCH = 200


def foundation_network(input_shape: tuple[int, int, int], classes: int) -> keras.Model:
    """Return the local foundation model (public code); 33,580 weights for 28 x 28 x 1, 10 classes.

    ReLU follows the pooling, where it has a quarter of the numbers; the result is the same.
    Departure: the last layer gives logits, and its softmax is part of the loss: the same function
    computed more exactly. It does not change which class is the greatest.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(20, 5),
            layers.MaxPool2D(2),
            layers.ReLU(),
            layers.Conv2D(50, 5),
            layers.MaxPool2D(2),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(classes),
        ],
        name="foundation",
    )


def q_network(inputs: int, hidden: tuple[int, ...], actions: int) -> keras.Model:
    """Return the DQN's network: dense ReLU layers, a linear Q value per action (public code).

    ``hidden`` is the units of each hidden layer.

    Returns:
        A network from (n, inputs) to (n, actions) float32.
    """
    layers = keras.layers
    hidden_layers = [layers.Dense(units, activation="relu") for units in hidden]
    return keras.Sequential(
        [keras.Input((inputs,)), *hidden_layers, layers.Dense(actions)], name="q_network"
    )


class Moments(NamedTuple):
    """Adam's state for one vector of P weights."""

    first: tf.Tensor  # (P,) float32, running mean of the gradient
    second: tf.Tensor  # (P,) float32, of its square
    step: tf.Tensor  # () float32, steps taken so far

    @classmethod
    def fresh(cls, size: int) -> Moments:
        """Return the moments before the first step."""
        return cls(tf.zeros(size), tf.zeros(size), tf.zeros(()))


def adam(
    weights: tf.Tensor, gradient: tf.Tensor, moments: Moments, learning_rate: float
) -> tuple[tf.Tensor, Moments]:
    """Take one step of Adam (Kingma and Ba 2015) on (P,) float32 weights, as Keras' optimizer does.

    The gradient is that of the loss, (P,) float32. Returns the new weights and moments.
    """
    step = moments.step + 1
    first = moments.first + (1 - _BETA_1) * (gradient - moments.first)
    second = moments.second + (1 - _BETA_2) * (tf.square(gradient) - moments.second)
    rate = learning_rate * tf.sqrt(1 - tf.pow(_BETA_2, step)) / (1 - tf.pow(_BETA_1, step))
    return weights - rate * first / (tf.sqrt(second) + _EPSILON), Moments(first, second, step)


class FlatNetwork:
    """A Keras model as a function of one weight vector.

    Args:
        model: a built model whose weights are all trainable (no batch normalisation).

    Attributes:
        size: P, the number of weights.
    """

    def __init__(self, model: keras.Model) -> None:
        if model.non_trainable_variables:
            raise ValueError(f"{model.name}: has weights that are not trainable")
        self.model = model
        self._shapes = [tuple(v.shape) for v in model.trainable_variables]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]
        self.size = sum(self._sizes)

    def initial_weights(self, rng: np.random.Generator) -> tf.Tensor:
        """Return (P,) float32 fresh weights, by the layers' own initialisers, seeded by ``rng``."""
        parts = []
        for layer in self.model.layers:
            for variable in layer.trainable_variables:
                initializer = getattr(layer, f"{variable.name}_initializer")
                config = initializer.get_config()
                if "seed" in config:
                    config["seed"] = int(rng.integers(2**31))
                value = type(initializer).from_config(config)(variable.shape)
                parts.append(tf.reshape(tf.convert_to_tensor(value), [-1]))
        return tf.concat(parts, 0)

    def split(self, weights: tf.Tensor) -> list[tf.Tensor]:
        """Return the vector's parts as the model's weights, each in its own shape."""
        parts = tf.split(weights, self._sizes)
        return [tf.reshape(p, shape) for p, shape in zip(parts, self._shapes, strict=True)]

    def apply(self, weights: tf.Tensor, inputs: tf.Tensor) -> tf.Tensor:
        """Return the model's outputs for a batch of inputs."""
        return self.model.stateless_call(self.split(weights), [], inputs)[0]

    def named_arrays(self, weights: tf.Tensor) -> dict[str, np.ndarray]:
        """Return the weights by layer: ``{"0/kernel": ..., "0/bias": ..., "1/kernel": ...}``."""
        names = [
            f"{index}/{variable.name}"
            for index, layer in enumerate(x for x in self.model.layers if x.trainable_variables)
            for variable in layer.trainable_variables
        ]
        return {n: part.numpy() for n, part in zip(names, self.split(weights), strict=True)}

    def from_named_arrays(self, arrays: dict[str, np.ndarray]) -> tf.Tensor:
        """Return the weight vector of what ``named_arrays`` returned.

        Raises:
            ValueError: an array is missing or has another shape.
        """
        expected = self.named_arrays(tf.zeros(self.size))
        for name, array in expected.items():
            if name not in arrays or arrays[name].shape != array.shape:
                raise ValueError(f"no weights {name} of shape {array.shape}")
        return tf.concat([np.float32(arrays[name]).ravel() for name in expected], 0)


class FoundationModel:
    """Local training and evaluation on one dataset.

    Args:
        dataset: its images train and test.
        batch_size, learning_rate: BATCH_SIZE and LEARNING_RATE of local training.

    Attributes:
        network: the model as a function of its weight vector.
        test_size: number of test images.
    """

    def __init__(self, dataset: Dataset, batch_size: int, learning_rate: float) -> None:
        self.network = FlatNetwork(foundation_network(dataset.input_shape, dataset.classes))
        self.test_size = len(dataset.y_test)
        shape = (-1, *dataset.input_shape)
        self._x_train = tf.constant(dataset.x_train.reshape(shape))
        self._y_train = tf.constant(dataset.y_train.astype(np.int32))
        self._x_test = _to_input(tf.constant(dataset.x_test.reshape(shape)))
        self._y_test = tf.constant(dataset.y_test.astype(np.int32))
        self._batch_size, self._learning_rate = batch_size, learning_rate
        vector = tf.TensorSpec([self.network.size], tf.float32)
        moments = Moments(vector, vector, tf.TensorSpec([], tf.float32))
        order = tf.TensorSpec([None], tf.int32)
        self.train_epoch = tf.function(self._train_epoch, [vector, moments, order])
        self._count_correct = tf.function(self._count, [vector, order])

    def evaluate(self, weights: tf.Tensor, images: np.ndarray | None = None) -> float:
        """Return the accuracy on the test set, in [0, 1]; 0.0 for weights that diverged.

        Args:
            weights: (P,) float32.
            images: (n,) int indices of the test images that count; all by default.
        """
        if images is None:
            images = np.arange(self.test_size)
        return int(self._count_correct(weights, tf.constant(images, tf.int32))) / len(images)

    def _train_epoch(
        self, weights: tf.Tensor, moments: Moments, order: tf.Tensor
    ) -> tuple[tf.Tensor, Moments]:
        """Pass over training images once with Adam; compiled as ``train_epoch``.

        Args:
            weights: (P,) float32.
            moments: Adam's, from the node's steps before.
            order: (n,) int32 indices of training images, in the order in which they are used;
                the last batch takes what is left.

        Returns:
            The new weights and moments.
        """
        for start in tf.range(0, tf.size(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            images, labels = tf.gather(self._x_train, batch), tf.gather(self._y_train, batch)
            with tf.GradientTape() as tape:
                tape.watch(weights)
                logits = self.network.apply(weights, _to_input(images))
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                loss = tf.reduce_mean(losses)
            gradient = tape.gradient(loss, weights)
            weights, moments = adam(weights, gradient, moments, self._learning_rate)
        return weights, moments

    def _count(self, weights: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
        correct = 0
        for start in tf.range(0, tf.size(images), _EVALUATION_BATCH):
            batch = images[start : start + _EVALUATION_BATCH]
            logits = self.network.apply(weights, tf.gather(self._x_test, batch))
            hits = tf.argmax(logits, 1, tf.int32) == tf.gather(self._y_test, batch)
            # argmax of NaNs is class 0: without this, a diverged model would have 0's share.
            hits &= tf.reduce_all(tf.math.is_finite(logits), 1)
            correct += tf.reduce_sum(tf.cast(hits, tf.int32))
        return correct


def q_targets(
    q_values: tf.Tensor,
    next_values: tf.Tensor,
    sample: dict[str, tf.Tensor],
    settings: AgentSettings,
) -> tf.Tensor:
    """Return what the Q values are fitted to: (n, A) float32 (public code).

    For the actions taken r + discount^steps * max Q(s'), or r alone at an episode's end. For all
    others the network's own values. With FIT_ALL_ACTIONS all are divided by their Frobenius norm
    (public code).

    Args:
        q_values: (n, A) float32, the network's at the observation.
        next_values: (n, A) float32, at the next one. The maximum leaves out actions that MAX_STAY
            bars there.
        sample: n transitions, the fields of ``ReplayBuffer``.
        settings: for DISCOUNT and FIT_ALL_ACTIONS.
    """
    barred = actions_taken(sample["barred"], q_values.shape[1])
    possible = tf.where(barred, next_values.dtype.min, next_values)
    future = tf.cast(tf.reduce_max(possible, 1), tf.float64)
    discount = settings.DISCOUNT ** tf.cast(sample["steps"], tf.float64)
    goes_on = tf.cast(~sample["terminals"], tf.float64)
    returns = sample["rewards"] + discount * future * goes_on
    taken = actions_taken(sample["actions"], q_values.shape[1])
    targets = tf.where(taken, returns[:, None], tf.cast(q_values, tf.float64))
    if settings.FIT_ALL_ACTIONS:
        targets = tf.math.divide_no_nan(targets, tf.norm(targets))
    return tf.cast(targets, tf.float32)


def actions_taken(actions: tf.Tensor, count: int) -> tf.Tensor:
    """Return (n, count) bool: which actions (n, k) int32 names; -1 names none."""
    return tf.reduce_any(tf.one_hot(actions, count, True, False), 1)


class QNetwork:
    """Q values of observations, and their fit to targets.

    Args:
        inputs: length of the flat observation.
        actions: A, number of actions.
        actions_per_step: k.
        settings: the DQN's.

    Attributes:
        network: the model as a function of its weight vector.
    """

    def __init__(
        self, inputs: int, actions: int, actions_per_step: int, settings: AgentSettings
    ) -> None:
        model = q_network(inputs, settings.HIDDEN_UNITS, actions)
        self.network = FlatNetwork(model)
        self._settings = settings
        vector = tf.TensorSpec([self.network.size], tf.float32)
        moments = Moments(vector, vector, tf.TensorSpec([], tf.float32))
        observations = tf.TensorSpec([None, inputs], tf.float32)
        transitions = {
            "observations": observations,
            "actions": tf.TensorSpec([None, actions_per_step], tf.int32),
            "rewards": tf.TensorSpec([None], tf.float64),
            "next_observations": observations,
            "terminals": tf.TensorSpec([None], tf.bool),
            "steps": tf.TensorSpec([None], tf.int32),
            "barred": tf.TensorSpec([None, actions_per_step], tf.int32),
        }
        draws = tf.TensorSpec([None, settings.REPLAY_SAMPLE], tf.int32)
        self._values = tf.function(self.network.apply, [vector, observations])
        self.train = tf.function(self._train, [vector, moments, vector, transitions, draws])

    def values(self, weights: tf.Tensor, observations: np.ndarray) -> np.ndarray:
        """Return (n, A) float32: the Q values of (n, inputs) observations."""
        return self._values(weights, tf.constant(observations, tf.float32)).numpy()

    def _train(
        self,
        weights: tf.Tensor,
        moments: Moments,
        target_weights: tf.Tensor,
        transitions: dict[str, tf.Tensor],
        draws: tf.Tensor,
    ) -> tuple[tf.Tensor, Moments, tf.Tensor]:
        """Fit to one sample after the other; compiled as ``train``.

        Q(s') is that of the network before the sample's fit, or with TARGET_RATE > 0 that of the
        target network (Mnih et al. 2015). A fit passes over the sample in its order with Adam.
        Without FIT_ALL_ACTIONS (ours) only the actions taken have an error. With it the targets of
        all others hold them back at their values from before the first batch.

        Args:
            weights: (P,) float32.
            moments: of the steps before.
            target_weights: (P,) float32.
            transitions: the fields of m transitions, as ``ReplayBuffer.draw`` returns them.
            draws: (U, n) int32, the transitions of each sample.

        Returns:
            The new weights and moments, and the mean squared error of all samples and actions. An
            action without an error counts 0. Each batch's error is taken before its step, as Keras
            reports it.
        """
        settings, total = self._settings, 0.0
        for draw in draws:
            sample = {name: tf.gather(field, draw) for name, field in transitions.items()}
            bootstrap = target_weights if settings.TARGET_RATE else weights
            q_values = self.network.apply(weights, sample["observations"])
            next_values = self.network.apply(bootstrap, sample["next_observations"])
            targets, lost = q_targets(q_values, next_values, sample, settings), 0.0
            for start in tf.range(0, settings.REPLAY_SAMPLE, settings.Q_BATCH_SIZE):
                stop = start + settings.Q_BATCH_SIZE
                batch = targets[start:stop]
                with tf.GradientTape() as tape:
                    tape.watch(weights)
                    outputs = self.network.apply(weights, sample["observations"][start:stop])
                    errors = tf.square(outputs - batch)
                    if not settings.FIT_ALL_ACTIONS:
                        taken = actions_taken(sample["actions"][start:stop], outputs.shape[1])
                        errors = tf.where(taken, errors, 0.0)
                    loss = tf.reduce_mean(errors)
                lost += loss * tf.cast(tf.shape(batch)[0], tf.float32)
                gradient = tape.gradient(loss, weights)
                if settings.Q_WEIGHT_DECAY:  # decoupled (Loshchilov and Hutter 2019)
                    weights -= settings.Q_LEARNING_RATE * settings.Q_WEIGHT_DECAY * weights
                weights, moments = adam(weights, gradient, moments, settings.Q_LEARNING_RATE)
            total += lost / settings.REPLAY_SAMPLE
        return weights, moments, total / tf.cast(tf.shape(draws)[0], tf.float32)


def _to_input(images: tf.Tensor) -> tf.Tensor:
    """Return images as float32 in [0, 1] (public code)."""
    return tf.cast(images, tf.float32) / 255.0 if images.dtype == tf.uint8 else images


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_device(threads: int = 0, device: str = "cpu") -> int:
    """Let TensorFlow compute on so many CPU threads, 0 for all cores, and on a DEVICE.

    One operation runs at a time, because the networks are chains. A fixed schedule keeps the order
    of floating-point sums, so the same seed gives the same bits.

    Returns:
        The number of threads.

    Raises:
        ConfigError: there is no GPU, or TensorFlow has started otherwise in this process.
            Whatever computes with TensorFlow before the first call starts it otherwise.
    """
    wanted = threads or available_cores()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # read when TensorFlow first looks for devices
    with _without_stderr():  # it reports in its own words that it finds none
        gpus = tf.config.list_physical_devices("GPU")[: int(device == "gpu")]
    if device == "gpu" and not gpus:
        seen = ", ".join(found.name for found in tf.config.list_physical_devices())
        raise ConfigError(f"DEVICE: got 'gpu', takes 'cpu' here: TensorFlow sees {seen}")
    try:
        tf.config.set_visible_devices(gpus, "GPU")
        if gpus:
            tf.config.experimental.set_memory_growth(gpus[0], True)  # several jobs may share it
            tf.config.experimental.enable_op_determinism()
        tf.config.threading.set_intra_op_parallelism_threads(wanted)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.list_logical_devices()  # TensorFlow starts here
    except RuntimeError as error:  # it has started otherwise
        used = tf.config.threading.get_intra_op_parallelism_threads()
        ours = used and tf.config.threading.get_inter_op_parallelism_threads() == 1
        takes = f"{used} threads and the same device: use_device" if ours else "none: other code"
        raise ConfigError(
            f"THREADS, DEVICE: got {threads}, {device!r}, takes {takes} has started TensorFlow in "
            "this process"
        ) from error
    return wanted


# Compiling takes a second and memory, and the models hold no weights. So the environments of a
# process share the latest one for the same Dataset object, and agents with equal AgentSettings too.
shared_foundation_model = functools.lru_cache(maxsize=1)(FoundationModel)
shared_q_network = functools.lru_cache(maxsize=1)(QNetwork)

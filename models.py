"""The two Keras networks as functions of their weights; local training, evaluation, the device.

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
from dask.system import cpu_count  # minds a container's limit and the process's affinity

from config import ConfigError, reason
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

    Departure: ReLU follows the pooling, where it has a quarter of the numbers; the result is the
    same. Departure: the last layer gives logits, and its softmax is part of the loss: the same
    function computed more exactly. It does not change which class is the greatest.
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
        with tf.device("CPU"):  # TensorFlow gathers bytes there alone, also with a GPU
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
            # Departure: a diverged model counts 0; the argmax of NaNs would be class 0.
            hits &= tf.reduce_all(tf.math.is_finite(logits), 1)
            correct += tf.reduce_sum(tf.cast(hits, tf.int32))
        return correct


def _to_input(images: tf.Tensor) -> tf.Tensor:
    """Return images as float32 in [0, 1] (public code)."""
    return tf.cast(images, tf.float32) / 255.0 if images.dtype == tf.uint8 else images


def use_device(threads: int = 0, device: str = "cpu") -> int:
    """Let TensorFlow compute on so many CPU threads, 0 for all cores, and on a DEVICE.

    One operation runs at a time, because the networks are chains. A fixed schedule keeps the order
    of floating-point sums, so the same seed gives the same bits.

    Returns:
        The number of threads.

    Raises:
        ConfigError: there is no GPU, or TensorFlow runs with other settings already. Call this
            before anything computes with TensorFlow.
    """
    wanted = threads or cpu_count()
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
            tf.config.experimental.enable_tensor_float_32_execution(False)  # 32 bits, as on a CPU
        tf.config.threading.set_intra_op_parallelism_threads(wanted)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.list_logical_devices()  # TensorFlow starts here
    except RuntimeError as error:
        used = tf.config.threading.get_intra_op_parallelism_threads()
        raise ConfigError(
            f"THREADS, DEVICE: got {threads}, {device!r}, takes what TensorFlow has started with "
            f"in this process: {used or 'unset'} threads ({reason(error)})"
        ) from error
    return wanted


# Compiling takes a second and memory, and the model holds no weights. So the environments of a
# process share the latest one for the same Dataset object and settings of training.
shared_foundation_model = functools.lru_cache(maxsize=1)(FoundationModel)

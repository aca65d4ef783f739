"""What was tried to make evaluation and training faster, and what it brings.

Usage: python3 benchmarks/variants.py [--repeats 9] [--output results/benchmark]

Each variant computes the same as ``models.py``, which is checked, and takes turns with it; the
figure is the median of its time divided by that of models.py in the same turn. Takes MNIST as
main.py does, or else the bundled digits. Prints a table and writes it as ``variants.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rounds import PROJECT, measured_on, seconds, table

import data
import models
from config import Settings, make_settings, stream
from data import Dataset
from models import FoundationModel, Moments, keras, tf

layers = keras.layers
Pool = Callable[[tf.Tensor], tf.Tensor]


def _twice(images: tf.Tensor) -> tf.Tensor:
    """Each pixel four times, as a square of 2 x 2."""
    _, height, width, channels = images.shape
    lines = tf.reshape(tf.concat([images, images], -1), (-1, height, 2 * width * channels))
    return tf.reshape(tf.concat([lines, lines], -1), (-1, 2 * height, 2 * width, channels))


@tf.custom_gradient
def pool_by_mask(images: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """Max pooling whose gradient goes to all greatest pixels of a square in equal parts."""
    pooled = tf.nn.max_pool2d(images, 2, 2, "VALID")

    def gradient(by_pooled: tf.Tensor) -> tf.Tensor:
        mask = tf.cast(images == _twice(pooled), tf.float32)
        count = 4 * tf.nn.avg_pool2d(mask, 2, 2, "VALID")
        return mask * _twice(by_pooled / count)

    return pooled, gradient


def pool_by_reduction(images: tf.Tensor) -> tf.Tensor:
    """Max pooling as a maximum over two axes of a reshaped tensor."""
    _, height, width, channels = images.shape
    squares = tf.reshape(images, (-1, height // 2, 2, width // 2, 2, channels))
    return tf.reduce_max(squares, (2, 4))


def pool_by_argmax(images: tf.Tensor) -> tf.Tensor:
    """Max pooling by the operation that keeps where the maxima are."""
    return tf.nn.max_pool_with_argmax(images, 2, 2, "VALID")[0]


def network_with(pool: Pool, convolution: type[layers.Layer] = layers.Conv2D) -> Callable:
    """The foundation model with another pooling, and another first convolution."""

    def network(shape: tuple[int, int, int], classes: int) -> keras.Model:
        return keras.Sequential(
            [
                keras.Input(shape),
                convolution(20, 5, activation="relu"),
                layers.Lambda(pool),
                layers.Conv2D(50, 5, activation="relu"),
                layers.Lambda(pool),
                layers.Flatten(),
                layers.Dense(classes),
            ]
        )

    return network


class ConvolutionByProduct(layers.Conv2D):
    """A convolution as a matrix product with the image's patches."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """The convolution with its activation."""
        size = self.kernel_size[0]
        one = [1, 1, 1, 1]
        patches = tf.image.extract_patches(images, [1, size, size, 1], one, one, "VALID")
        kernel = tf.reshape(self.kernel, (-1, self.filters))
        return self.activation(tf.tensordot(patches, kernel, 1) + self.bias)


class ConvolutionOfBlocks(layers.Conv2D):
    """A convolution of 2 x 2 pixels at once, with four times the filters, 6 x 6 wide."""

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """The convolution with its activation."""
        wide = [
            tf.pad(self.kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)))
            for i in (0, 1)
            for j in (0, 1)
        ]
        blocks = tf.nn.conv2d(images, tf.concat(wide, -1), 2, "VALID")
        return self.activation(tf.nn.depth_to_space(blocks, 2) + self.bias)


def plain_pool(images: tf.Tensor) -> tf.Tensor:
    """Max pooling as Keras does it."""
    return tf.nn.max_pool2d(images, 2, 2, "VALID")


class XlaModel(FoundationModel):
    """``FoundationModel`` compiled by XLA, a batch at a time: XLA wants fixed sizes.

    Training and evaluation go through the batches in Python, outside of what is compiled; each
    batch's hits wait for its end. That is part of what is timed.
    """

    def __init__(self, dataset: Dataset, settings: Settings) -> None:
        super().__init__(dataset, settings)
        train_batch = tf.function(self._train_batch, jit_compile=True)
        batch = settings.BATCH_SIZE

        def train_epoch(
            weights: tf.Tensor, moments: Moments, order: tf.Tensor
        ) -> tuple[tf.Tensor, Moments]:
            for start in range(0, len(order), batch):
                weights, moments = train_batch(weights, moments, order[start : start + batch])
            return weights, moments

        @tf.function(jit_compile=True)
        def correct(weights: tf.Tensor, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            hits = tf.argmax(self.network.apply(weights, images), 1, tf.int32) == labels
            return tf.reduce_sum(tf.cast(hits, tf.int32))

        def count_correct(weights: tf.Tensor) -> int:
            size = models._EVALUATION_BATCH
            return sum(
                int(correct(weights, self._x_test[i : i + size], self._y_test[i : i + size]))
                for i in range(0, self.test_size, size)
            )

        self.train_epoch, self._count_correct = train_epoch, count_correct


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="of each measurement [default: 9]")
    parser.add_argument(
        "--output", type=Path, default=PROJECT / "results" / "benchmark", help="folder"
    )
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # it warns of many traces: here each belongs to a variant
    settings = make_settings()
    threads = models.use_cpu(settings.THREADS)
    dataset = data.load(settings)
    original, batch = models.foundation_network, models._EVALUATION_BATCH

    kinds: dict[str, Callable[[], FoundationModel]] = {
        "models.py": lambda: FoundationModel(dataset, settings),
        "XLA": lambda: XlaModel(dataset, settings),
    }
    networks = {
        "pooling with kept positions": network_with(pool_by_argmax),
        "pooling as a reduction": network_with(pool_by_reduction),
        "pooling with a mask as gradient": network_with(pool_by_mask),
        "first convolution as a matrix product": network_with(plain_pool, ConvolutionByProduct),
        "first convolution of 2 x 2 blocks": network_with(plain_pool, ConvolutionOfBlocks),
    }

    def replaced(network: Callable) -> Callable[[], FoundationModel]:
        def make() -> FoundationModel:
            models.foundation_network = network
            try:
                return FoundationModel(dataset, settings)
            finally:
                models.foundation_network = original

        return make

    kinds |= {name: replaced(network) for name, network in networks.items()}
    made = {name: make() for name, make in kinds.items()}

    first = made["models.py"]
    weights = first.network.initial_weights(stream(0, "initialisation"))
    fresh = Moments.fresh(first.network.size)
    order = tf.constant(
        np.random.default_rng(0).permutation(settings.SAMPLES_PER_NODE).astype(np.int32)
    )
    trained = first.train_epoch(weights, fresh, order)[0]
    accuracy = first.evaluate(trained)
    for name, model in made.items():
        difference = np.abs(model.train_epoch(weights, fresh, order)[0] - trained).max()
        if difference > 1e-3 or abs(model.evaluate(trained) - accuracy) > 5e-4:
            raise SystemExit(f"{name}: computes something else ({difference})")

    def evaluation(size: int) -> Callable[[], object]:
        model = FoundationModel(dataset, settings)
        models._EVALUATION_BATCH = size
        model.evaluate(trained)  # traces, with this size
        models._EVALUATION_BATCH = batch
        return lambda: model.evaluate(trained)

    evaluations = {name: (lambda m=model: m.evaluate(trained)) for name, model in made.items()}
    evaluations |= {f"evaluation, batches of {n}": evaluation(n) for n in (100, 250, 2500)}
    trainings = {
        name: (lambda m=model: m.train_epoch(weights, fresh, order)[0].numpy())
        for name, model in made.items()
    }
    ratios: dict[str, dict[str, str]] = {}
    for kind, actions in (("evaluation", evaluations), ("training", trainings)):
        times = seconds(actions, arguments.repeats)
        for name in actions:
            ratio = float(np.median(np.divide(times[name], times["models.py"])))
            ratios.setdefault(name, {})[kind] = f"{ratio:.2f}"
    rows = [(n, r.get("evaluation", ""), r.get("training", "")) for n, r in ratios.items()]
    text = (
        f"{measured_on(dataset, threads)}\n\n"
        f"Time against models.py, medians of {arguments.repeats}\n\n"
        f"{table(' variant | evaluation | training ', rows)}\n"
    )
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "variants.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

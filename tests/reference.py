"""Decentralized learning written as plainly as possible, to check the fast environment against.

One Keras model with its own optimizer on every node, trained by ``fit``, evaluated by
``evaluate``, observed by scikit-learn's PCA, as the public code does it. Distances, shards and
reward are written from the paper, without the project's code. Only what is random is passed in: the
initial weights and the order of the images.
"""

import keras
import numpy as np
from sklearn.decomposition import PCA


def foundation_model():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5, activation="relu"),
            layers.MaxPool2D(2),
            layers.Conv2D(50, 5, activation="relu"),
            layers.MaxPool2D(2),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.001), "categorical_crossentropy", metrics=["accuracy"])
    return model


def flat(weights):
    return np.concatenate([w.flatten() for w in weights])


def scores(weights):
    pca = PCA(n_components=len(weights), svd_solver="full")
    found = pca.fit_transform(np.array(weights))
    # Components without variance are rounding noise, which can't be compared.
    found[:, pca.explained_variance_ < 1e-9 * pca.explained_variance_[0]] = 0
    return found.flatten()


class Reference:
    """One episode; ``round`` is the paper's round, the starter's included."""

    def __init__(
        self,
        data,
        initial_weights,
        orders,
        nodes=10,
        main=400,
        rest=100,
        kinds=("broadcast",),
        epochs=1,
    ):
        (x_train, y_train), (x_test, y_test) = data
        self.kinds, self.epochs = kinds, epochs
        self.orders = orders  # yields the order of a shard's images, an epoch at a time
        self.x_test = x_test.astype("float32")[..., None] / 255
        self.y_test = keras.utils.to_categorical(y_test, 10)
        self.global_model = foundation_model()
        self.global_model.set_weights(initial_weights)
        self.models, self.shards = [], []
        for n in range(nodes):
            model = foundation_model()
            model.set_weights(initial_weights)
            self.models.append(model)
            group, own = n // 10, y_train == n % 10
            x = np.concatenate(
                [
                    x_train[own][group * main : (group + 1) * main],
                    x_train[~own][group * rest : (group + 1) * rest],
                ]
            )
            y = np.concatenate(
                [
                    y_train[own][group * main : (group + 1) * main],
                    y_train[~own][group * rest : (group + 1) * rest],
                ]
            )
            self.shards.append(
                (x.astype("float32")[..., None] / 255, keras.utils.to_categorical(y, 10))
            )
        random = np.random.RandomState(0).random_sample((nodes, nodes)) / 10
        self.distances = (random + random.T) / 2
        for n in range(nodes):
            self.distances[n][n] = 0
        self.own_weights = [flat(initial_weights)] * nodes
        self.holder = None

    def round(self, chosen):
        """Trains on the chosen nodes; returns observations, accuracy and reward.

        The observations, of all nodes' weights: ``broadcast``, what the nodes hold before they get
        the new model, and ``local``, what each trained last.
        """
        for n in chosen:
            x, y = self.shards[n]
            for _ in range(self.epochs):
                order = next(self.orders)
                self.models[n].fit(
                    x[order], y[order], epochs=1, batch_size=32, shuffle=False, verbose=0
                )
            self.own_weights[n] = flat(self.models[n].get_weights())
        trained = [self.models[n].get_weights() for n in chosen]
        self.global_model.set_weights(
            [np.mean(parts, axis=0) for parts in zip(*trained, strict=True)]
        )

        observations = {}
        if "broadcast" in self.kinds:
            observations["broadcast"] = scores([flat(m.get_weights()) for m in self.models])
        if "local" in self.kinds:
            observations["local"] = scores(self.own_weights)

        for model in self.models:
            model.set_weights(self.global_model.get_weights())
        _, accuracy = self.global_model.evaluate(self.x_test, self.y_test, verbose=0)
        former = chosen[0] if self.holder is None else self.holder
        self.holder = chosen[0]
        reward = 32 ** (accuracy - 0.8) - self.distances[former][chosen[0]] - 1
        return observations, accuracy, reward

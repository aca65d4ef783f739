"""Decentralized learning as a Gymnasium environment: nodes, rounds, reward, observation.

An episode is one training of a fresh foundation model. In each round one node (or several)
trains it on its own shard and passes it on; the action is who trains next.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

import data
from config import Settings, make_settings, stream
from models import Moments, shared_foundation_model, tf, use_cpu


def distance_matrix(settings: Settings) -> np.ndarray:
    """(N, N) float64: the communication distance between each two nodes (public code).

    Uniform in [0, DISTANCE_SCALE) by the legacy generator that the public code seeds, made
    symmetric by the mean with its transpose, zero on the diagonal. Without a unit.
    """
    n = settings.NUM_NODES
    uniform = np.random.RandomState(settings.DISTANCE_SEED).random_sample((n, n))
    uniform *= settings.DISTANCE_SCALE
    distances = (uniform + uniform.T) / 2
    np.fill_diagonal(distances, 0.0)
    return distances


def reward(accuracy: float, distance: float, settings: Settings) -> float:
    """A round's reward, r = h^(accuracy - goal) - distance - 1 (paper; h = 32, public code).

    With REWARD_CEILING (ours) the power counts so much at most: a large h, which makes each round
    below the goal cost about one point, would else pay without bound for passing the goal.
    """
    progress = settings.REWARD_BASE ** (accuracy - settings.GOAL_ACCURACY)
    if settings.REWARD_CEILING:
        progress = min(progress, settings.REWARD_CEILING)
    return progress - distance - settings.STEP_PENALTY


def progress_reward(accuracy: float, before: float, settings: Settings) -> float:
    """What REWARD_PROGRESS adds to a round's reward (ours).

    Potential-based shaping (Ng, Harada and Russell 1999): DISCOUNT times the potential after the
    round less that before it. The potential is REWARD_PROGRESS times what the accuracy falls short
    of the goal, with a negative sign, and 0 from the goal on, as it has to be where episodes end.
    So progress pays at once, and of walks to the goal none is better for it: what is lost again has
    to be paid back, while a power of the accuracy pays again in each round for staying close to the
    goal. An episode that the limit ends keeps its last potential, as if more rounds followed: it
    ends worse by DISCOUNT * REWARD_PROGRESS times what its accuracy falls short of the goal.

    Args:
        accuracy: after the round, in [0, 1].
        before: after the round before it, in [0, 1].
        settings: REWARD_PROGRESS, GOAL_ACCURACY and DISCOUNT count.
    """
    after, before = (min(a - settings.GOAL_ACCURACY, 0.0) for a in (accuracy, before))
    return settings.REWARD_PROGRESS * (settings.DISCOUNT * after - before)


def turned_to(holder: int, scores: np.ndarray) -> np.ndarray:
    """Scores of which no component is negative at the holder (ours).

    Args:
        holder: node that trained last, in [0, N).
        scores: (N, C), of any floating dtype, which the result has as well.
    """
    return scores * np.where(scores[holder] < 0, -1, 1).astype(scores.dtype)


def pca_scores(models: np.ndarray, owners: np.ndarray, components: int) -> np.ndarray:
    """The PCA scores of all nodes' weights, as scikit-learn's full PCA gives them.

    Only the distinct weight vectors are looked at, each as often as nodes have it: the cost is
    that of a singular value decomposition of M vectors, however many nodes there are.

    Departure: a component without variance is 0 here; the public code, by scikit-learn's PCA,
    hands the DQN rounding noise below 1e-5 there.

    Args:
        models: (M, P) float, the distinct weight vectors.
        owners: (N,) int in [0, M), which of them each node has; each is had by some node.
        components: C, how many components to keep.

    Returns:
        (N, C) float32. A component's sign is such that its loading of greatest magnitude is
        positive, which is scikit-learn's rule since 1.5. All 0 if a weight is not finite.
    """
    scores = np.zeros((len(owners), components), np.float32)
    if not np.isfinite(models).all():
        return scores
    counts = np.bincount(owners, minlength=len(models)).astype(np.float64)
    centred = models.astype(np.float64)
    centred -= counts @ centred / counts.sum()
    # The N x P matrix with repeated rows has the singular values of the M x P matrix whose rows
    # are multiplied by the root of how often they occur; the small Gram matrix gives them.
    roots = np.sqrt(counts)
    squares, vectors = np.linalg.eigh(roots[:, None] * (centred @ centred.T) * roots)
    squares, vectors = squares[::-1][:components], vectors[:, ::-1][:, :components]
    # The weights are float32, so variance below their rounding (1e-7, squared) is noise.
    kept = (squares > 1e-13 * squares.max()) & (squares > 0)
    squares, vectors = squares[kept], vectors[:, kept]
    loadings = (roots[:, None] * vectors).T @ centred  # times the singular values
    signs = np.where(loadings.max(axis=1) >= -loadings.min(axis=1), 1.0, -1.0)
    # Row m of the left singular vectors times the singular values, freed of the row's factor.
    rows = signs * np.sqrt(squares) * vectors / roots[:, None]
    scores[:, : len(squares)] = rows[owners]
    return scores


class DistinctNodes(spaces.MultiDiscrete):
    """Actions of several nodes a round: k distinct nodes of N, as an int64 array of shape (k,)."""

    def __init__(self, nodes: int, per_round: int) -> None:
        super().__init__([nodes] * per_round)
        self._nodes, self._per_round = nodes, per_round

    def __repr__(self) -> str:
        return f"DistinctNodes({self._nodes}, {self._per_round})"

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        """K nodes drawn without replacement; masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("DistinctNodes samples without a mask")
        return self.np_random.permutation(self._nodes)[: self._per_round]

    def contains(self, x: Any) -> bool:
        """Whether x is an array of k distinct nodes."""
        return super().contains(x) and len(set(np.asarray(x).tolist())) == self._per_round


class DecentralizedLearning(gymnasium.Env[np.ndarray, Any]):
    """N nodes that train one foundation model in turn (paper, Section 3.3).

    Actions: the node that trains next, in [0, N); with NODES_PER_ROUND = k > 1, k distinct nodes,
    the first of which hands the averaged model on. The current node is allowed, and free.

    Observations: (N * C,) float32, the first C PCA scores of every node's weights, node by node.
    ``broadcast`` (public code): every node gets each round's new model, and the PCA sees the nodes
    just before that, so only the nodes that trained differ. ``local`` (what the paper's figures
    show): each node keeps the model that it last trained itself. ``both`` (ours), of shape (2 * N *
    C,): the former and then the latter. ``fixed`` (ours): as ``local``, but in a basis that is not
    fitted to what it shows: the PCA, made once, of how far the models of a pilot episode have moved
    from their initial one. The sign of a component that is fitted anew has no meaning: by
    scikit-learn's rule (public code) it turns from round to round; with PCA_SIGNS = ``holder``
    (ours) the node that trained last never has a negative score: in ``broadcast``, where it alone
    differs, the sign is always the same then; in ``local`` the component turns when the model goes
    to a node on the other side, so there the sign also tells something of who trained last:
    ``both`` shows that in the weights anyway, ``local`` alone does not, nor does either tell which
    of several nodes was the first. BROADCAST_SCALE and LOCAL_SCALE (ours; ``fixed`` takes the
    latter) multiply the scores: how far a late round moves the model is little beside how far the
    nodes' models lie apart, and a Q-network hardly sees it beside them. To tell what the weights
    are worth, two that hold none (ours), of shape (N,): ``last_node``, 1 for the nodes that trained
    last and 0 for the others; ``zeros``.

    Rewards: ``reward`` and from round 2 on ``progress_reward`` (ours, 0 by default) above, less
    MISS_PENALTY (ours) in a last round that misses the goal. An episode terminates when the
    accuracy on the whole test set is at least GOAL_ACCURACY, and is truncated after MAX_ROUNDS
    rounds. With REWARD_IMAGES (ours) the accuracy of a round is that on so many test images, drawn
    anew for each: quicker, and noisier (all, if there are no more). All judge whether the goal is
    reached: a round is left to the few only if by them it falls short of the goal by more than
    three standard errors.

    Info, from ``reset`` and ``step``: ``round`` (from 1), ``node`` (that trained; a list if k > 1),
    ``accuracy`` (share of the images that judged the round), ``distance`` (that the model travelled
    to this round's first node), ``communication_cost`` (sum of the episode's distances),
    ``reward``, ``goal_reached`` and ``diverged`` (some weight is not finite).

    Adam's moments belong to the node and are kept within an episode (public code), or start anew at
    each visit without KEEP_MOMENTS (ours). A node is a shard, a weight vector and these moments; no
    node has a Keras model of its own.

    Args:
        settings: by default those of config.py.
        dataset: by default the one that the settings name.

    Raises:
        ConfigError, DataError, DataNotFound: what the settings ask for can't be had.

    Attributes:
        settings, dataset: as given.
        shards: each node's training images, indices into ``dataset.x_train``.
        distances: (N, N) float64.
        foundation: a ``FoundationModel``, trains and evaluates.
    """

    # A Gymnasium class attribute that every environment has to state.
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self, settings: Settings | None = None, dataset: data.Dataset | None = None
    ) -> None:
        self.settings = settings or make_settings()
        use_cpu(self.settings.THREADS)  # before a dataset is made, which may compute as well
        self.dataset = dataset or data.load(self.settings)
        self.shards = data.make_shards(self.dataset, self.settings)
        self.distances = distance_matrix(self.settings)
        self.foundation = shared_foundation_model(self.dataset, self.settings)
        n, k = self.settings.NUM_NODES, self.settings.NODES_PER_ROUND
        self.action_space = spaces.Discrete(n) if k == 1 else DistinctNodes(n, k)
        # Scores have no bound of their own; infinite ones are what Gymnasium warns of.
        greatest = np.finfo(np.float32).max
        size = n * self.settings.components if self.settings.sees_weights else n
        size *= 2 if self.settings.OBSERVATION == "both" else 1
        self.observation_space = spaces.Box(-greatest, greatest, (size,), np.float32)
        self._over = True
        if self.settings.OBSERVATION == "fixed":
            self._basis, self._basis_mean = self._pilot_basis()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Makes a new foundation model and trains round 1, which is STARTER_NODE's.

        Departure: in the public code node 0 trains round 1 whatever ``--starter`` says, which
        there only changes the distance of that round. With the default they are the same.

        Args:
            seed: of the model's weights and of the order of the images; the same seed gives the
                same of both, whatever the actions are. None goes on with the generator as it is.
            options: ``{"nodes": [...]}`` lets these distinct nodes train round 1 instead.

        Returns:
            The first observation and info. Round 1 may reach an easy goal: see
            ``info["goal_reached"]``; there is no step to take then.

        Raises:
            ValueError: the nodes are not distinct nodes, or none.
        """
        nodes = (options or {}).get("nodes", [self.settings.STARTER_NODE])
        self._check_nodes(nodes, len(nodes) or 1)
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**63))
        self._shuffling = stream(episode, "shuffling")
        self._judging = stream(episode, "judging")
        self._model = self.foundation.network.initial_weights(stream(episode, "initialisation"))
        self._initial = self._model
        self._own: dict[int, tf.Tensor] = {}  # each node's own last model, for `local`
        self._moments: dict[int, Moments] = {}
        self._round, self._cost = 0, 0.0
        # The model starts where it is first trained: round 1 costs nothing.
        self._holder = nodes[0]
        observation, _, _, _, info = self._train_round(nodes)
        return observation, info

    def step(
        self, action: int | np.integer | np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Sends the model to the node(s), trains LOCAL_EPOCHS there and evaluates the result.

        Returns:
            Observation, reward, terminated, truncated, info, as the class describes.

        Raises:
            ValueError: not a node, or not NODES_PER_ROUND distinct nodes.
            gymnasium.error.ResetNeeded: the episode is over.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset first")
        k = self.settings.NODES_PER_ROUND
        if np.size(action) and np.asarray(action).dtype.kind not in "iu":
            raise ValueError(f"action: got {action!r}, takes {k} distinct node(s)")
        nodes = [int(node) for node in np.atleast_1d(action)]
        self._check_nodes(nodes, k)
        return self._train_round(nodes)

    def _check_nodes(self, nodes: list[int], count: int) -> None:
        if len(set(nodes)) != count or len(nodes) != count:
            raise ValueError(f"action: got {nodes}, takes {count} distinct node(s)")
        if not all(0 <= node < self.settings.NUM_NODES for node in nodes):
            raise ValueError(f"action: got {nodes}, takes nodes in [0, {self.settings.NUM_NODES})")

    def _train_round(
        self, nodes: list[int]
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        settings = self.settings
        received = self._model
        trained = [self._train_locally(node, received) for node in nodes]
        self._model = trained[0] if len(trained) == 1 else tf.add_n(trained) / len(trained)
        self._own.update(zip(nodes, trained, strict=True))

        self._round += 1
        # With several nodes the public code counts the way to the first of them alone.
        distance = float(self.distances[self._holder, nodes[0]])
        self._holder = nodes[0]
        self._cost += distance
        accuracy = self._judged()
        value = reward(accuracy, distance, settings)
        if self._round > 1:
            value += progress_reward(accuracy, self._accuracy, settings)
        self._accuracy = accuracy
        terminated = accuracy >= settings.GOAL_ACCURACY
        truncated = not terminated and self._round >= settings.MAX_ROUNDS
        if truncated:
            value -= settings.MISS_PENALTY
        self._over = terminated or truncated

        self._received, self._trained = received, dict(zip(nodes, trained, strict=True))
        info = {
            "round": self._round,
            "node": nodes[0] if len(nodes) == 1 else nodes,
            "accuracy": accuracy,
            "distance": distance,
            "communication_cost": self._cost,
            "reward": value,
            "goal_reached": terminated,
            "diverged": not bool(tf.reduce_all(tf.math.is_finite(self._model))),
        }
        return self.observe(settings.OBSERVATION), value, terminated, truncated, info

    def _judged(self) -> float:
        """The accuracy that the round counts with, in [0, 1]."""
        count, size = self.settings.REWARD_IMAGES, self.foundation.test_size
        if 0 < count < size:
            judges = self._judging.choice(size, count, replace=False)
            accuracy = self.foundation.evaluate(self._model, judges)
            goal = self.settings.GOAL_ACCURACY
            error = math.sqrt(goal * (1 - goal) / count * (size - count) / (size - 1))
            if accuracy < goal - 3 * error:
                return accuracy
        return self.foundation.evaluate(self._model, None)

    def _train_locally(self, node: int, weights: tf.Tensor) -> tf.Tensor:
        """The weights after LOCAL_EPOCHS on the node's shard; keeps the node's Adam moments."""
        shard = self.shards[node]
        kept = self._moments.get(node) if self.settings.KEEP_MOMENTS else None
        moments = kept or Moments.fresh(self.foundation.network.size)
        for _ in range(self.settings.LOCAL_EPOCHS):
            order = shard[self._shuffling.permutation(len(shard))]
            weights, moments = self.foundation.train_epoch(weights, moments, tf.constant(order))
        self._moments[node] = moments
        return weights

    def observe(self, kind: str) -> np.ndarray:
        """What the nodes hold after the last round, as one of the values of OBSERVATION shows it.

        Args:
            kind: any of them; ``fixed`` only if it is that of the settings.

        Returns:
            Float32, of the shape that the class describes.

        Raises:
            KeyError: another word.
        """
        n, components = self.settings.NUM_NODES, self.settings.components
        if kind == "both":
            return np.concatenate([self.observe(k) for k in ("broadcast", "local")])
        if kind in ("last_node", "zeros"):
            seen = np.zeros(n, np.float32)
            seen[list(self._trained)] = kind == "last_node"
            return seen
        if kind == "fixed":
            moved = np.zeros((n, self.foundation.network.size))
            for node, model in self._own.items():
                moved[node] = model - self._initial
            if not np.isfinite(moved).all():
                return np.zeros(n * components, np.float32)
            scores = (moved - self._basis_mean) @ self._basis.T
            return np.float32(self.settings.LOCAL_SCALE * scores).ravel()
        differing, rest, scale = {
            "broadcast": (self._trained, self._received, self.settings.BROADCAST_SCALE),
            "local": (self._own, self._initial, self.settings.LOCAL_SCALE),
        }[kind]
        models = [model.numpy() for model in differing.values()]
        owners = np.full(n, len(models))
        owners[list(differing)] = np.arange(len(models))
        if len(models) < n:
            models.append(rest.numpy())
        scores = pca_scores(np.stack(models), owners, components)
        if self.settings.PCA_SIGNS == "holder":
            scores = turned_to(self._holder, scores)
        return np.float32(scale) * scores.ravel()

    def _pilot_basis(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, P) and (P,): components and mean of how the models of a pilot episode have moved.

        Its nodes are random; model, order and nodes are of a stream of their own, so the same seed
        gives the same basis, and nothing is evaluated: the agent learns nothing from it.
        """
        from sklearn.decomposition import PCA

        settings = self.settings
        rng = self._shuffling = stream(settings.SEED, "basis")
        self._moments = {}
        initial = model = self.foundation.network.initial_weights(rng)
        moved = []
        for _ in range(max(settings.MAX_ROUNDS, settings.components)):
            model = self._train_locally(int(rng.integers(settings.NUM_NODES)), model)
            moved.append((model - initial).numpy())
        if not np.isfinite(moved).all():  # diverged: as with the other kinds, nothing to see
            return np.zeros((settings.components, initial.shape[0])), np.zeros(initial.shape[0])
        pca = PCA(settings.components, svd_solver="full").fit(moved)
        return pca.components_, pca.mean_


gymnasium.register(id="HomogeneousLearning-v0", entry_point="environment:DecentralizedLearning")

"""Decentralized learning as a Gymnasium environment: nodes, rounds, reward, observation.

An episode is one training of a fresh foundation model. In each round one node (or several)
trains it on its own shard and passes it on; the action is who trains next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

import data
from config import Settings, stream
from models import Moments, shared_foundation_model, tf, use_device

_EVALUATION_SIZES = (1000, 2000, 4000)  # test images, see DecentralizedLearning._evaluate

# Of progress_reward.
_MAX_ROUNDS_LEFT = 12.0  # the potential's guess of the rounds left, far below the goal
_GAP_SCALE = 0.1  # gap to the goal, as accuracy, over which that changes by a factor of e
_MISS_COST = 15.0  # of an episode that misses the goal


def distance_matrix(settings: Settings) -> np.ndarray:
    """Return (N, N) float64: the communication distance of each two nodes, no unit (public code).

    It is the mean of a uniform matrix in [0, DISTANCE_SCALE) and its transpose, with zeros on the
    diagonal. NumPy's legacy generator draws it, as in the public code. Departure: the public code
    divides by 10 where DISTANCE_SCALE multiplies, so last bits may differ.
    """
    random = np.random.RandomState(settings.DISTANCE_SEED)
    uniform = settings.DISTANCE_SCALE * random.random_sample([settings.NUM_NODES] * 2)
    distances = (uniform + uniform.T) / 2
    np.fill_diagonal(distances, 0.0)
    return distances


def power_reward(accuracy: float, distance: float, settings: Settings) -> float:
    """Return a round's reward, h^(accuracy - goal) - distance - 1 (public code; h = 32)."""
    return settings.REWARD_BASE ** (accuracy - settings.GOAL_ACCURACY) - distance - 1


def progress_reward(
    accuracy: float, before: float, distance: float, missed: bool, settings: Settings
) -> float:
    """Return the reward of a round that pays for progress and charges for time (ours).

    A round costs its distance, and one point unless it reaches the goal. A miss costs _MISS_COST.
    Potential-based shaping (Ng, Harada and Russell 1999) is added: DISCOUNT times the potential
    after the round, less the potential before it. The potential is
    _MAX_ROUNDS_LEFT * (exp(min(accuracy - goal, 0) / _GAP_SCALE) - 1), also at the round limit.

    Args:
        accuracy: after the round, in [0, 1].
        before: after the round before it, or 0.
        distance: of the round.
        missed: whether the round was the last, and the goal is missed.
        settings: for GOAL_ACCURACY and DISCOUNT.
    """
    gaps = [min(a - settings.GOAL_ACCURACY, 0.0) for a in (accuracy, before)]
    after, before = (_MAX_ROUNDS_LEFT * math.expm1(gap / _GAP_SCALE) for gap in gaps)
    return settings.DISCOUNT * after - before - distance - (gaps[0] < 0) - _MISS_COST * missed


def positive_at(holder: int, scores: np.ndarray) -> np.ndarray:
    """Return (N, C) scores, of their dtype, with signs that make row ``holder`` >= 0 (ours)."""
    return scores * np.where(scores[holder] < 0, -1, 1).astype(scores.dtype)


def pca_scores(models: np.ndarray, row_of_node: np.ndarray, components: int) -> np.ndarray:
    """Return the PCA scores of all nodes' weights, as scikit-learn's full PCA does.

    The cost is that of a singular value decomposition of the M distinct vectors, however many nodes
    there are. Departure: a component without variance is 0 here; the public code, by scikit-learn's
    PCA, gives the DQN rounding noise there.

    Args:
        models: (M, P) float, the distinct weight vectors.
        row_of_node: (N,) int in [0, M), the row of each node; each row has at least one node.
        components: C, how many components to keep.

    Returns:
        (N, C) float32. A component's loading of greatest magnitude is positive, which is
        scikit-learn's rule since 1.5. Departure: all 0 if a weight is not finite, where
        scikit-learn raises an error.
    """
    scores = np.zeros((len(row_of_node), components), np.float32)
    if not np.isfinite(models).all():
        return scores
    counts = np.bincount(row_of_node, minlength=len(models)).astype(np.float64)
    centred = models.astype(np.float64)
    centred -= counts @ centred / counts.sum()
    # Multiply each of the M rows by the root of how often it occurs. The resulting M x P matrix has
    # the singular values of the N x P matrix with repeated rows; the small Gram matrix gives them.
    roots = np.sqrt(counts)
    squares, vectors = np.linalg.eigh(roots[:, None] * (centred @ centred.T) * roots)
    squares, vectors = squares[::-1][:components], vectors[:, ::-1][:, :components]
    # The weights are float32, so variance near their rounding (1e-7, squared) is noise.
    kept = (squares > 1e-13 * squares.max()) & (squares > 0)
    squares, vectors = squares[kept], vectors[:, kept]
    loadings = (roots[:, None] * vectors).T @ centred  # times the singular values
    signs = np.where(loadings.max(axis=1) >= -loadings.min(axis=1), 1.0, -1.0)
    # Row m of the left singular vectors times the singular values, divided by the row's weight.
    rows = signs * np.sqrt(squares) * vectors / roots[:, None]
    scores[:, : len(squares)] = rows[row_of_node]
    return scores


class DistinctNodes(spaces.MultiDiscrete):
    """Actions of several nodes a round: k distinct nodes of N, as an int64 array of shape (k,)."""

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        """Draw k nodes without replacement, of those that a ``mask`` as in info allows."""
        if probability is not None:
            raise ValueError("DistinctNodes samples without probabilities")
        nodes = self.np_random.permutation(self.nvec[0])
        return (nodes if mask is None else nodes[mask[nodes] == 1])[: len(self.nvec)]

    def contains(self, x: Any) -> bool:
        """Return whether x is an array of k distinct nodes."""
        return super().contains(x) and len(np.unique(x)) == len(self.nvec)


class DecentralizedLearning(gymnasium.Env[np.ndarray, Any]):
    """N nodes that train one foundation model in turn (public code).

    Actions: the node that trains next, in [0, N). The current node is allowed, and free. With
    NODES_PER_ROUND = k > 1 an array of k distinct nodes, the first of which passes the averaged
    model on.

    Observations: see ``observe``. Rewards: ``power_reward``, or with REWARD = ``progress`` (ours)
    ``progress_reward``.

    An episode terminates when the accuracy on the whole test set is at least GOAL_ACCURACY, and is
    truncated after MAX_ROUNDS rounds.

    Info, from ``reset`` and ``step``:
        round: from 1.
        node: node that trained; a list if several did.
        accuracy: share of correct images among those that judged the round, in [0, 1].
        distance: how far the model travelled to this round's first node, no unit.
        communication_cost: sum of the episode's distances.
        reward: of the round.
        episode_reward: sum of the episode's rewards.
        goal_reached: whether the accuracy is at least GOAL_ACCURACY.
        action_mask: (N,) int8, 1 for each node that the agent may choose next. 0 for those that
            trained MAX_STAY rounds in a row, if enough others are left.
        diverged: whether some weight is not finite.

    A node is a shard, a weight vector and Adam's moments, kept within an episode (public code).

    Args:
        settings: by default those of config.py.
        dataset: by default the one that the settings name.

    Raises:
        ConfigError, DataError, DataNotFound: the settings ask for what does not exist.

    Attributes:
        shards: each node's training images, see ``data.make_shards``.
        distances: see ``distance_matrix``.
        foundation: a ``FoundationModel``; trains and evaluates.
        observation_size: length of an observation.
        threads: how many CPU threads compute.
    """

    def __init__(
        self, settings: Settings | None = None, dataset: data.Dataset | None = None
    ) -> None:
        self.settings = settings or Settings()
        # Before a dataset is made with TensorFlow.
        self.threads = use_device(self.settings.THREADS, self.settings.DEVICE)
        self.dataset = dataset or data.load(self.settings)
        self.shards = data.make_shards(self.dataset, self.settings)
        self.distances = distance_matrix(self.settings)
        training = self.settings.BATCH_SIZE, self.settings.LEARNING_RATE
        self.foundation = shared_foundation_model(self.dataset, *training)
        n, k = self.settings.NUM_NODES, self.settings.NODES_PER_ROUND
        self.action_space = spaces.Discrete(n) if k == 1 else DistinctNodes([n] * k)
        sizes = {"broadcast": n * n, "local": n * n, "both": 2 * n, "last_node": n, "zeros": n}
        self.observation_size = sizes[self.settings.OBSERVATION]
        greatest = np.finfo(np.float32).max  # Gymnasium warns of infinite bounds
        self.observation_space = spaces.Box(-greatest, greatest, (self.observation_size,))
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Make a new foundation model and train round 1 at STARTER_NODE.

        Departure: in the public code node 0 trains round 1 whatever ``--starter`` says, which
        there only changes the distance of that round. With the default they are the same.

        Args:
            seed: of the model's weights and the order of the images. With one node per round and
                shards of equal size they are the same whatever the actions are.
                None continues with the generator as it is.
            options: ``{"nodes": [...]}`` lets these distinct nodes train round 1 instead.

        Returns:
            The first observation and info. With ``info["goal_reached"]`` the episode is over.

        Raises:
            ValueError: the nodes are not a list of distinct nodes, or it is empty.
        """
        nodes = (options or {}).get("nodes", [self.settings.STARTER_NODE])
        if np.ndim(nodes) != 1:
            raise ValueError(f"nodes: got {nodes!r}, takes a list of distinct nodes")
        nodes = self._distinct_nodes(nodes, len(nodes) or 1)
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**63))
        self._shuffling = stream(episode, "shuffling")
        self._judging = stream(episode, "judging")
        self._model = self.foundation.network.initial_weights(stream(episode, "initialisation"))
        self._initial = self._model
        self._own: dict[int, tf.Tensor] = {}  # each node's own last model, for `local`
        self._moments: dict[int, Moments] = {}
        self._round, self._cost, self._total, self._accuracy = 0, 0.0, 0.0, 0.0
        self._stays: dict[int, int] = {}  # rounds in a row of the nodes that trained last
        # The model starts where it is first trained: round 1 costs nothing.
        self._holder = nodes[0]
        observation, _, _, _, info = self._train_round(nodes)
        return observation, info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Send the model to the node(s), train LOCAL_EPOCHS there and evaluate the result.

        Raises:
            ValueError: not a node, or not NODES_PER_ROUND distinct nodes.
            gymnasium.error.ResetNeeded: the episode is over.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset first")
        return self._train_round(self._distinct_nodes(action, self.settings.NODES_PER_ROUND))

    def _distinct_nodes(self, action: Any, count: int) -> list[int]:
        nodes, n = np.atleast_1d(action), self.settings.NUM_NODES
        whole = nodes.dtype.kind in "iu" and nodes.shape == np.unique(nodes).shape == (count,)
        if not whole or nodes.min() < 0 or nodes.max() >= n:
            raise ValueError(f"action: got {action!r}, takes {count} distinct node(s) in [0, {n})")
        return nodes.tolist()

    def _train_round(
        self, nodes: list[int]
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        settings = self.settings
        self._received = self._model
        self._trained = {node: self._train_locally(node, self._received) for node in nodes}
        self._own.update(self._trained)
        self._model = tf.add_n([*self._trained.values()]) / len(nodes)

        self._round += 1
        self._stays = {node: self._stays.get(node, 0) + 1 for node in nodes}
        # With several nodes the public code counts the way to the first of them alone.
        distance = float(self.distances[self._holder, nodes[0]])
        self._holder = nodes[0]
        self._cost += distance
        before, accuracy = self._accuracy, self._evaluate()
        self._accuracy = accuracy
        terminated = accuracy >= settings.GOAL_ACCURACY
        truncated = not terminated and self._round >= settings.MAX_ROUNDS
        reward = (
            power_reward(accuracy, distance, settings)
            if settings.REWARD == "power"
            else progress_reward(accuracy, before, distance, truncated, settings)
        )
        self._total += reward
        self._over = terminated or truncated
        info = {
            "round": self._round,
            "node": nodes[0] if len(nodes) == 1 else nodes,
            "accuracy": accuracy,
            "distance": distance,
            "communication_cost": self._cost,
            "reward": reward,
            "episode_reward": self._total,
            "goal_reached": terminated,
            "action_mask": self._action_mask(),
            "diverged": not bool(tf.reduce_all(tf.math.is_finite(self._model))),
        }
        return self.observe(settings.OBSERVATION), reward, terminated, truncated, info

    def _action_mask(self) -> np.ndarray:
        """Return info's ``action_mask``, for MAX_STAY (ours). Only the agent keeps to it."""
        longest = self.settings.MAX_STAY or math.inf
        mask = np.ones(self.settings.NUM_NODES, np.int8)
        mask[[node for node, rounds in self._stays.items() if rounds >= longest]] = 0
        return mask if mask.sum() >= self.settings.NODES_PER_ROUND else np.ones_like(mask)

    def _evaluate(self) -> float:
        """Return the accuracy that the round counts with: of all test images (public code).

        With REWARD = ``progress`` (ours) 1,000 images, drawn anew, judge a round, which is quicker.
        While their accuracy is within three standard errors of the goal, or above, more images
        join: 2,000, 4,000 and at last all.
        """
        size, goal = self.foundation.test_size, self.settings.GOAL_ACCURACY
        if self.settings.REWARD == "power":
            return self.foundation.evaluate(self._model)
        order, evaluated, correct = self._judging.permutation(size), 0, 0
        for count in (*(count for count in _EVALUATION_SIZES if count < size), size):
            more = order[evaluated:count]
            correct += round(self.foundation.evaluate(self._model, more) * len(more))
            evaluated = count
            error = math.sqrt(goal * (1 - goal) / count * (size - count) / max(size - 1, 1))
            if correct / count < goal - 3 * error:
                break
        return correct / evaluated

    def _train_locally(self, node: int, weights: tf.Tensor) -> tf.Tensor:
        shard = self.shards[node]
        moments = self._moments.get(node) or Moments.fresh(self.foundation.network.size)
        for _ in range(self.settings.LOCAL_EPOCHS):
            order = shard[self._shuffling.permutation(len(shard))]
            weights, moments = self.foundation.train_epoch(weights, moments, tf.constant(order))
        self._moments[node] = moments
        return weights

    def observe(self, kind: str) -> np.ndarray:
        """Return what a value of OBSERVATION shows after the last round; see docs/observations.md.

        The values are ``broadcast`` (public code), ``local`` (the paper's figures), ``both``,
        ``last_node`` and ``zeros`` (ours). The first two hold all scores of node 0, then of node 1,
        and so on. ``both`` holds the first broadcast score of each node, then the first local one.
        There the last node's are never negative, and factors of 4 and 0.4 give the two parts the
        same spread.

        Returns:
            Float32: (N * N,), for ``both`` (2 * N,), for ``last_node`` and ``zeros`` (N,).

        Raises:
            KeyError: another word.
        """
        n = self.settings.NUM_NODES
        if kind == "both":
            broadcast, local = (
                positive_at(self._holder, self._scores(part, 1)) for part in ("broadcast", "local")
            )
            return np.concatenate([np.float32(4) * broadcast, np.float32(0.4) * local]).ravel()
        if kind in ("last_node", "zeros"):
            seen = np.zeros(n, np.float32)
            seen[list(self._trained)] = kind == "last_node"
            return seen
        return self._scores(kind, n).ravel()

    def _scores(self, kind: str, components: int) -> np.ndarray:
        """Return (N, components) float32 PCA scores, ``broadcast`` or ``local``."""
        differing, rest = {
            "broadcast": (self._trained, self._received),
            "local": (self._own, self._initial),
        }[kind]
        models = [model.numpy() for model in differing.values()]
        row_of_node = np.full(self.settings.NUM_NODES, len(models))
        row_of_node[list(differing)] = np.arange(len(models))
        if len(models) < len(row_of_node):
            models.append(rest.numpy())
        return pca_scores(np.stack(models), row_of_node, components)


# --- Episodes --------------------------------------------------------------------------------

# (observation, info) -> the next node (or NODES_PER_ROUND of them), and what chose it.
Policy = Callable[[np.ndarray, dict[str, Any]], tuple[Any, str]]


class Round(NamedTuple):
    """One round of an episode: the environment before it, what the policy chose, what came of it.

    In round 1, which the policy does not choose, observation and action are None, and ``chosen_by``
    is ``starter``.

    Attributes:
        observation: (D,) float32, before the round; D is the environment's observation_size.
        action: the next node, or the k distinct nodes, as the policy returned them.
        chosen_by: the policy's word for what chose them.
        reward: of the round.
        next_observation: (D,) float32, after the round.
        terminated, truncated: whether the episode ended with it, at the goal or at the round limit.
        info: the environment's, after the round.
    """

    observation: np.ndarray | None
    action: Any
    chosen_by: str
    reward: float
    next_observation: np.ndarray
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def rollout(
    environment: DecentralizedLearning,
    policy: Policy,
    seed: int,
    first_nodes: list[int] | None = None,
) -> Iterator[Round]:
    """Reset the environment with the seed, play one episode and yield each round when it is over.

    ``first_nodes`` train round 1, by default STARTER_NODE; the policy chooses all others.
    """
    options = None if first_nodes is None else {"nodes": first_nodes}
    observation, info = environment.reset(seed=seed, options=options)
    done = info["goal_reached"]
    yield Round(None, None, "starter", info["reward"], observation, done, False, info)
    while not done:
        action, chosen_by = policy(observation, info)
        following, reward, terminated, truncated, info = environment.step(action)
        yield Round(observation, action, chosen_by, reward, following, terminated, truncated, info)
        observation, done = following, terminated or truncated


gymnasium.register(id="HomogeneousLearning-v0", entry_point="environment:DecentralizedLearning")

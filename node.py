"""The DQN agent that every node holds: it looks at an observation and picks who trains next.

It knows actions by their number alone, so it can act, remember and train on any Gymnasium
environment with a flat observation and discrete actions.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from config import REPLAY_CAPACITY, AgentSettings, Settings, names_of, stream
from models import FlatNetwork, Moments, adam, q_network, tf, use_device

if TYPE_CHECKING:
    from environment import Round


def transition_dtype(observation_size: int, actions: int, actions_per_step: int) -> np.dtype:
    """Return the fields of a transition, as ``ReplayBuffer.add`` describes them."""
    return np.dtype(
        [
            ("observations", np.float32, (observation_size,)),
            ("actions", np.int32, (actions_per_step,)),
            ("rewards", np.float64),
            ("next_observations", np.float32, (observation_size,)),
            ("dones", np.bool_),
            ("steps", np.int32),
            ("next_masks", np.bool_, (actions,)),
        ]
    )


class ReplayBuffer:
    """A ring buffer of transitions.

    Departure: the public code shuffles its memory in place before each draw, so beyond the
    capacity it drops transitions at random, not the oldest. Its 120 episodes of at most
    36 rounds never fill it.

    Args:
        capacity: transitions kept; after that the oldest is overwritten by the next one.
        observation_size: D, length of a flat observation.
        actions: A, number of actions.
        actions_per_step: k, number of actions taken in a step.

    Attributes:
        added: how many transitions were ever added.
    """

    def __init__(
        self, capacity: int, observation_size: int, actions: int, actions_per_step: int = 1
    ) -> None:
        self.capacity = capacity
        self.added = 0
        # It takes memory only where it is written.
        kind = transition_dtype(observation_size, actions, actions_per_step)
        self._ring = np.zeros(capacity, kind)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(
        self,
        observation: np.ndarray,
        actions: list[int],
        reward: float,
        next_observation: np.ndarray,
        done: bool,
        steps: int = 1,
        next_mask: np.ndarray | bool = True,
    ) -> None:
        """Store one transition, of one step or several.

        Args:
            observation: (D,) float32, before the first step.
            actions: the k distinct actions of the first step.
            reward: of all steps, discounted.
            next_observation: (D,) float32, after the last step.
            done: whether the episode ended there, at the goal or at the limit.
            steps: number of steps.
            next_mask: (A,) bool, the actions that may follow; True for all.
        """
        following = (next_observation, done, steps, next_mask)
        self._ring[self.added % self.capacity] = (observation, actions, reward, *following)
        self.added += 1

    def sample(
        self, count: int, size: int, rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw ``count`` samples of distinct transitions, each in random order.

        Returns:
            The fields of all transitions that were drawn, (m, ...) each, and (count, size) int32,
            which of them make a sample. So a transition is copied once, however often it is drawn.

        Raises:
            ValueError: fewer than ``size`` are stored.
        """
        places = [rng.choice(len(self), size, replace=False) for _ in range(count)]
        drawn, draws = np.unique(places, return_inverse=True)
        transitions = {name: self._ring[name][drawn] for name in self._ring.dtype.names or ()}
        return transitions, draws.reshape(count, size).astype(np.int32)

    def latest(self, count: int) -> np.ndarray:
        """Return the last ``count`` transitions (or all that there are), oldest first."""
        count = min(count, len(self))
        return self._ring[np.arange(self.added - count, self.added) % self.capacity]

    def restore(self, transitions: np.ndarray, added: int) -> None:
        """Become a buffer to which ``added`` transitions were added, of which these are the last.

        Raises:
            ValueError: they are too few, or of another kind of buffer.
        """
        kept = min(added, self.capacity)
        if transitions.dtype != self._ring.dtype or len(transitions) < kept:
            got = f"got {len(transitions)} transitions"
            takes = f"takes {kept} of these settings' sizes and this version's fields"
            raise ValueError(f"replay buffer: {got}, {takes}")
        places = np.arange(added - kept, added) % self.capacity
        self._ring[places] = transitions[len(transitions) - kept :]
        self.added = added


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
        next_values: (n, A) float32, at the next one. The maximum is over the actions that its mask
            allows.
        sample: n transitions, the fields of ``ReplayBuffer``.
        settings: for DISCOUNT and FIT_ALL_ACTIONS.
    """
    possible = tf.where(sample["next_masks"], next_values, next_values.dtype.min)
    future = tf.cast(tf.reduce_max(possible, 1), tf.float64)
    discount = settings.DISCOUNT ** tf.cast(sample["steps"], tf.float64)
    goes_on = tf.cast(~sample["dones"], tf.float64)
    returns = sample["rewards"] + discount * future * goes_on
    taken = taken_mask(sample["actions"], q_values.shape[1])
    targets = tf.where(taken, returns[:, None], tf.cast(q_values, tf.float64))
    if settings.FIT_ALL_ACTIONS:
        targets = tf.math.divide_no_nan(targets, tf.norm(targets))
    return tf.cast(targets, tf.float32)


def taken_mask(actions: tf.Tensor, count: int) -> tf.Tensor:
    """Return (n, count) bool: True at the actions taken, (n, k) int32."""
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
        fields = transition_dtype(inputs, actions, actions_per_step)
        transitions = {
            name: tf.TensorSpec([None, *fields[name].shape], fields[name].base)
            for name in fields.names or ()
        }
        draws = tf.TensorSpec([None, settings.REPLAY_SAMPLE], tf.int32)
        self._values = tf.function(self.network.apply, [vector, transitions["observations"]])
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
            transitions: the fields of m transitions, as ``ReplayBuffer.sample`` returns them.
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
                        taken = taken_mask(sample["actions"][start:stop], outputs.shape[1])
                        errors = tf.where(taken, errors, 0.0)
                    loss = tf.reduce_mean(errors)
                lost += loss * tf.cast(tf.shape(batch)[0], tf.float32)
                gradient = tape.gradient(loss, weights)
                if settings.Q_WEIGHT_DECAY:  # decoupled (Loshchilov and Hutter 2019)
                    weights -= settings.Q_LEARNING_RATE * settings.Q_WEIGHT_DECAY * weights
                weights, moments = adam(weights, gradient, moments, settings.Q_LEARNING_RATE)
            total += lost / settings.REPLAY_SAMPLE
        return weights, moments, total / tf.cast(tf.shape(draws)[0], tf.float32)


# Compiling takes a second, and the network holds no weights: agents share the latest one if their
# sizes and AgentSettings are equal.
shared_q_network = functools.lru_cache(maxsize=1)(QNetwork)


class DQNAgent:
    """Deep Q-learning with a replay buffer, trained at the end of an episode (public code).

    Args:
        observation_size: D, length of a flat observation.
        settings: NUM_NODES is the number of actions, NODES_PER_ROUND is k, the actions taken in a
            step. The replay buffer is no larger than EPISODES can fill it.

    Attributes:
        epsilon: probability of a random choice.
        episode: number of the present episode, from 1.
        replay: the replay buffer.
        q: the shared ``QNetwork``.
        weights, target_weights: (P,) float32, of the Q-network.
    """

    def __init__(self, observation_size: int, settings: Settings) -> None:
        use_device(settings.THREADS, settings.DEVICE)
        self.settings = settings
        self.actions = settings.NUM_NODES
        self.actions_per_step = settings.NODES_PER_ROUND
        # All steps of the training: the policy does not choose an episode's first round.
        steps = settings.EPISODES * (settings.MAX_ROUNDS - 1)
        sizes = observation_size, self.actions, self.actions_per_step
        self.replay = ReplayBuffer(min(REPLAY_CAPACITY, steps), *sizes)
        used = AgentSettings(**settings.model_dump(include=names_of(AgentSettings)))
        self.q = shared_q_network(*sizes, used)
        self.weights = self.q.network.initial_weights(stream(settings.SEED, "network"))
        self.target_weights = self.weights
        self.moments = Moments.fresh(self.q.network.size)
        self.epsilon = settings.EPSILON
        self._enter_episode(1)

    def _enter_episode(self, episode: int) -> None:
        self.episode = episode
        self._exploration = stream(self.settings.SEED, "exploration", episode)
        self._draws = stream(self.settings.SEED, "replay", episode)
        # Steps that wait for N_STEP rewards: observation, actions, reward.
        self._recent: list[tuple[np.ndarray, list[int], float]] = []
        self._choice: list[int] = []  # the last one
        self._mask = self._mask_of({})  # of the next step
        self._steps_left = 0  # steps that the last choice still lasts
        self._stored = 0  # transitions that this episode added

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> tuple[list[int], str]:
        """Choose k distinct actions; return them and ``random``, ``repeated`` or ``greedy``.

        Epsilon-greedy (public code). A choice lasts ROUNDS_PER_CHOICE steps. With MAX_STAY a random
        choice is repeated up to so many steps; how often is drawn uniformly. Both are ours (after
        Dabney et al. 2021). A node's effect shows after several rounds, and independent choices
        rarely stay that long.

        Args:
            observation: (D,) float32.
            info: ``action_mask``, (A,), is 0 for the actions that a new choice leaves out; by
                default it leaves out none.
        """
        mask, lasting = self._mask_of(info), self.settings.ROUNDS_PER_CHOICE
        self._steps_left -= 1
        # The mask counts where a choice begins, and where a random one is repeated.
        goes_on = self._steps_left % lasting > 0 or mask[self._choice].all()
        if self._steps_left > 0 and goes_on:
            return self._choice, "repeated"
        self._steps_left = lasting
        if self._exploration.random() >= self.epsilon:
            self._choice = self._best(observation, mask)
            return self._choice, "greedy"
        self._choice = self._first(self._exploration.permutation(self.actions), mask)
        longest = self.settings.MAX_STAY // lasting
        if longest > 1:
            self._steps_left = lasting * int(self._exploration.integers(1, longest + 1))
        return self._choice, "random"

    def _mask_of(self, info: dict[str, Any]) -> np.ndarray:
        """Return info's ``action_mask``, (A,) bool; without one all actions are allowed."""
        return np.full(self.actions, info.get("action_mask", True), bool)

    def _first(self, order: np.ndarray, mask: np.ndarray) -> list[int]:
        """Return the first k actions of an order that the mask allows."""
        return order[mask[order]][: self.actions_per_step].tolist()

    def _best(self, observation: np.ndarray, mask: np.ndarray) -> list[int]:
        """Return the k allowed actions of the greatest Q values; of equal ones the lower first."""
        q_values = self.q.values(self.weights, observation[None])[0]
        return self._first(np.argsort(-q_values, kind="stable"), mask)

    def greedy(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        """Return the best actions every ROUNDS_PER_CHOICE rounds, else those of the last round.

        Args:
            observation: (D,) float32.
            info: ``round``, from 1; ``node``, the last choice; ``action_mask``, as for ``act``.
        """
        if (info["round"] - 1) % self.settings.ROUNDS_PER_CHOICE:
            return info["node"]
        return self._best(observation, self._mask_of(info))

    def remember(self, round_: Round) -> None:
        """Store a step in the replay buffer, once N_STEP rewards from it on are known.

        If a choice lasts longer, its rewards are awaited. The discounted sum is stored, with the
        observation after the last reward. Fewer are summed at the episode's end, and before a
        random choice, which says nothing of the choices before it (Watkins 1989). By default a
        step is stored by itself (public code). An episode that the round limit truncates
        ends like one that reached the goal (public code). The starter's round, which no one chose,
        is not stored.

        ``round_.action`` and ``round_.chosen_by`` are what ``act`` returned. ``round_.info`` may
        have the ``action_mask`` of the next step.
        """
        observation = round_.observation
        if observation is None:
            return
        if round_.chosen_by == "random":
            self._store(observation, self._mask, False, 0)
        self._recent.append((observation, round_.action, round_.reward))
        # The value of a choice includes the rewards of all its rounds.
        steps = max(self.settings.N_STEP, self.settings.ROUNDS_PER_CHOICE)
        done = round_.terminated or round_.truncated
        self._mask = self._mask_of(round_.info)
        self._store(round_.next_observation, self._mask, done, 0 if done else steps - 1)

    def _store(
        self, next_observation: np.ndarray, next_mask: np.ndarray, done: bool, waiting: int
    ) -> None:
        """Store the oldest recent steps until ``waiting`` are left.

        A step counts only if its actions lasted for a whole choice, or to the episode's end. Else
        its reward is not that of a choice.
        """
        lasting = self.settings.ROUNDS_PER_CHOICE
        while len(self._recent) > waiting:
            steps = len(self._recent)
            first, chosen, _ = self._recent[0]
            same = all(actions == chosen for _, actions, _ in self._recent[:lasting])
            if same and (done or steps >= lasting):
                discount, total = self.settings.DISCOUNT, 0.0
                for i, (_, _, reward) in enumerate(self._recent):
                    total += discount**i * reward
                self.replay.add(first, chosen, total, next_observation, done, steps, next_mask)
                self._stored += 1
            self._recent.pop(0)

    def train(self) -> float | None:
        """Train the Q-network at the end of an episode, once REPLAY_SAMPLE transitions are stored.

        Each of UPDATES_PER_EPISODE updates passes once over a sample in batches of Q_BATCH_SIZE.
        Departure: in the order of the draw, which is random; Keras' ``fit`` in the public code
        shuffles it once more.

        Returns:
            The mean squared error before each gradient step, averaged; None without training.
        """
        settings = self.settings
        if len(self.replay) < settings.REPLAY_SAMPLE:
            return None
        transitions, draws = self.replay.sample(
            settings.UPDATES_PER_EPISODE, settings.REPLAY_SAMPLE, self._draws
        )
        self.weights, self.moments, loss = self.q.train(
            self.weights, self.moments, self.target_weights, transitions, draws
        )
        # With TARGET_RATE = 0 these weights are never used.
        step = settings.TARGET_RATE
        self.target_weights = (1 - step) * self.target_weights + step * self.weights
        return float(loss)

    def end_episode(self) -> np.ndarray:
        """Go on to the next episode; return the transitions that this one added, oldest first.

        epsilon is multiplied by exp(-EPSILON_DECAY) (public code).
        """
        added = self.replay.latest(self._stored)
        self.epsilon *= math.exp(-self.settings.EPSILON_DECAY)
        self._enter_episode(self.episode + 1)
        return added

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what ``agent.npz`` holds: the Q-network's weights, by layer."""
        return self.q.network.named_arrays(self.weights)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over the weights of what ``arrays`` returned; ValueError if they do not fit."""
        self.weights = self.q.network.from_named_arrays(arrays)

    def state(self) -> dict[str, np.ndarray]:
        """Return what training continues from between two episodes, without the transitions."""
        return {
            "episode": np.array(self.episode),
            "epsilon": np.array(self.epsilon),
            "weights": self.weights.numpy(),
            "target_weights": self.target_weights.numpy(),
            "first_moments": self.moments.first.numpy(),
            "second_moments": self.moments.second.numpy(),
            "moments_step": self.moments.step.numpy(),
            "transitions_added": np.array(self.replay.added),
        }

    def load_state(self, state: dict[str, np.ndarray], transitions: np.ndarray) -> None:
        """Take over another agent's ``state`` and its last transitions, oldest first.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: it belongs to another kind of agent; nothing
                has changed.
            KeyError: an array is missing.
        """
        vectors = ("weights", "target_weights", "first_moments", "second_moments")
        weights, target, first, second = (
            tf.ensure_shape(state[name], self.weights.shape) for name in vectors
        )
        self.replay.restore(transitions, int(state["transitions_added"]))
        self.weights, self.target_weights = weights, target
        self.moments = Moments(first, second, tf.constant(state["moments_step"]))
        self.epsilon = float(state["epsilon"])
        self._enter_episode(int(state["episode"]))

"""The DQN agent that every node holds: it looks at an observation and picks who is next.

It knows actions by their number alone (and STARTER_NODE as the one before the first, if random
choices repeat), so it learns on any Gymnasium environment with a flat observation and discrete
actions.
"""

from __future__ import annotations

import math

import numpy as np

from config import Settings, stream
from models import Moments, shared_q_network, tf


class ReplayMemory:
    """A ring buffer of transitions, an array that grows up to the capacity.

    Departure: the public code shuffles its memory in place before each draw, so that beyond the
    capacity it forgets transitions at random instead of the oldest. Its 120 episodes of at most
    36 rounds never fill it.

    Args:
        capacity: transitions kept; the oldest is overwritten by the next one after that.
        observation_size: D, length of a flat observation.
        actions_per_step: k, number of actions taken in a step.

    Attributes:
        added: how many transitions were ever added.
    """

    _FIRST_SIZE = 1024

    def __init__(self, capacity: int, observation_size: int, actions_per_step: int = 1) -> None:
        self.capacity = capacity
        self.added = 0
        self._transition = np.dtype(
            [
                ("observations", np.float32, (observation_size,)),
                ("actions", np.int32, (actions_per_step,)),
                ("rewards", np.float64),
                ("next_observations", np.float32, (observation_size,)),
                ("terminals", np.bool_),
                ("steps", np.int32),
            ]
        )
        self._ring = np.zeros(min(capacity, self._FIRST_SIZE), self._transition)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(
        self,
        observation: np.ndarray,
        actions: int | list[int],
        reward: float,
        next_observation: np.ndarray,
        terminal: bool,
        steps: int = 1,
    ) -> None:
        """Stores one transition, of one step or several.

        Args:
            observation: (D,) float32, before the first of them.
            actions: the first of them: one action, or k distinct ones.
            reward: of all of them.
            next_observation: (D,) float32, after the last of them.
            terminal: whether the episode ended there.
            steps: how many they are.
        """
        size = len(self._ring)
        if self.added == size < self.capacity:
            more = min(size, self.capacity - size)
            self._ring = np.concatenate([self._ring, np.zeros(more, self._transition)])
        transition = self._ring[self.added % self.capacity]
        values = (observation, actions, reward, next_observation, terminal, steps)
        for name, value in zip(self._transition.names, values, strict=True):
            transition[name] = value
        self.added += 1

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """``count`` distinct transitions in random order, as a copy.

        Returns:
            (count,) structured: observations, next_observations (count, D) float32; actions
            (count, k) int32; rewards (count,) float64; terminals (count,) bool; steps (count,)
            int32, from an observation to the next.

        Raises:
            ValueError: fewer than ``count`` are stored.
        """
        return self._ring[rng.choice(len(self), count, replace=False)]

    def latest(self, count: int) -> np.ndarray:
        """The last ``count`` transitions (all, if fewer are stored), oldest first; as ``draw``."""
        count = min(count, len(self))
        return self._ring[np.arange(self.added - count, self.added) % self.capacity]

    def restore(self, transitions: np.ndarray, added: int) -> None:
        """Becomes a memory to which ``added`` transitions were added, of which these are the last.

        Raises:
            ValueError: they are too few, or of another kind of memory.
        """
        kept = min(added, self.capacity)
        if transitions.dtype != self._transition or len(transitions) < kept:
            raise ValueError(
                f"replay memory: {len(transitions)} transitions, or of another kind or version"
            )
        ring = np.zeros(max(len(self._ring), kept), self._transition)
        ring[np.arange(added - kept, added) % self.capacity] = transitions[
            len(transitions) - kept :
        ]
        self._ring, self.added = ring, added


class DQNAgent:
    """Deep Q-learning with replay memory, trained at the end of an episode (public code).

    Args:
        observation_size: D, length of a flat observation.
        actions: number of discrete actions.
        settings: the DQN's and the exploration's constants, STARTER_NODE, and SEED.
        actions_per_step: k; with more than one, the k actions of greatest Q value are taken.

    Attributes:
        epsilon: probability of a random action in the present episode, in each step that does not
            go on with one (EXPLORATION_PERSIST).
        episode: number of the present episode, from 1.
        memory: the replay memory.
    """

    def __init__(
        self, observation_size: int, actions: int, settings: Settings, actions_per_step: int = 1
    ) -> None:
        self.settings = settings
        self.actions = actions
        self.actions_per_step = actions_per_step
        self.memory = ReplayMemory(settings.REPLAY_CAPACITY, observation_size, actions_per_step)
        self.q = shared_q_network(observation_size, actions, settings)
        self.weights = self.q.network.initial_weights(stream(settings.SEED, "network"))
        self.target_weights = self.weights
        self.moments = Moments.fresh(self.q.network.size)
        self.epsilon = settings.EPSILON
        self._enter_episode(1)

    def _enter_episode(self, episode: int) -> None:
        self.episode = episode
        self._exploration = stream(self.settings.SEED, "exploration", episode)
        self._replay = stream(self.settings.SEED, "replay", episode)
        # The present episode's steps that wait for N_STEP rewards: observation, actions, reward.
        self._recent: list[tuple[np.ndarray, int | list[int], float]] = []
        self._last = [self.settings.STARTER_NODE] if self.actions_per_step == 1 else []
        self._exploring = False  # whether the last choice was not greedy

    def act(self, observation: np.ndarray) -> tuple[list[int], str]:
        """Epsilon-greedy choice: k distinct actions, and ``random``, ``repeated`` or ``greedy``.

        With probability EXPLORATION_REPEAT a random choice is that of the step before (ours; after
        Dabney et al. 2021): what is learned at a node shows after several rounds there, which
        choices that are independent of each other hardly ever try. Before the first step the
        choice was STARTER_NODE, if one action is taken in a step. With probability
        EXPLORATION_PERSIST a step that follows a random or repeated choice repeats it whatever
        epsilon is (ours, after the same), so that long stays are tried while epsilon is small.

        Args:
            observation: (D,) float32.
        """
        settings, chance = self.settings, self._exploration.random
        persist = settings.EXPLORATION_PERSIST
        if persist and self._exploring and chance() < persist:
            return self._last, "repeated"
        self._exploring = chance() < self.epsilon
        if not self._exploring:
            return self._chose(self.best_actions(observation)), "greedy"
        repeat = settings.EXPLORATION_REPEAT
        if repeat and chance() < repeat and self._last:
            return self._last, "repeated"
        chosen = self._exploration.permutation(self.actions)[: self.actions_per_step]
        return self._chose(chosen.tolist()), "random"

    def _chose(self, actions: list[int]) -> list[int]:
        self._last = actions
        return actions

    def best_actions(self, observation: np.ndarray) -> list[int]:
        """The k actions of greatest Q value, best first; of equal ones the lower number.

        Args:
            observation: (D,) float32.
        """
        q_values = self.q.values(self.weights, observation[None])[0]
        return np.argsort(-q_values, kind="stable")[: self.actions_per_step].tolist()

    def remember(
        self,
        observation: np.ndarray,
        actions: int | list[int],
        reward: float,
        next_observation: np.ndarray,
        terminated: bool,
        truncated: bool = False,
    ) -> None:
        """Stores a step in the replay memory, once the N_STEP rewards from it on are known (ours).

        The stored reward is their sum, each next one weighted with DISCOUNT once more, and the next
        observation is that after the last of them. At an episode's end it is the sum of what is
        left, and with N_STEP = 0 always. With N_STEP = 1 that is the step itself (public code).

        An episode that the limit of rounds truncates ends like one that reached the goal (public
        code). The observation does not hold the round, so states that are typical of late rounds
        look good then, for they soon cost nothing any more. With BOOTSTRAP_AT_LIMIT (ours; Pardo et
        al. 2018) the value of the last observation follows instead.

        Args:
            observation: (D,) float32, before the step.
            actions: the one action, or the k distinct ones.
            reward: of the step.
            next_observation: (D,) float32, after it.
            terminated: whether it reached the goal.
            truncated: whether the limit of rounds ended the episode with it.
        """
        count, discount = self.settings.N_STEP, self.settings.DISCOUNT
        over = terminated or truncated
        terminal = terminated or (truncated and not self.settings.BOOTSTRAP_AT_LIMIT)
        self._recent.append((observation, actions, reward))
        while self._recent and (over or len(self._recent) == count):
            steps = len(self._recent)
            total = sum(discount**i * r for i, (_, _, r) in enumerate(self._recent))
            first, chosen, _ = self._recent.pop(0)
            self.memory.add(first, chosen, total, next_observation, terminal, steps)

    def train(self) -> float | None:
        """Trains the Q-network at the end of an episode, once REPLAY_SAMPLE transitions are stored.

        Each of UPDATES_PER_EPISODE updates draws a sample, computes its targets and goes through
        it once in batches of Q_BATCH_SIZE. (Departure: in the order of the draw, which is random;
        Keras' ``fit`` in the public code shuffles it once more.) The learning rate decays like
        epsilon, by Q_RATE_DECAY (ours): while episodes are few, each of them turns the policy, and
        what is learned late is to be kept.

        Returns:
            The mean squared error before each gradient step, averaged; None without training.
        """
        settings = self.settings
        if len(self.memory) < settings.REPLAY_SAMPLE:
            return None
        share = math.exp(-settings.Q_RATE_DECAY * (self.episode - 1))
        losses = []
        for _ in range(settings.UPDATES_PER_EPISODE):
            sample = self.memory.draw(settings.REPLAY_SAMPLE, self._replay)
            self.weights, self.moments, loss = self.q.fit(
                self.weights, self.moments, sample["observations"], self.targets(sample), share
            )
            losses.append(float(loss))
        if settings.TARGET_UPDATE == 0 or self.episode % settings.TARGET_UPDATE == 0:
            self.target_weights = self.weights
        return float(np.mean(losses))

    def targets(self, sample: np.ndarray) -> np.ndarray:
        """(n, K, actions) float32 that the K networks' Q values are fitted to (public code).

        The n transitions of ``sample`` are as ``ReplayMemory.draw`` gives them.
        Each network's own values, but for the actions taken: r + discount * max Q(s'), or r alone
        at an episode's end, where Q(s') is the networks' mean. With N_STEP > 1, r is the sum of
        several rewards, and the discount is taken to the power of their number. With
        NORMALIZE_TARGETS each network's (n, actions) is divided by its Frobenius norm, as in the
        public code.
        The network that gives Q(s') is the trained one, or the target network with TARGET_UPDATE
        > 0 (Mnih et al. 2015); with DOUBLE_Q the trained network picks the action whose value that
        one gives (van Hasselt et al. 2016).
        """
        settings = self.settings
        targets = self.q.all_values(self.weights, sample["observations"]).astype(np.float64)
        # Without a target network, max Q(s') comes from the network as it is at this update.
        bootstrap = self.target_weights if settings.TARGET_UPDATE else self.weights
        future = self.q.values(bootstrap, sample["next_observations"])
        if settings.DOUBLE_Q:
            picked = self.q.values(self.weights, sample["next_observations"]).argmax(axis=1)
        else:
            picked = future.argmax(axis=1)
        future = np.take_along_axis(future, picked[:, None], axis=1)[:, 0]
        discount = settings.DISCOUNT ** sample["steps"]
        returns = sample["rewards"] + discount * future * ~sample["terminals"]
        np.put_along_axis(targets, sample["actions"][:, None, :], returns[:, None, None], axis=2)
        if settings.NORMALIZE_TARGETS:
            for network in range(settings.Q_NETWORKS):
                norm = np.linalg.norm(targets[:, network])
                targets[:, network] /= norm or 1.0
        return targets.astype(np.float32)

    def decay_epsilon(self) -> None:
        """Ends the episode: epsilon is multiplied by exp(-EPSILON_DECAY) (public code)."""
        self.epsilon *= math.exp(-self.settings.EPSILON_DECAY)
        self._enter_episode(self.episode + 1)

    def state(self) -> dict[str, np.ndarray]:
        """What training goes on with between two episodes, but for ``memory``'s transitions."""
        return {
            "episode": np.array(self.episode),
            "epsilon": np.array(self.epsilon),
            "weights": self.weights.numpy(),
            "target_weights": self.target_weights.numpy(),
            "first_moments": self.moments.first.numpy(),
            "second_moments": self.moments.second.numpy(),
            "moments_step": self.moments.step.numpy(),
            "transitions_added": np.array(self.memory.added),
        }

    def load_state(self, state: dict[str, np.ndarray], transitions: np.ndarray) -> None:
        """Takes over what ``state`` returned; changes nothing if that is not possible.

        Args:
            state: of the other agent.
            transitions: those of its replay memory, oldest first; earlier ones do no harm.

        Raises:
            ValueError, KeyError: it belongs to another kind of agent.
        """
        size = self.q.network.size
        vectors = ["weights", "target_weights", "first_moments", "second_moments"]
        for name in vectors:
            if state[name].shape != (size,) or state[name].dtype != np.float32:
                raise ValueError(f"agent: {name} has shape {state[name].shape}, not ({size},)")
        episode, epsilon = int(state["episode"]), float(state["epsilon"])
        weights, target, first, second = (tf.constant(state[name]) for name in vectors)
        moments = Moments(first, second, tf.constant(state["moments_step"], tf.float32))
        self.memory.restore(transitions, int(state["transitions_added"]))
        self.weights, self.target_weights, self.moments = weights, target, moments
        self.epsilon = epsilon
        self._enter_episode(episode)

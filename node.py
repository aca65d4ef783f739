"""The DQN agent that every node holds: it looks at an observation and picks who trains next.

It knows actions by their number alone, so it can act, remember and train on any Gymnasium
environment with a flat observation and discrete actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from config import REPLAY_CAPACITY, AgentSettings, Settings, stream
from models import Moments, shared_q_network, tf, use_device

if TYPE_CHECKING:
    from environment import Round


class ReplayBuffer:
    """A ring buffer of transitions.

    Departure: the public code shuffles its memory in place before each draw, so beyond the
    capacity it drops transitions at random, not the oldest. Its 120 episodes of at most
    36 rounds never fill it.

    Args:
        capacity: transitions kept; after that the oldest is overwritten by the next one.
        observation_size: D, length of a flat observation.
        actions_per_step: k, number of actions taken in a step.

    Attributes:
        added: how many transitions were ever added.
    """

    def __init__(self, capacity: int, observation_size: int, actions_per_step: int = 1) -> None:
        self.capacity = capacity
        self.added = 0
        transition = [
            ("observations", np.float32, (observation_size,)),
            ("actions", np.int32, (actions_per_step,)),
            ("rewards", np.float64),
            ("next_observations", np.float32, (observation_size,)),
            ("terminals", np.bool_),
            ("steps", np.int32),
            ("barred", np.int32, (actions_per_step,)),
        ]
        self._ring = np.zeros(capacity, transition)  # takes memory only where it is written

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(
        self,
        observation: np.ndarray,
        actions: list[int],
        reward: float,
        next_observation: np.ndarray,
        terminal: bool,
        steps: int = 1,
        barred: Sequence[int] = (),
    ) -> None:
        """Store one transition, of one step or several.

        Args:
            observation: (D,) float32, before the first step.
            actions: the k distinct actions of the first step.
            reward: of all steps, discounted.
            next_observation: (D,) float32, after the last step.
            terminal: whether the episode ended there.
            steps: number of steps.
            barred: at most k actions that may not follow.
        """
        none = [-1] * (len(actions) - len(barred))
        following = (next_observation, terminal, steps, [*barred, *none])
        transition = (observation, actions, reward, *following)
        self._ring[self.added % self.capacity] = transition
        self.added += 1

    def draw(
        self, samples: int, size: int, rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draw samples of distinct transitions, each in random order.

        Returns:
            The fields of all transitions that were drawn, (m, ...) each, and (samples, size) int32,
            which of them make a sample. So a transition is copied once, however often it is drawn.

        Raises:
            ValueError: fewer than ``size`` are stored.
        """
        places = [rng.choice(len(self), size, replace=False) for _ in range(samples)]
        drawn, draws = np.unique(places, return_inverse=True)
        transitions = {name: self._ring[name][drawn] for name in self._ring.dtype.names or ()}
        return transitions, draws.reshape(samples, size).astype(np.int32)

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
            raise ValueError(f"replay buffer: got {len(transitions)} transitions, takes {kept}")
        places = np.arange(added - kept, added) % self.capacity
        self._ring[places] = transitions[len(transitions) - kept :]
        self.added = added


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
        capacity = min(REPLAY_CAPACITY, steps)
        self.replay = ReplayBuffer(capacity, observation_size, self.actions_per_step)
        used = AgentSettings(**settings.model_dump(include=set(AgentSettings.model_fields)))
        self.q = shared_q_network(observation_size, self.actions, self.actions_per_step, used)
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
        self._barred: Sequence[int] = ()  # before the next one
        self._steps_left = 0  # for which it still lasts
        self._repeats_left = 0  # of a random one
        self._stored = 0  # transitions of this episode

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> tuple[list[int], str]:
        """Choose k distinct actions; return them and ``random``, ``repeated`` or ``greedy``.

        Epsilon-greedy (public code). A choice lasts ROUNDS_PER_CHOICE steps. With MAX_STAY a random
        choice is repeated up to so many steps; how often is drawn uniformly. Both are ours (after
        Dabney et al. 2021). A node's effect shows after several rounds, and independent choices
        rarely stay that long.

        Args:
            observation: (D,) float32.
            info: ``barred`` are the actions that a new choice leaves out, by default none.
        """
        barred = info.get("barred", ())
        self._steps_left -= 1
        if self._steps_left > 0:
            return self._choice, "repeated"
        self._steps_left = self.settings.ROUNDS_PER_CHOICE
        self._repeats_left -= 1
        if self._repeats_left >= 0 and not set(barred) & set(self._choice):
            return self._choice, "repeated"
        self._repeats_left = 0
        if self._exploration.random() >= self.epsilon:
            self._choice = self.best_actions(observation, barred)
            return self._choice, "greedy"
        self._choice = self._first(self._exploration.permutation(self.actions), barred)
        longest = self.settings.MAX_STAY // self.settings.ROUNDS_PER_CHOICE
        if longest > 1:
            self._repeats_left = int(self._exploration.integers(longest))
        return self._choice, "random"

    def _first(self, order: np.ndarray, barred: Sequence[int]) -> list[int]:
        """Return the first k actions of an order, without barred ones."""
        return order[~np.isin(order, barred)][: self.actions_per_step].tolist()

    def best_actions(self, observation: np.ndarray, barred: Sequence[int] = ()) -> list[int]:
        """Return the k actions of the greatest Q values, best first, no barred ones.

        Of equal ones the lower number is first.
        """
        q_values = self.q.values(self.weights, observation[None])[0]
        return self._first(np.argsort(-q_values, kind="stable"), barred)

    def greedy(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        """Return the best actions every ROUNDS_PER_CHOICE rounds, else those of the last round.

        Args:
            observation: (D,) float32.
            info: ``round``, from 1; ``node``, the last choice; ``barred``, as for ``act``.
        """
        if (info["round"] - 1) % self.settings.ROUNDS_PER_CHOICE:
            return info["node"]
        return self.best_actions(observation, info.get("barred", ()))

    def remember(self, round_: Round) -> None:
        """Store a step in the replay buffer, once the N_STEP rewards from it on are known.

        These are at least the rewards of a choice, and the stored reward is their discounted sum.
        It is shorter at the episode's end and before a random choice, which says nothing of the
        choices before it (Watkins 1989). The next observation is that after the last of them.
        N_STEP = 1 stores the step itself (public code). An episode that the round limit truncates
        ends like one that reached the goal (public code). The starter's round, which no one chose,
        is not stored.

        ``round_.action`` and ``round_.chosen_by`` are what ``act`` returned. ``round_.info`` has
        ``barred``, the actions that may not follow the step, by default none.
        """
        observation = round_.observation
        if observation is None:
            return
        if round_.chosen_by == "random":
            self._store(observation, self._barred, False, 0)
        self._recent.append((observation, round_.action, round_.reward))
        # A choice is worth what all of its rounds bring.
        steps = max(self.settings.N_STEP, self.settings.ROUNDS_PER_CHOICE)
        done = round_.terminated or round_.truncated
        self._barred = round_.info.get("barred", ())
        self._store(round_.next_observation, self._barred, done, 0 if done else steps - 1)

    def _store(
        self, next_observation: np.ndarray, barred: Sequence[int], done: bool, waiting: int
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
                self.replay.add(first, chosen, total, next_observation, done, steps, barred)
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
        transitions, draws = self.replay.draw(
            settings.UPDATES_PER_EPISODE, settings.REPLAY_SAMPLE, self._draws
        )
        self.weights, self.moments, loss = self.q.train(
            self.weights, self.moments, self.target_weights, transitions, draws
        )
        # Without a target network the step counts nothing: the Q-network's values are used.
        step = settings.TARGET_RATE
        self.target_weights = (1 - step) * self.target_weights + step * self.weights
        return float(loss)

    def decay_epsilon(self) -> None:
        """End the episode: epsilon is multiplied by exp(-EPSILON_DECAY) (public code)."""
        self.epsilon *= math.exp(-self.settings.EPSILON_DECAY)
        self._enter_episode(self.episode + 1)

    def new_transitions(self) -> np.ndarray:
        """Return the transitions that the episode added, oldest first."""
        return self.replay.latest(self._stored)

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

"""An agent that searches a fixed walk, without observations.

A walk is a list of stays: a node, and how many rounds the model stays there. The last two stays
repeat until the episode ends.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from config import Settings, stream

if TYPE_CHECKING:
    from environment import Round

_STAYS = 6  # of a walk
_MAX_LENGTH = 12  # rounds of a stay
_GENERATION = 20  # walks, each played once
_ELITE_DIVISOR = 4  # the best quarter of the walks is the elite
_RATE = 0.7  # step of the probabilities towards the elite's, for a whole generation


def walk_nodes(stays: np.ndarray, rounds: int) -> list[int]:
    """Return the nodes that train after the starter, (rounds,).

    ``stays``, (2, S) int64, are the nodes of the S stays, and their lengths less 1.
    """
    walk = [[node] * (length + 1) for node, length in stays.T.tolist()]
    nodes = itertools.chain(*walk, itertools.cycle(walk[-2] + walk[-1]))
    return list(itertools.islice(nodes, rounds))


class WalkSearch:
    """The cross-entropy method (Rubinstein 1999) in place of the DQN: it learns a fixed walk.

    Each generation draws walks and plays each in one training episode. Then the probabilities of
    nodes and lengths move towards those of the walks with the greatest discounted return, the
    elite. It has the methods of ``node.DQNAgent``, and looks at no observation.

    Args:
        observation_size: not used.
        settings: for NUM_NODES, MAX_ROUNDS, DISCOUNT, EPISODES and SEED.

    Attributes:
        probabilities: (S, N) of the nodes and (S, L) of the lengths of a walk's S stays, float64.
    """

    epsilon = math.nan  # it has none

    def __init__(self, observation_size: int, settings: Settings) -> None:
        self.settings = settings
        sizes = (settings.NUM_NODES, _MAX_LENGTH)
        self.probabilities = [np.full((_STAYS, size), 1 / size) for size in sizes]
        self._played: list[tuple[float, np.ndarray]] = []  # of this generation: returns, stays
        self._enter_episode(1)

    def _enter_episode(self, episode: int) -> None:
        self.episode = episode
        rng = stream(self.settings.SEED, "exploration", episode)
        self._drawn = np.array(
            [[rng.choice(len(row), p=row) for row in table] for table in self.probabilities]
        )
        self._nodes = walk_nodes(self._drawn, self.settings.MAX_ROUNDS)
        self._return, self._steps = 0.0, 0

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> tuple[list[int], str]:
        """Return the next node of the episode's walk."""
        return [self._nodes[self._steps]], "walk"

    def remember(self, round_: Round) -> None:
        """Add the reward of a round to the walk's discounted return.

        The starter's round, which the walk does not choose, does not count.
        """
        if round_.chosen_by != "starter":
            self._return += self.settings.DISCOUNT**self._steps * round_.reward
            self._steps += 1

    def train(self) -> None:
        """End the episode's walk; after a generation's last one, move the probabilities."""
        self._played.append((self._return, self._drawn))
        if len(self._played) < _GENERATION and self.episode < self.settings.EPISODES:
            return
        best = sorted(self._played, key=lambda played: -played[0])
        elite = np.stack([stays for _, stays in best[: max(1, len(best) // _ELITE_DIVISOR)]])
        for which, table in enumerate(self.probabilities):
            shares = (elite[:, which, :, None] == np.arange(table.shape[1])).mean(axis=0)
            table += _RATE * len(best) / _GENERATION * (shares - table)
        self._played = []

    def end_episode(self) -> np.ndarray:
        """Go on to the next episode and draw its walk; return no transitions: none is stored."""
        self._enter_episode(self.episode + 1)
        return np.zeros(0)

    def state(self) -> dict[str, np.ndarray]:
        """Return what the search continues from between two episodes."""
        played = {
            "returns": np.array([total for total, _ in self._played]),
            "stays": np.array([stays for _, stays in self._played]),
        }
        return {"episode": np.array(self.episode), **played, **self.arrays()}

    def load_state(self, state: dict[str, np.ndarray], transitions: np.ndarray) -> None:
        """Take over another search's ``state``."""
        self.load(state)
        self._played = list(zip(state["returns"].tolist(), state["stays"], strict=True))
        self._enter_episode(int(state["episode"]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what ``agent.npz`` holds: the probabilities."""
        return dict(zip(("nodes", "lengths"), self.probabilities, strict=True))

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over the probabilities of another search's ``arrays``."""
        self.probabilities = [arrays[name].copy() for name in self.arrays()]

    def greedy(self, observation: np.ndarray, info: dict[str, Any]) -> int:
        """Return the next node of the most probable walk."""
        stays = np.array([table.argmax(axis=1) for table in self.probabilities])
        return walk_nodes(stays, self.settings.MAX_ROUNDS)[info["round"] - 1]

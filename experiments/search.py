"""Fixed walks: a policy that follows one, and a baseline that learns one without observations.

The search is the cross-entropy method (Rubinstein 1999). Its walks are lists of stays: a node, and
how many rounds the model stays there. The last two repeat until the episode ends. Each generation
draws walks, plays each for one training episode, and moves the probabilities of nodes and lengths
towards those of the best walks, the elite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from config import NAMED_SETTINGS, episode_seed, stream

if TYPE_CHECKING:  # a command line is checked without TensorFlow
    from environment import DecentralizedLearning

Walk = list[tuple[int, int]]  # stays: node, and rounds there

_STAYS = 6  # of a walk
_LONGEST = 12  # rounds of a stay
_GENERATION = 20  # walks, each played once
_ELITE = 4  # one in so many walks counts
_RATE = 0.7  # step of the probabilities towards the elite's, for a whole generation


def search_walk(
    play: Callable[[Walk, int], float], nodes: int, episodes: int, rng: np.random.Generator
) -> Walk:
    """Return the walk that is most probable after so many episodes.

    Args:
        play: from a walk and the number of the episode, from 1, to the sum of its rewards.
        nodes: N.
        episodes: how many are played.
        rng: draws the walks.
    """
    probabilities = [np.full((_STAYS, size), 1 / size) for size in (nodes, _LONGEST)]
    for first in range(1, episodes + 1, _GENERATION):
        played = []
        for episode in range(first, min(first + _GENERATION, episodes + 1)):
            drawn = [[rng.choice(len(row), p=row) for row in table] for table in probabilities]
            played.append((play(_stays(drawn), episode), drawn))
        played.sort(key=lambda result: -result[0])
        elite = [drawn for _, drawn in played[: max(1, len(played) // _ELITE)]]
        for which, table in enumerate(probabilities):
            chosen = np.array([drawn[which] for drawn in elite])
            shares = (chosen[:, :, None] == np.arange(table.shape[1])).mean(axis=0)
            table += _RATE * len(played) / _GENERATION * (shares - table)
    return _stays([table.argmax(axis=1).tolist() for table in probabilities])


def _stays(drawn: list[list[int]]) -> Walk:
    return [(int(node), 1 + int(more)) for node, more in zip(*drawn, strict=True)]


def walk_policy(first: list[int], cycle: list[int]) -> Callable[..., int]:
    """Return a policy that follows a fixed walk: the nodes of rounds 1, 2, ..., then a cycle.

    Who trains round 1 is up to ``Method.first_nodes``, whatever the walk says.
    """

    def policy(observation: np.ndarray, info: dict[str, Any], *_: Any) -> int:
        past = info["round"]
        return first[past] if past < len(first) else cycle[(past - len(first)) % len(cycle)]

    return policy


def follow(walk: Walk) -> Callable[..., int]:
    """Return the policy that follows a searched walk from round 2 on."""
    nodes = [node for node, length in walk for _ in range(length)]
    repeated = sum(length for _, length in walk[-2:])
    starter = nodes[0]  # stands for round 1, which the policy does not choose
    return walk_policy([starter, *nodes[:-repeated]], nodes[-repeated:])


def search_policy(environment: DecentralizedLearning) -> Callable[..., int]:
    """Search a walk in the EPISODES that train a DQN with the same SEED; return its policy.

    The rewards are the environment's, summed without discount. REWARD_IMAGES is that of ``tuned``.
    A search that was cut off starts anew.
    """
    from environment import DecentralizedLearning, rollout

    images = NAMED_SETTINGS["tuned"]["REWARD_IMAGES"]
    settings = environment.settings.replace(REWARD_IMAGES=images)
    training = DecentralizedLearning(settings, environment.dataset)

    def play(walk: Walk, episode: int) -> float:
        policy, seed = follow(walk), episode_seed(settings.SEED, episode)
        rounds = rollout(training, lambda *seen: (policy(*seen), "walk"), seed)
        return float(np.sum([round_.reward for round_ in rounds]))

    rng = stream(settings.SEED, "exploration")
    return follow(search_walk(play, settings.NUM_NODES, settings.EPISODES, rng))

"""A rival that learns a fixed walk: the cross-entropy method over walks, without observations.

A walk is a list of stays: a node, and how many rounds the model stays there. The last two repeat
until the episode ends. Each generation draws walks, plays each for one training episode, and moves
the probabilities of nodes and lengths towards those of the best walks (Rubinstein 1999).
"""

from __future__ import annotations

import itertools
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
_BEST = 5  # of them that count
_RATE = 0.7  # step of the probabilities towards those of the best walks


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
    chances = [np.full((_STAYS, size), 1 / size) for size in (nodes, _LONGEST)]
    for first in range(1, episodes + 1, _GENERATION):
        played = []
        for episode in range(first, min(first + _GENERATION, episodes + 1)):
            drawn = [[rng.choice(len(p), p=p) for p in chance] for chance in chances]
            played.append((play(_walk(drawn), episode), drawn))
        played.sort(key=lambda result: -result[0])
        for which, chance in enumerate(chances):
            best = np.array([drawn[which] for _, drawn in played[:_BEST]])
            shares = (best[:, :, None] == np.arange(chance.shape[1])).mean(axis=0)
            chance += _RATE * (shares - chance)
    return _walk([chance.argmax(axis=1).tolist() for chance in chances])


def _walk(drawn: list[list[int]]) -> Walk:
    return [(int(node), 1 + int(more)) for node, more in zip(*drawn, strict=True)]


def follow_walk(walk: Walk) -> Callable[..., int]:
    """Return the policy that follows a walk from round 2 on."""
    stays = itertools.chain(walk, itertools.cycle(walk[-2:]))
    nodes = (node for node, length in stays for _ in range(length))
    chosen: list[int] = []  # in rounds 2, 3, ...

    def policy(observation: np.ndarray, info: dict[str, Any], *_: Any) -> int:
        while len(chosen) < info["round"]:
            chosen.append(next(nodes))
        return chosen[info["round"] - 1]

    return policy


def search_policy(environment: DecentralizedLearning) -> Callable[..., int]:
    """Search a walk in the EPISODES that train a DQN with the same SEED; return its policy.

    The rewards are the environment's. REWARD_IMAGES is that of ``tuned``. A search that was cut off
    starts anew.
    """
    from environment import DecentralizedLearning, rollout

    images = NAMED_SETTINGS["tuned"]["REWARD_IMAGES"]
    settings = environment.settings.replace(REWARD_IMAGES=images)
    training = DecentralizedLearning(settings, environment.dataset)

    def play(walk: Walk, episode: int) -> float:
        policy, seed = follow_walk(walk), episode_seed(settings.SEED, episode)
        rounds = rollout(training, lambda *seen: (policy(*seen), "walk"), seed)
        return float(np.sum([round_.reward for round_ in rounds]))

    rng = stream(settings.SEED, "exploration")
    return follow_walk(search_walk(play, settings.NUM_NODES, settings.EPISODES, rng))

"""The methods of a comparison: HL, and what it is compared with, which learns no policy.

A method has a policy: a function of the observation, the environment's info and a random
generator of its own, that names the node to train next. All methods run in the same environment;
what a method changes of it (who trains round 1, how many train, on which data) stands in its
``Method``.

Own policy: add a ``Method`` to ``METHODS``; compare.py then takes its name.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from config import AGENTS, ConfigError, Settings

if TYPE_CHECKING:  # plot.py takes the methods' titles from here, and needs no TensorFlow
    from environment import DecentralizedLearning

# (observation, info, rng) -> the next node, or NODES_PER_ROUND of them. Observation and info are
# the environment's; rng is seeded for each episode and used by nothing else.
Policy = Callable[[np.ndarray, dict[str, Any], np.random.Generator], Any]


def _unchanged(settings: Settings) -> Settings:
    return settings


def _starter(settings: Settings, number: int) -> list[int]:
    return [settings.STARTER_NODE]


def _nothing(environment: DecentralizedLearning) -> tuple[int, float, float]:
    return 0, 0.0, 0.0


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the foundation model.

    Attributes:
        title: for tables and figures.
        policy: makes the policy for an environment, once for all its episodes. None for HL: its
            policy is a DQN that is trained first.
        settings: the environment's settings, from those of the comparison.
        first_nodes: who trains round 1, by settings and the number of the test episode, from 0 and
            counted on from seed to seed.
        prepare: changes an environment before its first episode, and returns what is sent once
            before each episode: transfers, their distances' sum, megabytes.
        several: whether it can pick several nodes per round.
    """

    title: str
    policy: Callable[[DecentralizedLearning], Policy] | None
    settings: Callable[[Settings], Settings] = _unchanged
    first_nodes: Callable[[Settings, int], list[int]] = _starter
    prepare: Callable[[DecentralizedLearning], tuple[int, float, float]] = _nothing
    several: bool = False

    @property
    def learns(self) -> bool:
        """Whether its policy is a trained DQN."""
        return self.policy is None


def training_name(method: str, seed: int) -> str:
    """The folder, beside that of its test, of the run that trains a method's DQN."""
    return f"training-seed{seed}" if method == "hl" else f"training-{method}-seed{seed}"


def check(name: str, settings: Settings) -> None:
    """Whether a method can run with the comparison's settings.

    Raises:
        ConfigError: it can't, or there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"--methods: got {name!r}, takes some of {', '.join(METHODS)}")
    if settings.NODES_PER_ROUND > 1 and not METHODS[name].several:
        raise ConfigError(
            f"NODES_PER_ROUND: got {settings.NODES_PER_ROUND}, takes 1 with the method {name}, "
            "which --methods can leave out"
        )
    if name == "fixed_walk" and max(FIXED_WALK + FIXED_WALK_CYCLE) >= settings.NUM_NODES:
        raise ConfigError(
            f"NUM_NODES: got {settings.NUM_NODES}, takes at least "
            f"{max(FIXED_WALK + FIXED_WALK_CYCLE) + 1} with the method {name}, which --methods can "
            "leave out"
        )


# --- Policies --------------------------------------------------------------------------------


def random_policy(environment: DecentralizedLearning) -> Policy:
    """Every node with the same probability, the present one included (the paper's rival)."""
    n, k = environment.settings.NUM_NODES, environment.settings.NODES_PER_ROUND

    def policy(observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> Any:
        return rng.permutation(n)[:k] if k > 1 else int(rng.integers(n))

    return policy


def stay_policy(environment: DecentralizedLearning) -> Policy:
    """Whoever trained last trains again."""
    return lambda observation, info, rng: info["node"]


def walk_policy(first: list[int], cycle: list[int]) -> Policy:
    """A fixed walk: the nodes of rounds 1, 2, ..., and a cycle that follows for ever.

    Round 1 is trained before a policy is asked, by the starter, whatever the walk says.
    """

    def policy(observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> int:
        past = info["round"]
        return first[past] if past < len(first) else cycle[(past - len(first)) % len(cycle)]

    return policy


def _tour_method(
    title: str, tour: Callable[[np.ndarray, int], list[int]], rounds_per_node: int
) -> Method:
    def make(environment: DecentralizedLearning) -> Policy:
        nodes = tour(environment.distances, environment.settings.STARTER_NODE)
        return walk_policy([], [n for n in nodes for _ in range(rounds_per_node)])

    return Method(title, make)


# --- Tours -----------------------------------------------------------------------------------

# Nodes up to which the shortest tour is found exactly: 2^12 sets of nodes times 12 x 12 steps.
_EXACT_NODES = 12


def numbered_tour(distances: np.ndarray, start: int) -> list[int]:
    """All nodes in the order of their numbers, from ``start``."""
    n = len(distances)
    return [(start + i) % n for i in range(n)]


def nearest_tour(distances: np.ndarray, start: int) -> list[int]:
    """Always on to the nearest node that was not visited yet; of equal ones the lower number."""
    tour, left = [start], set(range(len(distances))) - {start}
    while left:
        tour.append(min(left, key=lambda node: (distances[tour[-1], node], node)))
        left.remove(tour[-1])
    return tour


def shortest_tour(distances: np.ndarray, start: int) -> list[int]:
    """A closed tour through all nodes, of least length up to 12 nodes.

    Up to 12 nodes by dynamic programming over sets of nodes (Held and Karp 1962). With more, the
    nearest neighbours' tour is improved by turning stretches of it round until none is left whose
    turning helps (2-opt): short, but not proven to be shortest.
    """
    n = len(distances)
    if n > _EXACT_NODES:
        return _two_opt(distances, nearest_tour(distances, start))
    others = [node for node in range(n) if node != start]
    # best[set, last]: length of the shortest way from start through the set to last, and the tour.
    best = {(frozenset([node]), node): (distances[start, node], [start, node]) for node in others}
    for size in range(2, n):
        for members in map(frozenset, itertools.combinations(others, size)):
            for last in members:
                rest = members - {last}
                length, via = min(
                    (best[rest, node][0] + distances[node, last], node) for node in sorted(rest)
                )
                best[members, last] = length, [*best[rest, via][1], last]
    whole = frozenset(others)
    last = min(others, key=lambda node: best[whole, node][0] + distances[node, start])
    return best[whole, last][1]


def _two_opt(distances: np.ndarray, tour: list[int]) -> list[int]:
    n, improved = len(tour), True
    while improved:
        improved = False
        for i, j in itertools.combinations(range(1, n), 2):
            before, first, last, after = tour[i - 1], tour[i], tour[j], tour[(j + 1) % n]
            now = distances[before, first] + distances[last, after]
            turned = distances[before, last] + distances[first, after]
            if turned < now - 1e-12:
                tour[i : j + 1] = reversed(tour[i : j + 1])
                improved = True
    return tour


def tour_length(distances: np.ndarray, tour: list[int]) -> float:
    """Sum of the distances along a closed tour."""
    return float(sum(distances[a, b] for a, b in zip(tour, [*tour[1:], tour[0]], strict=True)))


# --- Methods ---------------------------------------------------------------------------------

# Found by a search on MNIST with the default distances and shards, and known to reach the goal
# there on initialisations that it was not searched on: node 0 for five rounds, then this cycle.
FIXED_WALK, FIXED_WALK_CYCLE = [0] * 5, [5, 5, 5, 1, 1, 0, 0]


def _each_in_turn(settings: Settings, number: int) -> list[int]:
    return [number % settings.NUM_NODES]


def _all_nodes(settings: Settings, number: int) -> list[int]:
    others = [node for node in range(settings.NUM_NODES) if node != settings.STARTER_NODE]
    return [settings.STARTER_NODE, *others]


def _check_sizes(environment: DecentralizedLearning) -> tuple[int, float, float]:
    """The environment averages without weights, which is FedAvg's mean for equal shards only."""
    sizes = {len(shard) for shard in environment.shards}
    if len(sizes) > 1:
        raise ConfigError(
            f"SHARD_RULE: got shards of {min(sizes)} to {max(sizes)} images, takes equal ones with "
            "the method fedavg"
        )
    return 0, 0.0, 0.0


def _pool_shards(environment: DecentralizedLearning) -> tuple[int, float, float]:
    """Gives the starter everybody's images; an image that several nodes hold, several times."""
    shards, starter = environment.shards, environment.settings.STARTER_NODE
    images = environment.dataset.x_train
    bytes_per_image = images[0].nbytes + 1  # and its label
    sent = sum(len(shard) for node, shard in enumerate(shards) if node != starter)
    shards[starter] = np.concatenate(shards)
    cost = float(environment.distances[:, starter].sum())
    return len(shards) - 1, cost, sent * bytes_per_image / 1e6


METHODS: dict[str, Method] = {
    "hl": Method("HL (DQN)", None, several=True),
    "tuned": Method(
        "HL (tuned DQN)",
        None,
        settings=lambda settings: dataclasses.replace(settings, **AGENTS["tuned"]),
        several=True,
    ),
    "random": Method("random", random_policy, several=True),
    "standalone": Method("standalone (each node)", stay_policy, first_nodes=_each_in_turn),
    "stay": Method("staying at the starter", stay_policy),
    # One model, one round an epoch over all shards, on the starter.
    "centralized": Method("centralized", stay_policy, prepare=_pool_shards),
    # McMahan et al. 2017, with all nodes in each round: they train what the server sends, and the
    # server, which the starter is, averages. As in HL every node keeps its Adam moments.
    "fedavg": Method(
        "FedAvg",
        stay_policy,
        settings=lambda settings: dataclasses.replace(settings, NODES_PER_ROUND=settings.NUM_NODES),
        first_nodes=_all_nodes,
        prepare=_check_sizes,
    ),
    "round_robin": _tour_method("round robin", numbered_tour, 1),
    "nearest": _tour_method("nearest unvisited", nearest_tour, 1),
    "shortest": _tour_method("shortest tour", shortest_tour, 1),
    "nearest_twice": _tour_method("nearest, two rounds each", nearest_tour, 2),
    "shortest_twice": _tour_method("shortest, two rounds each", shortest_tour, 2),
    "fixed_walk": Method("searched walk", lambda _: walk_policy(FIXED_WALK, FIXED_WALK_CYCLE)),
}

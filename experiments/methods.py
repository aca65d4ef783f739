"""The methods of a comparison: who trains the model next, and what else a method changes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import data
from config import NAMED_SETTINGS, ConfigError, Settings
from experiments import search

if TYPE_CHECKING:  # a command line is checked without TensorFlow
    from environment import DecentralizedLearning

# (observation, info, rng) -> the next node, or NODES_PER_ROUND of them. Observation and info are
# the environment's. The generator is new in each episode, and no one else draws from it.
MethodPolicy = Callable[[np.ndarray, dict[str, Any], np.random.Generator], Any]
PolicyMaker = Callable[["DecentralizedLearning"], MethodPolicy]
Sent = tuple[int, float, float]  # number of transfers, sum of their distances, megabytes


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train the foundation model."""

    description: str  # one line, for --list
    # Makes the policy of an environment, once for all its episodes. None: an agent, trained first
    # unless --agent gives it.
    policy: PolicyMaker | None
    # Makes the agent, from the observation's size and the settings. None: a DQNAgent.
    agent: Callable[[int, Settings], Any] | None = None
    # The settings that the method changes, from the comparison's settings.
    overrides: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    # Who trains round 1, from the settings and a number of the test episode that no other seed has.
    first_nodes: Callable[[Settings, int], list[int]] = lambda settings, _: [settings.STARTER_NODE]
    # Raises a ConfigError if the method can't train on these shards.
    check_shards: Callable[[list[np.ndarray]], None] = lambda shards: None
    # Changes an environment before its first episode. Returns what is sent before each episode.
    prepare: Callable[[DecentralizedLearning], Sent] = lambda environment: (0, 0.0, 0.0)
    several: bool = False  # whether the policy can choose several nodes per round
    min_nodes: int = 2  # least NUM_NODES that the policy's nodes ask for


def check_method(name: str, settings: Settings) -> None:
    """Raise a ConfigError if a method is unknown, or can't run with so many nodes."""
    if name not in METHODS:
        raise ConfigError(f"--methods: got {name!r}, takes some of {', '.join(METHODS)}")
    advice = f"with the method {name}, which --methods can leave out"
    if settings.NODES_PER_ROUND > 1 and not METHODS[name].several:
        raise ConfigError(f"NODES_PER_ROUND: got {settings.NODES_PER_ROUND}, takes 1 {advice}")
    nodes, least = settings.NUM_NODES, METHODS[name].min_nodes
    if nodes < least:
        raise ConfigError(f"NUM_NODES: got {nodes}, takes at least {least} {advice}")


# --- Policies --------------------------------------------------------------------------------


def random_policy(environment: DecentralizedLearning) -> MethodPolicy:
    """Choose every node with the same probability, the present one included (ours)."""
    n, k = environment.settings.NUM_NODES, environment.settings.NODES_PER_ROUND

    def policy(observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> Any:
        return rng.permutation(n)[:k] if k > 1 else int(rng.integers(n))

    return policy


def stay_policy(environment: DecentralizedLearning) -> MethodPolicy:
    """Choose the node, or nodes, that trained last."""
    return lambda observation, info, rng: info["node"]


def walk_policy(first: list[int], cycle: list[int]) -> MethodPolicy:
    """Return a policy that follows a fixed walk: the nodes of rounds 1, 2, ..., then a cycle.

    Who trains round 1 is up to ``Method.first_nodes``, whatever the walk says.
    """

    def policy(observation: np.ndarray, info: dict[str, Any], rng: np.random.Generator) -> int:
        past = info["round"]
        return first[past] if past < len(first) else cycle[(past - len(first)) % len(cycle)]

    return policy


def _touring(tour: Callable[[np.ndarray, int], list[int]], rounds_per_node: int = 1) -> PolicyMaker:
    """Return the maker of policies that follow a tour from STARTER_NODE again and again."""

    def policy_of(environment: DecentralizedLearning) -> MethodPolicy:
        nodes = tour(environment.distances, environment.settings.STARTER_NODE)
        return walk_policy([], np.repeat(nodes, rounds_per_node).tolist())

    return policy_of


def balanced_policy(environment: DecentralizedLearning) -> MethodPolicy:
    """Choose the node whose shard makes the labels trained on most even; the nearest if equal.

    After the routing of Tram-FL (Maejima et al. 2023, arXiv 2308.04762). The most even labels have
    the least sum of squared shares. All label counts are known.
    """
    start = environment.settings.STARTER_NODE
    counts = data.label_counts(environment.dataset, environment.shards)
    nodes, seen = [start], counts[start]
    for _ in range(1, environment.settings.MAX_ROUNDS):
        after = seen + counts
        unevenness = np.square(after / after.sum(axis=1, keepdims=True)).sum(axis=1)
        order = np.lexsort((environment.distances[nodes[-1]], unevenness.round(12)))
        nodes.append(int(order[0]))
        seen = after[nodes[-1]]
    return walk_policy(nodes, nodes)


def metropolis_chain(distances: np.ndarray) -> np.ndarray:
    """Return (N, N) float64: the probabilities of a random walk that prefers near nodes.

    A node proposes others by exp(-distance / mean distance), which is our choice. Metropolis and
    Hastings' acceptance keeps the walk at its node now and then, so that in the long run all nodes
    train equally often.
    """
    others = ~np.eye(len(distances), dtype=bool)
    mean = distances[others].mean()
    weights = np.exp(-distances / mean if mean > 0 else distances) * others
    totals = weights.sum(axis=1)
    chain = weights / np.maximum(totals[:, None], totals)  # proposed and accepted
    return chain + np.diag(np.maximum(1 - chain.sum(axis=1), 0))  # rounding makes a 0 negative


def _metropolis(jumps: float) -> PolicyMaker:
    """Return the maker of random walks; ``jumps`` is the probability to go to any node instead."""

    def policy_of(environment: DecentralizedLearning) -> MethodPolicy:
        chain = metropolis_chain(environment.distances)
        chain = (1 - jumps) * chain + jumps / len(chain)
        return lambda observation, info, rng: int(rng.choice(len(chain), p=chain[info["node"]]))

    return policy_of


# --- Tours -----------------------------------------------------------------------------------


def numbered_tour(distances: np.ndarray, start: int) -> list[int]:
    """Return all nodes in the order of their numbers, from ``start``."""
    return [*range(start, len(distances)), *range(start)]


def nearest_tour(distances: np.ndarray, start: int) -> list[int]:
    """Return a tour that goes on to the nearest unvisited node, the lower number if equal."""
    tour, left = [start], set(range(len(distances))) - {start}
    while left:
        tour.append(min(left, key=lambda node: (distances[tour[-1], node], node)))
        left.remove(tour[-1])
    return tour


def shortest_tour(distances: np.ndarray, start: int) -> list[int]:
    """Return the shortest closed tour through all nodes; with more than 12 nodes, a short one.

    Up to 12 nodes by dynamic programming over sets of nodes (Held and Karp 1962). With more, the
    nearest neighbours' tour is improved by 2-opt.
    """
    if len(distances) > 12:
        return _two_opt(distances, nearest_tour(distances, start))

    @functools.cache
    def shortest_way(nodes: frozenset[int], last: int) -> tuple[float, list[int]]:
        """Return the length of the shortest way from start through nodes to last, and the way."""
        if not nodes:
            return distances[start, last], [start, last]
        length, via = min(
            (shortest_way(nodes - {node}, node)[0] + distances[node, last], node) for node in nodes
        )
        return length, [*shortest_way(nodes - {via}, via)[1], last]

    return shortest_way(frozenset(range(len(distances))) - {start}, start)[1][:-1]


def _two_opt(distances: np.ndarray, tour: list[int]) -> list[int]:
    """Reverse stretches of a tour while that shortens it."""
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


# --- Methods ---------------------------------------------------------------------------------


def _check_sizes(shards: list[np.ndarray]) -> None:
    """Refuse unequal shards: the environment's unweighted mean is FedAvg's for equal ones only."""
    sizes = {len(shard) for shard in shards}
    if len(sizes) > 1:
        raise ConfigError(
            f"SHARD_RULE: got {min(sizes)} to {max(sizes)} images, takes equal shards"
        )


def _pool_shards(environment: DecentralizedLearning) -> Sent:
    """Give the starter all images; an image that several nodes hold counts several times."""
    shards, starter = environment.shards, environment.settings.STARTER_NODE
    bytes_per_image = environment.dataset.x_train[0].nbytes + 1  # and its label
    sent = sum(map(len, shards)) - len(shards[starter])
    shards[starter] = np.concatenate(shards)
    cost = float(environment.distances[:, starter].sum())
    return len(shards) - 1, cost, sent * bytes_per_image / 1e6


METHODS: dict[str, Method] = {
    "hl": Method("the paper's: a trained DQN chooses", None, several=True),
    "tuned": Method(
        "the same with the settings of --settings tuned",
        None,
        overrides=lambda settings: NAMED_SETTINGS["tuned"],
        several=True,
    ),
    "agent": Method("the trained DQN that --agent names", None, several=True),
    "random": Method(
        "the paper's baseline: any node, the same included", random_policy, several=True
    ),
    "standalone": Method(
        "each node trains alone, in turn from episode to episode",
        stay_policy,
        first_nodes=lambda settings, number: [number % settings.NUM_NODES],
    ),
    "stay": Method("the starter trains alone", stay_policy),
    # One model; a round is an epoch over all shards.
    "centralized": Method(
        "the starter gets all images and trains alone", stay_policy, prepare=_pool_shards
    ),
    # McMahan et al. 2017 with all nodes in each round. The starter comes first: it averages.
    # As in HL, every node keeps its Adam moments.
    "fedavg": Method(
        "all nodes train in each round; their models are averaged",
        stay_policy,
        overrides=lambda settings: {"NODES_PER_ROUND": settings.NUM_NODES},
        first_nodes=lambda s, _: sorted(range(s.NUM_NODES), key=lambda n: n != s.STARTER_NODE),
        check_shards=_check_sizes,
    ),
    "round_robin": Method("nodes in the order of their numbers", _touring(numbered_tour)),
    "nearest": Method("always on to the nearest unvisited node", _touring(nearest_tour)),
    "shortest": Method("the shortest tour through all nodes", _touring(shortest_tour)),
    "nearest_twice": Method("as nearest, two rounds on each node", _touring(nearest_tour, 2)),
    "shortest_twice": Method("as shortest, two rounds on each node", _touring(shortest_tour, 2)),
    "balanced": Method("the node whose labels were trained on least", balanced_policy),
    # After Liu et al. 2024 (arXiv 2407.20611), who prefer nodes by their data, not by distance.
    # Their jumps are several hops on a graph. Here a jump ends at any node; how often is ours.
    "metropolis": Method("a random walk that prefers near nodes", _metropolis(0.0)),
    "metropolis_jumps": Method("the same, and one step in ten is a jump", _metropolis(0.1)),
    # The best of a beam search there, over far more walks than a training has episodes.
    "best_walk": Method(
        "the best walk known on MNIST with ten nodes",
        lambda _: walk_policy([0] + [5] * 9, [1, 1, 5]),
        min_nodes=6,
    ),
    # It learns from the rewards of `tuned`, without an observation.
    "walk_search": Method(
        "a fixed walk, searched in as many episodes as train a DQN",
        None,
        search.WalkSearch,
        overrides=lambda settings: {
            **{name: NAMED_SETTINGS["tuned"][name] for name in ("REWARD", "DISCOUNT")},
            "OBSERVATION": "zeros",
        },
    ),
}

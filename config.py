"""All settings of Homogeneous Learning, in one place.

Edit the constants below, or override any of them for one run on the command line
(``--set NAME=VALUE``, see ``python3 main.py --help``). The comment above a constant is its help
text: what it means, its unit, the values it takes, and where its default comes from:
"public code" is the authors' TensorFlow implementation of the paper, "ours" is this project.

The constants are read once. What every other module receives is a ``Settings`` object made
from them: validated as a whole, and immutable afterwards.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import numpy as np

# --- Training goal ---------------------------------------------------------------------------
# episodes that train the DQN; an integer >= 1 (public code)
EPISODES = 120
# test accuracy that ends an episode, a share; a number in [0, 1] (public code)
GOAL_ACCURACY = 0.80
# rounds after which an episode ends without the goal; an integer >= 2 (public code)
MAX_ROUNDS = 36

# --- Nodes and data --------------------------------------------------------------------------
# auto, mnist, fashion_mnist, digits, or a name added to data.DATASETS; text (ours)
DATASET = "auto"
# mnist.npz or a folder of IDX files, relative to this file's folder, "" to search; text (ours)
DATA_FILE = ""
# nodes N; an integer >= 2 (public code)
NUM_NODES = 10
# node that trains round 1; an integer >= 0, below NUM_NODES (public code)
STARTER_NODE = 0
# nodes trained and averaged in a round; an integer >= 1 (public code)
NODES_PER_ROUND = 1
# main_class, iid, dirichlet, or a name added to data.SHARD_RULES; text (public code)
SHARD_RULE = "main_class"
# training images in a node's shard; an integer >= 1 (public code)
SAMPLES_PER_NODE = 500
# H, main class's share of a main_class shard; a number in [0, 1] (public code)
HETEROGENEITY = 0.8
# concentration of the dirichlet shards, small is non-IID; a number > 0 (ours)
DIRICHLET_ALPHA = 0.5
# beta, upper bound of the distance between two nodes; a number >= 0 (public code)
DISTANCE_SCALE = 0.1
# seed of the distance matrix; an integer in [0, 4294967295] (public code)
DISTANCE_SEED = 0

# --- Reward: r = REWARD_BASE ** (accuracy - GOAL_ACCURACY) - distance - STEP_PENALTY -----------
# h, base of the reward's power; a number > 0 (public code)
REWARD_BASE = 32.0
# what each round costs, in units of reward; a number >= 0 (public code)
STEP_PENALTY = 1.0
# most that the power counts in the reward, 0 for no bound; a number >= 0 (public code: 0)
REWARD_CEILING = 0.0
# points per accuracy gained towards the goal since the round before; a number >= 0 (public code: 0)
REWARD_PROGRESS = 0.0
# what it costs to miss the goal, in the last round's reward; a number >= 0 (public code: 0)
MISS_PENALTY = 0.0
# test images that judge a training's round, all if 0 or too many; an integer >= 0 (public code: 0)
REWARD_IMAGES = 0

# --- Foundation model ------------------------------------------------------------------------
# Adam's, in local training; a number > 0 (public code)
LEARNING_RATE = 0.001
# images in a step of local training; an integer >= 1 (public code)
BATCH_SIZE = 32
# passes over the shard in a round; an integer >= 1 (public code)
LOCAL_EPOCHS = 1
# a node's Adam keeps its moments from visit to visit of an episode; True or False (public code)
KEEP_MOMENTS = True

# --- Observation -----------------------------------------------------------------------------
# what the DQN sees; one of broadcast, local, both, fixed, last_node, zeros (public code: broadcast)
OBSERVATION = "broadcast"
# components kept, 0 for NUM_NODES; an integer >= 0, up to NUM_NODES (public code)
PCA_COMPONENTS = 0
# sign of a component, scikit-learn's rule or ours; one of loading, holder (public code: loading)
PCA_SIGNS = "loading"
# factor of the scores that `broadcast` shows; a number > 0 (public code: 1)
BROADCAST_SCALE = 1.0
# factor of the scores that `local` and `fixed` show; a number > 0 (public code: 1)
LOCAL_SCALE = 1.0

# --- DQN -------------------------------------------------------------------------------------
# units of the Q-network's hidden layers; a tuple of integers >= 1 (public code)
HIDDEN_UNITS = (500, 200)
# Q-networks that learn the same targets, and whose mean decides; an integer >= 1 (public code: 1)
Q_NETWORKS = 1
# heads for a state's value and the advantages of actions; True or False (public code: False)
DUELING = False
# Adam's, in the Q-network's training; a number > 0 (public code)
Q_LEARNING_RATE = 0.001
# that rate is multiplied by exp(-Q_RATE_DECAY) per episode; a number >= 0 (public code: 0)
Q_RATE_DECAY = 0.0
# share of the Q-network's weights that a step of rate 1 takes; a number >= 0 (public code: 0)
Q_WEIGHT_DECAY = 0.0
# gamma, weight of the next state's value; a number in [0, 1] (public code)
DISCOUNT = 0.9
# rewards summed before the next state's value, 0 for all; an integer >= 0 (public code: 1)
N_STEP = 1
# a target goes on beyond the round limit, which is no end then; True or False (public code: False)
BOOTSTRAP_AT_LIMIT = False
# transitions that the replay memory holds; an integer >= 1 (public code)
REPLAY_CAPACITY = 50_000
# transitions drawn for an update, training waits for them; an integer >= 1 (public code)
REPLAY_SAMPLE = 128
# transitions in a gradient step; an integer >= 1 (public code)
Q_BATCH_SIZE = 16
# draws of REPLAY_SAMPLE after each episode; an integer >= 1 (public code)
UPDATES_PER_EPISODE = 1
# divide an update's targets by their Frobenius norm; True or False (public code)
NORMALIZE_TARGETS = True
# episodes between copies to a target network, 0 for none; an integer >= 0 (public code: 0)
TARGET_UPDATE = 0
# double Q-learning, needs a target network; True or False (public code: False)
DOUBLE_Q = False

# --- Exploration -----------------------------------------------------------------------------
# probability of a random action in episode 1; a number in [0, 1] (public code)
EPSILON = 1.0
# epsilon is multiplied by exp(-EPSILON_DECAY) per episode; a number >= 0 (public code)
EPSILON_DECAY = 0.02
# probability that a random action repeats the last one; a number in [0, 1] (public code: 0)
EXPLORATION_REPEAT = 0.0
# probability that an exploring choice goes on in the next step; a number in [0, 1] (public code: 0)
EXPLORATION_PERSIST = 0.0

# --- Run -------------------------------------------------------------------------------------
# the one seed of everything random but the distances; an integer >= 0 (ours)
SEED = 0
# folder below RESULTS_DIR, "" for <dataset>-seed<SEED>; letters, digits, - _ and inner dots (ours)
NAME = ""
# folder of all results, relative to this file's folder; text (ours)
RESULTS_DIR = "results"
# CPU threads of TensorFlow, 0 for all cores; an integer in [0, 1024] (ours)
THREADS = 0


PROJECT = Path(__file__).resolve().parent

# Settings that say where things lie on one machine: they change no result, so they are neither
# stored with the results nor compared when a run is continued.
LOCATIONS = ("DATA_FILE", "RESULTS_DIR")

# Named settings of the agent, for --settings and for comparisons. "paper" is the public code's,
# whatever the constants above were changed to; "tuned" is ours.
AGENTS: dict[str, dict[str, Any]] = {
    "paper": {
        "REWARD_BASE": 32.0,
        "STEP_PENALTY": 1.0,
        "REWARD_CEILING": 0.0,
        "REWARD_PROGRESS": 0.0,
        "MISS_PENALTY": 0.0,
        "REWARD_IMAGES": 0,
        "OBSERVATION": "broadcast",
        "PCA_COMPONENTS": 0,
        "PCA_SIGNS": "loading",
        "BROADCAST_SCALE": 1.0,
        "LOCAL_SCALE": 1.0,
        "HIDDEN_UNITS": (500, 200),
        "Q_NETWORKS": 1,
        "DUELING": False,
        "Q_LEARNING_RATE": 0.001,
        "Q_RATE_DECAY": 0.0,
        "Q_WEIGHT_DECAY": 0.0,
        "DISCOUNT": 0.9,
        "N_STEP": 1,
        "BOOTSTRAP_AT_LIMIT": False,
        "REPLAY_CAPACITY": 50_000,
        "REPLAY_SAMPLE": 128,
        "Q_BATCH_SIZE": 16,
        "UPDATES_PER_EPISODE": 1,
        "NORMALIZE_TARGETS": True,
        "TARGET_UPDATE": 0,
        "DOUBLE_Q": False,
        "EPSILON": 1.0,
        "EPSILON_DECAY": 0.02,
        "EXPLORATION_REPEAT": 0.0,
        "EXPLORATION_PERSIST": 0.0,
    },
}
AGENTS["tuned"] = AGENTS["paper"] | {
    "REWARD_BASE": 1e100,
    "REWARD_CEILING": 1.0,
    "REWARD_PROGRESS": 10.0,
    "MISS_PENALTY": 15.0,
    "REWARD_IMAGES": 2000,
    "OBSERVATION": "both",
    "PCA_COMPONENTS": 1,
    "PCA_SIGNS": "holder",
    "BROADCAST_SCALE": 4.0,
    "LOCAL_SCALE": 0.4,
    "HIDDEN_UNITS": (64, 64),
    "Q_NETWORKS": 5,
    "DUELING": True,
    "Q_WEIGHT_DECAY": 0.4,
    "DISCOUNT": 0.96,
    "N_STEP": 6,
    "REPLAY_SAMPLE": 256,
    "Q_BATCH_SIZE": 256,
    "UPDATES_PER_EPISODE": 150,
    "NORMALIZE_TARGETS": False,
    "TARGET_UPDATE": 1,
    "EPSILON_DECAY": 0.06,
    "EXPLORATION_PERSIST": 0.8,
}

# Constants that results made before them do not name, each with the value that they were made with,
# which is the public code's.
JOINED_LATER = {"KEEP_MOMENTS": True} | {
    name: AGENTS["paper"][name]
    for name in (
        "REWARD_CEILING",
        "REWARD_PROGRESS",
        "MISS_PENALTY",
        "REWARD_IMAGES",
        "PCA_SIGNS",
        "BROADCAST_SCALE",
        "LOCAL_SCALE",
        "Q_NETWORKS",
        "DUELING",
        "Q_RATE_DECAY",
        "Q_WEIGHT_DECAY",
        "N_STEP",
        "BOOTSTRAP_AT_LIMIT",
        "EXPLORATION_REPEAT",
        "EXPLORATION_PERSIST",
    )
}


def absolute(text: str) -> Path:
    """A path from the constants: "~" is the user's folder, else relative to the project's."""
    return PROJECT / os.path.expanduser(text)


def reason(error: OSError) -> str:
    """What the system refused, in one line."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return " ".join(text.split())


class UserError(Exception):
    """A mistake that the user can mend. Its one-line message is all that is printed."""


class ConfigError(UserError, ValueError):
    """A setting with an unknown name, a wrong type, or a value or combination out of range."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a setting takes.

    Args:
        kind: the Python type: ``int``, ``float`` (takes integers too), ``bool``, ``str``, or
            ``tuple`` (of integers).
        low: least value, of numbers and of a tuple's members.
        high: greatest value.
        open_low: whether ``low`` itself is excluded.
        choices: the values of a text that has only these.
        pattern: a regular expression for the whole text, with ``wording`` to describe it.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    pattern: str = ""
    wording: str = ""

    def __str__(self) -> str:
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return f"one of {', '.join(self.choices)}" if self.choices else self.wording or "text"
        noun = {int: "an integer", float: "a number", tuple: "a tuple of integers"}[self.kind]
        if self.high is not None:
            return f"{noun} in [{self.low}, {self.high}]"
        return f"{noun} {'>' if self.open_low else '>='} {self.low}"

    def convert(self, name: str, value: Any) -> Any:
        """``value`` as the setting's own type; raises ``ConfigError`` if the rule refuses it."""
        converted = self._accepted(value)
        if converted is None:
            raise ConfigError(f"{name}: got {value!r}, takes {self}")
        return converted

    def _accepted(self, value: Any) -> Any:
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is str:
            good = isinstance(value, str) and (not self.choices or value in self.choices)
            good = good and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
            return value if good else None
        if self.kind is tuple:
            # A lone integer is what a user gets who forgets the comma of (500,).
            members = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            return members if members and all(self._in_range(m, int) for m in members) else None
        try:
            return self.kind(value) if self._in_range(value, self.kind) else None
        except OverflowError:  # an integer beyond the range of float
            return None

    def _in_range(self, value: Any, kind: type) -> bool:
        numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, numbers):
            return False
        if kind is float and not math.isfinite(value):
            return False
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        return self.high is None or value <= self.high


_COUNT = Rule(int, low=1)
_COUNT_OR_NONE = Rule(int, low=0)
_SHARE = Rule(float, low=0, high=1)
_POSITIVE = Rule(float, low=0, open_low=True)
_NOT_NEGATIVE = Rule(float, low=0)
_TEXT = Rule(str)
_SWITCH = Rule(bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The validated, immutable settings of one run; the fields are the constants above.

    Make one with ``make_settings``, vary it with ``dataclasses.replace``; both validate.

    Raises:
        ConfigError: a value of the wrong type or out of range, or a combination that can't work.
    """

    EPISODES: Annotated[int, _COUNT]
    GOAL_ACCURACY: Annotated[float, _SHARE]
    MAX_ROUNDS: Annotated[int, Rule(int, low=2)]
    DATASET: Annotated[str, _TEXT]
    DATA_FILE: Annotated[str, _TEXT]
    NUM_NODES: Annotated[int, Rule(int, low=2)]
    STARTER_NODE: Annotated[int, _COUNT_OR_NONE]
    NODES_PER_ROUND: Annotated[int, _COUNT]
    SHARD_RULE: Annotated[str, _TEXT]
    SAMPLES_PER_NODE: Annotated[int, _COUNT]
    HETEROGENEITY: Annotated[float, _SHARE]
    DIRICHLET_ALPHA: Annotated[float, _POSITIVE]
    DISTANCE_SCALE: Annotated[float, _NOT_NEGATIVE]
    DISTANCE_SEED: Annotated[int, Rule(int, low=0, high=2**32 - 1)]
    REWARD_BASE: Annotated[float, _POSITIVE]
    STEP_PENALTY: Annotated[float, _NOT_NEGATIVE]
    REWARD_CEILING: Annotated[float, _NOT_NEGATIVE]
    REWARD_PROGRESS: Annotated[float, _NOT_NEGATIVE]
    MISS_PENALTY: Annotated[float, _NOT_NEGATIVE]
    REWARD_IMAGES: Annotated[int, _COUNT_OR_NONE]
    LEARNING_RATE: Annotated[float, _POSITIVE]
    BATCH_SIZE: Annotated[int, _COUNT]
    LOCAL_EPOCHS: Annotated[int, _COUNT]
    KEEP_MOMENTS: Annotated[bool, _SWITCH]
    OBSERVATION: Annotated[
        str, Rule(str, choices=("broadcast", "local", "both", "fixed", "last_node", "zeros"))
    ]
    PCA_COMPONENTS: Annotated[int, _COUNT_OR_NONE]
    PCA_SIGNS: Annotated[str, Rule(str, choices=("loading", "holder"))]
    BROADCAST_SCALE: Annotated[float, _POSITIVE]
    LOCAL_SCALE: Annotated[float, _POSITIVE]
    HIDDEN_UNITS: Annotated[tuple[int, ...], Rule(tuple, low=1)]
    Q_NETWORKS: Annotated[int, _COUNT]
    DUELING: Annotated[bool, _SWITCH]
    Q_LEARNING_RATE: Annotated[float, _POSITIVE]
    Q_RATE_DECAY: Annotated[float, _NOT_NEGATIVE]
    Q_WEIGHT_DECAY: Annotated[float, _NOT_NEGATIVE]
    DISCOUNT: Annotated[float, _SHARE]
    N_STEP: Annotated[int, _COUNT_OR_NONE]
    BOOTSTRAP_AT_LIMIT: Annotated[bool, _SWITCH]
    REPLAY_CAPACITY: Annotated[int, _COUNT]
    REPLAY_SAMPLE: Annotated[int, _COUNT]
    Q_BATCH_SIZE: Annotated[int, _COUNT]
    UPDATES_PER_EPISODE: Annotated[int, _COUNT]
    NORMALIZE_TARGETS: Annotated[bool, _SWITCH]
    TARGET_UPDATE: Annotated[int, _COUNT_OR_NONE]
    DOUBLE_Q: Annotated[bool, _SWITCH]
    EPSILON: Annotated[float, _SHARE]
    EPSILON_DECAY: Annotated[float, _NOT_NEGATIVE]
    EXPLORATION_REPEAT: Annotated[float, _SHARE]
    EXPLORATION_PERSIST: Annotated[float, _SHARE]
    SEED: Annotated[int, _COUNT_OR_NONE]
    # Not "." or "..": the name is a folder inside RESULTS_DIR and must stay there.
    NAME: Annotated[
        str,
        Rule(
            str,
            pattern=r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?",
            wording="letters, digits, - _ and inner dots",
        ),
    ]
    RESULTS_DIR: Annotated[str, _TEXT]
    THREADS: Annotated[int, Rule(int, low=0, high=1024)]

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            object.__setattr__(self, name, rule.convert(name, getattr(self, name)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        def refuse(name: str, takes: str) -> NoReturn:
            raise ConfigError(f"{name}: got {getattr(self, name)!r}, takes {takes}")

        if self.STARTER_NODE >= self.NUM_NODES:
            refuse("STARTER_NODE", f"a node below NUM_NODES = {self.NUM_NODES}")
        if self.NODES_PER_ROUND > self.NUM_NODES:
            refuse("NODES_PER_ROUND", f"at most NUM_NODES = {self.NUM_NODES} distinct nodes")
        if self.PCA_COMPONENTS > self.NUM_NODES:
            refuse(
                "PCA_COMPONENTS", f"at most NUM_NODES = {self.NUM_NODES}, as many as the PCA has"
            )
        if self.REPLAY_SAMPLE > self.REPLAY_CAPACITY:
            refuse("REPLAY_SAMPLE", f"at most REPLAY_CAPACITY = {self.REPLAY_CAPACITY}")
        if self.DOUBLE_Q and self.TARGET_UPDATE == 0:
            refuse("DOUBLE_Q", "True only with a target network, TARGET_UPDATE >= 1")
        if self.RESULTS_DIR == "":
            refuse("RESULTS_DIR", "a folder's path")

    @property
    def components(self) -> int:
        """PCA components of the observation: PCA_COMPONENTS, or NUM_NODES where that is 0."""
        return self.PCA_COMPONENTS or self.NUM_NODES

    @property
    def sees_weights(self) -> bool:
        """Whether the observation is made of the nodes' weights."""
        return self.OBSERVATION in ("broadcast", "local", "both", "fixed")

    @property
    def results_dir(self) -> Path:
        """Absolute path of RESULTS_DIR."""
        return absolute(self.RESULTS_DIR)

    def stored(self) -> dict[str, Any]:
        """What ``config.json`` keeps: every setting that can change a result, JSON types only."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in LOCATIONS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


RULES: dict[str, Rule] = {
    name: get_args(hint)[1]
    for name, hint in get_type_hints(Settings, globals(), include_extras=True).items()
}


def make_settings(**overrides: Any) -> Settings:
    """Settings of this file's constants, with some of them replaced.

    Raises:
        ConfigError: an unknown name, here or among the overrides, or an invalid value.
    """
    constants = {k: v for k, v in globals().items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", k)}
    for name in ("PROJECT", "LOCATIONS", "AGENTS", "JOINED_LATER", "RULES", "STREAMS"):
        constants.pop(name)
    for name in [*constants, *overrides]:
        if name not in RULES:
            close = difflib.get_close_matches(name.upper(), RULES, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
            raise ConfigError(f"{name}: unknown, takes the name of a constant of config.py{hint}")
    for name in RULES:
        if name not in constants:
            raise ConfigError(f"{name}: missing from config.py, takes {RULES[name]}")
    return Settings(**{**constants, **overrides})


# --- Randomness ------------------------------------------------------------------------------

# Departure: the public code draws from the global generators of NumPy, Python and TensorFlow, of
# which it seeds the first alone, so no two runs of it are the same. Here one seed is spread over
# named streams, so that a change in how one of them is used (another policy, say) changes nothing
# that the others yield. Streams that are used within an episode are keyed by the episode as well:
# a continued run needs no stored generator state.
STREAMS = {
    "episode": 0,  # one seed per training episode, for the environment's reset
    "initialisation": 1,  # weights of a new foundation model
    "shuffling": 2,  # order of the images in local training
    "network": 3,  # weights of a new Q-network
    "exploration": 4,  # epsilon-greedy choices
    "replay": 5,  # transitions drawn from the replay memory
    "shards": 6,  # who holds which images, for shard rules that draw them
    "test": 7,  # one seed per test episode: the initialisations that no training episode has
    "policy": 8,  # choices of a policy that draws them, in test episodes
    "basis": 9,  # the pilot episode of the fixed basis
    "validation": 10,  # one seed per episode that judges a trial of settings
    "judging": 11,  # the test images that judge a round, if not all do
    "audit": 12,  # trees and resamples of an audit
}


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """The random generator that belongs to a seed, a stream's name and an index (ours)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[name], index)))


def episode_seed(seed: int, episode: int, kind: str = "episode") -> int:
    """The seed in [0, 2**63) with which the environment is reset for an episode (ours).

    Args:
        seed: SEED.
        episode: its number, from 1.
        kind: of which stream: ``episode`` for one of training, ``test`` or ``validation``.
    """
    return int(stream(seed, kind, episode).integers(2**63))


# --- Command line ----------------------------------------------------------------------------

# Short flags for the settings that are changed most; the first five are the public code's.
_FLAGS = {
    "--episodes": "EPISODES",
    "--starter": "STARTER_NODE",
    "--step": "NODES_PER_ROUND",
    "--epsilon": "EPSILON",
    "--epsilon_decay": "EPSILON_DECAY",
    "--seed": "SEED",
    "--dataset": "DATASET",
    "--name": "NAME",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(2)


def _meanings() -> dict[str, str]:
    """The comment above each constant of this file, which is its documentation."""
    text = Path(__file__).read_text(encoding="utf-8")
    matches = re.finditer(r"^# (?!---)(.+)\n([A-Z][A-Z0-9_]*) = ", text, re.MULTILINE)
    return {match[2]: match[1] for match in matches if match[2] in RULES}


def _value(text: str) -> Any:
    """A command line's text as the Python value that it spells, or as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _named_values(name: str, default: Any) -> str:
    """What a constant becomes by those of the named settings that change it."""
    values = {which: agent[name] for which, agent in AGENTS.items() if name in agent}
    return "".join(f"; {which}: {v!r}" for which, v in values.items() if v != default)


def setting_flags(
    parser: argparse.ArgumentParser,
    flags: dict[str, str],
    own: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Adds flags for settings to a parser, and the list of all constants to its help.

    ``--set`` takes any of them, ``--settings`` the name of some of ``AGENTS``.

    Args:
        parser: its ``parse_args`` result is for ``named_settings`` and ``overrides``.
        flags: each flag with the name of its constant.
        own: a constant's meaning and its default in the flags' help, where config.py's do not hold.

    Raises:
        SystemExit: with status 2 after one line on stderr if a constant is wrong.
    """
    try:
        defaults = make_settings()
    except ConfigError as error:
        Parser(prog="config.py").error(str(error))
    meanings = _meanings()
    listing = "\n".join(
        f"  {name} = {getattr(defaults, name)!r}{_named_values(name, getattr(defaults, name))}\n"
        f"      {meanings.get(name, '')}"
        for name in RULES
    )
    parser.epilog = f"constants of config.py, for --set:\n{listing}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for flag, name in flags.items():
        names = [flag, "--episode"] if flag == "--episodes" else [flag]
        of_config = meanings.get(name, ""), repr(getattr(defaults, name))
        meaning, default = (own or {}).get(name, of_config)
        text = f"{meaning} [default: {default}]"
        parser.add_argument(*names, dest=name, metavar="VALUE", help=text.replace("%", "%%"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override any constant of config.py, listed below; repeatable",
    )
    parser.add_argument(
        "--settings",
        dest="agent_settings",
        default="",
        metavar="NAME",
        help=f"named settings of the agent, before --set: {' or '.join(AGENTS)}",
    )


def named_settings(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> dict[str, Any]:
    """The constants that ``--settings`` names; a wrong name ends the program.

    Raises:
        SystemExit: with status 2 after one line on stderr.
    """
    name = parsed.agent_settings
    if name and name not in AGENTS:
        parser.error(f"--settings: got {name!r}, takes {' or '.join(AGENTS)}")
    return AGENTS.get(name, {})


def overrides(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> dict[str, Any]:
    """What the flags of ``setting_flags`` say, for ``make_settings``; a wrong one ends the program.

    Raises:
        SystemExit: with status 2 after one line on stderr.
    """
    texts: dict[str, str] = {}
    for assignment in parsed.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            parser.error(f"--set: got {assignment!r}, takes NAME=VALUE")
        texts[name.strip()] = text.strip()
    # A short flag is the more explicit of the two, so it wins.
    texts.update({k: v for k, v in vars(parsed).items() if k in RULES and v is not None})
    return {
        name: text if name in RULES and RULES[name].kind is str else _value(text)
        for name, text in texts.items()
    }


def available_cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def seeds_of(text: str) -> list[int]:
    """A command line's seeds, from "5" (0 to 4) or a list as "0,3,7-9"."""
    if re.fullmatch(r"[0-9]{1,6}", text):
        seeds = list(range(int(text)))
    elif re.fullmatch(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*,?", text):
        seeds = []
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            some = range(int(first), min(int(last or first), int(first) + 10**6) + 1)
            if not some:  # 5-3
                seeds = []
                break
            seeds += some
    else:
        seeds = []
    if not seeds:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, takes a number of seeds (5 is 0 to 4) or a list (0,3,7-9)"
        )
    return sorted(set(seeds))


def count_of(text: str) -> int:
    """A command line's count, an integer >= 1."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes an integer >= 1")
    return int(text)


def default_dataset() -> str:
    """What config.py names; the bundled digits if that leaves it open, for they take minutes."""
    return "digits" if DATASET == "auto" else DATASET


def from_command_line(arguments: list[str] | None = None) -> Settings:
    """Settings of this file's constants and the overrides on main.py's command line.

    Args:
        arguments: the command line without the program's name; ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with status 2 after one line on stderr if a constant, an override or the
            command line itself is wrong; with status 0 after ``--help``.
    """
    parser = Parser(
        prog="main.py",
        description="Train the DQN of Homogeneous Learning; results go to results/<name>/.",
        allow_abbrev=False,
    )
    setting_flags(parser, _FLAGS)
    parsed = parser.parse_args(arguments)
    try:
        return make_settings(**named_settings(parser, parsed) | overrides(parser, parsed))
    except ConfigError as error:
        parser.error(str(error))

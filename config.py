"""Every setting of Homogeneous Learning, declared once, and the named random streams.

Edit a default below, or override it for one run with ``--set NAME=VALUE`` (``main.py --help``).
A setting's type states the values that it takes. The line under it is its help, with its source:
"public code" is the authors' TensorFlow implementation of the paper. "ours" is this project; its
agent settings are off by default.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

PROJECT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can correct. Its one-line message is all that is printed."""


class ConfigError(UserError, ValueError):
    """A setting with an unknown name, a wrong type, or a value or combination out of range."""


def reason(error: Exception) -> str:
    """Return an error's message in one line; for a file that the system refused, which and why."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split())


def absolute(text: str) -> Path:
    """Return a path of the settings; "~" is the user's folder, relative ones start at PROJECT."""
    return PROJECT / os.path.expanduser(text)


# Transitions that the replay buffer holds (public code). 120 episodes never fill it.
REPLAY_CAPACITY = 50_000

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
_listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Counts = Annotated[tuple[Count, ...], Field(min_length=1), _listed]  # takes a list too
# Not "." or "..": the name is a folder inside RESULTS_DIR and must stay there.
FolderName = Annotated[str, Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")]


class Group(BaseModel):
    """Settings that belong together; the docstring of a subclass is the group's title."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class WorldSettings(Group):
    """World: the problem that methods are compared on"""

    # Training goal
    GOAL_ACCURACY: Share = 0.80
    """Test accuracy that ends an episode (public code)."""
    MAX_ROUNDS: AtLeastTwo = 36
    """Rounds after which an episode ends without the goal (public code)."""

    # Nodes and data
    DATASET: str = "auto"
    """auto, mnist, fashion_mnist, digits, or a name added to data.DATASETS (ours)."""
    NUM_NODES: AtLeastTwo = 10
    """Number of nodes N (public code)."""
    STARTER_NODE: CountOrZero = 0
    """Node that trains round 1, below NUM_NODES (public code)."""
    NODES_PER_ROUND: Count = 1
    """Nodes that train in a round; their models are averaged (public code)."""
    SHARD_RULE: str = "main_class"
    """main_class, iid, dirichlet, or a name added to data.SHARD_RULES (public code)."""
    SAMPLES_PER_NODE: Count = 500
    """Training images in a node's shard (public code)."""
    HETEROGENEITY: Share = 0.8
    """H, share of the main class in a main_class shard (public code)."""
    DIRICHLET_ALPHA: Positive = 0.5
    """Concentration of the dirichlet shards; small is non-IID (ours)."""
    DISTANCE_SCALE: NotNegative = 0.1
    """beta, upper bound of the distance between two nodes (public code)."""
    DISTANCE_SEED: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the distance matrix (public code)."""

    # Foundation model
    LEARNING_RATE: Positive = 0.001
    """Learning rate of Adam in local training (public code)."""
    BATCH_SIZE: Count = 32
    """Images per gradient step of local training (public code)."""
    LOCAL_EPOCHS: Count = 1
    """Passes over the shard in a round (public code)."""


class AgentSettings(Group):
    """Agent: what it sees and how it learns"""

    # Reward
    REWARD: Literal["power", "progress"] = "power"
    """power: h ** (accuracy - goal) - distance - 1; progress: docs/tuned.md (public code)."""
    REWARD_BASE: Positive = 32.0
    """h, base of the power reward (public code)."""

    # Observation
    OBSERVATION: Literal["broadcast", "local", "both", "last_node", "zeros"] = "broadcast"
    """broadcast, local, both, last_node or zeros: docs/observations.md (public code)."""

    # DQN
    EPISODES: Count = 120
    """Episodes that train the DQN (public code)."""
    HIDDEN_UNITS: Counts = (500, 200)
    """Units of the Q-network's hidden layers (public code)."""
    Q_LEARNING_RATE: Positive = 0.001
    """Learning rate of Adam in the Q-network's training (public code)."""
    Q_WEIGHT_DECAY: NotNegative = 0.0
    """Decoupled weight decay of the Q-network (ours)."""
    DISCOUNT: Share = 0.9
    """gamma, weight of the next state's value (public code)."""
    N_STEP: Count = 1
    """Rewards in a return; ROUNDS_PER_CHOICE if larger (ours)."""
    ROUNDS_PER_CHOICE: Count = 1
    """Rounds that a choice of nodes lasts (ours)."""
    MAX_STAY: CountOrZero = 0
    """Longest stay before another choice; random ones repeat up to it; 0 = off (ours)."""
    REPLAY_SAMPLE: Annotated[int, Field(ge=1, le=REPLAY_CAPACITY)] = 128
    """Transitions drawn for an update; training starts when so many are stored (public code)."""
    Q_BATCH_SIZE: Count = 16
    """Transitions per gradient step (public code)."""
    UPDATES_PER_EPISODE: Count = 1
    """Draws of REPLAY_SAMPLE transitions after each episode (public code)."""
    FIT_ALL_ACTIONS: bool = True
    """Fit all actions' values, divided by their norm; else those taken (public code)."""
    TARGET_RATE: Share = 0.0
    """Step of the target network to the Q-network after an episode; 0 = none (ours)."""

    # Exploration
    EPSILON: Share = 1.0
    """Probability of a random action in episode 1 (public code)."""
    EPSILON_DECAY: NotNegative = 0.02
    """epsilon is multiplied by exp(-EPSILON_DECAY) after each episode (public code)."""


class RunSettings(Group):
    """Run: its seed, and what computes it"""

    SEED: CountOrZero = 0
    """Seed of everything random but the distance matrix (ours)."""
    THREADS: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 = all cores, in comparisons one per job (ours)."""
    DEVICE: Literal["cpu", "gpu"] = "cpu"
    """cpu, or gpu: TensorFlow's first GPU (ours)."""


class PlaceSettings(Group):
    """Place: where files lie, without effect on results"""

    NAME: FolderName = ""
    """Folder below RESULTS_DIR; empty = <dataset>-seed<SEED> in main.py (ours)."""
    RESULTS_DIR: Annotated[str, Field(min_length=1)] = "results"
    """Folder of all results, relative to the project's folder (ours)."""
    DATA_DIR: Annotated[str, Field(min_length=1)] = os.environ.get("HL_DATA_DIR") or "data"
    """Folder searched for datasets; default: $HL_DATA_DIR, else data (ours)."""


# What --settings names (ours): docs/tuned.md gives the reason for each.
NAMED_SETTINGS: dict[str, dict[str, Any]] = {
    "tuned": {
        "REWARD": "progress",
        "OBSERVATION": "both",
        "Q_WEIGHT_DECAY": 0.4,
        "DISCOUNT": 0.97,
        "N_STEP": 12,
        "ROUNDS_PER_CHOICE": 3,
        "UPDATES_PER_EPISODE": 20,
        "FIT_ALL_ACTIONS": False,
        "TARGET_RATE": 0.2,
        "EPSILON_DECAY": 0.04,
        "MAX_STAY": 9,
    },
}


# A dataset's own defaults, by the rule in docs/extending.md (ours). They replace those above;
# settings that are named win.
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"GOAL_ACCURACY": 0.72, "MAX_ROUNDS": 87},
}


class Settings(PlaceSettings, RunSettings, AgentSettings, WorldSettings):
    """The validated, immutable settings of one run: ``Settings(SEED=1)``.

    Raises:
        ConfigError: an unknown name, a wrong type, or a value or combination out of range.
    """

    def __init__(self, **values: Any) -> None:
        dataset = values.get("DATASET", type(self).model_fields["DATASET"].default)
        plain = {**DATASET_SETTINGS.get(str(dataset), {}), **values}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in plain.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise ConfigError(_one_line(error, values)) from None
        n, starter, k = self.NUM_NODES, self.STARTER_NODE, self.NODES_PER_ROUND
        if starter >= n:
            raise ConfigError(f"STARTER_NODE: got {starter}, takes at most NUM_NODES - 1 = {n - 1}")
        if k > n:
            raise ConfigError(f"NODES_PER_ROUND: got {k}, takes at most NUM_NODES = {n}")

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed, validated as a whole."""
        return Settings(**{**self.model_dump(), **changes})

    def stored(self) -> dict[str, Any]:
        """Return what ``config.json`` keeps: settings that can change a result, as JSON types."""
        return self.model_dump(mode="json", exclude=names_of(PlaceSettings))


GROUPS = (WorldSettings, AgentSettings, RunSettings, PlaceSettings)


def names_of(*groups: type[Group]) -> set[str]:
    """Return the names of all settings of some groups."""
    return {name for group in groups for name in group.model_fields}


def takes(name: str) -> str:
    """Return the values that a setting takes, in words: "an integer >= 1"."""
    schema = Settings.model_json_schema()["properties"][name]
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "pattern" in schema:
        return "letters, digits, - _ and inner dots"
    words = {
        "array": "a tuple of integers >= 1, as (64,)",
        "boolean": "True or False",
        "integer": "an integer",
        "number": "a number",
        "string": "text",
    }[schema["type"]]
    if "maximum" in schema:
        return f"{words} in [{schema['minimum']}, {schema['maximum']}]"
    if "exclusiveMinimum" in schema:
        return f"{words} > {schema['exclusiveMinimum']}"
    return f"{words} >= {schema['minimum']}" if "minimum" in schema else words


def _one_line(error: ValidationError, values: dict[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] != "extra_forbidden":
        return f"{name}: got {values.get(name, first['input'])!r}, takes {takes(name)}"
    close = difflib.get_close_matches(name.upper(), Settings.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else "main.py --help lists them"
    return f"{name}: unknown, takes the name of a setting; {hint}"


def meaning(name: str) -> tuple[str, str]:
    """Return what a setting means, and the source of its default: its docstring's two parts."""
    text = Settings.model_fields[name].description or ""
    match = re.fullmatch(r"(.+) \((public code|ours)\)\.", text)
    if match is None:
        raise ConfigError(f"{name}: got no docstring that ends with (public code) or (ours)")
    return match[1], match[2]


# --- Randomness ------------------------------------------------------------------------------

# Departure: the public code draws from the global generators of NumPy, Python and TensorFlow. It
# seeds the first alone, so no two of its runs are the same. Here each use has a stream of its own.
# Streams used within an episode are keyed by it as well, so resuming needs no generator state.
# The numbers are part of what a seed means: they never change, and 9 is not used again.
STREAMS = {
    "episode": 0,  # one seed per training episode, for the environment's reset
    "initialisation": 1,  # weights of a new foundation model
    "shuffling": 2,  # order of the images in local training
    "network": 3,  # weights of a new Q-network
    "exploration": 4,  # epsilon-greedy choices
    "replay": 5,  # transitions drawn from the replay buffer
    "shards": 6,  # which node holds which images, for shard rules that draw them
    "test": 7,  # one seed per test episode: initialisations that no training episode has
    "policy": 8,  # choices of a policy that draws them, in test episodes
    "validation": 10,  # one seed per validation episode, which settings are chosen by
    "judging": 11,  # test images that judge a round, with REWARD = progress
    "audit": 12,  # trees and resamples of an audit
}


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """Return the random generator of a seed, a stream's name and an index (ours)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[name], index)))


def episode_seed(seed: int, episode: int, kind: str = "episode") -> int:
    """Return the seed in [0, 2**63) that resets the environment for an episode (ours).

    Episodes count from 1; ``kind`` names the stream: episode (training), test or validation.
    """
    return int(stream(seed, kind, episode).integers(2**63))

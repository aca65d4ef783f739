"""Files that are whole or not there, where results come from, and the record of one run.

A run that stops, even by a power cut, loses at most the episode in progress. Each row is in its
file as soon as it is known. A file that replaces another is written beside it, synced and renamed.
A checkpoint after each episode states the sizes of the growing files; a continued run cuts them
back. Departure: the public code writes two ``.npy`` files every 20 episodes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd

from config import PROJECT, RunSettings, Settings, UserError, absolute, names_of, reason
from data import Dataset, label_counts

if TYPE_CHECKING:
    from node import DQNAgent

ROUND_COLUMNS = tuple("dataset episode round node chosen_by distance accuracy reward".split())
EPISODE_COLUMNS = tuple(
    "dataset episode rounds goal_reached final_accuracy episode_reward communication_cost epsilon "
    "q_loss diverged goal_accuracy max_rounds seconds".split()
)
SHARD_COLUMNS = ("dataset", "node", "class", "images")
DISTANCE_COLUMNS = ("dataset", "node", "other_node", "distance")

# The files that grow during a run; the last one holds arrays, one after the other.
_TABLES = {"rounds.csv": ROUND_COLUMNS, "episodes.csv": EPISODE_COLUMNS}
_TRANSITIONS = "transitions.npy"

# Columns of text, here and in experiments; all others hold numbers. "node" may be "3+5".
TEXT_COLUMNS = set(
    "dataset node chosen_by variant method state error agent git_revision tensorflow cpu device "
    "quantity observation target".split()
)

# pandas before 3 needs this to read back the same bits.
_EXACT: Any = {} if pd.__version__ >= "3" else {"float_precision": "round_trip"}

_PACKAGES = ("keras", "numpy", "gymnasium", "pandas", "matplotlib", "scikit-learn")
Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
_ADVICE = "move the folder away, or choose another --name"


def _damaged(path: Path | str, error: Exception) -> UserError:
    return UserError(f"{path}: damaged ({reason(error)}); {_ADVICE}")


# --- Files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` once it is whole and on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # other systems can't open folders; here the rename is made to last
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def locked(folder: Path, program: str) -> contextlib.AbstractContextManager[object]:
    """Make a folder and return its lock, held until the context ends.

    UserError if another process, probably a ``program``, holds it, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another {program} is writing there; wait for it, or choose another --name"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written ({reason(error)}); choose another RESULTS_DIR or --name"
        ) from error


def append_rows(path: Path, columns: tuple[str, ...], *rows: dict[str, Any]) -> None:
    """Add rows to a CSV file, and the header before its first row; the file is closed again.

    Reading gives the same bits. None is an empty field, a truth value is 0 or 1, a list its members
    joined by "+". Values that no column names are left out; KeyError if one is missing.
    """
    fields = [[_field(row[column]) for column in columns] for row in rows]
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(columns)
        writer.writerows(fields)


def _field(value: Any) -> Any:
    """Convert a value for the csv module, which handles None and floats itself."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, bool) else value


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Read a CSV, without a last row that was cut off; UserError if it lacks these columns."""
    texts = [column for column in columns if column in TEXT_COLUMNS]
    try:
        text = path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]
        table = pd.read_csv(io.StringIO(text), dtype=dict.fromkeys(texts, str), **_EXACT)
        for column in table.columns.difference(texts):
            table[column] = pd.to_numeric(table[column])
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path}: can't be read ({cause})") from error
    if list(table) != list(columns):
        raise UserError(f"{path}: got the columns {', '.join(table)}, takes {', '.join(columns)}")
    return table.fillna(dict.fromkeys(texts, ""))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    with replacing(path) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())


def write_json(path: Path, content: Json) -> None:
    """Write a dictionary of JSON types, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as an uncompressed ``.npz`` file, whole or not at all."""
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> Arrays:
    """Read all of an ``.npz`` file, never unpickling; UserError if a checksum shows a damage."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        raise _damaged(path, error) from error


def save_agent(path: Path, weights: Arrays, settings: Settings, dataset: Dataset) -> None:
    """Write a trained agent as ``.npz``, with its settings, and its data's name and SHA-256.

    ``weights`` are what the agent's ``arrays`` returned: of a DQN, float32 by layer.
    """
    data = {"name": dataset.name, "sha256": dataset.sha256}
    config = json.dumps({"settings": settings.stored(), "dataset": data})
    write_arrays(path, {**weights, "config": np.array(config)})


def load_agent(path: Path) -> tuple[Arrays, Json]:
    """Return ``save_agent``'s arrays, and ``settings`` and ``dataset``; UserError if it can't."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        about = json.loads(str(arrays.pop("config")))
        about["settings"]["SEED"], about["dataset"]["name"], about["dataset"]["sha256"]
    except Exception as error:  # NumPy raises many types
        cause = reason(error)
        raise UserError(f"{path}: holds no trained agent ({cause}); takes an agent.npz") from error
    return arrays, about


# --- Where a result comes from ---------------------------------------------------------------


def provenance(threads: int, device: str) -> Json:
    """Return the revision, versions and machine that a result comes from."""
    return {
        "git_revision": git_revision(),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tensorflow_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": threads,
            "device": device,
            "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS"),
        },
    }


def tensorflow_version() -> str:
    """Return TensorFlow's version by itself: its package may be called tensorflow-cpu."""
    import tensorflow

    return tensorflow.__version__


def git_revision() -> str | None:
    """Return the project's commit, "+changes" if files beside results differ; None if no clone."""

    def git(*arguments: str) -> str:
        # With its folder named, git takes another user's clone, as under sudo, and no outer one.
        command = ["git", "-C", str(PROJECT), "--git-dir=.git", "--work-tree=.", *arguments]
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def cpu_name() -> str:
    """Return the processor's name, or an empty string."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def differences(stored: Json, now: Json) -> list[str]:
    """Return ``"name = value there, value now"`` for each name that differs between both."""
    return [
        f"{name} = {stored.get(name)!r} there, {now.get(name)!r} now"
        for name in dict.fromkeys([*now, *stored])
        if stored.get(name) != now.get(name)
    ]


def fingerprint(name: str, sha256: dict[str, str]) -> str:
    """Return a dataset's name and the beginnings of its checksums, to tell data apart."""
    return " ".join([name, *(text[:6] for text in sha256.values())])


def read_config(path: Path, *needed: str, flag: str = "") -> Json:
    """Return a ``config.json``; UserError if settings, dataset or one of ``needed`` is missing.

    ``flag`` begins the error's line: what named the file.
    """
    needed = ("settings", "dataset", *needed)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings, about, *_ = (config[name] for name in needed)
        whole = isinstance(settings, dict) and isinstance(about, dict)
        if not (whole and {"name", "sha256"} <= about.keys()):
            raise ValueError("settings or dataset is damaged")
        return config
    except OSError as error:
        raise UserError(f"{flag}{reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        names = ", ".join(needed)
        line = f"{flag}{path}: takes a config.json with {names} ({reason(error)})"
        raise UserError(line) from error


def read_matching_config(
    path: Path, kind: str, comparable: Callable[[Json], Json], now: Json
) -> Json | None:
    """Return the JSON file that identifies a folder; None if the folder is empty.

    ``comparable`` takes from the file's content the values that have to be those of ``now``. If
    they differ, the folder holds another ``kind`` (run, comparison or audit): a UserError.
    """
    folder = path.parent
    try:
        if not path.exists():
            others = sorted(file.name for file in folder.glob("[!.]*"))  # .lock does not count
            if others:
                raise UserError(f"{folder}: holds {others[0]} but no {path.name}; {_ADVICE}")
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = differences(comparable(stored), now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = f"{path}: damaged, or of another kind than {kind} ({reason(error)}); {_ADVICE}"
        raise UserError(line) from error
    if differing:
        raise UserError(f"{folder}: holds another {kind} ({'; '.join(differing)}); {_ADVICE}")
    return stored


# --- A run -----------------------------------------------------------------------------------


class Run:
    """The folder of one run; a context manager that holds its lock.

    ``episodes_finished`` counts those of earlier sessions too; ``config`` is ``config.json``.
    Entering raises a UserError if the folder is in use, damaged, or holds something else.
    """

    def __init__(self, settings: Settings, dataset: Dataset, threads: int) -> None:
        self.settings = settings
        self.dataset = dataset
        name = settings.NAME or f"{dataset.name}-seed{settings.SEED}"
        self.folder = absolute(settings.RESULTS_DIR) / name
        self.episodes_finished = 0
        self.config: Json = {}
        self._threads = threads
        self._checkpoint_path = self.folder / "checkpoint.npz"
        self._sizes: dict[str, int] = {}  # of the files at the last checkpoint, in bytes
        self._state: Arrays = {}  # of the agent, at the last checkpoint

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder, "run"))
            self._read()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """Whether all episodes are done and the run is closed for good."""
        return self.config["state"] == "finished"

    def _read(self) -> None:
        """Read what an earlier session left. Only a finished run's checkpoint is deleted."""
        dataset = self.dataset
        new: Json = {
            "state": "running",
            "dataset": {
                "name": dataset.name,
                "source": dataset.source,
                "verdict": dataset.verdict,
                "training_images": len(dataset.y_train),
                "test_images": len(dataset.y_test),
                "sha256": dataset.sha256,
            },
            "settings": self.settings.stored(),
            "sessions": [],
        }
        now = _comparable(new)
        path = self.folder / "config.json"
        self.config = read_matching_config(path, "run", _comparable, now) or new
        if self.finished:
            self._remove_checkpoint()  # left by a kill at the very end
        elif self._checkpoint_path.exists():
            try:
                self._state = read_arrays(self._checkpoint_path)
                self._sizes = dict(json.loads(str(self._state.pop("files"))))
                self.episodes_finished = int(self._state["episode"]) - 1
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(self._checkpoint_path, error) from error
            for name, size in self._sizes.items():
                path = self.folder / name
                if not path.exists() or path.stat().st_size < size:
                    raise UserError(f"{path}: shorter than at the last checkpoint; {_ADVICE}")
        else:
            # The first checkpoint follows the first row: with more rows, one was there.
            episodes = self.folder / "episodes.csv"
            if episodes.exists() and episodes.read_bytes().count(b"\n") > 2:
                raise UserError(f"{self._checkpoint_path}: missing; {_ADVICE}")

    def restore(self, agent: DQNAgent) -> None:
        """Take an agent to the last checkpoint, if there is one; UserError if it does not fit."""
        if not self._state:
            return
        try:
            parts = []
            with (self.folder / _TRANSITIONS).open("rb") as file:
                while file.tell() < self._sizes[_TRANSITIONS]:
                    parts.append(np.load(file, allow_pickle=False))
            agent.load_state(self._state, np.concatenate(parts))
        except Exception as error:  # NumPy raises many types
            raise _damaged(f"{self._checkpoint_path} or {_TRANSITIONS}", error) from error

    def start(self, shards: list[np.ndarray], distances: np.ndarray) -> None:
        """Begin a session: cut the tables back to the checkpoint, write shards and distances.

        ``shards`` are each node's indices into ``dataset.x_train``; ``distances`` (N, N) float64.
        """
        sessions = self.config["sessions"]
        times = {"started": _now(), "ended": None, "first_episode": self.episodes_finished + 1}
        session = {**times, **provenance(self._threads, self.settings.DEVICE)}
        if sessions:
            changed = differences(_flat_provenance(sessions[-1]), _flat_provenance(session))
            if changed:
                text = f"{self.folder}: the same seed may give other bits ({'; '.join(changed)})"
                warnings.warn(text, stacklevel=2)
        sessions.append(session)
        write_json(self.folder / "config.json", self.config)
        for name in (*_TABLES, _TRANSITIONS):
            if (self.folder / name).exists():
                os.truncate(self.folder / name, self._sizes.get(name, 0))
        for name, columns in _TABLES.items():
            append_rows(self.folder / name, columns)
        write_table(self.folder / "shards.csv", shard_table(self.dataset, shards))
        write_table(self.folder / "distances.csv", distance_table(self.dataset.name, distances))

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Write a row of one of the tables; dataset and episode are filled in."""
        now = {"dataset": self.dataset.name, "episode": self.episodes_finished + 1}
        append_rows(self.folder / table, _TABLES[table], {**now, **row})

    def checkpoint(self, agent_state: Arrays, transitions: np.ndarray) -> None:
        """Make the episode just recorded part of what a later session continues.

        ``agent_state`` holds ``episode``, the next one's number; ``transitions`` are the new ones.
        """
        with (self.folder / _TRANSITIONS).open("ab") as file:
            np.save(file, transitions, allow_pickle=False)
        for name in (*_TABLES, _TRANSITIONS):
            with (self.folder / name).open("ab") as file:
                os.fsync(file.fileno())
                self._sizes[name] = file.tell()
        files = {"files": np.array(json.dumps(self._sizes))}
        write_arrays(self._checkpoint_path, agent_state | files)
        self.episodes_finished += 1

    def finish(self) -> None:
        """Declare the run finished."""
        self.config["state"] = "finished"
        self.config["sessions"][-1]["ended"] = _now()
        write_json(self.folder / "config.json", self.config)
        self._remove_checkpoint()

    def _remove_checkpoint(self) -> None:
        self._checkpoint_path.unlink(missing_ok=True)
        (self.folder / _TRANSITIONS).unlink(missing_ok=True)


def _flat_provenance(session: Json) -> Json:
    return {
        "git_revision": session["git_revision"],
        **session["versions"],
        **session["machine"],
    }


def _comparable(config: Json) -> Json:
    """Return what of a run's ``config.json`` must stay the same when the run is continued."""
    config["state"], config["sessions"]  # they are needed later
    # DATASET counts by the data that it loaded: "auto" may have loaded the same.
    data = fingerprint(config["dataset"]["name"], config["dataset"]["sha256"])
    # What computes the run may change, as the machine may: Run.start warns.
    free = dict.fromkeys(names_of(RunSettings) - {"SEED"} | {"DATASET"})
    return {**config["settings"], **free, "data": data}


def episode_row(info: dict[str, Any], settings: Settings, started: float) -> dict[str, Any]:
    """Return an episode's row, of a run or a test, from the info of its last round.

    ``started`` is the episode's start by ``perf_counter``.
    """
    return {
        **info,
        "rounds": info["round"],
        "final_accuracy": info["accuracy"],
        "goal_accuracy": settings.GOAL_ACCURACY,
        "max_rounds": settings.MAX_ROUNDS,
        "seconds": round(time.perf_counter() - started, 3),
    }


def shard_table(dataset: Dataset, shards: list[np.ndarray]) -> pd.DataFrame:
    """Return SHARD_COLUMNS: how many training images of each class each node holds."""
    counts = label_counts(dataset, shards)
    node, label = np.indices(counts.shape)
    values = (dataset.name, node.ravel(), label.ravel(), counts.ravel())
    return pd.DataFrame(dict(zip(SHARD_COLUMNS, values, strict=True)))


def distance_table(dataset: str, distances: np.ndarray) -> pd.DataFrame:
    """Return DISTANCE_COLUMNS: the distance of each pair of nodes, the lower number first."""
    node, other = np.triu_indices(len(distances), 1)
    values = (dataset, node, other, distances[node, other])
    return pd.DataFrame(dict(zip(DISTANCE_COLUMNS, values, strict=True)))

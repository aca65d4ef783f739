"""The record of one run: its folder with settings, CSVs, checkpoint and weights.

A run may stop at any moment, by a signal, a full disk or a power cut. What makes that safe:
rows are flushed as soon as they are known; a file that replaces another is written beside it,
synced and renamed; a checkpoint after each episode states how long the growing files were by
then, and a continued run cuts them back to that. So at most the episode in progress is lost.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import filelock
import numpy as np
import pandas as pd

from config import JOINED_LATER, PROJECT, Settings, UserError, reason
from data import Dataset, warn

ROUND_COLUMNS = (
    "dataset",
    "episode",
    "round",
    "node",
    "chosen_by",
    "distance",
    "accuracy",
    "reward",
)
EPISODE_COLUMNS = (
    "dataset",
    "episode",
    "rounds",
    "goal_reached",
    "final_accuracy",
    "episode_reward",
    "communication_cost",
    "epsilon",
    "q_loss",
    "diverged",
    "goal_accuracy",
    "max_rounds",
    "seconds",
)
SHARD_COLUMNS = ("dataset", "node", "class", "images")
TEST_ROUND_COLUMNS = (
    "dataset",
    "method",
    "seed",
    "episode",
    "round",
    "node",
    "distance",
    "accuracy",
    "reward",
)
TEST_EPISODE_COLUMNS = (
    "dataset",
    "method",
    "seed",
    "episode",
    "rounds",
    "goal_reached",
    "final_accuracy",
    "episode_reward",
    "communication_cost",
    "transfers",
    "megabytes",
    "observation_megabytes",
    "diverged",
    "goal_accuracy",
    "max_rounds",
    "seconds",
)

TRAINING_TABLES = {"rounds.csv": ROUND_COLUMNS, "episodes.csv": EPISODE_COLUMNS}
TEST_TABLES = {"rounds.csv": TEST_ROUND_COLUMNS, "episodes.csv": TEST_EPISODE_COLUMNS}
# Columns of text, where all else is numbers. A single node reads as a number, "3+5" does not.
_TEXTS = {"dataset", "node", "chosen_by", "method", "comparison", "parameter", "variant"}
_TEXTS |= {"folder", "state", "error", "quantity", "trial", "settings", "git_revision"}
_TEXTS |= {"observation", "target"}

_TRANSITIONS = "transitions.npy"  # many arrays, one after the other

_PACKAGES = ("tensorflow", "keras", "numpy", "gymnasium", "pandas", "matplotlib", "scikit-learn")


# What to do about a run that can't be continued.
_ADVICE = "move the folder away, or choose another --name, to start anew"


class RunError(UserError):
    """A folder of results that this run can't use, with what to do about it."""


class CsvTable:
    """A CSV file with fixed columns, one flushed row at a time.

    Floats are written so that reading gives the same bits; None is an empty field, a truth value
    0 or 1, a list its members joined by "+".

    Args:
        path: continued if it exists.
        columns: the header.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.columns = columns
        new = not path.exists() or path.stat().st_size == 0
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if new:
            self._writer.writerow(columns)
            self._file.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row and flushes it.

        Raises:
            ValueError: the row's names are not the columns.
        """
        if set(row) != set(self.columns):
            raise ValueError(f"{self.path.name}: {sorted(set(row) ^ set(self.columns))}")
        self._writer.writerow([_text(row[column]) for column in self.columns])
        self._file.flush()

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TransitionFile:
    """A file to which arrays of transitions are appended, each as ``numpy.save`` writes it.

    Appended to, because a hundred nodes' replay memory has hundreds of megabytes. It keeps every
    transition that was ever added, also those that the replay memory has forgotten.

    Args:
        path: continued if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sha256 = _sha256(path, None) if path.exists() else hashlib.sha256()
        self._file = path.open("ab")

    def add(self, transitions: np.ndarray) -> None:
        """Appends an array and waits until it is on the disk."""
        buffer = io.BytesIO()
        np.save(buffer, transitions, allow_pickle=False)
        self._sha256.update(buffer.getbuffer())
        self._file.write(buffer.getbuffer())
        self._file.flush()
        os.fsync(self._file.fileno())

    def state(self) -> tuple[int, str]:
        """Its size in bytes and its SHA-256."""
        return self._file.tell(), self._sha256.hexdigest()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @staticmethod
    def read(path: Path, size: int, last: int) -> np.ndarray:
        """The last transitions in the first ``size`` bytes, oldest first, never unpickling.

        Args:
            path: of the file.
            size: in bytes.
            last: how many transitions to return at least, if there are as many. Earlier arrays
                are dropped while reading: together they may not fit into memory.

        Raises:
            ValueError: they are not what ``add`` wrote.
        """
        parts: deque[np.ndarray] = deque()
        count = 0
        with path.open("rb") as file:
            while file.tell() < size:
                parts.append(np.load(file, allow_pickle=False))
                count += len(parts[-1])
                while len(parts) > 1 and count - len(parts[0]) >= last:
                    count -= len(parts.popleft())
        return np.concatenate(parts)


def _sha256(path: Path, size: int | None) -> hashlib._Hash:
    """Of a file's first ``size`` bytes; of all of it if that is None or the file is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size if size is None else size
        while chunk := file.read(min(left, 1 << 24)):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return repr(float(value))
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes ``path``'s place once it is whole and on the disk, and not before.

    Raises:
        RunError: no file may be written into its folder.
        OSError: the system refuses something else; the disk is full, say.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if denied and str(error.filename) == str(part):
            raise RunError(_unwritable(path.parent, error)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder}: can't be written ({reason(error)})"


@contextlib.contextmanager
def entering(
    folder: Path, writer: str, instead: str = "another RESULTS_DIR or --name"
) -> Iterator[None]:
    """Tells in a line why a folder could not be made or locked: ``writer`` holds it, or the system.

    Args:
        folder: of results.
        writer: what else may be writing there.
        instead: what the user may choose.

    Raises:
        RunError: instead of ``filelock.Timeout`` and ``OSError``.
    """
    try:
        yield
    except filelock.Timeout:
        raise RunError(
            f"{folder}: another {writer} is writing there; wait for it, or choose another --name"
        ) from None
    except OSError as error:
        raise RunError(f"{_unwritable(folder, error)}; choose {instead}") from error


@contextlib.contextmanager
def claimed(
    folder: Path, name: str, about: dict[str, Any], program: str, check: Callable[[], None]
) -> Iterator[None]:
    """Makes a folder a program's for what it is about, and keeps other processes out meanwhile.

    Args:
        folder: is made if it is not there.
        name: of the JSON file that says what it is about; left as it is if it is there.
        about: the file's content.
        program: that writes there.
        check: refuses a folder of something else; called when nobody else can claim it any more.

    Raises:
        UserError: another process has it, it can't be written, or ``check`` refuses it.
    """
    lock = filelock.FileLock(folder / ".lock")
    with entering(folder, program):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    try:
        check()
        if not (folder / name).exists():
            with replacing(folder / name) as file:
                file.write(json.dumps(about, indent=2).encode() + b"\n")
        yield
    finally:
        lock.release()


def check_claim(
    folder: Path,
    name: str,
    kind: str,
    foreign: str,
    differing: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Refuses a folder that ``claimed`` made for something else; a new or empty one is free.

    Args:
        folder: as ``claimed``'s.
        name: as ``claimed``'s.
        kind: what the folder would hold another of.
        foreign: what is told of a folder with other files but without that one, the first of which
            it may name as ``{found}``.
        differing: from the file's content to what differs from what is wanted, in words.

    Raises:
        UserError: it holds another, or something else, or can't be read, or the file is damaged.
    """
    path = folder / name
    try:
        if not path.exists():
            files = [p for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else []
            if not files:
                return
            told = foreign.format(found=min(files).name)
            raise UserError(f"{folder}: {told}; choose another --name")
        other = differing(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"{folder}: can't be read ({reason(error)}); choose another RESULTS_DIR or --name"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); choose another --name") from error
    if other:
        raise UserError(
            f"{folder}: holds another {kind} ({', '.join(other)}); choose another --name"
        )


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A CSV with these columns; a last row without its end is left out.

    Raises:
        UserError: it is missing or something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # A row without its end is one that could not be written any more.
        text = text[: text.rfind("\n") + 1]
        table = pd.read_csv(io.StringIO(text), dtype={c: str for c in columns if c in _TEXTS})
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    if list(table) != list(columns):
        raise UserError(f"{path}: is not such a table as a run writes, whose columns are {columns}")
    texts = [column for column in columns if column in _TEXTS]
    for column in table.columns.difference(texts):
        if len(table) and not pd.api.types.is_numeric_dtype(table[column]):
            raise UserError(f"{path}: can't be read (of {column} not all values are numbers)")
    return table.fillna(dict.fromkeys(texts, ""))


def stored_progress(folder: Path) -> tuple[str, int]:
    """A run's state and number of sessions as its folder tells them, whatever run it is.

    Without a run, or with a damaged one: "" and 0.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["state"]), len(config["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as an uncompressed ``.npz`` file, whole or not at all."""
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all of an ``.npz`` file, never unpickling; each array's checksum is verified.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise RunError(f"{path}: damaged ({' '.join(str(error).split())})") from error


class OtherRun(RunError):
    """A folder that holds a run with other settings or data than the present ones."""


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``"name = value there, value now"`` for each name that has not the same value in both."""
    return [
        f"{name} = {there.get(name)!r} there, {now.get(name)!r} now"
        for name in dict.fromkeys([*now, *there])
        if there.get(name) != now.get(name)
    ]


class Run:
    """The folder ``results/<name>/`` of one run; a context manager that holds its lock.

    Args:
        settings: the run's, stored in ``config.json`` but for what names a place on this machine.
        dataset: its name, source, verdict and SHA-256 are stored.
        threads: how many CPU threads the run computes with.
        tables: files and columns, TRAINING_TABLES or TEST_TABLES.
        about: what else makes this run what it is, stored in ``config.json`` and, but for a place
            on this machine (``agent``), compared when it is continued; JSON types only.

    Attributes:
        folder: where everything is.
        episodes_finished: by this run and those that it continues.
        continued: whether this run continues an earlier one.

    Raises:
        RunError: the folder can't be written, or holds another run (``OtherRun``), a damaged one,
            one that is running, or something else.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        threads: int,
        tables: dict[str, tuple[str, ...]] = TRAINING_TABLES,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.dataset = dataset
        self.name = settings.NAME or f"{dataset.name}-seed{settings.SEED}"
        self.folder = settings.results_dir / self.name
        self.episodes_finished = 0
        self.continued = False
        self._threads = threads
        self._columns = tables
        self._about = about or {}
        self._config_path = self.folder / "config.json"
        self._checkpoint_path = self.folder / "checkpoint.npz"
        self._tables: dict[str, CsvTable] = {}
        self._transitions: TransitionFile | None = None
        self._sizes: dict[str, int] = {}  # of the files at the last checkpoint, in bytes
        self._state: dict[str, np.ndarray] | None = None
        self._config: dict[str, Any] = {}

    def __enter__(self) -> Run:
        with entering(self.folder, "run"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_other_folders()
            _sync_folder(self.folder.parent)
            self._lock = filelock.FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._tables and not self.finished:
            # On a full disk this fails as well: the state then stays "running", without a lock.
            with contextlib.suppress(OSError, RunError):
                self._set_state("interrupted")
        self._close()

    @property
    def finished(self) -> bool:
        """Whether all episodes are done and the run is closed for good."""
        return self._config.get("state") == "finished"

    def peek(self) -> str:
        """State of the run in the folder, "" if there is none; neither locks nor writes.

        Raises:
            RunError: the folder holds another run, or a damaged one.
        """
        if not self._config_path.exists():
            return ""
        self._compare(self._read_config())
        return self._config["state"]

    def _close(self) -> None:
        files = [*self._tables.values(), *([self._transitions] if self._transitions else [])]
        for file in files:
            # A last flush fails on a full disk; the error that stopped the run is the one to show.
            with contextlib.suppress(OSError):
                file.close()
        self._lock.release()

    def _refuse_other_folders(self) -> None:
        if not self._config_path.exists():
            others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            if others:
                raise RunError(
                    f"{self.folder}: holds {others[0]} but no config.json, so it is not a run's "
                    f"folder; {_ADVICE}"
                )

    def _open(self) -> None:
        """Reads what an earlier run left. Nothing is written before ``start``."""
        if not self._config_path.exists():
            return
        self._compare(self._read_config())
        self.continued = True
        if self.finished:
            self._remove_checkpoint()  # left by a kill at the very end
        elif self._checkpoint_path.exists():
            self._read_checkpoint()
        else:
            # The first checkpoint follows the first row: with more rows, one was there.
            episodes = self.folder / "episodes.csv"
            if episodes.exists() and episodes.read_bytes().count(b"\n") > 2:
                raise RunError(f"{self._checkpoint_path}: missing; {_ADVICE}")

    def start(self, shards: list[np.ndarray]) -> None:
        """Begins a session: cuts the tables back to the checkpoint and writes ``shards.csv``."""
        self._start_session()
        for name in (*self._columns, _TRANSITIONS):
            path = self.folder / name
            if path.exists():
                os.truncate(path, self._sizes.get(name, 0))
        for name, columns in self._columns.items():
            self._tables[name] = CsvTable(self.folder / name, columns)
        if self._columns is TRAINING_TABLES:
            self._transitions = TransitionFile(self.folder / _TRANSITIONS)
        self._record_shards(shards)

    def _read_config(self) -> dict[str, Any]:
        try:
            config = json.loads(self._config_path.read_text(encoding="utf-8"))
            config["settings"], config["dataset"]["sha256"], config["state"], config["sessions"]
        except OSError as error:
            raise RunError(f"{self._config_path}: can't be read ({reason(error)})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._config_path}: damaged ({error}); {_ADVICE}") from error
        return config

    def _compare(self, config: dict[str, Any]) -> None:
        stored, present = JOINED_LATER | config["settings"], self.settings.stored()
        for name in ("NAME", "DATASET"):
            stored.pop(name, None)
            present.pop(name)
        differing = differences(stored, present)
        # An agent is known by its weights' SHA-256, whatever its folder is called.
        there, now = config.get("about", {}), self._about
        differing += differences({**there, "agent": None}, {**now, "agent": None})
        # What counts of DATASET is which data it led to: "auto" may have found the same.
        if config["dataset"]["sha256"] != self.dataset.sha256:
            there = config["dataset"]["name"]
            differing.append(f"data = {there!r} there, {self.dataset.name!r} now")
        if differing:
            raise OtherRun(
                f"{self.folder}: holds a run with other settings ({'; '.join(differing)}); choose "
                "another --name, or move that folder away"
            )
        self._config = config

    def _read_checkpoint(self) -> None:
        """Loads the checkpoint and checks the CSVs against it."""
        try:
            arrays = read_arrays(self._checkpoint_path)
            if "files" not in arrays:
                raise RunError(f"{self._checkpoint_path}: written by an earlier version")
            files = json.loads(str(arrays.pop("files")))
            self.episodes_finished = int(arrays["agent/episode"]) - 1
            for name, (size, digest) in files.items():
                if _sha256(self.folder / name, size).hexdigest() != digest:
                    raise RunError(f"{self.folder / name}: damaged since the last checkpoint")
        except RunError as error:
            raise RunError(f"{error}; {_ADVICE}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged_checkpoint(error) from error
        except FileNotFoundError as error:
            raise RunError(f"{error.filename}: missing; {_ADVICE}") from error
        prefix = "agent/"
        self._state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        self._sizes = {name: size for name, (size, _) in files.items()}

    def _start_session(self) -> None:
        session = {
            "started": _now(),
            "ended": None,
            "first_episode": self.episodes_finished + 1,
            **circumstances(self._threads),
        }
        if self.continued:
            before = self._config["sessions"][-1] if self._config["sessions"] else session
            for key in ("versions", "git_revision", "machine"):
                if before[key] != session[key]:
                    warn(f"continuing {self.name} with other {key}: bit-equality is not promised")
        else:
            self._config = {
                "name": self.name,
                "state": "running",
                "started": session["started"],
                "ended": None,
                "seed": self.settings.SEED,
                "dataset": {
                    "name": self.dataset.name,
                    "source": self.dataset.source,
                    "verdict": self.dataset.verdict,
                    "training_images": len(self.dataset.y_train),
                    "test_images": len(self.dataset.y_test),
                    "sha256": self.dataset.sha256,
                },
                "settings": self.settings.stored(),
                **({"about": self._about} if self._about else {}),
                "sessions": [],
            }
        self._config["sessions"].append(session)
        self._set_state("running")

    def _set_state(self, state: str) -> None:
        self._config["state"] = state
        ended = None if state == "running" else _now()
        self._config["ended"] = self._config["sessions"][-1]["ended"] = ended
        text = json.dumps(self._config, indent=2) + "\n"
        with replacing(self._config_path) as file:
            file.write(text.encode())

    def agent_state(self) -> dict[str, np.ndarray] | None:
        """The agent's state at the last checkpoint, or None at the start."""
        return self._state

    def transitions(self, last: int) -> np.ndarray:
        """The last transitions up to the last checkpoint, oldest first.

        Args:
            last: how many are needed; more may come, fewer only if there are no more.

        Raises:
            ValueError: the file is damaged.
        """
        return TransitionFile.read(self.folder / _TRANSITIONS, self._sizes[_TRANSITIONS], last)

    def damaged_checkpoint(self, error: Exception) -> RunError:
        """The error to raise when what ``agent_state`` gave can't be used."""
        return RunError(f"{self._checkpoint_path}: damaged ({error}); {_ADVICE}")

    def _record_shards(self, shards: list[np.ndarray]) -> None:
        """Writes ``shards.csv``: how many images of each class each node holds."""
        labels = self.dataset.y_train
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(SHARD_COLUMNS)
        for node, shard in enumerate(shards):
            for digit, count in enumerate(
                np.bincount(labels[shard], minlength=self.dataset.classes)
            ):
                writer.writerow([self.dataset.name, node, digit, count])
        with replacing(self.folder / "shards.csv") as file:
            file.write(buffer.getvalue().encode())

    def record_round(self, episode: int, info: dict[str, Any], chosen_by: str) -> None:
        """Writes a row of ``rounds.csv`` from the environment's info."""
        self._tables["rounds.csv"].add(
            {
                "dataset": self.dataset.name,
                "episode": episode,
                "round": info["round"],
                "node": info["node"],
                "chosen_by": chosen_by,
                "distance": info["distance"],
                "accuracy": info["accuracy"],
                "reward": info["reward"],
            }
        )

    def record_episode(
        self,
        episode: int,
        info: dict[str, Any],
        *,
        episode_reward: float,
        epsilon: float,
        q_loss: float | None,
        seconds: float,
    ) -> None:
        """Writes a row of ``episodes.csv`` from the info of the episode's last round."""
        self._tables["episodes.csv"].add(
            self._episode(episode, info, episode_reward, seconds)
            | {
                "communication_cost": info["communication_cost"],
                "epsilon": epsilon,
                "q_loss": q_loss,
                "diverged": info["diverged"] or (q_loss is not None and not math.isfinite(q_loss)),
            }
        )

    def _episode(
        self, episode: int, info: dict[str, Any], episode_reward: float, seconds: float
    ) -> dict[str, Any]:
        """What an episode of training and one of a test have in common."""
        return {
            "dataset": self.dataset.name,
            "episode": episode,
            "rounds": info["round"],
            "goal_reached": info["goal_reached"],
            "final_accuracy": info["accuracy"],
            "episode_reward": episode_reward,
            "diverged": info["diverged"],
            "goal_accuracy": self.settings.GOAL_ACCURACY,
            "max_rounds": self.settings.MAX_ROUNDS,
            "seconds": round(seconds, 3),
        }

    def record_test_round(self, method: str, episode: int, info: dict[str, Any]) -> None:
        """Writes a row of a test's ``rounds.csv``."""
        columns = ("round", "node", "distance", "accuracy", "reward")
        self._tables["rounds.csv"].add(
            {
                "dataset": self.dataset.name,
                "method": method,
                "seed": self.settings.SEED,
                "episode": episode,
                **{name: info[name] for name in columns},
            }
        )

    def record_test_episode(
        self,
        method: str,
        episode: int,
        info: dict[str, Any],
        *,
        episode_reward: float,
        seconds: float,
        **communication: float,
    ) -> None:
        """Writes a row of a test's ``episodes.csv``.

        Args:
            method: whose it is.
            episode: its number, from 1.
            info: of its last round.
            episode_reward: sum of the rewards.
            seconds: that it took.
            communication: ``communication_cost``, ``transfers``, ``megabytes`` and
                ``observation_megabytes``.
        """
        self._tables["episodes.csv"].add(
            self._episode(episode, info, episode_reward, seconds)
            | {"method": method, "seed": self.settings.SEED, **communication}
        )

    def checkpoint(
        self, agent_state: dict[str, np.ndarray], transitions: np.ndarray | None = None
    ) -> None:
        """Makes the episode that has just been recorded part of what a later run continues.

        Args:
            agent_state: the agent's, after the episode; of a test ``episode`` alone, the next one's
                number.
            transitions: what the episode of training added to the replay memory.
        """
        files = {}
        if self._transitions and transitions is not None:
            self._transitions.add(transitions)
            files[_TRANSITIONS] = self._transitions.state()
        for name, table in self._tables.items():
            table.sync()
            size = table.path.stat().st_size
            files[name] = (size, _sha256(table.path, size).hexdigest())
        arrays = {f"agent/{name}": array for name, array in agent_state.items()}
        write_arrays(self._checkpoint_path, arrays | {"files": np.array(json.dumps(files))})
        self.episodes_finished += 1

    def save_agent(self, weights: dict[str, np.ndarray]) -> None:
        """Writes the agent's weights as ``agent.npz``."""
        write_arrays(self.folder / "agent.npz", weights)

    def finish(self) -> None:
        """Declares the run finished."""
        self._set_state("finished")
        self._remove_checkpoint()

    def _remove_checkpoint(self) -> None:
        """Of no use to a finished run, and large."""
        self._checkpoint_path.unlink(missing_ok=True)
        (self.folder / _TRANSITIONS).unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def circumstances(threads: int) -> dict[str, Any]:
    """What a result depends on beside settings and data: revision, versions and machine.

    Args:
        threads: how many CPU threads compute.
    """
    return {
        "git_revision": git_revision(),
        "versions": _versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": threads,
        },
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def git_revision() -> str | None:
    """The project's commit, with "+changes" if its files differ; None outside a clone.

    Results don't count: those of a run would mark the revision of the next one.
    """

    def git(*arguments: str) -> str:
        # Under sudo the clone is another user's; git needs to be told that this is meant.
        command = ["git", "-c", f"safe.directory={PROJECT}", "-C", str(PROJECT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return result.stdout.strip()

    try:
        # A copy without .git inside somebody's repository must not get that one's revision.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != PROJECT:
            return None
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def cpu_name() -> str:
    """The processor's name, or an empty string."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

"""Files that are whole or not there: tables, arrays and JSON, and the lock of a folder.

A file that replaces another is written beside it, synced and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
import pandas as pd

from config import UserError, reason

# Columns of text, here and in experiments; all others hold numbers. "node" may be "3+5".
TEXT_COLUMNS = set(
    "dataset node chosen_by variant method state error agent git_revision tensorflow cpu device "
    "quantity observation target".split()
)

# pandas before 3 needs this to read back the same bits.
_EXACT: Any = {} if pd.__version__ >= "3" else {"float_precision": "round_trip"}

Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
ADVICE = "move the folder away, or choose another --name"


def damaged(path: Path | str, error: Exception) -> UserError:
    """Return the error of a file that can't be read."""
    return UserError(f"{path}: damaged ({reason(error)}); {ADVICE}")


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
    """Return what the csv module writes as append_rows promises; it does so for None and floats."""
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
        raise damaged(path, error) from error

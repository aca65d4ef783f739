import contextlib

import numpy as np
import pandas as pd
import pytest

import files
from config import UserError
from files import append_rows


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    with contextlib.suppress(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^{folder}: ") as error, files.locked(folder, "run"):
            pass
        assert "\n" not in str(error.value)


# --- Tables ----------------------------------------------------------------------------------


def test_rows_by_hand(tmp_path):
    path = tmp_path / "table.csv"
    columns = ("node", "a", "b", "c", "d")
    append_rows(path, columns)
    assert path.read_text() == "node,a,b,c,d\n"
    append_rows(path, columns, {"node": [3, 15], "a": True, "b": None, "c": 0.1, "d": 2})
    row = {"a": np.False_, "b": np.float64(1e-17), "c": np.float32(0.1), "d": np.int64(7)}
    append_rows(path, columns, {"other": 5, "node": "x", **row})
    lines = ["node,a,b,c,d", "3+15,1,,0.1,2", "x,0,1e-17,0.10000000149011612,7"]
    assert path.read_text().splitlines() == lines
    # A misspelt column leaves the file as it is.
    with pytest.raises(KeyError, match="'d'"):
        append_rows(path, columns, {"node": 1, "a": 1, "b": 2, "c": 3, "e": 4})
    append_rows(path, columns, dict.fromkeys(columns, 4), dict.fromkeys(columns, 5))
    assert path.read_text().splitlines() == [*lines, "4,4,4,4,4", "5,5,5,5,5"]


def test_numbers_are_read_with_the_bits_that_were_written(tmp_path):
    numbers = np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(-100, 100).repeat(10)
    rows = [{"a": number, "b": 1} for number in numbers]
    append_rows(tmp_path / "rows.csv", ("a", "b"), *rows)
    files.write_table(tmp_path / "frame.csv", pd.DataFrame({"a": numbers, "b": 1}))
    for name in ("rows.csv", "frame.csv"):
        read = files.read_table(tmp_path / name, ("a", "b"))
        assert (read["a"].to_numpy() == numbers).all()


def test_text_columns_and_a_last_row_that_was_cut_off(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("node,method,rounds,q_loss\n07,,5,\n3+5,nan,6,0.5\n4,hl,7,0")
    table = files.read_table(path, ("node", "method", "rounds", "q_loss"))
    assert table["node"].tolist() == ["07", "3+5"]
    assert table["method"].tolist() == ["", ""]
    assert table["rounds"].tolist() == [5, 6]
    assert table["q_loss"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ""),
        (b"", ""),
        (b"a,b\n1,\xff\n", ""),
        (b"a,b\n1,2\n1,2,3\n", ""),
        (b"a,b\n1,2\n1,many\n", ""),
        (b"a,c\n1,2\n", "got the columns a, c, takes a, b"),
        (b"b,a\n1,2\n", "got the columns b, a, takes a, b"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*{words}") as error:
        files.read_table(path, ("a", "b"))
    assert "\n" not in str(error.value)


# --- Arrays ----------------------------------------------------------------------------------


def test_arrays_are_never_pickled(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.array([{}]))
    with pytest.raises(UserError, match=f"^{path}: damaged"):
        files.read_arrays(path)

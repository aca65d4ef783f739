"""Several comparisons on one page."""

import json

import pytest
from conftest import PROJECT
from test_estimates import LIMIT, estimated, write_comparison

from experiments import summary

FIRST = {
    "random": {0: [(20, 1.0), (20, 1.0)]},
    "hl": {0: [(10, 0.25), (10, 0.25)]},
}
SECOND = {
    "stay": {0: [(LIMIT, 0.0), (LIMIT, 0.0)]},
    "random": {0: [(20, 2.0), (20, 2.0)]},
    "fedavg": {0: [(5, 4.0), (5, 4.0)]},
    "hl": {0: [(30, 1.0), (30, 1.0)]},
}


@pytest.fixture
def folders(tmp_path):
    """Two comparisons of a task, and one of another."""
    found = []
    for name, values, nodes in (("a", FIRST, 10), ("b", SECOND, 10), ("c", FIRST, 100)):
        folder = tmp_path / name
        write_comparison(folder, values)
        config = json.loads((folder / "config.json").read_text())
        config |= {"dataset": {"name": "mnist"}, "settings": {"NUM_NODES": nodes}}
        (folder / "config.json").write_text(json.dumps(config))
        estimated(folder).to_csv(folder / "estimates.csv", index=False)
        found.append(folder)
    return found


def test_the_tables(folders):
    """By rounds; each method compared with random of its own comparison; the first hl counts."""
    lines = summary.report(summary.read_tasks(folders)).splitlines()
    more = 100 * (LIMIT - 20) / 20
    assert [line for line in lines if "1 x 2" in line or line.endswith(":")] == [
        "mnist, 10 nodes:",
        "| fedavg | 1 x 2 | 5.0 | -75.0 % | +100.0 % | 100 % |",
        "| hl | 1 x 2 | 10.0 | -50.0 % | -75.0 % | 100 % |",
        "| random | 1 x 2 | 20.0 |  |  | 100 % |",
        f"| stay | 1 x 2 | {LIMIT:.1f} | {more:+.1f} % | -100.0 %* | 0 % |",
        "mnist, 100 nodes:",
        "| hl | 1 x 2 | 10.0 | -50.0 % | -75.0 % | 100 % |",
        "| random | 1 x 2 | 20.0 |  |  | 100 % |",
    ]


def marks(axis):
    """Where the means are: {(label, row): x}, and the rows with open marks."""
    found, empty = {}, []
    for container in axis.containers:
        (x,), (y,) = container.lines[0].get_data()
        found[container.get_label(), round(y)] = x
        if container.lines[0].get_markerfacecolor() == "white":
            empty.append(round(y))
    return found, empty


def test_the_figure(folders):
    first, second = summary.draw(summary.read_tasks(folders)).axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["fedavg", "hl", "stay"]
    found, empty = marks(first)
    assert found == {
        ("rounds", 0): -75.0,
        ("rounds", 1): -50.0,
        ("communication cost", 1): -75.0,
        ("communication cost", 2): -100.0,
    }
    assert empty == [2]
    texts = [text.get_text() for text in first.texts]
    assert texts == ["+80 % →", "+100 % →", "goal reached", "100 %", "100 %", "0 %"]
    published = [line.get_xdata()[0] for line in first.lines if line.get_linestyle() == ":"]
    assert published == pytest.approx([-50.8, -74.6])
    assert marks(second)[0] == {("rounds", 1): -50.0, ("communication cost", 1): -75.0}
    assert not [line for line in second.lines if line.get_linestyle() == ":"]


def test_the_command(tmp_path, capsys):
    folder = PROJECT / "results" / "reference" / "paper-digits"
    figure = tmp_path / "summary.svg"
    assert summary.main([str(figure), str(folder)]) == 0
    assert figure.read_bytes().startswith(b"<?xml")
    assert "| hl | 2 x 5 | 13.5 " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["summary.jpg", "x"], ["summary.png", "nothing"]])
def test_wrong_arguments(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = summary.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())

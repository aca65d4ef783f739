import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import CORES, PROJECT

import cli
import config
import data
import plot
import records
from experiments import audit, compare, estimates, figures, methods
from experiments.tables import (
    EPISODE_COLUMNS,
    JOB_COLUMNS,
    JOB_KEY,
    ROUND_COLUMNS,
    TRAINING_COLUMNS,
    read_comparison,
)
from node import shared_q_network

REFERENCE = PROJECT / "results" / "reference"
PAGES = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((PROJECT / "docs").glob("*.md")),
]
TEXTS = {str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def rows_of(text, header):
    """The cells of the table whose header line starts with ``header``, a list per row."""
    table = text[text.index(f"\n{header}") + 1 :].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def section(text, heading):
    """What stands under a heading, until the next one of any level."""
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    return re.split(r"^#+ ", text[start:], flags=re.MULTILINE)[0]


def flat(name):
    """A page without line breaks."""
    return " ".join(TEXTS[name].split())


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def table(folder, name):
    """A committed table."""
    return pd.read_csv(REFERENCE / folder / f"{name}.csv", keep_default_na=False)


@functools.cache
def estimated(folder):
    """Committed estimates, by variant, method and quantity."""
    path = REFERENCE / folder / "estimates.csv"
    rows = records.read_table(path, estimates.ESTIMATE_COLUMNS)
    return rows.set_index(["variant", "method", "quantity"]).sort_index()


# --- Commands and examples -------------------------------------------------------------------


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.split()) < 900
    assert len(README.splitlines()) < 180


PARSERS = {
    "main.py": cli.settings_of_run,
    "plot.py": plot.main,
    "experiments.compare": compare.parse,
    "experiments.figures": figures.main,
    "experiments.audit": audit.parse,
}
UNPARSED = {"venv", "cli.py", "benchmarks.rounds"}


def commands():
    """The command lines of all pages, in blocks and within the text: program, arguments."""
    for name, text in TEXTS.items():
        lines = "".join(blocks(text, "sh")).splitlines()
        inline = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"`((?:sudo )?python3 [^`]+)`", inline)
        lines += re.findall(r"<!-- (python3 .*?) -->", inline)
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and (words[0] == "sudo" or re.fullmatch(r"[A-Z_]+=\S+", words[0])):
                words.pop(0)
            if words[:1] == ["python3"]:
                program, *arguments = words[2:] if words[1] == "-m" else words[1:]
                if program not in UNPARSED and (program in PARSERS or name != "CHANGELOG.md"):
                    yield pytest.param(program, arguments, id=f"{name}: {' '.join(words[1:])}")


@pytest.mark.parametrize(("program", "arguments"), list(commands()))
def test_commands_are_understood(program, arguments, monkeypatch):
    monkeypatch.setattr(cli, "exit_status", lambda *_: 0)  # nothing runs
    try:
        PARSERS[program](arguments)
    except SystemExit as end:
        if end.code != 0 or arguments not in (["--help"], ["--list"]):
            raise


def test_the_commands_of_all_programs_are_shown():
    assert {command.values[0] for command in commands()} == set(PARSERS)


def test_examples_run(tmp_path):
    """One after the other in the same process, in a copy with episodes of at most three rounds."""
    examples = [
        code
        for name in ("docs/extending.md", "docs/files.md", "README.md")
        for code in blocks(TEXTS[name], "python")
    ]
    assert len(examples) == 8
    code = "\n".join(examples)
    assert code.count("MAX_ROUNDS=9") == 2
    code = code.replace("MAX_ROUNDS=9", "MAX_ROUNDS=3")
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(PROJECT / "experiments", tmp_path / "experiments")
    reference = tmp_path / "results" / "reference"
    for name in (
        *("mnist-seed0/episodes", "headline-mnist/episodes"),
        *("paper-mnist/rounds", "pilot-fashion_mnist/rounds"),
    ):
        (reference / name).parent.mkdir(parents=True)
        shutil.copy(REFERENCE / f"{name}.csv", (reference / name).parent)
    source = tmp_path / "config.py"
    short = source.read_text().replace("MAX_ROUNDS: AtLeastTwo = 36", "MAX_ROUNDS: AtLeastTwo = 3")
    source.write_text(short)
    # The digits are loaded once, and figures are not drawn: other tests look into both.
    before = """if True:
        import functools, config, data, plot
        assert config.Settings().MAX_ROUNDS == 3
        data.DATASETS["digits"] = functools.cache(data.load_digits)
        plot.draw_run = plot.save_figure = lambda *_: None
    """
    # Jobs compute on one thread, and a process can't change the number.
    one_core = sorted(os.sched_getaffinity(0))[:1] if CORES else []
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=(lambda: os.sched_setaffinity(0, one_core)) if one_core else None,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("stripes-seed0/agent.npz", "sorted/agent.npz", "own/estimates.csv"):
        assert (tmp_path / "results" / name).exists()
    assert (tmp_path / "results" / "rounds.png").exists()
    assert done.stdout.count("'round': 3") == 2
    mnist, fashion = blocks(TEXTS["docs/extending.md"], "text")
    assert mnist.splitlines()[-1] == "0.8 35.0 0.05"
    assert mnist + fashion in done.stdout
    own = config.DATASET_SETTINGS["fashion_mnist"]
    goal, limit, share = map(float, fashion.splitlines()[-1].split())
    assert (goal, limit) == (own["GOAL_ACCURACY"], own["MAX_ROUNDS"])
    assert share <= 0.05


@pytest.mark.parametrize("name", [*TEXTS, "results/reference/TUNING.md"])
def test_links_lead_somewhere(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = ((PROJECT / name).parent / file).resolve() if file else PROJECT / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_every_page_is_in_the_index():
    for path in (PROJECT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in README


# --- What is listed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("### Columns of a run's `episodes.csv`", records.EPISODE_COLUMNS),
        ("### Columns of a run's `rounds.csv`", records.ROUND_COLUMNS),
        (
            "### Columns of `shards.csv` and `distances.csv`",
            tuple(dict.fromkeys(records.SHARD_COLUMNS + records.DISTANCE_COLUMNS)),
        ),
        ("### Columns of `jobs.csv`", JOB_COLUMNS),
        ("### Columns of `estimates.csv`", estimates.ESTIMATE_COLUMNS),
        ("## An audit", audit.AUDIT_COLUMNS),
    ],
)
def test_every_column_is_documented(heading, columns):
    rows = rows_of(section(TEXTS["docs/files.md"], heading), "| column |")
    assert tuple(row[0].strip("`") for row in rows) == columns
    assert all(row[1] for row in rows)


def test_the_columns_of_a_comparison_are_documented():
    text, key = TEXTS["docs/files.md"], set(JOB_KEY)
    rows = rows_of(
        section(text, "### Columns of a comparison's `episodes.csv` that differ"), "| column |"
    )
    more = {row[0].strip("`") for row in rows}
    run, test = set(records.EPISODE_COLUMNS), set(EPISODE_COLUMNS)
    assert (run - test, test - run - key - more) == ({"epsilon", "q_loss"}, set())
    run, test = set(records.ROUND_COLUMNS), set(ROUND_COLUMNS)
    assert (run - test, test - run) == ({"chosen_by", "reward"}, key)
    assert set(TRAINING_COLUMNS) == set(records.EPISODE_COLUMNS) | key


def test_quantities_are_documented():
    text = section(TEXTS["docs/files.md"], "### Columns of `estimates.csv`")
    assert all(f"`{name}`" in text for name in estimates.QUANTITIES)
    suffixes = {row[0].strip("`") for row in rows_of(text, "| suffix |")}
    others = set(estimated("headline-mnist").index.get_level_values("quantity"))
    others -= set(estimates.QUANTITIES)
    assert {name.removeprefix("rounds").removeprefix("communication_cost") for name in others} == (
        suffixes
    )


def test_choices_are_named():
    observations = config.takes("OBSERVATION").removeprefix("one of ").split(", ")
    rows = rows_of(TEXTS["docs/observations.md"], "| `OBSERVATION` | shows |")
    assert [row[0].strip("`") for row in rows] == observations
    rows = rows_of(TEXTS["docs/comparing.md"], "| method |")
    assert {row[0].strip("`") for row in rows} == set(methods.METHODS)
    for name in data.DATASETS:
        assert f"`{name}`" in TEXTS["docs/files.md"]
    for name in set(compare.COMPARISONS) - {"paper"}:
        assert (
            f"`{name}`" in TEXTS["docs/comparing.md"]
            or f"compare {name} " in (TEXTS["docs/comparing.md"])
        )


def test_the_table_of_the_tuned_settings():
    defaults, tuned = config.Settings(), config.NAMED_SETTINGS["tuned"]
    words = {"TARGET_RATE": "none", "MAX_STAY": "none"}

    def shown(name, value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple | str):
            return str(value)
        return words[name] if value == 0 and name in words else f"{value:,}".removesuffix(".0")

    named = []
    for names, before, after, why in rows_of(TEXTS["docs/tuned.md"], "| setting | public code |"):
        names = re.findall(r"`(\w+)`", names)
        assert before == ", ".join(shown(name, getattr(defaults, name)) for name in names)
        assert after == ", ".join(shown(name, tuned[name]) for name in names)
        assert why
        named += names
    assert sorted(named) == sorted(tuned)


def test_the_committed_agent_has_the_tuned_settings():
    settings = config.Settings(**config.NAMED_SETTINGS["tuned"])
    q = shared_q_network(20, 10, 1, settings)
    path = REFERENCE / "headline-mnist" / "agents" / "tuned-seed0.npz"
    weights, about = records.load_agent(path)
    assert np.isfinite(q.network.from_named_arrays(weights)).all()
    stored = config.Settings(**{**about["settings"], "SEED": 0, "THREADS": 0, "DATASET": "auto"})
    assert stored == settings


# --- Numbers ---------------------------------------------------------------------------------


@functools.cache
def printed(command):
    """What the command named above a table prints, made from the committed tables."""
    module, *arguments = shlex.split(command)[2:]
    if module == "experiments.audit":
        settings, _ = audit.parse(arguments)
        folder = config.absolute(settings.RESULTS_DIR) / f"audit-{settings.DATASET}"
        return audit.report(records.read_table(folder / "audit.csv", audit.AUDIT_COLUMNS))
    comparisons = []
    for folder in (PROJECT / argument for argument in arguments):
        tables = read_comparison(folder)
        # test_estimates.py makes them again from the episodes.
        path = folder / "estimates.csv"
        tables["estimates"] = records.read_table(path, estimates.ESTIMATE_COLUMNS)
        figures.prepare(tables)
        comparisons.append(tables)
    reports = [figures.report(PROJECT, tables) for tables in comparisons]
    return "\n".join([*reports, figures.summary(figures.by_task(comparisons))])


GENERATED = [
    pytest.param(command, text, id=f"{page}-{number}")
    for page in TEXTS
    for number, (command, text) in enumerate(
        re.findall(
            r"^<!-- (python3 -m \S+ .*?) -->\n(.*?)\n?^<!-- end -->",
            TEXTS[page],
            re.DOTALL | re.MULTILINE,
        )
    )
]


@pytest.mark.parametrize(("command", "text"), GENERATED)
def test_tables_are_what_their_command_prints(command, text):
    assert len(text.splitlines()) > 5
    assert f"\n{text}\n" in f"\n{printed(command)}\n"


def test_the_table_of_the_benchmark():
    report = (REFERENCE / "benchmark" / "report.md").read_text(encoding="utf-8")
    table = f"<!-- results/benchmark/report.md -->\n{report}<!-- end -->\n"
    assert table in TEXTS["docs/performance.md"]


def test_pages_with_tables_of_commands():
    assert len(GENERATED) >= 3


def test_the_numbers_of_the_readme():
    rows = rows_of(README, "| method | rounds | against random |")
    shown = [
        ("headline-mnist", "random"),
        ("paper-mnist", "hl"),
        ("headline-mnist", "tuned"),
        ("headline-mnist", "best_walk"),
        ("headline-mnist", "walk_search"),
        ("paper-fashion_mnist", "tuned"),
        ("nodes-100-mnist", "tuned"),
    ]
    for row, (folder, method) in zip(rows, shown, strict=False):
        quantities = estimated(folder).loc["", method]
        cells = [f"{quantities.loc['rounds', 'mean']:.1f}"]
        for quantity in ("rounds_reduction", "communication_cost_reduction"):
            cell = ""
            if method != "random":
                mean, low, high = -100 * quantities.loc[quantity, ["mean", "high", "low"]]
                cell = f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"
            cells.append(cell)
        goal = f"{100 * quantities.loc['goal_reached', 'mean']:.1f}".removesuffix(".0")
        cells.append(f"{goal} %")
        assert [cell.removesuffix(" *") for cell in row[1:]] == cells
        # What is saved by missing the goal is marked.
        marked = method in ("hl", "walk_search")
        assert [cell.endswith(" *") for cell in row[1:]] == [False, False, marked, False]
    assert len(rows) == 8
    published = [f"{-100 * plot.PUBLISHED[name]:+.1f} %" for name in plot.PUBLISHED]
    assert rows[7] == ["the paper", "", *published, ""]


def test_the_numbers_of_the_reference_run():
    rows = rows_of(TEXTS["docs/results.md"], "| episodes | rounds | cost |")
    lines = plot.summary(REFERENCE / "mnist-seed0").splitlines()[2:8]
    for row, line in zip(rows, lines, strict=True):
        expected = [cell.strip() for cell in line.split("|")[1:-1]][:4]
        assert [cell.replace(" %", "%") for cell in row[:4]] == [
            cell.replace(" %", "%") for cell in expected
        ]
    text = flat("docs/results.md")
    digits = table("digits-seed0", "episodes")["rounds"]
    assert f"from {digits[:20].mean():.1f} to {digits[-20:].mean():.1f}" in text


def test_how_long_the_committed_comparisons_took():
    def hours(folder):
        return sum(table(folder, name)["seconds"].sum() for name in ("episodes", "training")) / 3600

    text = flat("docs/results.md")
    assert f"Their episodes took {hours('paper-mnist'):.0f} hours in all" in text
    assert f"All episodes took {hours('paper-fashion_mnist'):.1f} hours, part" in text
    assert f"All episodes took {hours('nodes-100-mnist'):.1f} core hours" in text
    assert f"took {hours('ablation-mnist'):.0f} core hours" in flat("docs/tuned.md")


def test_a_round_on_a_gpu():
    episodes = table("paper-fashion_mnist", "episodes").query("method == 'random'")
    seconds = episodes.groupby("seed")[["seconds", "rounds"]].sum().eval("seconds / rounds")
    devices = table("paper-fashion_mnist", "jobs").query("method == 'random'")
    on_gpu = devices.set_index("seed")["device"] == "gpu"
    gpu, cpu = (seconds[on_gpu == there].round(2) for there in (True, False))
    text = flat("docs/performance.md")
    assert f"took {gpu.min():.2f} s there" in text
    assert gpu.nunique() == 1
    assert f"it took {cpu.min():.1f} to {cpu.max():.1f} s" in text


def test_what_the_agents_of_the_public_codes_settings_do():
    columns = ["communication_cost", "goal_reached"]
    means = table("paper-mnist", "episodes").groupby(["method", "seed"])[columns].mean()
    hl, random = means.loc["hl"], means.loc["random"]
    change = hl["communication_cost"] / random["communication_cost"] - 1
    assert len(change) == 10
    assert list(change.index[change > 0]) == [7]
    assert hl["goal_reached"].nlargest(2).tolist() == [0.5, 0.05]
    rounds = table("paper-mnist", "rounds").query("method == 'hl'").groupby(["seed", "episode"])
    most = rounds["node"].apply(lambda nodes: nodes.value_counts().max() / len(nodes))
    assert (most > 0.5).groupby("seed").mean().loc[[s for s in range(10) if s != 7]].min() == 1
    assert most.loc[7].mean() < 0.5


def test_what_carries_over_to_fashion_mnist():
    text = flat("docs/results.md")
    episodes = table("paper-fashion_mnist", "episodes").groupby(["method", "seed"])["rounds"]
    first, second, third = episodes.mean()["agent"]
    assert f"take {first:.1f}, {second:.1f} and {third:.1f} rounds" in text
    intervals = estimated("paper-fashion_mnist").loc[""]
    quantities = intervals["mean"]
    assert 1 / 3 < 1 - quantities["best_walk", "goal_reached"] < 0.4  # over a third
    changes = [f"{name}_reduction" for name in ("rounds", "communication_cost")]
    mnist = estimated("headline-mnist").loc["", "tuned"]["mean"]
    assert all(0.85 < quantities["tuned", name] / mnist[name] < 1 for name in changes)
    searched = intervals.loc["walk_search", "rounds"]
    assert searched["low"] < quantities["tuned", "rounds"] < searched["high"]
    assert abs(searched["mean"] - quantities["tuned", "rounds"]) < 3
    missed = [100 - 100 * quantities[name, "goal_reached"] for name in ("walk_search", "tuned")]
    walk = table("paper-fashion_mnist", "rounds").query("method == 'hl' and round > 1")
    assert set(walk["node"].astype(int)) == {6}
    assert f"misses {missed[0]:.0f} % of the goals, `tuned` {missed[1]:.0f} %" in text
    digits = table("paper-digits", "episodes").groupby("method")["rounds"].mean()
    assert f"the starter needs {digits['stay']:.1f} there" in text
    assert f"tested without exploration, {digits['hl']:.1f} (" in text


def test_a_hundred_nodes():
    text, quantities = flat("docs/results.md"), estimated("nodes-100-mnist").loc[""]
    tuned, searched = (quantities.loc[name, "rounds"] for name in ("tuned", "walk_search"))
    assert tuned["low"] < searched["mean"] < tuned["mean"]
    means = quantities["mean"].unstack()
    saved = means.loc[["round_robin", "nearest", "shortest", "balanced"], "rounds_reduction"]
    assert saved.max() < 0
    assert means["rounds"].idxmin() == "fedavg"
    times = 1 - means.loc["fedavg", "communication_cost_reduction"]
    assert f"at {times:.0f} times random's cost" in text
    stays = table("nodes-100-mnist", "rounds").query("method == 'hl' and round > 1")
    shares = stays.groupby(["seed", "episode"])["node"].value_counts(normalize=True)
    assert shares.groupby(["seed", "episode"]).max().mean() > 0.98
    assert means.loc["hl", "goal_reached"] < 0.1
    training = table("nodes-100-mnist", "training").query("method == 'tuned'")
    lasting = config.NAMED_SETTINGS["tuned"]["ROUNDS_PER_CHOICE"]
    choices = -(-(training["rounds"] - 1) // lasting)  # the starter's round is no choice
    count = choices.groupby(training["seed"]).sum().mean()
    assert f"about {count:.0f} choices of three rounds, {count / 100:.0f} per node" in text


def test_the_walks_and_bounds_on_mnist():
    walks, others = (estimated(name).loc[""] for name in ("headline-mnist", "paper-mnist"))
    rounds = walks.xs("rounds", level="quantity")
    assert rounds["mean"].idxmin() == "best_walk"
    assert rounds.loc["walk_search", "low"] > rounds.loc["tuned", "high"]
    others = others["mean"].unstack()
    assert others.loc["centralized", "rounds"] < 1.05 < others.loc["fedavg", "rounds"] < 10
    assert round(1 - others.loc["fedavg", "communication_cost_reduction"]) == 7
    assert others.loc["standalone", "goal_reached"] < 0.1
    assert round(1 / (1 - walks.loc[("tuned", "communication_cost_reduction"), "mean"])) == 8


def test_the_tuned_agents_seed_by_seed():
    tests = table("headline-mnist", "episodes")
    columns = ["rounds", "communication_cost", "goal_reached"]
    means = tests.groupby(["method", "seed"])[columns].mean()
    rows = rows_of(TEXTS["docs/tuned.md"], "| seed |")
    assert len(rows) == 10
    for seed, row in enumerate(rows):
        tuned, walk = (means.loc[name, seed] for name in ("tuned", "best_walk"))
        assert row == [
            str(seed),
            *(f"{each['rounds']:.2f}" for each in (tuned, walk)),
            *(f"{each['communication_cost']:.3f}" for each in (tuned, walk)),
            f"{100 * tuned['goal_reached']:.0f} %",
        ]
    text = flat("docs/tuned.md")
    rounds = means["rounds"].unstack("method")
    published = (1 - plot.PUBLISHED["rounds"]) * rounds["random"].mean()
    best = rounds["best_walk"].mean()
    expected = f"would take {published:.1f} rounds here, and the best walk known takes {best:.1f}"
    assert expected in text
    assert f"only seed 4 comes down to {published:.1f}." in text
    lost = rounds["tuned"] - rounds["best_walk"]
    *others, last = map(str, lost.index[lost > 1.5])
    assert f"Seeds {', '.join(others)} and {last} lose more than 1.5 rounds" in text
    assert (rounds["tuned"] < 16).sum() == 7
    assert list(rounds.index[rounds["tuned"] <= published]) == [4]
    for quantity in ("rounds", "communication_cost"):
        row = estimated("headline-mnist").loc["", "tuned", f"{quantity}_break_even"]
        assert re.search(rf"\s{row['mean']:.0f}\s\[{row['low']:.0f}, {row['high']:.0f}\]", text)


def stays_of(walk):
    return [(node, len(list(stay))) for node, stay in itertools.groupby(walk)]


def test_what_limits_the_tuned_agents():
    text = flat("docs/tuned.md")
    rounds = table("headline-mnist", "rounds").query("method == 'tuned'")
    walks = {key: group["node"].tolist() for key, group in rounds.groupby(["seed", "episode"])}
    stays = {key: stays_of(walk) for key, walk in walks.items()}
    later = {
        key: walk[[node for node, _ in walk].index(5) + 1 :]  # after the first stay at node 5
        for key, walk in stays.items()
    }
    by_seed = [[walk for (s, _), walk in walks.items() if s == seed] for seed in range(10)]
    one_walk = [all(w == max(ws, key=len)[: len(w)] for w in ws) for ws in by_seed]
    assert sum(one_walk) == 6
    first = [next(length for node, length in walk if node == 5) for walk in stays.values()]
    assert f"It lasts nine rounds in {first.count(9)} of {len(first)} episodes" in text
    short = [len(walk) for walk in walks.values() if len(walk) <= 20]
    assert f"{len(short)} episodes reach the goal within 20 rounds" in text
    assert f"after {sum(short) / len(short):.1f} on average" in text
    waits = [
        any(length == 9 for _, length in walk)
        for key, walk in later.items()
        if len(walks[key]) > 20
    ]
    assert f"In {sum(waits)} of the other {len(waits)}, the model" in text
    others = [len({node for node, _ in walk} - {5}) for walk in later.values()]
    assert f"In {others.count(1) + others.count(2)} of 200 episodes, one or two other" in text
    free = table("ablation-mnist", "rounds").query("variant == 'MAX_STAY'")
    left = [
        next(length for node, length in stays_of(walk) if node == 5)
        for _, walk in free.groupby(["seed", "episode"])["node"]
    ]
    assert f"by themselves, in {left.count(9)} of {len(left)} episodes" in text


def test_the_numbers_of_other_distances_and_starters():
    text = flat("docs/tuned.md")
    worlds = estimated("worlds-mnist")["mean"].unstack().xs("tuned", level="method")
    shares = 100 * (1 - worlds["rounds_reduction"])
    assert list(shares.index[shares > 60]) == ["distances-3", "starter-8"]
    assert f"{shares.min():.0f} to {shares.max():.0f} % of random's" in text
    goal = 100 * worlds["goal_reached"]
    assert f"Of the test episodes, {goal.min():.0f} to {goal.max():.0f} % reach the goal" in text
    episodes = table("worlds-mnist", "episodes").query("method == 'tuned'")
    agents = episodes.groupby(["variant", "seed"])["rounds"].mean().sort_values()
    assert f"agents take {agents.iloc[0]:.1f} to {agents.iloc[-2]:.1f} rounds" in text
    assert (len(agents), agents.index[-1]) == (15, ("starter-8", 2))
    assert f"starter 8 takes {agents.iloc[-1]:.1f}." in text
    random = table("worlds-mnist", "episodes").query("method == 'random'")
    walks = random.pivot(index=["seed", "episode"], columns="variant", values="rounds")
    assert (walks.filter(like="distances").nunique(axis=1) == 1).all()
    hours = table("worlds-mnist", "jobs")["seconds"].sum() / 3600
    assert f"took {hours:.1f} hours of one core" in text


def test_the_numbers_of_the_ablation():
    text = flat("docs/tuned.md")
    rounds = estimated("ablation-mnist").xs("rounds", level="quantity").droplevel("method")
    own, others = rounds.loc["nothing"], rounds.drop("nothing")
    assert set(others.index) == set(config.NAMED_SETTINGS["tuned"])
    needed, some = (
        re.findall(r"`(\w+)`", text.partition(f"**{title}:**")[2].partition(".")[0])
        for title in ("Needed", "Needed by some seeds")
    )
    assert set(needed) == set(others.index[others["low"] > own["high"]])
    for group in (others.loc[needed], others.drop([*needed, *some])):
        least, most = group["mean"].agg(["min", "max"])
        assert f"agents take {least:.1f} to {most:.1f} rounds on average" in text
    of_agents = table("ablation-mnist", "episodes").groupby(["variant", "seed"])["rounds"].mean()
    slow = (of_agents > 29).groupby("variant").sum()
    assert [slow[name] for name in some] == [1, 2]
    assert f"takes only {of_agents['ROUNDS_PER_CHOICE'].min():.1f}." in text
    assert own["low"] < others["mean"]["DISCOUNT"] < own["mean"]


def test_the_numbers_of_simulated_agents_without_some_settings():
    text = (REFERENCE / "TUNING.md").read_text(encoding="utf-8")
    trials = pd.read_csv(REFERENCE / "tuning-simulator.csv").set_index("trial")
    rows = rows_of(text, "| trial | without |")
    assert len(rows) == 7
    for trial, _, mean, ends, goal in rows:
        own = trials.loc[trial.strip("`")]
        assert len(own) == 8
        numbers = [float(mean), *map(float, ends.split(" to "))]
        assert numbers == pytest.approx(own["rounds"].agg(["mean", "min", "max"]), abs=0.0501)
        assert goal == f"{100 * own['goal_reached'].mean():.0f} %"
    assert trials.loc["gpu-without-q-networks", "rounds"].mean() == pytest.approx(16.6, abs=0.0501)
    assert "took 16.6 rounds with five agents" in text


def test_the_numbers_of_the_observations():
    text = " ".join(re.sub("<!-- .*?<!-- end -->", "", flat("docs/observations.md")).split())
    rows = table("audit-mnist", "audit")
    assert set(rows["episodes"]) == {60}
    r2 = rows.set_index(["target", "observation"])["r2"]
    now, following = r2["accuracy"], r2["next_accuracy"]
    for number in (
        *(now[name] for name in ("last_node_moved", "broadcast", "local", "broadcast_and_local")),
        *(following[name] for name in ("both", "first_scores")),
    ):
        assert f"{number:.2f}" in text

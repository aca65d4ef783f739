"""The README's commands, examples, tables and numbers."""

import json
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

import audit
import baselines
import compare
import config
import data
import estimates
import models
import plot
import records
import tune

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_two_commands():
    run, test = COMMANDS[:2]
    venv = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert run == f"{venv}requirements.txt && .venv/bin/python main.py"
    assert test == f"{venv}requirements-dev.txt && .venv/bin/python -m pytest"
    # .ci/run finds and runs these two.
    patterns = re.findall(r"grep -m 1 -E '(.*?)'", (PROJECT / ".ci" / "run").read_text())
    lines = README.splitlines()
    found = [next(line for line in lines if re.search(pattern, line)) for pattern in patterns]
    assert found == [run, test]


@pytest.mark.parametrize(
    ("script", "count", "parse", "stops"),
    [
        ("main.py", 4, config.from_command_line, "--help"),
        ("compare.py", 6, compare.parse, "--list"),
        ("audit.py", 1, audit.parse, "--help"),
        ("tune.py", 1, tune.parse, "--help"),
    ],
)
def test_every_command_line_is_understood(script, count, parse, stops):
    lines = [c.partition("#")[0] for c in COMMANDS if c.startswith(f"python3 {script}")]
    assert len(lines) >= count
    for line in lines:
        arguments = shlex.split(line)[2:]
        if arguments != [stops]:
            parse(arguments)


def test_examples_run(tmp_path):
    """One after the other in the same process, on one core, for a comparison's jobs have one.

    Figures are made, but not written, and the digits are loaded once: other tests look into both.
    """
    assert len(EXAMPLES) == 4
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, tmp_path)
    before = """if True:
        import functools, config, data, plot
        digits = config.make_settings(DATASET="digits")
        load = functools.cache(lambda: data.load_digits(digits))
        data.DATASETS["digits"] = lambda settings: load()
        plot.save_figure = lambda path, draw, tables: plot.plt.close(draw(tables))
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([before, *(EXAMPLES[n] for n in (2, 0, 1, 3))])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=(lambda: os.sched_setaffinity(0, CORES[:1])) if CORES else None,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("stripes-seed0/agent.npz", "sorted/agent.npz", "own/estimates.csv"):
        assert (tmp_path / "results" / name).exists()
    assert "'goal_reached'" in done.stdout


def test_every_setting_has_its_place():
    table = README[README.index("### Settings") : README.index("Flags:")]
    assert set(re.findall(r"`([A-Z_]+)`", table)) == set(config.RULES)


def test_the_table_of_the_tuned_settings():
    """Names and values are those of config.py, which the committed agents were trained with."""
    words = {"REWARD_CEILING": "none", "TARGET_UPDATE": "none", "REWARD_IMAGES": "all"}
    words["PCA_COMPONENTS"] = str(config.make_settings().NUM_NODES)

    def shown(name, value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple | str):
            return str(value)
        return words[name] if value == 0 and name in words else f"{value:,}".removesuffix(".0")

    table = README[README.index("| setting | public code | tuned | why |") :].split("\n\n")[0]
    named = []
    for line in table.splitlines()[2:]:
        names, paper, tuned = line.split("|")[1:4]
        names = re.findall(r"`(\w+)`", names)
        for agent, cell in (("paper", paper), ("tuned", tuned)):
            values = (config.AGENTS[agent][name] for name in names)
            texts = [shown(*pair) for pair in zip(names, values, strict=True)]
            assert cell.strip() == ", ".join(texts)
        named += names
    changed = {n for n, v in config.AGENTS["paper"].items() if v != config.AGENTS["tuned"][n]}
    assert sorted(named) == sorted(changed)
    agents = list((PROJECT / "results/reference/paper-mnist").glob("training-tuned-seed*"))
    assert len(agents) == 10
    settings = config.make_settings(**config.AGENTS["tuned"])
    q = models.shared_q_network(20, 10, settings)
    for folder in agents:
        weights = q.network.from_named_arrays(records.read_arrays(folder / "agent.npz"))
        assert np.isfinite(weights).all()
        stored = json.loads((folder / "config.json").read_text())["settings"]
        stored = config.JOINED_LATER | stored
        for name, value in config.AGENTS["tuned"].items():
            assert stored[name] == (list(value) if isinstance(value, tuple) else value)


def test_every_column_is_documented():
    def documented(name):
        start = name if "`" in name else f"`{name}"
        table = README[README.index(f"| {start}` | meaning and unit |") :].split("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        return {c for cell in cells for c in re.findall(r"`(\w+)`", cell)}

    assert documented("episodes.csv") == set(records.EPISODE_COLUMNS)
    assert documented("rounds.csv") == set(records.ROUND_COLUMNS)
    assert documented("a test's `episodes.csv") == set(records.TEST_EPISODE_COLUMNS)
    assert documented("tuning.csv") == set(tune.LOG_COLUMNS)
    assert documented("a test's `rounds.csv") == set(records.TEST_ROUND_COLUMNS)
    for file, columns in (
        ("jobs.csv", estimates.JOB_COLUMNS),
        ("estimates.csv", estimates.ESTIMATE_COLUMNS),
        ("audit.csv", plot.AUDIT_COLUMNS),
    ):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{file}` |"))
        assert set(columns) <= set(re.findall(r"`(\w+)`", line))
    assert f"`shards.csv` | {', '.join(f'`{c}`' for c in records.SHARD_COLUMNS)}" in README


def test_every_module_has_its_line():
    assert {p.name for p in PROJECT.glob("*.py")} == set(re.findall(r"\| \[(\w+\.py)\]", README))


def test_choices_are_named():
    observations = config.RULES["OBSERVATION"].choices
    for name in [*data.DATASETS, *data.SHARD_RULES, *observations]:
        assert f"`{name}`" in README
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    for name in baselines.METHODS:
        assert any(f"`{name}`" in row for row in rows)
    paragraph = README[README.index("The named comparisons beside") :].split("\n\n")[0]
    assert all(f"`{name}`" in paragraph for name in compare.COMPARISONS)


@pytest.mark.parametrize("name", ["mnist-seed0", "digits-seed0"])
def test_numbers_of_the_reference_runs_are_their_tables(name):
    # But for the last two, which explain the sign and name the folder.
    lines = plot.summary(PROJECT / "results" / "reference" / name).splitlines()[:-2]
    assert len(lines) == 9
    for line in lines:
        assert line in README
    config = json.loads((PROJECT / "results/reference" / name / "config.json").read_text())
    for session in config["sessions"]:
        assert f"`{session['git_revision'][:7]}`" in README


def test_the_headline_is_the_comparison_on_mnist():
    stored = pd.read_csv(PROJECT / "results/reference/paper-mnist/estimates.csv")
    stored = stored.set_index(["method", "quantity"])
    lines = README[README.index("| against random |") :].split("\n\n")[0].splitlines()
    for word, method in (("`paper`", "hl"), ("`tuned`", "tuned"), ("random itself", "random")):
        (line,) = (line for line in lines[2:] if word in line)
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        rounds = stored.loc[(method, "rounds")]
        assert cells[0] == f"{rounds['seeds']} x {rounds['episodes'] // rounds['seeds']}"
        for cell, quantity, form in (
            (cells[1], "rounds_reduction", "+.1%"),
            (cells[2], "communication_cost_reduction", "+.1%"),
            (cells[3], "goal_reached", ".0%"),
        ):
            if (method, quantity) in stored.index:
                row = stored.loc[(method, quantity)]
                mean, low, high = (format(row[name], form) for name in ("mean", "low", "high"))
                assert cell == f"{mean} [{low}, {high}]"
            else:
                assert (cell, method) == ("", "random")


def test_numbers_of_other_worlds_in_the_text():
    table = pd.read_csv(PROJECT / "results/reference/worlds-mnist/estimates.csv")
    table = table.set_index(["method", "quantity", "variant"])["mean"].sort_index()
    distances, starters = (f"distances-{n}" for n in (1, 2, 3)), ("starter-4", "starter-8")
    text = " ".join(README.split())
    fewer = table["tuned", "rounds_reduction"]
    among = [fewer[name] for name in distances]
    from_4, from_8 = (fewer[name] for name in starters)
    goals = [f"{table['tuned', 'goal_reached', name]:.0%}".rstrip("%") for name in starters]
    assert [table["random", "goal_reached", name] for name in starters] == [0.95, 0.95]
    assert (
        f"takes {100 * min(among):.0f} to {100 * max(among):.0f} % fewer rounds; from starters 4 "
        f"and 8 it takes {100 * from_4:.0f} and {100 * from_8:.0f} % fewer, and reaches the goal "
        f"in {goals[0]} and {goals[1]} % of the episodes, below random's 95 %"
    ) in text
    cost = table["tuned", "communication_cost_reduction"]
    assert (
        f"reduction of the rounds does not hold ({100 * from_4:.1f} and {100 * from_8:.1f} %), nor "
        f"does the goal: {goals[0]} and {goals[1]} % of the episodes reach it where random reaches "
        f"it in 95 %; that of the cost holds from starter 4 ({100 * cost['starter-4']:.1f} %), not "
        f"from 8 ({100 * cost['starter-8']:.1f} %)"
    ) in text


def test_what_the_tuned_agents_do_after_their_stay():
    """The first stay of four rounds or more: until when, and where to then."""
    until, shares, walks = [], [], []
    for seed in range(10):
        path = PROJECT / f"results/reference/paper-mnist/tuned-seed{seed}/rounds.csv"
        ends, then, whole = set(), [], set()
        for _, rounds in pd.read_csv(path).groupby("episode"):
            nodes = rounds["node"].tolist()
            whole.add(tuple(nodes))
            end = next(t for t in range(4, len(nodes)) if len(set(nodes[t - 4 : t])) == 1)
            while nodes[end] == nodes[end - 1]:
                end += 1
            assert nodes[end - 1] == (8 if seed == 6 else 5)
            ends.add(end)
            then.append(nodes[end])
        until.append(max(ends) - min(ends))
        shares.append(sorted(map(then.count, set(then))))
        walks.append(len(whole))
    assert sorted(set(until)) == [1, 2]
    assert shares[3] == [1, 19]
    assert shares[9] == [7, 13]
    assert shares.count([20]) == 8
    assert (min(walks), max(walks)) == (7, 16)
    text = " ".join(README.split())
    assert "When it leaves differs by a round or two" in text
    assert "in all 20 episodes, seed 3 in 19, seed 9 to one node in 13 and another in 7)" in text
    assert "20 episodes are seven to sixteen different walks" in text


def test_numbers_of_what_agents_learn_from_each_observation():
    text = " ".join(README[README.index("**What an agent learns from each") :].split())
    folder = PROJECT / "results/reference/observation-tuned-mnist"
    walks = {path.parent.name: pd.read_csv(path / "rounds.csv") for path in folder.glob("*/hl-*")}
    assert set(walks) == set(compare.COMPARISONS["observation"].variants)
    last = {name: rounds.groupby("episode").last() for name, rounds in walks.items()}
    mean = {name: rounds["round"].mean() for name, rounds in last.items()}
    assert f"finds with both ({mean['both']:.1f} rounds)" in text
    assert f"a tour of four nodes ({mean['broadcast']:.1f} rounds)" in text
    assert walks["broadcast"]["node"].nunique() == 4
    missed = last["local"][last["local"]["accuracy"] < 0.8]
    assert (len(missed), sum(missed["node"] == 0)) == (8, 7)
    assert f"where 40 % of the episodes miss the goal ({mean['local']:.1f})" in text
    assert set(walks["last_node"]["node"]) == {0, 5}
    assert f"to and fro between nodes 0 and 5 ({mean['last_node']:.1f})" in text
    assert set(walks["fixed"].query("round > 1")["node"]) == {1, 5}
    assert f"at node 1 or 5 until the limit ({mean['fixed']:.1f})" in text
    (node,) = set(walks["zeros"].query("round > 1")["node"])
    zeros = last["zeros"][last["zeros"]["accuracy"] >= 0.8]
    assert (
        f"goes to node {node} and stays there, which reaches the goal in {5 * len(zeros)} % of the "
        f"episodes, within {zeros['round'].max()} rounds, and else never ({mean['zeros']:.1f})"
    ) in text
    assert len(last["zeros"]) == 20
    worth = [mean["last_node"] - mean[name] for name in ("broadcast", "both", "local")]
    assert [round(rounds) for rounds in worth] == [7, 15, 0]
    assert "worth seven rounds to this agent in `broadcast`, fifteen in both kinds" in text
    table = pd.read_csv(PROJECT / "results/reference/audit-mnist/audit.csv")
    r2 = table.set_index(["target", "observation"])["r2"]["next_accuracy"]
    read = f"`local` it reads {r2['local']:.2f} of the next accuracy's variance, of `broadcast`"
    assert f"{read} {r2['broadcast']:.2f}" in text


def test_numbers_of_the_tuned_agents_in_the_text():
    text = " ".join(README.split())

    def by_seed(rounds):
        *first, last = (f"{r:.1f}" for r in rounds)
        return f"{', '.join(first)} and {last} rounds"

    trials = pd.read_csv(PROJECT / "results/reference/tuning.csv")
    final = trials[trials["trial"] == "persist8"].sort_values("seed")
    assert f"ten validation episodes each: {by_seed(final['rounds'])}" in text
    means = final[["rounds", "communication_cost", "goal_reached"]].mean()
    assert f"{means.iloc[0]:.1f} on average, at a communication cost of {means.iloc[1]:.3f}" in text
    assert f"{means.iloc[2]:.0%}".rstrip("%") + " of the 100 reached the goal" in text

    folder = PROJECT / "results/reference/paper-mnist"
    tests = [pd.read_csv(folder / f"tuned-seed{seed}" / "episodes.csv") for seed in range(10)]
    assert f"By seed: {by_seed(test['rounds'].mean() for test in tests)};" in text
    assert sum((test["goal_reached"] == 0).sum() for test in tests) == 6
    assert "Six of the 200 episodes missed the goal" in text
    table = pd.read_csv(folder / "estimates.csv")
    for quantity in ("rounds", "communication_cost"):
        rows = table[(table["method"] == "tuned") & (table["quantity"] == f"{quantity}_break_even")]
        mean, low, high = rows[["mean", "low", "high"]].astype(float).to_numpy()[0]
        assert f"after {mean:.0f} [{low:.0f}, {high:.0f}]" in text


def test_numbers_of_changes_taken_back_in_the_text():
    text = " ".join(README[README.index("**Each change taken back**") :].split())
    folder = PROJECT / "results/reference/changes-mnist"
    assert (
        len(compare.COMPARISONS["changes"].variants) == len(list(folder.glob("*/hl-seed0"))) == 18
    )
    ten = PROJECT / "results/reference/paper-mnist"

    def episodes(path):
        return pd.read_csv(path / "episodes.csv")

    def when(training):
        """After how many episodes ten in a row take fewer than 20 rounds in the mean."""
        few = training["rounds"].rolling(10).mean() < 20
        return few.idxmax() + 1 if few.any() else None

    random = episodes(ten / "random-seed0")
    assert (
        f"random takes {random['rounds'].mean():.1f} rounds at a cost of "
        f"{random['communication_cost'].mean():.3f} and reaches the goal in "
        f"{100 * random['goal_reached'].mean():.0f} %"
    ) in text
    tested = {path.parent.name: episodes(path) for path in folder.glob("*/hl-seed0")}
    trained = {path.parent.name: episodes(path) for path in folder.glob("*/training-seed0")}
    rounds = {change: test["rounds"].mean() for change, test in tested.items()}
    goal = {change: test["goal_reached"].mean() for change, test in tested.items()}
    tuned = [episodes(ten / f"tuned-seed{seed}")["rounds"].mean() for seed in range(10)]
    # 23.45 is a tie of rounding.
    assert (min(tuned), max(tuned)) == (15.1, 23.45)
    assert "the ten `tuned` agents take 15.1 to 23.4 rounds" in text

    below = ("step-reward",)
    missing = ("steps", "target-network", "targets-not-normalized")
    reaching = ("observation", "persistent-exploration", "updates")
    beyond = {change for change, mean in rounds.items() if mean > max(tuned)}
    assert beyond == {*below, *missing, *reaching}
    assert "Seven do." in text
    a, b, c = (f"{rounds[change]:.1f}" for change in missing)
    assert f"({a}, {b} and {c}) it misses the goal in a third to a half of the episodes" in text
    assert all(1 / 3 <= 1 - goal[change] <= 1 / 2 for change in missing)
    a, b, c = (f"{rounds[change]:.1f}" for change in reaching)
    assert f"({a}, {b} and {c}) the agent reaches the goal" in text
    assert all(goal[change] >= 0.95 for change in reaching)
    assert f"reward ({rounds['step-reward']:.1f} rounds) it stays below the goal" in text
    limit = tested["step-reward"]["max_rounds"].max()
    assert (tested["step-reward"]["rounds"] == limit).mean() > 0.5
    others = [mean for change, mean in rounds.items() if change not in {"nothing", *beyond}]
    assert f"without them takes {min(others):.1f} to {max(others):.1f} rounds" in text

    by_seed = [when(episodes(ten / f"training-tuned-seed{seed}")) for seed in range(10)]
    assert by_seed[6] is None
    reached = [count for count in by_seed if count is not None]
    assert len(reached) == 9
    assert (
        f"after {when(trained['nothing'])} episodes here, and with the ten seeds after "
        f"{min(reached)} to {max(reached)}, but for seed 6"
    ) in text
    late = {when(trained[change]) for change in ("scales", "dueling")}
    all_images = when(trained["reward-images"])
    assert f"it takes {late.pop()} episodes, with rewards judged by all images {all_images}" in text
    assert not late
    assert all_images > max(reached)
    assert when(trained["epsilon-decay"]) is None
    within = {*rounds} - {"nothing", "scales", "dueling", "reward-images", "epsilon-decay", *beyond}
    assert all(when(trained[change]) <= max(reached) for change in within)
    last = [trained[change]["rounds"][-20:].mean() for change in ("epsilon-decay", "nothing")]
    assert f"take {last[0]:.2f} rounds instead of {last[1]:.2f})" in text


def test_the_audit_on_mnist_is_of_its_walks(monkeypatch):
    folder = PROJECT / "results/reference/audit-mnist"
    table = pd.read_csv(folder / "audit.csv")
    walks = [records.read_arrays(folder / f"walk-{episode}.npz") for episode in range(1, 61)]
    assert set(table["episodes"]) == {len(list(folder.glob("walk-*.npz")))} == {60}
    assert set(table["rounds"]) == {sum(len(walk["nodes"]) for walk in walks) - 60}
    # One of its observations, the quickest, as audit.py looks at it.
    monkeypatch.setattr(plot, "OBSERVATIONS", {"last_node": ""})
    found = audit.table_of(walks, "mnist", config.make_settings())
    stored = table[table["observation"] == "last_node"].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, stored, atol=0.01)  # trees of another version differ


def test_tables_of_comparisons_are_their_reports():
    """What stands between two marks is the beginning of what plot.py prints."""
    shown = re.findall(r"<!-- python3 plot.py (\S+) -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert shown
    for folder, text in shown:
        assert len(text.splitlines()) > 5
        if "audit" in folder:
            assert plot.audit_report(PROJECT / folder) == text
            continue
        assert estimates.report(PROJECT / folder).startswith(text)
        # And what it is made from is what is committed.
        table = estimates.estimate(estimates.read_comparison(PROJECT / folder))
        stored = pd.read_csv(PROJECT / folder / "estimates.csv", keep_default_na=False)
        assert stored["quantity"].tolist() == table["quantity"].tolist()
        for column in ("mean", "low", "high"):  # bounds are missing where one seed is
            found = pd.to_numeric(table[column])
            np.testing.assert_allclose(pd.to_numeric(stored[column]), found, rtol=1e-9)

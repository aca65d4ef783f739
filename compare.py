"""Named comparisons of methods over many seeds: run, resumed, estimated and drawn by one command.

Usage: python3 compare.py [--help]; ``--list`` names the comparisons and the methods.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from config import (
    AGENTS,
    JOINED_LATER,
    ConfigError,
    Parser,
    Settings,
    UserError,
    absolute,
    available_cores,
    count_of,
    default_dataset,
    make_settings,
    named_settings,
    overrides,
    reason,
    seeds_of,
    setting_flags,
)

# Short flags for the settings that a comparison changes most.
_FLAGS = {"--dataset": "DATASET", "--episodes": "EPISODES", "--name": "NAME"}

# The reward of the world, which a test counts as well.
_REWARD = {"REWARD_BASE", "STEP_PENALTY", "REWARD_CEILING", "REWARD_PROGRESS", "MISS_PENALTY"}

# What does not change the basis that an agent with OBSERVATION = "fixed" has learned in.
_NOT_THE_BASIS = {
    *_REWARD,
    "GOAL_ACCURACY",
    "STARTER_NODE",
    "DISTANCE_SCALE",
    "DISTANCE_SEED",
    "NAME",
    "RESULTS_DIR",
    "THREADS",
}

# What an agent was trained with: a test of it takes these as they are. REWARD_IMAGES is among
# them, for all images judge a test.
_AGENTS_OWN = {"EPISODES", "NUM_NODES", *AGENTS["paper"]} - _REWARD

# Enough to see how it goes within minutes on the bundled digits.
_SEEDS, _TEST_EPISODES = "2", 5

FULL = "python3 compare.py --dataset mnist --seeds 10 --test-episodes 20"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        meaning: one line of help.
        methods: names in ``baselines.METHODS``.
        parameter: what varies: a constant's name, or words; "" if nothing does.
        variants: each value's name, which is its folder's as well, with the settings that it sets.
    """

    meaning: str
    methods: tuple[str, ...]
    parameter: str = ""
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})


def _vary(name: str, *values: Any, **fixed: Any) -> dict[str, Any]:
    """``parameter`` and ``variants`` of a comparison in which one constant takes some values."""
    return {"parameter": name, "variants": {str(v): {**fixed, name: v} for v in values}}


_TOURS = ("round_robin", "nearest", "shortest", "nearest_twice", "shortest_twice", "fixed_walk")
_ALL = (
    "hl",
    "random",
    "standalone",
    "stay",
    "centralized",
    "fedavg",
    *_TOURS,
)
_FEW = ("hl", "random", "nearest_twice")

# The public code's agent and moments, whatever config.py says of them.
_PUBLIC = {**AGENTS["paper"], "KEEP_MOMENTS": True}
_TUNED = AGENTS["tuned"]

# What the tuned settings change, to be taken back part by part: together what makes no sense
# otherwise, and the scales of an observation with it as well as alone.
_SCALES = ("BROADCAST_SCALE", "LOCAL_SCALE")
_CHANGES = {
    "observation": ("OBSERVATION", "PCA_COMPONENTS", "PCA_SIGNS", *_SCALES),
    "step-reward": ("REWARD_BASE", "REWARD_CEILING"),
    "progress-reward": ("REWARD_PROGRESS",),
    "persistent-exploration": ("EXPLORATION_PERSIST",),
    "updates": ("REPLAY_SAMPLE", "Q_BATCH_SIZE", "UPDATES_PER_EPISODE"),
    "targets-not-normalized": ("NORMALIZE_TARGETS",),
    "target-network": ("TARGET_UPDATE",),
    "steps": ("N_STEP",),
    "discount": ("DISCOUNT",),
    "epsilon-decay": ("EPSILON_DECAY",),
    "miss-penalty": ("MISS_PENALTY",),
    "scales": _SCALES,
    "q-networks": ("Q_NETWORKS",),
    "dueling": ("DUELING",),
    "weight-decay": ("Q_WEIGHT_DECAY",),
    "hidden-units": ("HIDDEN_UNITS",),
    "reward-images": ("REWARD_IMAGES",),
}

COMPARISONS: dict[str, Comparison] = {
    "paper": Comparison("the paper's: HL against random and standalone, and other rivals", _ALL),
    "goal": Comparison("goal accuracy", _FEW, **_vary("GOAL_ACCURACY", 0.7, 0.75, 0.8, 0.85)),
    "heterogeneity": Comparison(
        "share of a node's main class", _FEW, **_vary("HETEROGENEITY", 0.2, 0.4, 0.6, 0.8, 1.0)
    ),
    "dirichlet": Comparison(
        "Dirichlet shards",
        _FEW,
        **_vary("DIRICHLET_ALPHA", 0.1, 0.5, 1.0, 10.0, SHARD_RULE="dirichlet"),
    ),
    "starter": Comparison("starter node", _FEW, **_vary("STARTER_NODE", 0, 2, 4, 6, 8)),
    "distance_scale": Comparison(
        "scale of the distances", _FEW, **_vary("DISTANCE_SCALE", 0.0, 0.03, 0.1, 0.3, 1.0)
    ),
    "nodes": Comparison("number of nodes", _FEW, **_vary("NUM_NODES", 10, 20, 50, 100)),
    "distances": Comparison(
        "seed of the distance matrix", _FEW, **_vary("DISTANCE_SEED", 0, 1, 2, 3, 4)
    ),
    "nodes_per_round": Comparison(
        "nodes that train in a round", ("hl", "random"), **_vary("NODES_PER_ROUND", 1, 2, 3, 5)
    ),
    "moments": Comparison(
        "nodes' Adam moments, kept from visit to visit or not",
        _FEW,
        **_vary("KEEP_MOMENTS", True, False),
    ),
    "observation": Comparison(
        "what the DQN sees: does it use the weights at all?",
        ("hl",),
        "OBSERVATION",
        {
            "broadcast": {"OBSERVATION": "broadcast"},
            # Alone, its signs would tell with "holder" what the weights do not: who trained last.
            "local": {"OBSERVATION": "local", "PCA_SIGNS": "loading"},
            **{name: {"OBSERVATION": name} for name in ("both", "fixed", "last_node", "zeros")},
        },
    ),
    "departures": Comparison(
        "the public code's settings, and the options of agent and reward that depart from them",
        ("hl",),
        "option",
        {
            "public-code": _PUBLIC,
            "targets-not-normalized": {**_PUBLIC, "NORMALIZE_TARGETS": False},
            "target-network": {**_PUBLIC, "TARGET_UPDATE": 5},
            "double-q": {**_PUBLIC, "TARGET_UPDATE": 5, "DOUBLE_Q": True},
            "rate-decay": {**_PUBLIC, "Q_RATE_DECAY": 0.02},
            "local-observation": {**_PUBLIC, "OBSERVATION": "local"},
            "both-observations": {**_PUBLIC, "OBSERVATION": "both"},
            "holder-signs": {**_PUBLIC, "PCA_SIGNS": "holder"},
            "scaled-scores": {**_PUBLIC, "BROADCAST_SCALE": 4.0},
            "bounded-reward": {**_PUBLIC, "REWARD_CEILING": 1.0},
            "progress-reward": {**_PUBLIC, "REWARD_PROGRESS": 10.0},
            "miss-penalty": {**_PUBLIC, "MISS_PENALTY": 15.0},
            "reward-images": {**_PUBLIC, "REWARD_IMAGES": 2000},
            "five-networks": {**_PUBLIC, "Q_NETWORKS": 5},
            "dueling": {**_PUBLIC, "DUELING": True},
            "weight-decay": {**_PUBLIC, "Q_WEIGHT_DECAY": 0.05},
            "five-steps": {**_PUBLIC, "N_STEP": 5},
            "beyond-the-limit": {**_PUBLIC, "BOOTSTRAP_AT_LIMIT": True},
            "repeating-exploration": {**_PUBLIC, "EXPLORATION_REPEAT": 0.6},
            "persistent-exploration": {**_PUBLIC, "EXPLORATION_PERSIST": 0.6},
        },
    ),
    "headline": Comparison(
        "HL with config.py's and with the tuned settings, against random and fixed walks",
        ("hl", "tuned", "random", *_TOURS),
    ),
    "worlds": Comparison(
        "the tuned settings with other distances and starters",
        ("tuned", "random", "nearest_twice"),
        "world",
        {
            **{f"distances-{seed}": {"DISTANCE_SEED": seed} for seed in (1, 2, 3)},
            **{f"starter-{node}": {"STARTER_NODE": node} for node in (4, 8)},
        },
    ),
    "changes": Comparison(
        "the tuned settings, and each change in them taken back to the public code's",
        ("hl",),
        "taken back",
        {"nothing": _TUNED}
        | {
            change: {**_TUNED, **{name: AGENTS["paper"][name] for name in names}}
            for change, names in _CHANGES.items()
        },
    ),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with ``settings``, ``seeds``, ``methods`` and ``comparison`` made from it.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong; 0 after ``--help``
            and ``--list``.
    """
    parser = Parser(
        prog="compare.py",
        description="Compare methods over many seeds; results go to results/<name>/.",
        allow_abbrev=False,
    )
    cores = available_cores()
    add = parser.add_argument
    add("what", nargs="?", default="paper", help="name of a comparison, see --list [paper]")
    add("--list", action="store_true", help="list comparisons and methods, and stop")
    add("--seeds", type=seeds_of, help=f"a number (5 is 0 to 4) or a list (0,3,7-9) [{_SEEDS}]")
    add("--methods", help="some of them, joined by commas [the comparison's]")
    add(
        "--test-episodes",
        type=count_of,
        default=_TEST_EPISODES,
        metavar="N",
        help=f"episodes on which each policy is tested, per seed [{_TEST_EPISODES}]",
    )
    add(
        "--agent",
        action="append",
        default=[],
        metavar="FOLDER",
        help="test this trained agent, with its settings and its seed; repeatable",
    )
    add("--jobs", type=count_of, metavar="N", help=f"processes [{cores}, all cores]")
    add("--cluster", default="", metavar="ADDRESS", help="a Dask scheduler that runs the jobs")
    add("--seed", help=argparse.SUPPRESS)  # main.py's, which users try here as well
    datasets = "digits, mnist, fashion_mnist, auto, or a name of your own"
    own = {
        "DATASET": (datasets, f"{default_dataset()}, or the agent's"),
        "NAME": ("folder below RESULTS_DIR", "<comparison>-<dataset>"),
    }
    setting_flags(parser, _FLAGS, own)
    parsed = parser.parse_args(arguments)
    if parsed.list:
        print(_listing())
        sys.exit(0)
    if parsed.what not in COMPARISONS:
        parser.error(f"comparison: got {parsed.what!r}, takes one of {', '.join(COMPARISONS)}")
    parsed.comparison = COMPARISONS[parsed.what]
    if parsed.seed is not None:
        parser.error(f"--seed: got {parsed.seed!r}, takes --seeds in a comparison")
    if parsed.agent and parsed.agent_settings:
        parser.error("--settings: got it beside --agent, takes what the agent was trained with")
    if parsed.agent and parsed.seeds:
        parser.error("--seeds: got it beside --agent, takes the agents' seeds then")
    if parsed.jobs and parsed.cluster:
        parser.error("--jobs: got it beside --cluster, whose workers are as many as run there")
    parsed.jobs = parsed.jobs or cores
    named = parsed.comparison.methods if parsed.methods is None else parsed.methods.split(",")
    parsed.methods = list(dict.fromkeys(name.strip() for name in named if name.strip()))
    if not parsed.methods:
        parser.error("--methods: got none, takes names joined by commas, see --list")
    methods = ",".join(parsed.methods)
    for flag, given in (("--settings", parsed.agent_settings), ("--agent", parsed.agent)):
        if given and "hl" not in parsed.methods:
            tuned = flag == "--settings" and "tuned" in parsed.methods
            own = ", for tuned has its own" if tuned else ""
            parser.error(f"{flag}: got it with the methods {methods}, takes methods with hl{own}")
    if "tuned" in parsed.methods and "hl" in parsed.methods:
        if parsed.agent_settings == "tuned":
            parser.error(
                f"--settings: got 'tuned' with the methods {methods}, takes one of the two"
            )
        if parsed.agent:
            parser.error(f"--agent: got it with the methods {methods}, takes hl alone that learns")
    parsed.seeds = parsed.seeds or seeds_of(_SEEDS)
    changes = overrides(parser, parsed)
    if "SEED" in changes:
        parser.error("SEED: got it with --set, takes --seeds in a comparison")
    varied = {name for variant in parsed.comparison.variants.values() for name in variant}
    for name in varied & set(changes):
        parser.error(f"{name}: got {changes[name]!r}, takes what the comparison sets it to")
    if parsed.agent_settings and varied >= set(AGENTS["paper"]):
        parser.error(f"--settings: got it in {parsed.what}, takes none, for it sets them itself")
    if parsed.agent:
        for name in sorted(_AGENTS_OWN & (varied | set(changes))):
            parser.error(f"{name}: got it beside --agent, takes what the agent was trained with")
    elif "DATASET" not in changes:
        changes["DATASET"] = default_dataset()
    parsed.changes = set(changes)
    parsed.own_data = bool(parsed.agent) and not {"DATASET", "DATA_FILE"} & set(changes)
    try:
        named = named_settings(parser, parsed)
        parsed.settings = make_settings(**named | _agents_settings(parsed) | changes)
        others = sorted((varied | set(changes)) - _NOT_THE_BASIS)
        if parsed.agent and parsed.settings.OBSERVATION == "fixed" and others:
            parser.error(f"{others[0]}: got it beside --agent, takes what its basis was made with")
    except UserError as error:
        parser.error(str(error))
    return parsed


def _agents_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that all ``--agent`` folders share.

    Sets ``parsed.agents``, seed -> folder, and ``parsed.agents_data``, the SHA-256 of their data.
    """
    parsed.agents, parsed.agents_data = {}, None
    shared: dict[str, Any] = {}
    for text in parsed.agent:
        path = absolute(text) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            stored, seed = JOINED_LATER | config["settings"], int(config["seed"])
            stored["DATASET"] = config["dataset"]["name"]
            checksums = dict(config["dataset"]["sha256"])
        except OSError as error:
            raise ConfigError(f"--agent: {reason(error)}; takes the folder of a run") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--agent: {path}: damaged ({error})") from error
        if not (absolute(text) / "agent.npz").exists():
            raise ConfigError(f"--agent: {text} holds no agent.npz, takes a finished run")
        if seed in parsed.agents:
            raise ConfigError(f"--agent: two agents with seed {seed}, takes one of each")
        parsed.agents[seed] = text
        own = {k: v for k, v in stored.items() if k not in ("SEED", "NAME", "THREADS")}
        if shared and own != shared:
            names = [k for k in own if own[k] != shared.get(k)]
            raise ConfigError(f"--agent: {text} differs from the others in {', '.join(names)}")
        if shared and checksums != parsed.agents_data:
            raise ConfigError(f"--agent: {text} was trained on other data than the others")
        shared, parsed.agents_data = own, checksums
    if parsed.agents:
        parsed.seeds = sorted(parsed.agents)
    return shared


def _listing() -> str:
    from baselines import METHODS

    lines = ["comparisons:"]
    for name, comparison in COMPARISONS.items():
        values = ", ".join(filter(None, comparison.variants))
        lines.append(f"  {name:16} {comparison.meaning}{': ' * bool(values)}{values}")
    lines += ["methods:", *(f"  {name:16} {method.title}" for name, method in METHODS.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    # Before TensorFlow, which takes seconds to import: a typo is reported at once, and Ctrl-C
    # ends the program without a traceback.
    PARSED = parse()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

import baselines
import data
import estimates
import plot
from estimates import counted
from jobs import (
    Job,
    Outcome,
    Watch,
    check_cluster,
    dataset_of,
    is_finished,
    own_settings,
    run_all,
)
from main import exit_status
from records import OtherRun, check_claim, claimed, differences, replacing, stored_progress


def make_jobs(parsed: argparse.Namespace, folder: Path) -> list[Job]:
    """All jobs of a comparison, those that take longest first.

    Raises:
        ConfigError: a method or a setting that can't work in one of them.
    """
    jobs = []
    for variant, changes in parsed.comparison.variants.items():
        for name in parsed.methods:
            for seed in parsed.seeds:
                varied = dataclasses.replace(parsed.settings, **changes)
                settings = own_settings(varied, seed, folder / variant)
                baselines.check(name, settings)
                own = baselines.METHODS[name].settings(settings)
                for constant in sorted({*changes, *parsed.changes}):
                    asked, taken = getattr(settings, constant), getattr(own, constant)
                    if asked != taken:
                        raise ConfigError(
                            f"{constant}: got {asked!r}, takes {taken!r} with the method {name}, "
                            "which --methods can leave out"
                        )
                agent = parsed.agents.get(seed, "") if name == "hl" else ""
                jobs.append(Job(name, settings, variant, parsed.test_episodes, agent))
    return sorted(jobs, key=lambda job: -job.episodes)


def _about(parsed: argparse.Namespace, dataset: data.Dataset) -> dict[str, Any]:
    """What all jobs of a comparison share, as JSON has it: for ``comparison.json``."""
    settings = dataclasses.asdict(parsed.settings)
    # Another place, or the job's own; the data is told by its checksums.
    for name in ("SEED", "NAME", "RESULTS_DIR", "THREADS", "DATASET", "DATA_FILE"):
        del settings[name]
    about = {
        "comparison": parsed.what,
        "test_episodes": parsed.test_episodes,
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "settings": settings,
    }
    return json.loads(json.dumps(about))


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Refuses a folder whose results are not of this comparison: their means would be mixed.

    Raises:
        UserError: it is not this comparison's.
    """

    def what(there: dict[str, Any]) -> dict[str, Any]:
        same = there["dataset"]["sha256"] == about["dataset"]["sha256"]
        return {
            "comparison": there["comparison"],
            "test_episodes": there["test_episodes"],
            "dataset": there["dataset"]["name"],
            "the data": "this" if same else "other",
            **JOINED_LATER,
            **there["settings"],
        }

    foreign = "holds {found} but no comparison.json, so it is not a comparison's folder"
    check_claim(
        folder,
        "comparison.json",
        "comparison",
        foreign,
        lambda there: differences(what(there), what(about)),
    )


def _check_other_seeds(parsed: argparse.Namespace, folder: Path) -> None:
    """Refuses to add seeds to jobs of other settings, as after a change of a method's.

    Raises:
        UserError: a finished job of one of the methods, with another seed, has other settings.
    """
    if not (folder / "jobs.csv").exists():
        return
    there = estimates.read_jobs(folder)
    others = argparse.Namespace(**vars(parsed))
    others.seeds = sorted(set(there["seed"]) - set(parsed.seeds))
    for job in make_jobs(others, folder):
        # Agents that were given are told apart by their weights, and are others for each seed.
        given = parsed.agents and job.method == "hl"
        if given or not (job.folder / "config.json").exists():
            continue
        try:
            is_finished(job)
        except OtherRun:
            raise
        except UserError:  # a damaged one is told of by the report
            continue


class JobTable:
    """``jobs.csv`` of a comparison: every job that was ever asked for, and how it stands.

    What an earlier call noted may be out of date, if it was killed: the jobs' folders tell.
    """

    def __init__(self, folder: Path, name: str, parameter: str) -> None:
        self._path = folder / "jobs.csv"
        self._folder, self._name, self._parameter = folder, name, parameter
        self._rows: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for row in estimates.read_jobs(folder).to_dict("records"):
                if stored_progress(folder / row["folder"])[0] == "finished":
                    row.update(state="finished", error="")
                self._rows[row["folder"]] = row

    def set(self, job: Job, state: str, seconds: float | None = None, error: str = "") -> None:
        """Notes how a job stands; ``seconds`` None leaves those that were noted."""
        folder = job.folder.relative_to(self._folder).as_posix()
        before = self._rows.get(folder, {"seconds": 0.0})
        self._rows[folder] = {
            "comparison": self._name,
            "parameter": self._parameter,
            "variant": job.variant,
            "method": job.method,
            "seed": job.settings.SEED,
            "folder": folder,
            "state": state,
            "seconds": round(before["seconds"] if seconds is None else seconds, 1),
            "error": error,
        }

    def write(self) -> None:
        """Replaces the file; rows by variant and method in the order of the comparison."""
        comparison = COMPARISONS[self._name]
        variants, methods = list(comparison.variants), list(baselines.METHODS)
        rows = sorted(
            self._rows.values(),
            key=lambda row: (
                variants.index(row["variant"]) if row["variant"] in variants else len(variants),
                methods.index(row["method"]) if row["method"] in methods else len(methods),
                row["seed"],
            ),
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, estimates.JOB_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self._path) as file:
            file.write(text.getvalue().encode())


def compare(parsed: argparse.Namespace) -> int:
    """Runs what is left of a comparison, writes its tables and figures, and prints its report.

    Returns:
        0, or 1 if a job failed or the tables of a training are damaged.

    Raises:
        UserError: nothing was started.
    """
    settings: Settings = parsed.settings
    dataset = dataset_of(dataclasses.replace(settings, THREADS=settings.THREADS or 1))
    folder = settings.results_dir / (settings.NAME or f"{parsed.what}-{dataset.name}")
    if settings.DATASET == "auto":  # the jobs shall take what was found, and not warn each anew
        parsed.settings = dataclasses.replace(parsed.settings, DATASET=dataset.name)
    if not settings.DATA_FILE and dataset.name != "digits" and os.environ.get(data.DATA_VARIABLE):
        # A worker on another machine has no such environment variable.
        file = str(absolute(os.environ[data.DATA_VARIABLE]))
        parsed.settings = dataclasses.replace(parsed.settings, DATA_FILE=file)
    if parsed.own_data and parsed.agents_data != dataset.sha256:
        raise UserError(
            f"--agent: was trained on other {dataset.name} data than is at hand; --dataset "
            f"{dataset.name} tests it on this all the same"
        )
    jobs = make_jobs(parsed, folder)
    about = _about(parsed, dataset)
    # Refuses what it can't fill, and what it can't continue, before a file is written.
    check = functools.partial(_check_folder, folder, about)
    check()
    for job in jobs:
        data.make_shards(dataset, baselines.METHODS[job.method].settings(job.settings))
    _check_other_seeds(parsed, folder)
    waiting, damaged = [], []
    for job in jobs:
        try:
            if not is_finished(job):
                waiting.append(job)
            else:
                estimates.read_job(job.folder, job.test_episodes)
        except UserError as error:
            damaged.append(Outcome(job, "failed", 0.0, str(error)))
        except OSError as error:
            damaged.append(Outcome(job, "failed", 0.0, reason(error)))
    check_cluster(parsed.cluster)
    with claimed(folder, "comparison.json", about, "compare.py", check):
        return _run(parsed, folder, jobs, waiting, damaged, dataset.name)


def _run(
    parsed: argparse.Namespace,
    folder: Path,
    jobs: list[Job],
    waiting: list[Job],
    damaged: list[Outcome],
    dataset: str,
) -> int:
    table = JobTable(folder, parsed.what, parsed.comparison.parameter)
    print(_plan(parsed, folder, jobs, waiting, dataset), flush=True)
    for job in jobs:
        table.set(job, "waiting" if job in waiting else "finished")
    for outcome in damaged:
        table.set(outcome.job, outcome.state, None, outcome.error)
    table.write()

    total = sum(job.episodes for job in jobs)
    bar = tqdm(
        total=total,
        bar_format="episode {n_fmt}/{total_fmt} of all jobs |{bar}| {remaining} left{postfix}",
        initial=sum(job.episodes_finished() for job in jobs),
        disable=None,
    )
    done = len(jobs) - len(waiting)

    def show(episodes: int) -> None:
        bar.n = max(bar.n, episodes)
        bar.set_postfix_str(f"jobs {done}/{len(jobs)}")

    started, before = time.monotonic(), bar.n

    def left() -> str:
        """For an output that shows no bar; an episode of one method stands for those of others."""
        episodes = sum(job.episodes_finished() for job in jobs)
        minutes = (time.monotonic() - started) / max(1, episodes - before) / 60 * (total - episodes)
        return "" if done == len(jobs) else f", about {minutes:.0f} min left"

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        table.set(outcome.job, outcome.state, outcome.seconds, outcome.error)
        table.write()
        label = " ".join(filter(None, [outcome.job.variant, outcome.job.name]))
        how = f"failed: {outcome.error}" if outcome.error else f"in {outcome.seconds / 60:.1f} min"
        tqdm.write(f"{done}/{len(jobs)} {label} {how}{left()}")

    with bar, Watch(jobs, show):
        outcomes = run_all(waiting, parsed.jobs, parsed.cluster, tell)
    failed = [*damaged, *(outcome for outcome in outcomes if outcome.error)]
    whole = not failed
    try:
        if len(failed) < len(jobs):
            tables = plot.draw_comparison(folder)
            print(estimates.report(folder, tables))
            # Of a finished job an error tells of the training, which nothing runs again.
            told = tables["jobs"]
            whole &= told[(told["state"] == "finished") & (told["error"] != "")].empty
    finally:  # whatever is wrong with a table or a figure
        print(
            f"jobs: {len(jobs) - len(waiting) - len(damaged)} finished before, {len(outcomes)} "
            f"started, {sum(not o.error for o in outcomes)} finished, {len(failed)} failed"
        )
        for outcome in failed:
            where = "" if str(outcome.job.folder) in outcome.error else f"{outcome.job.folder}: "
            print(f"failed: {where}{outcome.error}")
    return 0 if whole else 1


def _plan(
    parsed: argparse.Namespace, folder: Path, jobs: list[Job], waiting: list[Job], dataset: str
) -> str:
    methods = counted(len({job.method for job in jobs}), "method")
    variants = len(parsed.comparison.variants)
    lines = [
        f"{parsed.what} on {dataset}: {methods} x {counted(len(parsed.seeds), 'seed')}"
        f"{f' x {variants} values of {parsed.comparison.parameter}' if variants > 1 else ''}, "
        f"{counted(parsed.test_episodes, 'test episode')} each: {counted(len(jobs), 'job')}, "
        f"{len(waiting)} to do; results in {folder}"
    ]
    for variant in sorted({job.variant for job in jobs if job.method == "standalone"}):
        alone = [job for job in jobs if (job.method, job.variant) == ("standalone", variant)]
        n = alone[0].settings.NUM_NODES
        tests = Counter(node for job in alone for node in job.first_nodes())
        if len({tests[node] for node in range(n)}) > 1:
            lines.append(
                f"standalone{f' {variant}' * bool(variant)}: the test episodes do not weigh the "
                f"{n} nodes alike"
            )
    whole = parsed.what == "paper" and set(parsed.methods) == set(_ALL) and not parsed.agent
    if whole and dataset == "digits":
        lines.append(f"the full comparison on MNIST ({FULL}) takes about {FULL_HOURS} on 2 cores")
    return "\n".join(lines)


# Estimated: some 100,000 rounds, at the rate of results/reference/paper-mnist's last jobs.
FULL_HOURS = "eleven hours"


def main(parsed: argparse.Namespace) -> int:
    """Runs a comparison; returns the exit status, as main.py's, and 1 if a job failed."""
    return exit_status("compare.py", lambda: compare(parsed), "mend this")


if __name__ == "__main__":
    sys.exit(main(PARSED))

"""Compare methods over many seeds: run or continue the jobs, collect their tables, draw, report.

Usage: python3 -m experiments.compare [NAME] [options]; ``--list`` shows comparisons and methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

import cli
import data
import records
from config import (
    DATASET_SETTINGS,
    NAMED_SETTINGS,
    AgentSettings,
    ConfigError,
    PlaceSettings,
    RunSettings,
    Settings,
    UserError,
    WorldSettings,
    absolute,
    names_of,
)
from experiments.methods import METHODS, check_method
from experiments.tables import ComparisonFolder, Job, finished_jobs

PROGRAM = "experiments.compare"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared."""

    description: str  # one line of help
    methods: tuple[str, ...]  # names in METHODS
    parameter: str = ""  # what varies: a setting's name, or words; "" if nothing does
    # Each value's name, which is also a folder's, with the settings that it sets.
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})


COMPARISONS: dict[str, Comparison] = {
    "paper": Comparison(
        "the paper's: HL against random and standalone, and other baselines",
        (
            *("hl", "random", "standalone", "stay", "centralized", "fedavg", "round_robin"),
            *("nearest", "shortest", "nearest_twice", "shortest_twice"),
            *("balanced", "metropolis", "metropolis_jumps"),
        ),
    ),
    "worlds": Comparison(
        "the tuned settings with other distances and starters",
        ("tuned", "random"),
        "world",
        {
            **{f"distances-{seed}": {"DISTANCE_SEED": seed} for seed in (1, 2, 3)},
            **{f"starter-{node}": {"STARTER_NODE": node} for node in (4, 8)},
        },
    ),
    "ablation": Comparison(
        "the tuned settings, and the same without one of them",
        ("hl",),
        "taken back",
        {
            left_out: {k: v for k, v in NAMED_SETTINGS["tuned"].items() if k != left_out}
            for left_out in ("nothing", *NAMED_SETTINGS["tuned"])
        },
    ),
}


# --- Command line ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line; a ConfigError if its parts don't go together."""

    name: str  # of the comparison
    comparison: Comparison
    methods: list[str]
    seeds: list[int]
    test_episodes: int
    first_episode: int
    kind: str  # of the episodes: test or validation
    settings: Settings  # of all jobs, before variants and methods change them
    named: set[str]  # settings that the command line names
    agent: str  # path of the given agent; "" for none
    agent_settings: dict[str, Any]  # that it was trained with; {} for none
    data_sha256: dict[str, str]  # of the data that it was trained on; {} for any
    workers: int | None  # processes on this machine; None: one per core
    cluster: str  # address of a Dask scheduler; "" for none

    def __post_init__(self) -> None:
        changes = self.comparison.variants.values()
        varied = {setting for changed in changes for setting in changed}
        twice = ", ".join(sorted(varied & self.named))
        missing = "agent" in self.methods and not self.agent
        for wrong, message in (
            ("SEED" in self.named, "SEED: got it, takes --seeds in a comparison"),
            (twice, f"{twice}: got it with --set, takes the comparison's values"),
            (missing, "--methods: got agent, takes it beside --agent"),
        ):
            if wrong:
                raise ConfigError(message)
        for settings in self.variants().values():
            for method in self.methods:
                check_method(method, settings)
                self._check_overrides(method, settings, self.named | varied)

    def overrides(self, method: str, settings: Settings) -> dict[str, Any]:
        """Return the settings that a method changes, from the comparison's or a variant's."""
        if method == "agent":
            return self.agent_settings
        return METHODS[method].overrides(settings)

    def variants(self) -> dict[str, Settings]:
        """Return the settings with each value of what varies."""
        items = self.comparison.variants.items()
        return {name: self.settings.replace(**changes) for name, changes in items}

    def _check_overrides(self, method: str, settings: Settings, chosen: set[str]) -> None:
        """Raise a ConfigError if a method changes a setting that is named or varied."""
        for setting, value in self.overrides(method, settings).items():
            got = getattr(settings, setting)
            if setting in chosen and got != value:
                message = f"{setting}: got {got!r}, takes {value!r} with the method {method}"
                raise ConfigError(message)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        PROGRAM,
        "Compare methods over many seeds; results go to results/<name>/. Without --dataset these\n"
        "take the bundled digits, unless config.py names data.",
        f"  python3 -m {PROGRAM} --list\n"
        f"  python3 -m {PROGRAM} --dataset mnist --seeds 10 --test-episodes 20\n"
        f"  python3 -m {PROGRAM} --vary GOAL_ACCURACY=0.7,0.75,0.8 --methods hl,random",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="list comparisons and methods, and stop")
    what, who, where = (parser.add_mutually_exclusive_group().add_argument for _ in range(3))
    help_ = "a named comparison, see --list [paper]"
    what("comparison", nargs="?", choices=COMPARISONS, default="paper", metavar="NAME", help=help_)
    what("--vary", metavar="NAME=v1,v2,...", help="compare values of a setting instead")
    help_ = "a number (5 is 0 to 4) or a list (0,3,7) [%(default)s]"
    who("--seeds", type=cli.seeds_of, default="2", help=help_)
    help_ = "test this agent.npz beside the methods, with its settings and its seed"
    who("--agent", type=os.path.expanduser, metavar="FILE", help=help_)
    add("--methods", metavar="M1,M2,...", help="some of them, see --list [the comparison's]")
    help_ = "episodes that test each policy, per seed [%(default)s]"
    add("--test-episodes", type=cli.count_of, default="5", metavar="N", help=help_)
    help_ = "number of the first of them; 21 leaves out the first 20 [%(default)s]"
    add("--first-episode", type=cli.count_of, default="1", metavar="N", help=help_)
    help_ = "test on validation episodes, to choose settings by"
    add("--validation", action="store_true", help=help_)
    help_ = "processes on this machine [one per core]"
    where("--jobs", type=cli.count_of, metavar="N", help=help_)
    where("--cluster", default="", metavar="ADDRESS", help="a Dask scheduler that runs the jobs")
    add("--seed", dest="SEED", help=argparse.SUPPRESS)  # main.py's, refused as --set SEED is
    cli.add_setting_flags(parser, {"DATASET", "EPISODES", "NAME"})
    return parser


def parse(arguments: list[str] | None = None) -> Plan:
    """Return the plan of a command line; UserError or exit with status 2 if it is wrong."""
    parsed = _parser().parse_args(arguments)
    if parsed.list:
        for kind, entries in (("comparisons", COMPARISONS), ("methods", METHODS)):
            print(f"{kind}:", *(f"  {k:16} {e.description}" for k, e in entries.items()), sep="\n")
        sys.exit(0)
    named, base = cli.overrides_of(parsed), NAMED_SETTINGS.get(parsed.settings, {})
    name, comparison = parsed.comparison, COMPARISONS[parsed.comparison]
    seeds, world, agent_settings = parsed.seeds, {}, {}
    data_sha256: dict[str, str] = {}
    if parsed.agent is not None:
        trained, data_sha256 = _training_of(parsed.agent)
        agent_settings = trained.model_dump(include={*names_of(AgentSettings), "NUM_NODES"})
        world = trained.model_dump(include=names_of(WorldSettings))
        if named.get("DATASET", trained.DATASET) != trained.DATASET:
            # Another dataset comes with its own goal and limit.
            own = set().union(*DATASET_SETTINGS.values())
            world = {k: v for k, v in world.items() if k not in own}
        seeds = [trained.SEED]
    if base and (parsed.agent or name == "ablation"):
        raise ConfigError("--settings: got it beside --agent or ablation, takes their own")
    settings = Settings(**{**cli.dataset_of_experiments(), **world, **base, **named})
    if parsed.vary:
        name, comparison = _varied_comparison(parsed.vary, settings)
    methods = list(comparison.methods)
    if parsed.methods is not None:
        methods = [method.strip() for method in parsed.methods.split(",")]
    elif parsed.agent:
        methods = ["random"]
    if parsed.agent:
        methods = ["agent", *methods]
    return Plan(
        name=name,
        comparison=comparison,
        methods=list(dict.fromkeys(methods)),
        seeds=seeds,
        test_episodes=parsed.test_episodes,
        first_episode=parsed.first_episode,
        kind="validation" if parsed.validation else "test",
        settings=settings,
        named=set(named),
        agent=str(Path(parsed.agent).resolve()) if parsed.agent else "",
        agent_settings=agent_settings,
        data_sha256={} if "DATASET" in named else data_sha256,
        workers=parsed.jobs,
        cluster=parsed.cluster,
    )


def _training_of(path: str) -> tuple[Settings, dict[str, str]]:
    """Return the settings of a given agent's training, and the SHA-256 of its data."""
    arrays, about = records.load_agent(Path(path))
    if "0/kernel" not in arrays:  # those of walk_search are no network's
        raise ConfigError(f"--agent: got {path}, takes the agent.npz of a DQN")
    dataset = about["dataset"]
    return Settings(**{**about["settings"], "DATASET": dataset["name"]}), dataset["sha256"]


def _varied_comparison(text: str, settings: Settings) -> tuple[str, Comparison]:
    """Return the comparison of ``--vary NAME=v1,v2,...``; commas in parentheses don't separate.

    Each value has to go together with the other settings.
    """
    name, _, values = text.partition("=")
    texts = [part.strip() for part in re.split(r",(?![^(]*\))", values) if part.strip()]
    if not texts or name in {"DATASET", *names_of(RunSettings, PlaceSettings)}:
        raise ConfigError(f"--vary: got {text!r}, takes NAME=v1,v2,... of the world or the agent")
    variants = {}
    for value in texts:
        valid = getattr(settings.replace(**{name: cli.value_of(name, value)}), name)
        variants[str(valid).replace(" ", "")] = {name: valid}
    return name.lower(), Comparison("", ("hl", "random", "nearest_twice"), name, variants)


# --- The comparison's folder -----------------------------------------------------------------


def make_jobs(plan: Plan, folder: Path) -> list[Job]:
    """Return all jobs of a comparison, those that take longest first."""
    jobs = []
    for (variant, settings), method, seed in itertools.product(
        plan.variants().items(), plan.methods, plan.seeds
    ):
        run = {"SEED": seed, "NAME": "", "RESULTS_DIR": str(folder / "jobs" / variant)}
        own = settings.replace(**plan.overrides(method, settings), **run)
        agent = plan.agent if method == "agent" else ""
        episodes = (plan.test_episodes, plan.first_episode)
        jobs.append(Job(method, own, variant, *episodes, agent, plan.kind))
    return sorted(jobs, key=lambda job: -job.episodes)


def open_folder(
    plan: Plan, dataset: data.Dataset, folder: Path, jobs: list[Job]
) -> tuple[ComparisonFolder, list[Job]]:
    """Return a comparison's tables and its unfinished jobs.

    UserError if the folder holds another comparison, or a job of another agent.
    """
    config: dict[str, Any] = {
        "comparison": plan.name,
        "parameter": plan.comparison.parameter,
        "variants": plan.comparison.variants,
        "methods": {name: plan.overrides(name, plan.settings) for name in plan.methods},
        "episodes": plan.kind,
        "test_episodes": plan.test_episodes,
        "first_episode": plan.first_episode,
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "settings": plan.settings.model_dump(
            mode="json", exclude=names_of(RunSettings, PlaceSettings)
        ),
    }
    config = json.loads(json.dumps(config))  # tuples are lists there
    several = ("variants", "methods")  # more may be added; those in both files must be equal

    def comparable(content: dict[str, Any]) -> dict[str, Any]:
        """Flatten a config.json to what must not change, by name."""
        own = {**content, **content["settings"], "data": records.fingerprint(**content["dataset"])}
        for kind in several:
            own |= {f"{kind} {k}": v for k, v in content[kind].items() if k in config[kind]}
        return {k: v for k, v in own.items() if k not in (*several, "settings", "dataset")}

    now = comparable(config)
    path = folder / "config.json"
    found = records.read_matching_config(
        path, "comparison", lambda content: now | comparable(content), now
    )
    if found:
        config = found | {kind: found[kind] | config[kind] for kind in several}
    results = ComparisonFolder(folder, config)
    finished, rows = finished_jobs(folder, plan.test_episodes), results.jobs()
    for job in jobs:
        if job.key in rows and rows[job.key]["agent"] != job.agent_sha256():
            raise UserError(f"{folder}: holds {job.folder.name} of another agent; choose a --name")
    return results, [job for job in jobs if job.key not in finished]


def compare(plan: Plan) -> int:
    """Run what is left of a comparison and report it; return 1 if a job failed, else 0.

    A command line, data or folder that is refused with a UserError starts no job.
    """
    # Importing these takes seconds: a wrong command line is reported at once.
    import models
    from experiments import figures
    from experiments.jobs import dask_client, load_dataset

    threads = plan.settings.THREADS or 1
    models.use_device(threads, "cpu" if plan.cluster else plan.settings.DEVICE)
    dataset = load_dataset(plan.settings.DATASET, plan.settings.DATA_DIR)
    # The jobs take the data that was found, and do not search and warn again.
    settings = plan.settings.replace(DATASET=dataset.name, THREADS=threads)
    plan = dataclasses.replace(plan, settings=settings)
    if plan.data_sha256 not in ({}, dataset.sha256):
        raise UserError(f"--agent: trained on other data; --dataset {dataset.name} tests it here")
    suffix = "-validation" if plan.kind == "validation" else ""
    name = settings.NAME or f"{plan.name}-{dataset.name}{suffix}"
    folder = absolute(settings.RESULTS_DIR) / name
    jobs = make_jobs(plan, folder)
    # Everything that can be refused is refused before a file is written.
    for job in jobs:
        METHODS[job.method].check_shards(data.make_shards(dataset, job.settings))
    _, waiting = open_folder(plan, dataset, folder, jobs)
    workers = min(plan.workers or models.cpu_count(), len(waiting))
    cluster = plan.cluster if waiting else ""
    with dask_client(workers, cluster) as client, records.locked(folder, PROGRAM):
        # Read again: another process may have written here meanwhile.
        results, waiting = open_folder(plan, dataset, folder, jobs)
        results.create(settings)
        finished = [row for row in results.jobs().values() if row["state"] == "finished"]
        if {row["git_revision"] for row in finished} - {"", records.git_revision()}:
            text = f"{folder}: holds jobs of other code, see git_revision in jobs.csv"
            warnings.warn(text, stacklevel=2)
        print(
            f"{dataset.name}: {', '.join(plan.methods)}; {cli.counted(len(plan.seeds), 'seed')}; "
            f"{cli.counted(plan.test_episodes, f'{plan.kind} episode')} each\n"
            f"{cli.counted(len(jobs), 'job')}, {len(waiting)} to do; results in {folder}",
            flush=True,
        )
        results.set_jobs({job: "waiting" if job in waiting else "finished" for job in jobs})
        if not waiting:
            print("all jobs are finished already; for other code or settings choose a --name")
        failed = _run(plan, results, waiting, client)
        print(
            f"jobs: {len(jobs) - len(waiting)} finished before, {len(waiting)} started, "
            f"{len(waiting) - failed} finished, {failed} failed"
        )
        if failed < len(jobs):
            print(figures.report(folder, figures.draw_comparison(folder)))
    return 1 if failed else 0


def _run(plan: Plan, results: ComparisonFolder, waiting: list[Job], client: Any) -> int:
    """Run the waiting jobs, collect each as it ends; return how many failed."""
    from experiments.jobs import run_jobs

    bar = tqdm(
        total=sum(job.episodes for job in waiting),
        initial=sum(job.episodes_finished() for job in waiting),
        bar_format="episode {n_fmt}/{total_fmt} of all jobs |{bar}| {remaining} left{postfix}",
        disable=None,  # no bar where the output is not a terminal
    )
    failed = 0
    with bar:
        for ended in run_jobs(waiting, client):
            bar.update(sum(job.episodes_finished() for job in waiting) - bar.n)
            if ended is None:
                continue
            job, outcome = ended
            if not outcome["error"] and job.key not in finished_jobs(job.folder, job.test_episodes):
                outcome["error"] = f"its files are not in {job.folder}; run the same command again"
            error = outcome["error"]
            state = "failed" if error else "finished"
            if error:
                failed += 1
            else:
                results.collect(job)
            results.set_jobs({job: state}, **outcome)
            bar.write(f"{job.variant} {job.folder.name} {state}: {error}".strip(" :"))
            if "seconds" in outcome and (job.folder / "error.txt").exists():
                bar.write(f"traceback: {job.folder / 'error.txt'}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run a comparison; return the exit status, as main.py's, and 1 if a job failed."""
    return cli.exit_status(PROGRAM, lambda: compare(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

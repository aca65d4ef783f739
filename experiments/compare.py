"""Compare methods over many seeds: run or continue the jobs, collect their tables, draw, report.

Usage: python3 -m experiments.compare [NAME] [options]; ``--list`` shows comparisons and methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

import cli
import data
import records
from config import NAMED_SETTINGS, ConfigError, Settings, UserError, names_of
from experiments.estimates import JOB_KEY, TABLES
from experiments.methods import METHODS, check_method

# TensorFlow and SciPy take seconds to import. The functions below import what needs them, so that a
# mistake on the command line is reported at once.
if TYPE_CHECKING:
    from experiments.jobs import Job
    from experiments.tuning import Log

PROGRAM = "experiments.compare"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared."""

    description: str  # one line of help
    methods: tuple[str, ...]  # names in METHODS
    parameter: str = ""  # what varies: a setting's name, or words; "" if nothing does
    # Each value's name, which is also a folder's, with the settings that it sets.
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})


# What the ablation takes out of the tuned settings. Settings that make no sense alone go together.
_ABLATIONS = {
    "nothing": (),
    "observation": ("OBSERVATION", "PCA_COMPONENTS", "PCA_SIGNS", "BROADCAST_SCALE", "LOCAL_SCALE"),
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
    "scales": ("BROADCAST_SCALE", "LOCAL_SCALE"),
    "q-networks": ("Q_NETWORKS",),
    "dueling": ("DUELING",),
    "weight-decay": ("Q_WEIGHT_DECAY",),
    "hidden-units": ("HIDDEN_UNITS",),
    "reward-images": ("REWARD_IMAGES",),
}

COMPARISONS: dict[str, Comparison] = {
    "paper": Comparison(
        "the paper's: HL against random and standalone, and other baselines",
        tuple(name for name in METHODS if name != "tuned"),
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
    "observation": Comparison(
        "what the DQN sees: does it use the weights at all?",
        ("hl",),
        "OBSERVATION",
        {
            "broadcast": {"OBSERVATION": "broadcast"},
            # With "holder", the signs of local scores would show who trained last.
            "local": {"OBSERVATION": "local", "PCA_SIGNS": "loading"},
            **{name: {"OBSERVATION": name} for name in ("both", "last_node", "zeros")},
        },
    ),
    "ablation": Comparison(
        "the tuned settings, and the same without each change",
        ("hl",),
        "taken back",
        {
            change: {k: v for k, v in NAMED_SETTINGS["tuned"].items() if k not in names}
            for change, names in _ABLATIONS.items()
        },
    ),
}


# --- Command line ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line that was checked."""

    name: str  # of the comparison, or "trial"
    comparison: Comparison  # its parameter and variants
    methods: list[str]
    seeds: list[int]
    test_episodes: int
    kind: str  # of the episodes: test or validation
    settings: Settings  # of all jobs, before variants and methods change them
    named: set[str]  # settings that the command line names
    agents: dict[int, Path]  # the given agent of each seed
    data_sha256: dict[str, str]  # of the data that these were trained on; {} for any
    workers: int  # processes on this machine
    cluster: str  # address of a Dask scheduler; "" for none

    def variants(self) -> dict[str, Settings]:
        """Return the settings with each value of what varies."""
        items = self.comparison.variants.items()
        return {name: self.settings.replace(**changes) for name, changes in items}


def _parser() -> cli.Parser:
    examples = (
        f"  python3 -m {PROGRAM} --list\n"
        f"  python3 -m {PROGRAM} --dataset mnist --seeds 10 --test-episodes 20\n"
        f"  python3 -m {PROGRAM} --vary GOAL_ACCURACY=0.7,0.75,0.8 --methods hl,random"
    )
    text = "Compare methods over many seeds; results go to results/<name>/."
    parser = cli.Parser(PROGRAM, text, examples)
    add = parser.add_argument
    add("--list", action="store_true", help="list comparisons and methods, and stop")
    what, who, where = (parser.add_mutually_exclusive_group().add_argument for _ in range(3))
    help_ = "a named comparison, see --list [paper]"
    what("comparison", nargs="?", choices=COMPARISONS, default="paper", metavar="NAME", help=help_)
    what("--vary", metavar="NAME=v1,v2,...", help="compare values of a setting instead")
    what("--validation", action="store_true", help="a tuning trial, logged in tuning.csv")
    help_ = "a number (5 is 0 to 4) or a list (0,3,7-9) [%(default)s]"
    who("--seeds", type=cli.seeds_of, default="2", help=help_)
    help_ = "test this agent.npz, with its settings and its seed; repeatable"
    who(
        "--agent",
        type=lambda text: Path(text).expanduser(),
        action="append",
        default=[],
        metavar="FILE",
        help=help_,
    )
    add("--methods", metavar="M1,M2,...", help="some of them, see --list [the comparison's]")
    help_ = "episodes that test each policy, per seed [5; 10 with --validation]"
    add("--test-episodes", type=cli.count_of, metavar="N", help=help_)
    cores, help_ = str(cli.available_cores()), "processes [%(default)s, all cores]"
    where("--jobs", type=cli.count_of, default=cores, metavar="N", help=help_)
    where("--cluster", default="", metavar="ADDRESS", help="a Dask scheduler that runs the jobs")
    add("--seed", dest="SEED", help=argparse.SUPPRESS)  # main.py's, refused as --set SEED is
    cli.add_setting_flags(parser, {f"--{n.lower()}": n for n in ("DATASET", "EPISODES", "NAME")})
    return parser


def parse(arguments: list[str] | None = None) -> Plan:
    """Read and check the command line.

    Raises:
        SystemExit: with status 2 after one line on stderr if something is wrong, else after
            ``--help`` and ``--list`` with status 0.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.list:
        for kind, entries in (("comparisons", COMPARISONS), ("methods", METHODS)):
            lines = [f"  {name:15} {entry.description}" for name, entry in entries.items()]
            print("\n".join([f"{kind}:", *lines]))
        sys.exit(0)
    named, base = cli.overrides_of(parsed), NAMED_SETTINGS[parsed.settings]
    try:
        plan = _plan_of(parsed, named, base)
        if base and (plan.agents or plan.name == "ablation"):
            raise ConfigError("--settings: got it beside --agent or ablation, takes their own")
        _check_plan(plan)
        return plan
    except UserError as error:
        parser.error(str(error))


def _plan_of(parsed: argparse.Namespace, named: dict[str, Any], base: dict[str, Any]) -> Plan:
    """Return the plan of a command line that names some settings, on top of named settings."""
    name, comparison = parsed.comparison, COMPARISONS[parsed.comparison]
    if parsed.validation:
        name, comparison = "trial", Comparison("", ("hl",))
    elif parsed.vary:
        name, comparison = _values_of(parsed.vary)
    agents, stored, data_sha256 = _read_agents(parsed.agent)
    values = {**stored, **base, **named}
    if "DATASET" not in values and Settings().DATASET == "auto":
        values["DATASET"] = "digits"  # takes minutes, where MNIST takes hours
    methods = comparison.methods if parsed.methods is None else parsed.methods.split(",")
    return Plan(
        name=name,
        comparison=comparison,
        methods=list(dict.fromkeys(m.strip() for m in methods)),
        seeds=sorted(agents) or parsed.seeds,
        test_episodes=parsed.test_episodes or (10 if parsed.validation else 5),
        kind="validation" if parsed.validation else "test",
        settings=Settings(**values),
        named=set(named),
        agents=agents,
        data_sha256={} if "DATASET" in named else data_sha256,
        workers=parsed.jobs,
        cluster=parsed.cluster,
    )


def _values_of(text: str) -> tuple[str, Comparison]:
    """Return the comparison of ``--vary NAME=v1,v2,...``; commas in parentheses don't separate."""
    name, _, values = text.partition("=")
    texts = [part.strip() for part in re.split(r",(?![^(]*\))", values) if part.strip()]
    if not texts or name in {"DATASET", *names_of("run", "place")}:
        raise ConfigError(f"--vary: got {text!r}, takes NAME=v1,v2,... of the world or the agent")
    variants = {}
    for value in texts:
        valid = getattr(Settings(**{name: cli.value_of(name, value)}), name)
        variants[str(valid).replace(" ", "")] = {name: valid}
    return name.lower(), Comparison("", ("hl", "random", "nearest_twice"), name, variants)


def _read_agents(paths: list[Path]) -> tuple[dict[int, Path], dict[str, Any], dict[str, str]]:
    """Return the agents by seed, the settings that all share, and the SHA-256 of their data."""
    agents: dict[int, Path] = {}
    shared: dict[str, Any] = {}
    for path in paths:
        about = records.load_agent(path)[1]
        seed = about["settings"]["SEED"]
        own = {k: v for k, v in about["settings"].items() if k not in names_of("run")}
        own |= {"DATASET": about["dataset"]["name"], "data": about["dataset"]["sha256"]}
        if seed in agents:
            raise ConfigError(f"--agent: got two agents with seed {seed}, takes one of each")
        if agents and own != shared:
            differing = "; ".join(records.differences(shared, own))
            raise ConfigError(f"--agent: {path}: differs from the first ({differing})")
        agents[seed], shared = path.resolve(), own
    data_sha256 = shared.pop("data", {})
    return agents, shared, data_sha256


def _check_plan(plan: Plan) -> None:
    """Refuse settings that others set already, and methods that can't run."""
    varied = {setting for changes in plan.comparison.variants.values() for setting in changes}
    fixed = names_of("agent") | {"NUM_NODES"} if plan.agents else set()
    twice = ", ".join(sorted(varied & plan.named))
    trained = ", ".join(sorted(fixed & (varied | plan.named)))
    names, trial = ", ".join(plan.methods), plan.kind == "validation"
    for wrong, message in (
        ("SEED" in plan.named, "SEED: got it, takes --seeds in a comparison"),
        (twice, f"{twice}: got it with --set, takes the comparison's values"),
        (trained, f"{trained}: got it beside --agent, takes what the agent was trained with"),
        (plan.agents and trial, "--agent: got it beside --validation, takes none"),
        (plan.agents and "hl" not in plan.methods, f"--agent: got {names}, takes hl as well"),
        (trial and not plan.settings.NAME, "--validation: got no --name, takes the trial's name"),
        (trial and names not in ("hl", "tuned"), f"--validation: got {names}, takes hl or tuned"),
    ):
        if wrong:
            raise ConfigError(message)
    for variant, settings in plan.variants().items():
        asked = plan.named | set(plan.comparison.variants[variant])
        for method in plan.methods:
            check_method(method, settings)
            for name, value in METHODS[method].overrides(settings).items():
                if name in asked and getattr(settings, name) != value:
                    raise ConfigError(
                        f"{name}: got {getattr(settings, name)!r}, takes {value!r} with the method "
                        f"{method}, which --methods can leave out"
                    )


# --- The comparison's folder -----------------------------------------------------------------


def make_jobs(plan: Plan, folder: Path) -> list[Job]:
    """Return all jobs of a comparison, those that take longest first."""
    from experiments.jobs import Job

    jobs = []
    for variant, settings in plan.variants().items():
        place = {"NAME": "", "RESULTS_DIR": str(folder / "jobs" / variant)}
        own = settings.replace(**place, THREADS=settings.THREADS or 1)
        for method, seed in itertools.product(plan.methods, plan.seeds):
            agent = str(plan.agents.get(seed, "")) if method == "hl" else ""
            of_seed = own.replace(SEED=seed)
            jobs.append(Job(method, of_seed, variant, plan.test_episodes, agent, plan.kind))
    return sorted(jobs, key=lambda job: -job.episodes)


def shared_config(plan: Plan, dataset: data.Dataset, folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a comparison, with what its folder has already.

    Raises:
        UserError: the folder holds something else, and the means would be mixed.
    """
    values = {
        "comparison": plan.name,
        "parameter": plan.comparison.parameter,
        "variants": plan.comparison.variants,
        "methods": {name: METHODS[name].overrides(plan.settings) for name in plan.methods},
        "episodes": plan.kind,
        "test_episodes": plan.test_episodes,
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "settings": plan.settings.model_dump(mode="json", exclude=names_of("run", "place")),
    }
    config = json.loads(json.dumps(values))
    several = ("variants", "methods")  # those have to agree that both have

    def comparable(content: dict[str, Any]) -> dict[str, Any]:
        flat = {k: v for k, v in content.items() if k not in (*several, "settings", "dataset")}
        flat["data"] = records.fingerprint(**content["dataset"])
        for kind in several:
            both = content[kind].keys() & config[kind].keys()
            flat |= {f"{kind} {name}": content[kind][name] for name in both}
        return flat | content["settings"]

    now = comparable(config)
    found = records.read_own(
        folder / "config.json", "comparison", lambda content: now | comparable(content), now
    )
    return config if found is None else found | {k: found[k] | config[k] for k in several}


Key = tuple[str, str, int]  # variant, method, seed


class Tables:
    """The tables of a comparison's folder, which grow by a job's rows when the job is finished.

    A job whose rows are all there is finished, and its folder in ``jobs/`` may be deleted.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self._config = config

    def read(self, name: str, path: Path | None = None) -> pd.DataFrame:
        """Return a table as text, so that no digit changes; without a file it has no rows.

        Raises:
            UserError: the file is damaged, or has other columns.
        """
        path, columns = path or self.folder / f"{name}.csv", list(TABLES[name])
        if not path.exists():
            return pd.DataFrame(columns=columns, dtype=str)
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            if list(table) != columns:
                raise ValueError(f"got the columns {list(table)}, takes {columns}")
        except ValueError as error:
            raise UserError(f"{path}: can't be read ({error})") from error
        return table

    def create(self, settings: Settings) -> None:
        """Write ``config.json``, ``distances.csv``, and the missing tables without rows."""
        from environment import distance_matrix

        records.write_json(self.folder / "config.json", self._config)
        for name in TABLES:
            if not (self.folder / f"{name}.csv").exists():
                records.write_table(self.folder / f"{name}.csv", self.read(name))
        table = pd.concat(
            records.distance_table(variant, distance_matrix(settings.replace(**changes)))
            for variant, changes in self._config["variants"].items()
        ).rename(columns={"dataset": "variant"})
        records.write_table(self.folder / "distances.csv", table)

    def finished(self) -> set[Key]:
        """Return the jobs all of whose test episodes, with all their rounds, are in the tables."""
        episodes = self.read("episodes").astype({"seed": int, "rounds": int})
        rounds = self.read("rounds").astype({"seed": int})
        counts = episodes.groupby(JOB_KEY)["rounds"].agg(["size", "sum"])
        found = rounds.groupby(JOB_KEY).size().reindex(counts.index)
        complete = counts["size"] == self._config["test_episodes"]
        return set(counts.index[complete & (counts["sum"] == found)])

    def add(self, name: str, rows: pd.DataFrame) -> None:
        """Add the rows of jobs to a table, in place of earlier rows of the same jobs."""
        rows, old = rows.astype(str), self.read(name)
        replaced = pd.MultiIndex.from_frame(old[JOB_KEY]).isin(
            pd.MultiIndex.from_frame(rows[JOB_KEY])
        )
        table = pd.concat([old[~replaced], rows], ignore_index=True)
        order_of = {name: place for place, name in enumerate(METHODS)}
        ranks = {
            "variant": table["variant"].map(list(self._config["variants"]).index),
            # A method that a script added earlier may be unknown here.
            "method": table["method"].map(lambda name: order_of.get(name, len(order_of))),
            "seed": table["seed"].astype(int),
        }
        order = pd.DataFrame(ranks).sort_values(JOB_KEY, kind="stable").index
        records.write_table(self.folder / f"{name}.csv", table.loc[order])

    def jobs(self) -> dict[Key, dict[str, Any]]:
        """Return the rows of ``jobs.csv`` by job."""
        rows = self.read("jobs").to_dict("records")
        return {(row["variant"], row["method"], int(row["seed"])): row for row in rows}

    def set_jobs(self, states: dict[Job, str], **values: Any) -> None:
        """Write the jobs' rows of ``jobs.csv``: their states, and the values that all get."""
        old, rows = self.jobs(), []
        for job, state in states.items():
            row = old.get(job.key, dict.fromkeys(TABLES["jobs"], ""))
            row |= dict(zip(JOB_KEY, job.key, strict=True))
            row |= {"state": state, "error": "", "agent": _sha256(job.agent), **values}
            rows.append(row)
        self.add("jobs", pd.DataFrame(rows))

    def collect(self, job: Job) -> None:
        """Add a finished job's rows to the tables, and copy its trained agent."""
        if job.trains:
            path = job.training_folder / "episodes.csv"
            rows = pd.read_csv(path, dtype=str, keep_default_na=False)
            rows = rows.assign(**dict(zip(JOB_KEY, job.key, strict=True)))
            self.add("training", rows[list(TABLES["training"])])
            agent = self.folder / "agents" / job.variant / f"{job.name}.npz"
            agent.parent.mkdir(parents=True, exist_ok=True)
            with records.replacing(agent) as file:
                file.write((job.training_folder / "agent.npz").read_bytes())
        for name in ("rounds", "episodes"):
            self.add(name, self.read(name, job.folder / f"{name}.csv"))


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


# --- The command -----------------------------------------------------------------------------


def compare(plan: Plan) -> int:
    """Run what is left of a comparison, write its tables and figures, and print its report.

    Returns 1 if a job failed, else 0. After a UserError nothing was started.
    """
    import models
    from experiments import figures
    from experiments.jobs import dask_client, load_dataset
    from experiments.tuning import Log

    models.use_cpu(plan.settings.THREADS or 1)
    dataset = load_dataset(plan.settings.DATASET, plan.settings.DATA_DIR)
    # The jobs take the data that was found, and do not search and warn again.
    plan = dataclasses.replace(plan, settings=plan.settings.replace(DATASET=dataset.name))
    if plan.data_sha256 not in ({}, dataset.sha256):
        raise UserError(f"--agent: trained on other data; --dataset {dataset.name} tests it here")
    name = plan.settings.NAME or f"{plan.name}-{dataset.name}"
    trial = f"tuning/{name}-{dataset.name}"
    folder = plan.settings.results_dir / (trial if plan.kind == "validation" else name)
    jobs = make_jobs(plan, folder)
    # Everything that can be refused is refused before a file is written.
    for job in jobs:
        data.make_shards(dataset, job.test_settings)
    _, waiting = _state(plan, dataset, folder, jobs)
    log = Log(plan.settings, plan.named) if plan.kind == "validation" else None
    cluster, workers = plan.cluster if waiting else "", min(plan.workers, len(waiting))
    with dask_client(workers, cluster) as client, records.locked(folder, PROGRAM):
        # Read again: another process may have written here meanwhile.
        tables, waiting = _state(plan, dataset, folder, jobs)
        tables.create(plan.settings)
        print(
            f"{plan.name}: {len(plan.methods)} methods, {len(plan.seeds)} seeds, "
            f"{len(plan.comparison.variants)} values, {plan.test_episodes} test episodes each: "
            f"{len(jobs)} jobs, {len(waiting)} to do; results in {folder}",
            flush=True,
        )
        tables.set_jobs({job: "waiting" if job in waiting else "finished" for job in jobs})
        if log:
            for job in waiting:
                log.write(job, "not finished")
        failed = _run(tables, waiting, client, log)
        print(
            f"jobs: {len(jobs) - len(waiting)} finished before, {len(waiting)} started, "
            f"{len(waiting) - len(failed)} finished, {len(failed)} failed"
        )
        for job, error in failed:
            print(f"failed: {job.folder}: {error}")
        if len(failed) < len(jobs) and plan.kind == "test":
            print(figures.report(folder, figures.draw_comparison(folder)))
    return 1 if failed else 0


def _state(
    plan: Plan, dataset: data.Dataset, folder: Path, jobs: list[Job]
) -> tuple[Tables, list[Job]]:
    """Return a comparison's tables and its unfinished jobs; refuse a folder of something else."""
    tables = Tables(folder, shared_config(plan, dataset, folder))
    finished, rows = tables.finished(), tables.jobs()
    for job in jobs:
        if job.key in rows and rows[job.key]["agent"] != _sha256(job.agent):
            raise UserError(f"{folder}: holds {job.name} of another agent; choose a --name")
    return tables, [job for job in jobs if job.key not in finished]


def _run(tables: Tables, waiting: list[Job], client: Any, log: Log | None) -> list[tuple[Job, str]]:
    """Run the waiting jobs and collect each as it ends; return the failed ones and their errors."""
    from experiments.jobs import run_jobs

    bar = tqdm(
        total=sum(job.episodes for job in waiting),
        initial=sum(job.episodes_finished() for job in waiting),
        bar_format="episode {n_fmt}/{total_fmt} of all jobs |{bar}| {remaining} left{postfix}",
        disable=None,  # no bar where the output is not a terminal
    )
    failed = []
    with bar:
        for ended in run_jobs(waiting, client):
            bar.update(sum(job.episodes_finished() for job in waiting) - bar.n)
            if ended is None:
                continue
            job, outcome = ended
            if outcome["error"]:
                failed.append((job, outcome["error"]))
            else:
                tables.collect(job)
            state = "failed" if outcome["error"] else "finished"
            tables.set_jobs({job: state}, **outcome)
            if log:
                log.write(job, outcome["error"], outcome.get("seconds", 0.0))
            bar.write(f"{job.variant} {job.name} {outcome['error'] or 'finished'}".strip())
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run a comparison; return the exit status, as main.py's, and 1 if a job failed."""
    plan = parse(arguments)
    return cli.exit_status(PROGRAM, lambda: compare(plan))


if __name__ == "__main__":
    sys.exit(main())

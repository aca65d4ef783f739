"""Compare methods over many seeds: run or continue the jobs, collect their tables, draw, report.

Usage: python3 -m experiments.compare [NAME] [options]; ``--list`` shows comparisons and methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    Parser,
    add_setting_flags,
    available_cores,
    count_of,
    exit_status,
    named_settings_of,
    overrides_of,
    seeds_of,
    value_of,
)
from config import NAMED_SETTINGS, ConfigError, Settings, UserError, names_of
from experiments.methods import METHODS, check_method

# TensorFlow takes seconds to import. The functions below import what needs it, so that a mistake
# on the command line is reported at once.
if TYPE_CHECKING:
    import pandas as pd

    from data import Dataset
    from experiments.jobs import Job
    from experiments.tuning import Log

PROGRAM = "experiments.compare"

# Enough to see how it goes within minutes on the bundled digits.
_SEEDS, _TEST_EPISODES, _VALIDATION_EPISODES = "2", 5, 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        description: one line of help.
        methods: names in ``METHODS``.
        parameter: what varies: a setting's name, or words; "" if nothing does.
        variants: each value's name, which is also a folder's, with the settings that it sets.
    """

    description: str
    methods: tuple[str, ...]
    parameter: str = ""
    variants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})


_TUNED = NAMED_SETTINGS["tuned"]

# What the ablation takes out of the tuned settings. Settings that make no sense alone go together.
_SCALES = ("BROADCAST_SCALE", "LOCAL_SCALE")
_ABLATIONS = {
    "nothing": (),
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
    "paper": Comparison(
        "the paper's: HL against random and standalone, and other baselines",
        tuple(name for name in METHODS if name != "tuned"),
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
            change: {name: value for name, value in _TUNED.items() if name not in names}
            for change, names in _ABLATIONS.items()
        },
    ),
}


# --- Command line ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """A command line that was checked.

    Attributes:
        name: of the comparison, or of a tuning trial.
        comparison: its parameter and variants.
        methods, seeds, test_episodes: what is run.
        kind: of the episodes, ``test`` or ``validation``.
        settings: of all jobs, before variants and methods change them.
        named: the settings that the command line names.
        agents: path of the given agent of each seed.
        data_sha256: of the data that the given agents were trained on; {} for any.
        workers: processes on this machine.
        cluster: address of a Dask scheduler; "" for none.
    """

    name: str
    comparison: Comparison
    methods: list[str]
    seeds: list[int]
    test_episodes: int
    kind: str
    settings: Settings
    named: set[str]
    agents: dict[int, Path]
    data_sha256: dict[str, str]
    workers: int
    cluster: str

    def folder(self, dataset: str) -> Path:
        """Return where the comparison's results go."""
        results, name = self.settings.results_dir, self.settings.NAME
        if self.kind == "validation":
            return results / "tuning" / f"{name}-{dataset}"
        return results / (name or f"{self.name}-{dataset}")

    def variants(self) -> dict[str, Settings]:
        """Return the settings with each value of what varies."""
        items = self.comparison.variants.items()
        return {name: self.settings.replace(**changes) for name, changes in items}


def _parser() -> Parser:
    examples = (
        f"  python3 -m {PROGRAM} --list\n"
        f"  python3 -m {PROGRAM} --dataset mnist --seeds 10 --test-episodes 20\n"
        f"  python3 -m {PROGRAM} --vary GOAL_ACCURACY=0.7,0.75,0.8 --methods hl,random"
    )
    text = "Compare methods over many seeds; results go to results/<name>/."
    parser = Parser(PROGRAM, text, examples)
    cores = available_cores()
    add = parser.add_argument
    add("comparison", nargs="?", metavar="NAME", help="a named comparison, see --list [paper]")
    add("--list", action="store_true", help="list comparisons and methods, and stop")
    add("--vary", metavar="NAME=v1,v2,...", help="compare values of a setting instead")
    add("--seeds", type=seeds_of, help=f"a number (5 is 0 to 4) or a list (0,3,7-9) [{_SEEDS}]")
    add("--methods", metavar="M1,M2,...", help="some of them, see --list [the comparison's]")
    help_ = f"episodes that test each policy, per seed [{_TEST_EPISODES}]"
    add("--test-episodes", type=count_of, metavar="N", help=help_)
    help_ = f"a tuning trial: {_VALIDATION_EPISODES} validation episodes, logged in tuning.csv"
    add("--validation", action="store_true", help=help_)
    help_ = "test this agent.npz, with its settings and its seed; repeatable"
    add("--agent", action="append", default=[], metavar="FILE", help=help_)
    add("--jobs", type=count_of, metavar="N", help=f"processes [{cores}, all cores]")
    add("--cluster", default="", metavar="ADDRESS", help="a Dask scheduler that runs the jobs")
    add("--seed", help=argparse.SUPPRESS)  # main.py's, which users try here as well
    add_setting_flags(parser, {"--dataset": "DATASET", "--episodes": "EPISODES", "--name": "NAME"})
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
        lines = [f"  {name:15} {c.description}" for name, c in COMPARISONS.items()]
        methods = [f"  {name:15} {method.description}" for name, method in METHODS.items()]
        print("\n".join(["comparisons:", *lines, "methods:", *methods]))
        sys.exit(0)
    named, base = overrides_of(parser, parsed), named_settings_of(parser, parsed)
    try:
        _check_flags(parsed)
        plan = _plan_of(parsed, named, base)
        _check_plan(plan)
        return plan
    except UserError as error:
        parser.error(str(error))


def _plan_of(parsed: argparse.Namespace, named: dict[str, Any], base: dict[str, Any]) -> Plan:
    """The plan of a command line that names some settings, on top of named settings."""
    if parsed.validation:
        name, comparison = "trial", Comparison("a tuning trial", ("hl",))
    elif parsed.vary:
        name, comparison = _values_of(parsed.vary)
    else:
        name = parsed.comparison or "paper"
        if name not in COMPARISONS:
            raise ConfigError(f"comparison: got {name!r}, takes one of {', '.join(COMPARISONS)}")
        comparison = COMPARISONS[name]
    agents, stored, data_sha256 = _read_agents(parsed.agent)
    values = {**stored, **base, **named}
    if "DATASET" not in values and Settings().DATASET == "auto":
        values["DATASET"] = "digits"  # takes minutes, where MNIST takes hours
    methods = comparison.methods if parsed.methods is None else parsed.methods.split(",")
    default_episodes = _VALIDATION_EPISODES if parsed.validation else _TEST_EPISODES
    return Plan(
        name=name,
        comparison=comparison,
        methods=list(dict.fromkeys(m.strip() for m in methods)),
        seeds=sorted(agents) or parsed.seeds or seeds_of(_SEEDS),
        test_episodes=parsed.test_episodes or default_episodes,
        kind="validation" if parsed.validation else "test",
        settings=Settings(**values),
        named=set(named),
        agents=agents,
        data_sha256={} if "DATASET" in named else data_sha256,
        workers=parsed.jobs or available_cores(),
        cluster=parsed.cluster,
    )


def _values_of(text: str) -> tuple[str, Comparison]:
    """The comparison of ``--vary NAME=v1,v2,...``; commas inside parentheses separate nothing."""
    name, _, values = text.partition("=")
    texts = [part.strip() for part in re.split(r",(?![^(]*\))", values) if part.strip()]
    if not texts or name in {"DATASET", *names_of("run", "place")}:
        raise ConfigError(
            f"--vary: got {text!r}, takes NAME=v1,v2,... of the world's or the agent's settings"
        )
    variants = {}
    for value in texts:
        valid = getattr(Settings(**{name: value_of(name, value)}), name)
        variants[str(valid).replace(" ", "")] = {name: valid}
    return name.lower(), Comparison("", ("hl", "random", "nearest_twice"), name, variants)


def _read_agents(texts: list[str]) -> tuple[dict[int, Path], dict[str, Any], dict[str, str]]:
    """The given agents by seed, the settings that all share, and the SHA-256 of their data."""
    agents: dict[int, Path] = {}
    shared: dict[str, Any] = {}
    data_sha256: dict[str, str] = {}
    for text in texts:
        from records import differences, load_agent

        path = Path(text).expanduser().resolve()
        about = load_agent(path)[1]
        seed = about["settings"]["SEED"]
        own = {k: v for k, v in about["settings"].items() if k not in names_of("run")}
        own["DATASET"] = about["dataset"]["name"]
        if seed in agents:
            raise ConfigError(f"--agent: got two agents with seed {seed}, takes one of each")
        if agents and (own, about["dataset"]["sha256"]) != (shared, data_sha256):
            differing = "; ".join(differences(shared, own)) or "other data"
            raise ConfigError(f"--agent: {text}: differs from the first ({differing})")
        agents[seed], shared, data_sha256 = path, own, about["dataset"]["sha256"]
    return agents, shared, data_sha256


def _check_flags(parsed: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    named = f"got {parsed.comparison!r}" if parsed.comparison else ""
    for wrong, message in (
        (parsed.seed is not None, f"--seed: got {parsed.seed!r}, takes --seeds in a comparison"),
        (parsed.jobs and parsed.cluster, "--jobs: got it beside --cluster, takes one of the two"),
        (parsed.vary and named, f"--vary: {named} beside it, takes no named comparison"),
        (parsed.validation and (named or parsed.vary), "--validation: takes no comparison"),
        (parsed.agent and parsed.seeds, "--seeds: got it beside --agent, takes the agents' seeds"),
        (parsed.agent and parsed.validation, "--agent: got it beside --validation, takes none"),
        (
            parsed.settings != "paper" and (parsed.agent or parsed.comparison == "ablation"),
            "--settings: got it beside --agent or an ablation, which have their own",
        ),
    ):
        if wrong:
            raise ConfigError(message)


def _check_plan(plan: Plan) -> None:
    """Refuse settings that others set already, and methods that can't run."""
    varied = {setting for changes in plan.comparison.variants.values() for setting in changes}
    if "SEED" in plan.named:
        raise ConfigError("SEED: got it with --set, takes --seeds in a comparison")
    for name in sorted(varied & plan.named):
        value = getattr(plan.settings, name)
        raise ConfigError(f"{name}: got {value!r} with --set, takes what the comparison sets")
    for name in sorted((names_of("agent") | {"NUM_NODES"}) & (varied | plan.named)):
        if plan.agents:
            raise ConfigError(
                f"{name}: got it beside --agent, takes what the agent was trained with"
            )
    if plan.agents and "hl" not in plan.methods:
        raise ConfigError(f"--agent: got the methods {', '.join(plan.methods)}, takes hl as well")
    if plan.kind == "validation":
        if not plan.settings.NAME:
            raise ConfigError("--validation: got no --name, takes the trial's name")
        if plan.methods not in (["hl"], ["tuned"]):
            raise ConfigError(f"--validation: got {', '.join(plan.methods)}, takes hl or tuned")
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
        own = settings.replace(
            NAME="", RESULTS_DIR=str(folder / "jobs" / variant), THREADS=settings.THREADS or 1
        )
        for method in plan.methods:
            for seed in plan.seeds:
                agent = str(plan.agents.get(seed, "")) if method == "hl" else ""
                of_seed = own.replace(SEED=seed)
                jobs.append(Job(method, of_seed, variant, plan.test_episodes, agent, plan.kind))
    return sorted(jobs, key=lambda job: -job.episodes)


def config_of(plan: Plan, dataset: Dataset) -> dict[str, Any]:
    """Return what all jobs of a comparison share, for ``config.json``."""
    stored = plan.settings.stored()
    config = {
        "comparison": plan.name,
        "parameter": plan.comparison.parameter,
        "variants": plan.comparison.variants,
        "methods": {name: METHODS[name].overrides(plan.settings) for name in plan.methods},
        "episodes": plan.kind,
        "test_episodes": plan.test_episodes,
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "settings": {k: v for k, v in stored.items() if k not in names_of("run")},
    }
    return json.loads(json.dumps(config))


def merged_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison's config with the methods and variants that its folder has already.

    Raises:
        UserError: the folder holds something else, and the means would be mixed.
    """
    from records import fingerprint, read_own

    several = ("variants", "methods")

    def comparable(stored: dict[str, Any]) -> dict[str, Any]:
        names = ("comparison", "parameter", "episodes", "test_episodes")
        flat = {name: stored[name] for name in names} | stored["settings"]
        flat["data"] = fingerprint(stored["dataset"]["name"], stored["dataset"]["sha256"])
        # Of methods and variants those have to agree that both have.
        shared = {
            f"{kind} {name}": stored[kind].get(name) for kind in several for name in config[kind]
        }
        return flat | {name: value for name, value in shared.items() if value is not None}

    now = comparable(config)
    stored = read_own(
        folder / "config.json",
        "comparison",
        lambda stored: {**now, **comparable(stored)},
        now,
    )
    return config if stored is None else stored | {k: stored[k] | config[k] for k in several}


Key = tuple[str, str, int]  # variant, method, seed


class Tables:
    """The tables of a comparison's folder, which grow by a job's rows when the job is finished.

    A job whose rows are all there is finished, and its folder in ``jobs/`` may be deleted.

    Args:
        folder: the comparison's.
        config: of the comparison, for the order of its variants.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from experiments import estimates

        self.folder = folder
        self._test_episodes = config["test_episodes"]
        self._variants = list(config["variants"])
        # episodes.csv comes last: a job that is in it is in all others.
        self._columns = {
            "jobs": estimates.JOB_COLUMNS,
            "rounds": estimates.ROUND_COLUMNS,
            "training": estimates.TRAINING_COLUMNS,
            "episodes": estimates.EPISODE_COLUMNS,
        }

    def read(self, name: str, path: Path | None = None) -> pd.DataFrame:
        """Return a table as text, so that no digit changes; without a file it has no rows.

        Raises:
            UserError: the file can't be read, or has other columns.
        """
        import pandas as pd

        path, columns = path or self.folder / f"{name}.csv", list(self._columns[name])
        if not path.exists():
            return pd.DataFrame(columns=columns, dtype=str)
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: can't be read ({error})") from error
        if list(table) != columns:
            raise UserError(f"{path}: got the columns {list(table)}, takes {columns}")
        return table

    def create(self) -> None:
        """Write the tables that are missing, without rows."""
        from records import write_table

        for name in self._columns:
            if not (self.folder / f"{name}.csv").exists():
                write_table(self.folder / f"{name}.csv", self.read(name))

    def finished(self) -> set[Key]:
        """Return the jobs all of whose test episodes, with all their rounds, are in the tables."""
        episodes = self.read("episodes").astype({"seed": int, "rounds": int})
        rounds = self.read("rounds").astype({"seed": int})
        counts = episodes.groupby(_KEY)["rounds"].agg(["size", "sum"])
        found = rounds.groupby(_KEY).size().reindex(counts.index)
        whole = (counts["size"] == self._test_episodes) & (counts["sum"] == found)
        return set(counts.index[whole])

    def add(self, name: str, rows: pd.DataFrame) -> None:
        """Add the rows of jobs to a table, in place of earlier rows of the same jobs."""
        import pandas as pd

        from records import write_table

        rows = rows.astype(str)
        old = self.read(name)
        replaced = pd.MultiIndex.from_frame(old[_KEY]).isin(pd.MultiIndex.from_frame(rows[_KEY]))
        table = pd.concat([old[~replaced], rows], ignore_index=True)
        ranks = {
            "variant": table["variant"].map(self._variants.index),
            "method": table["method"].map(list(METHODS).index),
            "seed": table["seed"].astype(int),
        }
        order = pd.DataFrame(ranks).sort_values(_KEY, kind="stable").index
        write_table(self.folder / f"{name}.csv", table.loc[order])

    def jobs(self) -> dict[Key, dict[str, Any]]:
        """Return the rows of ``jobs.csv`` by job."""
        rows = self.read("jobs").to_dict("records")
        return {(row["variant"], row["method"], int(row["seed"])): row for row in rows}

    def set_job(self, job: Job, state: str, **values: Any) -> None:
        """Write a job's row of ``jobs.csv``."""
        import pandas as pd

        row = self.jobs().get(job.key, dict.fromkeys(self._columns["jobs"], ""))
        row |= dict(zip(_KEY, job.key, strict=True)) | {"state": state, "error": ""}
        self.add("jobs", pd.DataFrame([row | {"agent": sha256_of(job.agent)} | values]))

    def collect(self, job: Job) -> None:
        """Add a finished job's rows to the tables, and copy its trained agent."""
        from records import replacing

        if job.trains:
            path = job.training_folder / "episodes.csv"
            self.add("training", _training_rows(job, path))
            agent = self.folder / "agents" / job.variant / f"{job.name}.npz"
            agent.parent.mkdir(parents=True, exist_ok=True)
            with replacing(agent) as file:
                file.write((job.training_folder / "agent.npz").read_bytes())
        for name in ("rounds", "episodes"):
            self.add(name, self.read(name, job.folder / f"{name}.csv"))


_KEY = ["variant", "method", "seed"]


def _training_rows(job: Job, path: Path) -> pd.DataFrame:
    import pandas as pd

    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    for place, (name, value) in enumerate(zip(_KEY, job.key, strict=True), start=1):
        rows.insert(place, name, str(value))
    return rows


def write_distances(folder: Path, variants: dict[str, Settings]) -> None:
    """Write ``distances.csv``: the distance of each two nodes, for each variant's settings."""
    import pandas as pd

    from environment import distance_matrix
    from experiments.estimates import DISTANCE_COLUMNS
    from records import distance_table, write_table

    tables = [distance_table(name, distance_matrix(own)) for name, own in variants.items()]
    table = pd.concat(tables, ignore_index=True).set_axis(list(DISTANCE_COLUMNS), axis=1)
    write_table(folder / "distances.csv", table)


# --- The command -----------------------------------------------------------------------------


def compare(plan: Plan) -> int:
    """Run what is left of a comparison, write its tables and figures, and print its report.

    Returns:
        0, or 1 if a job failed.

    Raises:
        UserError: nothing was started.
    """
    import data
    import models
    from experiments.jobs import dask_client, load_dataset
    from experiments.tuning import Log
    from records import locked, write_json

    models.use_cpu(plan.settings.THREADS or 1)
    dataset = load_dataset(plan.settings.DATASET, plan.settings.DATA_DIR)
    # The jobs take the data that was found, and do not search and warn again.
    plan = dataclasses.replace(plan, settings=plan.settings.replace(DATASET=dataset.name))
    if plan.data_sha256 not in ({}, dataset.sha256):
        raise UserError(f"--agent: trained on other data; --dataset {dataset.name} tests it here")
    folder = plan.folder(dataset.name)
    jobs = make_jobs(plan, folder)
    # Everything that can be refused is refused before a file is written.
    config = merged_config(folder, config_of(plan, dataset))
    for job in jobs:
        data.make_shards(dataset, job.test_settings)
    tables = Tables(folder, config)
    finished = tables.finished()
    waiting = [job for job in jobs if job.key not in finished]
    _check_agents(tables, jobs)
    log = Log(plan.settings, plan.named) if plan.kind == "validation" else None
    workers = min(plan.workers, len(waiting))
    with dask_client(workers, plan.cluster if waiting else "") as client, locked(folder, PROGRAM):
        write_json(folder / "config.json", config)
        tables.create()
        write_distances(
            folder, {n: plan.settings.replace(**v) for n, v in config["variants"].items()}
        )
        print(_summary(plan, jobs, waiting, folder), flush=True)
        for job in jobs:
            if job.key in finished:
                tables.set_job(job, "finished")
        failed = _run(tables, waiting, client, log)
        print(
            f"jobs: {len(jobs) - len(waiting)} finished before, {len(waiting)} started, "
            f"{len(waiting) - len(failed)} finished, {len(failed)} failed"
        )
        for job, error in failed:
            print(f"failed: {job.folder}: {error}")
        if len(failed) < len(jobs) and plan.kind == "test":
            from experiments import figures

            print(figures.report(folder, figures.draw_comparison(folder)))
    return 1 if failed else 0


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file; "" without a path."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _check_agents(tables: Tables, jobs: list[Job]) -> None:
    """Refuse a given agent whose test is there with another agent's rows."""
    rows = {
        tuple(row[name] for name in _KEY): row for row in tables.read("jobs").to_dict("records")
    }
    for job in jobs:
        row = rows.get((job.variant, job.method, str(job.settings.SEED)))
        if row and row["state"] == "finished" and row["agent"] != sha256_of(job.agent):
            raise UserError(f"{tables.folder}: holds {job.name} of another agent; choose a --name")


def _summary(plan: Plan, jobs: list[Job], waiting: list[Job], folder: Path) -> str:
    return (
        f"{plan.name}: {len(plan.methods)} methods, {len(plan.seeds)} seeds, "
        f"{len(plan.comparison.variants)} values, {plan.test_episodes} test episodes each: "
        f"{len(jobs)} jobs, {len(waiting)} to do; results in {folder}"
    )


def _run(tables: Tables, waiting: list[Job], client: Any, log: Log | None) -> list[tuple[Job, str]]:
    """Run the waiting jobs and collect each as it ends; return the failed ones and their errors."""
    from tqdm import tqdm

    from experiments.jobs import run_jobs

    for job in waiting:
        tables.set_job(job, "waiting")
        if log:
            log.write(job, "not finished")
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
            if not outcome["error"]:
                tables.collect(job)
            else:
                failed.append((job, outcome["error"]))
            tables.set_job(job, "failed" if outcome["error"] else "finished", **outcome)
            if log:
                log.write(job, outcome["error"], outcome.get("seconds", 0.0))
            done = f"failed: {outcome['error']}" if outcome["error"] else "finished"
            bar.write(f"{' '.join(filter(None, [job.variant, job.name]))} {done}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run a comparison; return the exit status, as main.py's, and 1 if a job failed."""
    plan = parse(arguments)
    return exit_status(PROGRAM, lambda: compare(plan))


if __name__ == "__main__":
    sys.exit(main())

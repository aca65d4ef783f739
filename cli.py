"""Command lines: flags for the settings, one-line errors, exit status and signals.

``env -u HL_DATA_DIR python3 cli.py > docs/settings.md`` writes the page of all settings.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from config import (
    DATASET_SETTINGS,
    GROUPS,
    NAMED_SETTINGS,
    AgentSettings,
    ConfigError,
    Group,
    Settings,
    UserError,
    meaning,
    reason,
    takes,
)

# Short flags for the settings that are changed most; the first five are the public code's.
FLAGS = {
    "--episodes": "EPISODES",
    "--starter": "STARTER_NODE",
    "--step": "NODES_PER_ROUND",
    "--epsilon": "EPSILON",
    "--epsilon_decay": "EPSILON_DECAY",
    "--seed": "SEED",
    "--dataset": "DATASET",
    "--name": "NAME",
}


class Parser(argparse.ArgumentParser):
    """An argument parser; ``examples`` are command lines, shown before the flags in the help."""

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        if examples:
            description += f"\n\nexamples:\n{examples}"
        super().__init__(
            prog=prog,
            description=description,
            usage=f"{prog} [options]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line on stderr."""
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(2)


def add_setting_flags(
    parser: Parser, names: set[str], groups: tuple[type[Group], ...] = GROUPS
) -> None:
    """Add the short flags of ``names``, ``--set``, and to the help the settings of groups.

    ``--settings``, which changes the agent, is added if AgentSettings is among them.
    """
    try:
        Settings()
    except ConfigError as error:  # a default that a user edited
        Parser("config.py", "").error(str(error))
    parser.epilog = _settings_help(groups)
    add = parser.add_argument
    for flag, name in FLAGS.items():
        if name in names:
            spellings = [flag, "--episode"] if flag == "--episodes" else [flag]
            add(*spellings, dest=name, metavar="VALUE", help=f"short for --set {name}=VALUE")
    help_ = "any setting below; repeatable"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=help_)
    if AgentSettings in groups:
        help_ = "tuned: our settings of the agent; --set overrides them"
        add("--settings", choices=NAMED_SETTINGS, metavar="NAME", help=help_)


def _default_and_tuned(name: str, mark: str = "") -> tuple[str, str]:
    """Return a setting's default, with those of datasets, and its tuned value or "", in marks."""
    texts = [f"{mark}{Settings.model_fields[name].default!r}{mark}"]
    for dataset, own in DATASET_SETTINGS.items():
        if name in own:
            texts.append(f"{dataset}: {mark}{own[name]!r}{mark}")
    tuned = NAMED_SETTINGS["tuned"]
    return ", ".join(texts), f"{mark}{tuned[name]!r}{mark}" if name in tuned else ""


def _settings_help(groups: tuple[type[Group], ...]) -> str:
    tuned = "; tuned value" if AgentSettings in groups else ""
    lines = [f"settings, for --set (default{tuned}):"]
    for group in groups:
        lines.append(f"  {group.__doc__}")
        for name in group.model_fields:
            values = "; ".join(filter(None, _default_and_tuned(name)))
            lines.append(f"    {f'{name} = {values}':40} {meaning(name)[0]}")
    return "\n".join(lines)


def overrides_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line names one by one; a short flag beats ``--set``."""
    texts = {}
    for text in parsed.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {text!r}, takes NAME=VALUE")
        texts[name.strip()] = value.strip()
    known = Settings.model_fields
    texts |= {k: v for k, v in vars(parsed).items() if k in known and v is not None}
    return {name: value_of(name, text) for name, text in texts.items()}


def value_of(name: str, text: str) -> Any:
    """Return a command line's text as the Python value that it spells, or as text."""
    field = Settings.model_fields.get(name)
    if field is None or field.annotation is not str:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(text)
    return text


def settings_of_run(arguments: list[str] | None = None) -> tuple[Settings, dict[str, str]]:
    """Return main.py's settings, and the SHA-256 of the data of ``--config``, {} without it.

    UserError or exit with status 2 if the command line is wrong.
    """
    examples = (
        "  python3 main.py                                     # the defaults of config.py\n"
        "  python3 main.py --settings tuned --seed 1           # the tuned agent, another seed\n"
        "  python3 main.py --set DISCOUNT=0.95 --name longer   # any setting, with its own folder"
    )
    parser = Parser("main.py", "Train the DQN; results go to results/<name>/.", examples)
    help_ = "run again what a run's config.json says"
    parser.add_argument("--config", type=os.path.expanduser, metavar="FILE", help=help_)
    add_setting_flags(parser, set(FLAGS.values()))
    parsed = parser.parse_args(arguments)
    named, stored, data_sha256 = overrides_of(parsed), {}, {}
    if parsed.config is not None:
        from records import read_config  # imports pandas

        # A comparison and an audit have no sessions.
        config = read_config(Path(parsed.config), "sessions", flag="--config: ")
        name, data_sha256 = config["dataset"]["name"], config["dataset"]["sha256"]
        if named.get("DATASET", name) != name:
            got = f"got {named['DATASET']!r}"
            raise ConfigError(f"DATASET: {got}, takes {name!r} with this --config")
        stored = {**config["settings"], "DATASET": name}
    return Settings(**{**stored, **NAMED_SETTINGS.get(parsed.settings, {}), **named}), data_sha256


def seeds_of(text: str) -> list[int]:
    """Return a command line's seeds, from "5" (0 to 4) or a list as "0,3,7"."""
    seeds: set[int] = set()
    if re.fullmatch(r"[0-9]{1,6}", text):
        seeds = set(range(int(text)))
    elif re.fullmatch(r"([0-9]{1,6}(,|$))+", text):
        seeds = set(map(int, text.removesuffix(",").split(",")))
    if not seeds:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, takes a number of seeds (5 is 0 to 4) or a list (0,3,7)"
        )
    return sorted(seeds)


def count_of(text: str) -> int:
    """Return a command line's integer >= 1."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes an integer >= 1")
    return int(text)


def dataset_of_experiments() -> dict[str, str]:
    """Return the default DATASET of experiments: digits take minutes, MNIST hours."""
    return {"DATASET": "digits"} if Settings().DATASET == "auto" else {}


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: 1 seed, 2 seeds."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


def exit_status(program: str, work: Callable[[], int]) -> int:
    """Do a command's work and return its exit status.

    A warning is one line on stderr, and so is what stops the command. The status is then 2 after a
    user's mistake, 1 when the system refuses a file, 130 after Ctrl-C and 143 after SIGTERM.
    """
    previous = {n: signal.signal(n, _interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    show_warning, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        return work()
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = f"{reason(error)}; fix this, then run the same command again", 1
    except KeyboardInterrupt as interrupt:
        message = "interrupted; run the same command again"
        status = 128 + (interrupt.args or [signal.SIGINT])[0]
    finally:
        warnings.showwarning = show_warning
        for number, handler in previous.items():
            signal.signal(number, handler)
    sys.stderr.write(f"{program}: {message}\n")
    return status


def settings_page() -> str:
    """Return docs/settings.md: every setting with its default, values, meaning and source."""
    lines = [
        "# Settings",
        "",
        "All settings, as `config.py` declares them: what they mean, which values they take, and",
        "where they come from. Written by `env -u HL_DATA_DIR python3 cli.py > docs/settings.md`.",
        "",
        'Source "public code" is the authors\' implementation, "ours" is this project.',
        "The source is that of the setting and its default; other values may be",
        "[ours](departures.md#what-is-added).",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.__doc__}", ""]
        lines += ["| setting | default | `tuned` | takes | meaning | source |", "|---" * 6 + "|"]
        for name in group.model_fields:
            cells = [f"`{name}`", *_default_and_tuned(name, "`"), takes(name), *meaning(name)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_page())

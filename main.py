"""Homogeneous Learning: train a DQN that picks the nodes which train a shared model.

Usage: python3 main.py [--help]; the settings are in config.py.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from cli import exit_status, settings_of_run
from config import Settings, UserError, episode_seed

# Importing TensorFlow takes seconds: the functions below do so after the command line is checked.
if TYPE_CHECKING:
    from environment import DecentralizedLearning
    from node import DQNAgent
    from records import Run


def train(
    environment: DecentralizedLearning, run: Run, agent: DQNAgent, quiet: bool = False
) -> None:
    """Train an agent for EPISODES episodes, each one training of a fresh foundation model.

    ``run`` records everything and may hold an earlier session, which is continued. ``agent.npz`` is
    written at the end; the caller then declares the run finished. ``quiet``: no progress bar.
    """
    from tqdm import tqdm

    from environment import rollout
    from records import episode_row, save_agent

    settings = environment.settings
    run.restore(agent)
    run.start(environment.shards, environment.distances)

    bar = tqdm(
        total=settings.EPISODES,
        initial=run.episodes_finished,
        bar_format="episode {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
        disable=quiet or None,  # None: no bar where the output is not a terminal
    )
    with bar:
        for episode in range(run.episodes_finished + 1, settings.EPISODES + 1):
            started = time.perf_counter()
            for round_ in rollout(environment, agent.act, episode_seed(settings.SEED, episode)):
                run.add("rounds.csv", {**round_.info, "chosen_by": round_.chosen_by})
                agent.remember(round_)
                bar.set_postfix_str(
                    f"round {round_.info['round']}, accuracy {round_.info['accuracy']:.3f}, "
                    f"cost {round_.info['communication_cost']:.2f}, epsilon {agent.epsilon:.2f}"
                )
            q_loss = agent.train()
            row = episode_row(round_.info, settings, started)
            row["diverged"] |= q_loss is not None and not math.isfinite(q_loss)
            run.add("episodes.csv", {**row, "epsilon": agent.epsilon, "q_loss": q_loss})
            transitions = agent.end_episode()
            run.checkpoint(agent.state(), transitions)
            bar.update()

    save_agent(run.folder / "agent.npz", agent.arrays(), settings, environment.dataset)


def run_or_continue(settings: Settings, data_sha256: dict[str, str]) -> int:
    """Do what ``main`` does; UserError or OSError is what the user or the system has to correct.

    ``data_sha256`` is that of the data that the run has to have, by array; empty for any.
    """
    import plot
    from environment import DecentralizedLearning
    from node import DQNAgent
    from records import Run

    # Whatever the data can't fill is refused here, before a file is written.
    environment = DecentralizedLearning(settings)
    dataset = environment.dataset
    if data_sha256 and data_sha256 != dataset.sha256:
        raise UserError(f"--config: the {dataset.name} data here is not the data of that run")
    with Run(settings, dataset, environment.threads) as run:
        if run.finished:
            print(f"{run.folder} is finished already; for another run choose a --name")
        else:
            done = f"{run.episodes_finished} of {settings.EPISODES} episodes finished"
            print(f"{dataset.name}: {done}; results in {run.folder}", flush=True)
            agent = DQNAgent(environment.observation_size, settings)
            train(environment, run, agent)
            plot.draw_run(run.folder)
            run.finish()
        print(plot.summary(run.folder))
    return 0


def main(settings: Settings | None = None) -> int:
    """Run or continue a training, by default the command line's; return the exit status."""

    def work() -> int:
        return run_or_continue(settings, {}) if settings else run_or_continue(*settings_of_run())

    return exit_status("main.py", work)


if __name__ == "__main__":
    sys.exit(main())

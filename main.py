"""Homogeneous Learning: train a DQN to pick the nodes that train a shared model.

Usage: python3 main.py [--help]; the settings are in config.py.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from config import Settings, UserError, episode_seed, from_command_line, reason

if __name__ == "__main__":
    # Before TensorFlow, which takes seconds to import: a typo is reported at once, and Ctrl-C
    # ends the program without a traceback.
    SETTINGS = from_command_line()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tqdm import tqdm

import data
import models
import plot
from environment import DecentralizedLearning
from node import DQNAgent
from records import Run


def train(environment: DecentralizedLearning, run: Run, quiet: bool = False) -> None:
    """Trains the agent for EPISODES episodes, each one training of a fresh foundation model.

    Args:
        environment: with the settings, which are the agent's as well.
        run: where everything is recorded, and where an earlier run of it is continued from.
        quiet: no progress bar and no figures, for trainings that are many.
    """
    settings = environment.settings
    agent = DQNAgent(
        environment.observation_space.shape[0],
        settings.NUM_NODES,
        settings,
        settings.NODES_PER_ROUND,
    )
    restore(agent, run)
    run.start(environment.shards)

    bar = tqdm(
        total=settings.EPISODES,
        initial=run.episodes_finished,
        bar_format="episode {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
        disable=quiet or None,  # None: no bar where the output is not a terminal
    )
    with bar:
        for episode in range(run.episodes_finished + 1, settings.EPISODES + 1):
            started = time.perf_counter()
            observation, info = environment.reset(seed=episode_seed(settings.SEED, episode))
            run.record_round(episode, info, chosen_by="starter")
            episode_reward = info["reward"]
            done = info["goal_reached"]

            while not done:
                nodes, chosen_by = agent.act(observation)
                next_observation, reward, terminated, truncated, info = environment.step(nodes)
                done = terminated or truncated
                agent.remember(observation, nodes, reward, next_observation, terminated, truncated)
                observation = next_observation
                episode_reward += reward
                run.record_round(episode, info, chosen_by)
                bar.set_postfix_str(
                    f"round {info['round']}, accuracy {info['accuracy']:.3f}, "
                    f"cost {info['communication_cost']:.2f}, epsilon {agent.epsilon:.2f}"
                )

            q_loss = agent.train()
            run.record_episode(
                episode,
                info,
                episode_reward=episode_reward,
                epsilon=agent.epsilon,
                q_loss=q_loss,
                seconds=time.perf_counter() - started,
            )
            agent.decay_epsilon()
            run.checkpoint(agent.state(), agent.memory.latest(info["round"] - 1))
            bar.update()

    run.save_agent(agent.q.network.named_arrays(agent.weights))
    if not quiet:
        plot.draw_run(run.folder)
    run.finish()


def restore(agent: DQNAgent, run: Run) -> None:
    """Takes the agent to where the run's last checkpoint left it, if there is one.

    Raises:
        RunError: the checkpoint does not fit this agent.
    """
    state = run.agent_state()
    if state is None:
        return
    try:
        agent.load_state(state, run.transitions(agent.memory.capacity))
    except (ValueError, KeyError) as error:
        raise run.damaged_checkpoint(error) from error


def main(settings: Settings) -> int:
    """Runs or continues the training that the settings describe.

    Returns:
        The exit status: 0, or 2 after a user's mistake, 1 when the system refuses a file, 130
        after Ctrl-C, 143 after SIGTERM; each with one line on stderr.
    """

    def run_or_continue() -> int:
        threads = models.use_cpu(settings.THREADS)
        dataset = data.load(settings)
        data.make_shards(dataset, settings)  # refuses what it can't fill before a file is written
        with Run(settings, dataset, threads) as run:
            if run.finished:
                print(f"{run.folder} is finished already; for another run choose a --name")
            else:
                if run.episodes_finished:
                    print(f"continuing {run.folder} after episode {run.episodes_finished}")
                train(DecentralizedLearning(settings, dataset), run)
            print(plot.summary(run.folder))
        return 0

    return exit_status("main.py", run_or_continue, "what was finished is kept: mend this")


def exit_status(program: str, work: Callable[[], int], advice: str) -> int:
    """Does a command's work, ending it in order on Ctrl-C and SIGTERM; one line for what stops it.

    Args:
        program: its name, in front of the line.
        work: returns the exit status if nothing stops it.
        advice: to the user whose system refuses a file.

    Returns:
        The exit status, as ``main`` has it.
    """
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, _raise_terminated),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        return work()
    except UserError as error:
        message, status = str(error), 2
    except OSError as error:
        message, status = f"{reason(error)}; {advice}, and the same command continues", 1
    except KeyboardInterrupt as interrupt:
        message = "interrupted; the same command continues"
        status = 143 if isinstance(interrupt, Terminated) else 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    sys.stderr.write(f"{program}: {message}\n")
    return status


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is: files are closed and the state is written."""


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main(SETTINGS))

"""`hive`: the verbs and where each is implemented. Importing this imports click only; a verb is imported when used."""

from __future__ import annotations

import sys

import click

from protos.command_line import LazyGroup, run, version_option

_CLI = "coordinator.cli."
VERBS = {
    "plan": (_CLI + "submit:plan", "Dry run: what the model is, the candidates, the choice and why."),
    "submit": (_CLI + "submit:submit", "Train what a job file describes."),
    "ps": (_CLI + "jobs:ps", "Jobs that are not finished (--all: every job)."),
    "show": (_CLI + "jobs:show", "One job: state, progress, result."),
    "explain": (_CLI + "jobs:explain", "Why a job was cut that way, and what was measured beside each prediction."),
    "logs": (_CLI + "follow:logs", "What a job's workers printed."),
    "wait": (_CLI + "follow:wait", "Follow a job until it ends."),
    "cancel": (_CLI + "jobs:cancel", "Stop a job for good."),
    "pause": (_CLI + "jobs:pause", "Stop a job after a checkpoint; resume continues it."),
    "resume": (_CLI + "jobs:resume", "Continue a paused job."),
    "events": (_CLI + "follow:events", "The event log (-w: as it grows)."),
    "artifacts": (_CLI + "artifacts:artifacts", "List or fetch what a job made."),
    "nodes": (_CLI + "nodes:nodes", "The machines and what they can do (--lan: those not joined)."),
    "node": (_CLI + "nodes:node", "Cordon, uncordon, drain or remove a machine."),
    "qtable": (_CLI + "qtable:qtable", "What the choice has learned: show, export, import, reset, rebuild, evaluate."),
    "models": (_CLI + "models:models", "What a model file or directory is, without running it."),
    "token": (_CLI + "token:token", "Create, list or revoke join tokens."),
    "coordinator": (_CLI + "start:coordinator", "Start the coordinator on this machine."),
    "up": (_CLI + "up:up", "A coordinator and N nodes on this one machine."),
    "demo": (_CLI + "up:demo", "Train a digits classifier on three local nodes."),
    "doctor": (_CLI + "doctor:doctor", "Check this machine, the coordinator and the way between."),
    "completion": (_CLI + "completion:completion", "Shell completion for bash, zsh or fish."),
}


@click.command(cls=LazyGroup, lazy=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def cli() -> None:
    """Turn a handful of unlike machines into one computer that trains models.

    Start with `hive demo`, or `hive coordinator start` on one machine and `hive-node start` on each.
    """


def main() -> None:
    sys.exit(run(cli, "hive", sys.argv[1:]))


if __name__ == "__main__":
    main()

"""`hive-node`: the verbs of a machine's owner. Importing this imports click only; a verb is imported when used."""

from __future__ import annotations

import sys

import click

from protos.command_line import LazyGroup, run, version_option

VERBS = {
    "start": ("node.cli_start:start", "Lend this machine: join a coordinator and work for it."),
    "status": ("node.cli_control:status", "What the daemon here is doing."),
    "pause": ("node.cli_control:pause", "Stop working now; jobs go on elsewhere or wait."),
    "resume": ("node.cli_control:resume", "Work again."),
    "drain": ("node.cli_control:drain", "Finish or hand over what runs, take nothing new."),
    "leave": ("node.cli_control:leave", "Leave the cluster for good and end the daemon."),
    "doctor": ("node.cli_doctor:doctor", "Check this machine and which caps are enforced how."),
    "bench": ("node.cli_control:bench", "Measure this machine again, under its caps."),
    "config": ("node.cli_install:config", "The settings in force and where each came from."),
    "install": ("node.cli_install:install", "Print or write a hardened systemd unit."),
}


@click.command(cls=LazyGroup, lazy=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def cli() -> None:
    """Lend this machine to a hive: `hive-node start --token hive1....`"""


def main() -> None:
    sys.exit(run(cli, "hive-node", sys.argv[1:]))


if __name__ == "__main__":
    main()

"""`hive completion`: the script that a shell evaluates to complete verbs and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_INSTALL = {
    "bash": 'eval "$(hive completion bash)"   in ~/.bashrc',
    "zsh": 'eval "$(hive completion zsh)"   in ~/.zshrc',
    "fish": "hive completion fish > ~/.config/fish/completions/hive.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_INSTALL)))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    bash: eval "$(hive completion bash)"   in ~/.bashrc
    zsh:  eval "$(hive completion zsh)"    in ~/.zshrc
    fish: hive completion fish > ~/.config/fish/completions/hive.fish
    """
    from coordinator.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None  # click has the three shells of _INSTALL
    script = kind(cli, {}, "hive", "_HIVE_COMPLETE")
    click.echo(script.source_template % script.source_vars())
    click.echo(f"# install: {_INSTALL[shell]}", err=True)

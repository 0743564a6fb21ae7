"""`hive up` and `hive demo`: the whole of it on one machine, in separate processes."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from coordinator import connect
from coordinator.cli import ending, render
from protos.command_line import human_bytes, human_seconds, output_option, say, write_line
from protos.errors import EXIT_DETACHED, ErrorCode, HiveError, NotFound
from protos.printable import printable
from protos.version import SCHEMA

_DEMO_FOLDER = Path("hive-demo")
_DEMO_MARK = ".hive-demo"
_DEMO_NODES = 3


@click.command()
@click.option("--nodes", default=3, show_default=True, type=click.IntRange(1, 32), help="How many.")
@click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Where it keeps all [default: HIVE_HOME]."
)
@click.option("--port", default=7700, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--session-port", default=7701, show_default=True, type=click.IntRange(0, 65535))
@output_option
def up(nodes: int, home: Path | None, port: int, session_port: int, as_json: bool) -> int:
    """Start a coordinator and N nodes on this machine, each with an equal share; Ctrl-C ends them all."""
    asyncio.run(_up(connect.load({"home": home}).home, nodes, (port, session_port), as_json))
    return 0


async def _up(home: Path, nodes: int, ports: tuple[int, int], as_json: bool) -> None:
    from coordinator.local import LocalCluster, machine_share

    share = machine_share(nodes)
    say(
        f"starting a coordinator and {nodes} nodes with {share.cpus:g} cores and {human_bytes(share.memory_bytes)} each"
    )
    async with _UntilStopped(), LocalCluster(home, nodes, share, *ports) as cluster:
        if as_json:
            facts = {"home": str(home), "address": cluster.address, "nodes": cluster.names, "pids": cluster.pids}
            write_line({"schema": SCHEMA, "up": facts})
        else:
            prefix = "" if home == connect.load().home else f"HIVE_HOME={home} "
            say(f"up: coordinator at {cluster.address}, nodes {', '.join(cluster.names)}, files in {home}")
            say(f"in another terminal: {prefix}hive nodes, {prefix}hive submit JOB.yaml --wait. Ctrl-C ends all.")
        raise await cluster.ended()


class _UntilStopped:
    """`async with`: SIGINT, SIGTERM and SIGHUP cancel the body, which then ends without an error."""

    async def __aenter__(self) -> None:
        self._stopped = False
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        if not self._stopped and self._task is not None:  # a second Ctrl-C does not interrupt the ending
            self._stopped = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)
        if self._stopped:
            say("\nended")
        return self._stopped and kind is asyncio.CancelledError

    @property
    def stopped(self) -> bool:
        return self._stopped


@click.command()
@click.option(
    "--folder",
    default=_DEMO_FOLDER,
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where it writes; made anew.",
)
def demo(folder: Path) -> int:
    """Train a digits classifier on three local nodes, then end them. Takes a minute or two."""
    return asyncio.run(_demo(folder.resolve()))


async def _demo(folder: Path) -> int:
    from coordinator.local import LocalCluster, machine_share

    job_file = example("digits/mlp.yaml")
    home = _fresh(folder)
    started = time.monotonic()
    share = machine_share(_DEMO_NODES)
    say(f"starting a coordinator and {_DEMO_NODES} nodes on this machine (files below {folder})")
    stopped = _UntilStopped()
    async with stopped, LocalCluster(home, _DEMO_NODES, share) as cluster:
        say(f"up after {human_seconds(time.monotonic() - started)}: {', '.join(cluster.names)}")
        training = asyncio.create_task(_train(home, job_file, folder))
        broken = asyncio.create_task(cluster.ended())
        try:
            await asyncio.wait({training, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not training.done():
                raise broken.result()
            document, lines = training.result()
        finally:
            for task in (training, broken):
                task.cancel()
            await asyncio.gather(training, broken, return_exceptions=True)
    if stopped.stopped:
        return EXIT_DETACHED
    return _told(document["job"], folder, lines, time.monotonic() - started, job_file)


async def _train(home: Path, job_file: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    from coordinator.bundle import bundle
    from coordinator.jobfile import read_job
    from coordinator.loading import CODE_FOLDER, load_lines

    prepared = bundle(read_job(job_file), job_file.parent)
    async with await connect.connect(connect.ClientConfig(home)) as client:
        await client.upload(prepared)
        job_id = (await client.submit(prepared))["job"]["id"]
        say(f"submitted {job_file} as {job_id}")
        document = await ending.wait_with_progress(client, job_id)
        await client.fetch(document["job"].get("artifacts") or [], folder / "model")
    shutil.copytree(job_file.parent, folder / "model" / CODE_FOLDER)
    return document, load_lines(folder / "model", prepared.spec.model.model_dump())


def _told(job: dict[str, Any], folder: Path, lines: list[str], seconds: float, job_file: Path) -> int:
    """What came of it, where it is, what to type next."""
    if job["state"] != "SUCCEEDED":
        click.echo(render.job(job))
        say(f"the logs are in {folder / 'home' / 'logs'}")
        return ending.exit_code(job)
    accuracy = (job.get("metrics") or {}).get("accuracy")
    nodes = printable(", ".join(job.get("nodes") or ()))
    click.echo(f"test accuracy  {accuracy:.4f}" if accuracy is not None else "test accuracy  unknown")
    click.echo(f"trained as     {job.get('strategy')} on {nodes}, {job.get('samples')} samples")
    click.echo(f"model          {folder / 'model' / 'model.safetensors'}")
    click.echo(f"time           {human_seconds(seconds)} with starting and ending everything")
    if lines:
        say("\nload the model with plain torch:")
        say("\n".join(f"  {line}" for line in lines))
    say("\nwhat to type next:")
    for line in activation():
        say(line)
    say("  hive up --nodes 3                    the same, left running; or, on several machines:")
    say("  hive coordinator start               on one: prints the command for the others")
    say(f"  hive submit {job_file} --wait")
    return 0


def activation() -> list[str]:
    """What makes `hive` a command of this shell, where it is none: installed into a virtual environment not active."""
    script = Path(sys.prefix) / "bin" / "activate"
    return [f"  . {shlex.quote(str(script))}"] if shutil.which("hive") is None and script.is_file() else []


def _fresh(folder: Path) -> Path:
    """An empty home in the demo's folder. Refuses a folder that an earlier demo did not make."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _DEMO_MARK).exists():
        raise HiveError(f"{folder} exists and is not a demo's", "give another one with --folder", code=ErrorCode.USAGE)
    for part in ("home", "model"):
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DEMO_MARK).touch()
    return folder / "home"


def example(name: str) -> Path:
    """A file of examples/, beside the packages in a checkout or below the prefix of an installation."""
    for root in (Path(__file__).parents[2] / "examples", Path(sys.prefix) / "share" / "hive" / "examples"):
        if (root / name).is_file():
            return root / name
    raise NotFound(f"the example {name} is not installed", "run it from a checkout of hive")

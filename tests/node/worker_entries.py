"""Entry functions that tests run in real worker processes: no torch, each does one thing a task may do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from protos.errors import Blame, DeadlineExceeded
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome, Progress
from strategies.context import TaskContext

_FOREVER = threading.Event()


def run(context: TaskContext) -> Outcome:
    """Does what the task's model source names."""
    return globals()[context.task.spec.model.source.removesuffix(".py:build")](context)


def _done(document: str = "") -> Outcome:
    return Outcome(AttemptState.DONE, document=document)


def returns(context: TaskContext) -> Outcome:
    return _done()


def looks_around(context: TaskContext) -> Outcome:
    names = ["HIVE_TOKEN", "AWS_SECRET_ACCESS_KEY", "CUDA_VISIBLE_DEVICES"]
    around = [os.environ.get(name, "-") for name in names]
    around += [
        context.device,
        str(Path.cwd() == context.workspace.output_dir.resolve()),
        str(os.getsid(0) == os.getpid()),
    ]
    around += [context.node_name, str(context.threads), str(len(list(Path("/proc/self/fd").iterdir())))]
    return _done(" ".join(around))


def tells_its_upload(context: TaskContext) -> Outcome:
    return _done(repr(context.max_upload_bytes_per_s))


def says_everything(context: TaskContext) -> Outcome:
    channel = context.channel
    channel.ready()
    channel.progress(Progress((), 3, 10, 0, 1, "train", 96))
    folder = context.workspace.checkpoint_dir / "step-3"
    folder.mkdir(parents=True)
    channel.checkpoint(folder, 3, 96)
    path = context.workspace.output_dir / "model.safetensors"
    path.write_bytes(b"weights")
    channel.artifact("model.safetensors", path)
    sys.stdout.write("a line on stdout\n")
    sys.stderr.write("a line on stderr\n")
    return _done()


def uses_the_store(context: TaskContext) -> Outcome:
    store = context.channel.store
    store.set("a", b"\x00\xff")
    seen = [store.get("a", 5.0), store.add("n", 2), store.add("n", 3), store.check(["a"]), store.check(["b"])]
    seen += [store.compare_set("a", b"\x00\xff", b"new"), store.delete_key("a"), store.num_keys()]
    store.wait(["n"], 5.0)
    try:
        store.get("never", 0.05)
    except DeadlineExceeded:
        seen.append("late")
    return _done(repr(seen))


def waits_for_stop(context: TaskContext) -> Outcome:
    stopped = threading.Event()
    modes: list[str] = []

    def on_stop(mode: object) -> None:
        modes.append(str(mode))
        stopped.set()

    context.channel.on_stop(on_stop)
    context.channel.ready()
    stopped.wait()
    return _done(f"{modes} {context.channel.stop_requested()}")


def ignores_stop(context: TaskContext) -> Outcome:
    context.channel.ready()
    _FOREVER.wait()
    return _done()


def starts_processes(context: TaskContext) -> Outcome:
    """A child, and a grandchild in a session of its own whose parent is gone: neither may outlive the worker."""
    child = subprocess.Popen(["sleep", "300"])
    escaped = subprocess.run(
        ["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    sys.stdout.write(f"pids {os.getpid()} {child.pid} {escaped.stdout.strip()}\n")
    context.channel.ready()
    _FOREVER.wait()
    return _done()


def raises(context: TaskContext) -> Outcome:
    raise RuntimeError("the entry is broken")


def exits(context: TaskContext) -> Outcome:
    sys.stdout.write("about to leave\n")
    os._exit(3)


def prints_and_hangs(context: TaskContext) -> Outcome:
    sys.stdout.write("downloading forever\n")
    _FOREVER.wait()
    return _done()


def prints_and_fails(context: TaskContext) -> Outcome:
    sys.stdout.write("".join(f"line {number}\n" for number in range(30)))
    fault = Fault(Reason.MODEL_UNUSABLE, Blame.USER_CODE, "no", last_lines=("Traceback of the user",))
    return Outcome(AttemptState.FAILED, fault=fault)


def is_killed(context: TaskContext) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    return _done()


def grows(context: TaskContext) -> Outcome:
    context.channel.ready()
    kept = []
    while True:
        kept.append(b"x" * (8 * 2**20))
        time.sleep(0.01)


def freezes(context: TaskContext) -> Outcome:
    context.channel.ready()
    os.kill(os.getpid(), signal.SIGSTOP)
    return _done()


def spins(context: TaskContext) -> Outcome:
    context.channel.ready()
    while True:
        pass


def names_a_file_of_the_owner(context: TaskContext) -> Outcome:
    context.channel.artifact("passwd", Path("/etc/passwd"))
    _FOREVER.wait()
    return _done()


def sends_garbage(context: TaskContext) -> Outcome:
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            connection = socket.socket(fileno=os.dup(int(descriptor.name)))
            connection.sendall(b"\xff" * 64)
        except OSError:
            continue
    _FOREVER.wait()
    return _done()


def prints_much(context: TaskContext) -> Outcome:
    sys.stdout.write("x" * 100_000 + "\n")
    for percent in range(100):
        sys.stdout.write(f"\r{percent} %")
    sys.stdout.write("\n")
    sys.stdout.write("no newline at the end")
    return _done()


def holds_when_stopped(context: TaskContext) -> Outcome:
    """Has a checkpoint uploaded, and keeps it when it is asked to end."""
    folder = context.workspace.checkpoint_dir / "step-00000005"
    folder.mkdir(parents=True)
    stopped = threading.Event()
    context.channel.on_stop(lambda mode: stopped.set())
    context.channel.checkpoint(folder, 5, 160)
    stopped.wait()
    return Outcome(AttemptState.FAILED, step=5, samples=160, held_step=5)


def _checkpoint(context: TaskContext, step: int) -> None:
    folder = context.workspace.checkpoint_dir / f"step-{step:08d}"
    folder.mkdir(parents=True)
    context.channel.checkpoint(folder, step, 32 * step)


def waits_for_its_upload(context: TaskContext) -> Outcome:
    _checkpoint(context, 5)
    while context.channel.uploading():
        time.sleep(0.001)
    return _done()


def asks_whether_it_uploads(context: TaskContext) -> Outcome:
    """What it is told after a first checkpoint, after a second one that is let be, and at last."""
    _checkpoint(context, 5)
    said = [context.channel.uploading()]
    _checkpoint(context, 6)
    said.append(context.channel.uploading())
    context.channel.ready()
    while context.channel.uploading():
        time.sleep(0.001)
    said.append(context.channel.uploading())
    return _done(" ".join(map(str, said)))

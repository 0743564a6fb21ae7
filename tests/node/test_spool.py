"""The spool: numbered, on disk, sent again until acknowledged, whatever is killed when."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node import spool as spool_module
from node.spool import Spool
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2


def report(job: str = "j-1", state: str = "DONE") -> pb.Durable:
    return pb.Durable(job_id=job, fence=1, report=work_pb2.AttemptReport(state=state, outcome_json=b"{}"))


def output(size: int = 10, job: str = "j-1") -> pb.Durable:
    return pb.Durable(job_id=job, logs=work_pb2.LogLines(lines=["x" * size]))


def progress(job: str = "j-1") -> pb.Durable:
    return pb.Durable(job_id=job, progress_json=b"{}")


def numbers(spool: Spool) -> list[int]:
    return [message.seq for message in spool.waiting()]


def test_messages_are_numbered_and_wait_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for message in (report(), progress(), output()):
        spool.append(message)
    assert numbers(spool) == [1, 2, 3]
    assert [m.seq for m in spool.acknowledge(2)] == [1, 2]
    assert numbers(spool) == [3]
    assert [m.seq for m in spool.waiting(after_seq=3)] == []


def test_a_daemon_that_was_killed_sends_what_waits_and_goes_on_numbering(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.append(report())
    first.append(report("j-2"))
    first.acknowledge(1)
    second = Spool(tmp_path)  # the first was never closed
    assert second.spool_id == first.spool_id
    assert [m.job_id for m in second.reports() if m.seq > 1] == ["j-2"]
    stored = second.append(progress())
    assert stored is not None
    assert stored.seq == 3


def test_numbers_are_not_used_again_after_everything_was_acknowledged(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.append(report())
    first.acknowledge(1)
    first.close()
    second = Spool(tmp_path)
    assert second.waiting() == []
    stored = second.append(report())
    assert stored is not None
    assert stored.seq == 2


def test_a_machine_that_lost_its_power_does_not_reuse_numbers_the_coordinator_has(tmp_path: Path) -> None:
    """Progress is not fsynced: what the coordinator accepted may be gone here, and its numbers with it."""
    spool = Spool(tmp_path)
    assert spool.acknowledge(17) == []
    stored = spool.append(report())
    assert stored is not None
    assert stored.seq == 18


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 9])
def test_a_torn_tail_is_cut_off(tmp_path: Path, cut: int) -> None:
    first = Spool(tmp_path)
    first.append(report())
    first.append(report("j-2"))
    first.close()
    path = tmp_path / "spool"
    path.write_bytes(path.read_bytes()[:-cut])
    second = Spool(tmp_path)
    assert [m.job_id for m in second.waiting()] == ["j-1"]
    second.append(report("j-3"))
    second.close()
    assert [m.job_id for m in Spool(tmp_path).waiting()] == ["j-1", "j-3"]


@pytest.mark.parametrize("garbage", [b"\0" * 64, b"\x05\0\0\0\xff\xff\xff\xff\xff", b"\xff" * 40])
def test_a_damaged_tail_does_not_keep_the_daemon_from_starting(tmp_path: Path, garbage: bytes) -> None:
    first = Spool(tmp_path)
    first.append(report())
    first.close()
    with (tmp_path / "spool").open("ab") as file:
        file.write(garbage)
    second = Spool(tmp_path)
    assert [m.job_id for m in second.waiting()] == ["j-1"]
    second.append(report("j-2"))
    second.close()
    assert [m.job_id for m in Spool(tmp_path).waiting()][-1] == "j-2"


def test_output_is_bounded_while_the_coordinator_is_away_but_results_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "MAX_WAITING_LOG_BYTES", 1000)
    spool = Spool(tmp_path)
    kept = [spool.append(output(90)) for _ in range(20)]
    assert 5 < sum(message is not None for message in kept) < 12
    assert spool.append(report()) is not None
    assert spool.append(progress()) is not None
    spool.close()
    assert Spool(tmp_path).append(output(900)) is None  # also counted after a restart


def test_the_bound_on_output_does_not_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MAX_WAITING_LOG_BYTES", 1000)
    spool = Spool(tmp_path)
    for _ in range(200):
        stored = spool.append(output(90))
        assert stored is not None
        spool.acknowledge(stored.seq)
    assert sum(spool.append(output(90)) is not None for _ in range(20)) < 12


def test_a_long_absence_does_not_grow_the_file_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_COMPACT_BYTES", 2000)
    spool = Spool(tmp_path)
    spool.append(report())
    for _ in range(100):
        stored = spool.append(output(90))
        assert stored is not None
        spool.acknowledge(stored.seq - 1)
    assert (tmp_path / "spool").stat().st_size < 5000
    spool.close()
    again = Spool(tmp_path)  # knows some acknowledged ones still; the welcome says it again
    again.acknowledge(100)
    assert numbers(again) == [101]


def test_a_lost_name_begins_a_new_series(tmp_path: Path) -> None:
    """Under the old numbers the coordinator would take new messages for repetitions."""
    first = Spool(tmp_path)
    first.append(report())
    first.close()
    (tmp_path / "spool.id").write_text("")
    second = Spool(tmp_path)
    assert second.spool_id != first.spool_id
    assert second.waiting() == []


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_as_a_spool_file_let_the_daemon_start(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Spool(Path(folder)).close()
        (Path(folder) / "spool").write_bytes(content)
        spool = Spool(Path(folder))
        stored = spool.append(report())
        assert stored is not None
        assert numbers(spool)[-1] == stored.seq
        spool.close()


class Deliveries(RuleBasedStateMachine):
    """Kills between any two calls: everything appended is delivered in order, once by number."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.spool = Spool(Path(self._folder.name))
        self.appended: list[bytes] = []
        self.accepted = 0

    @rule(kind=st.sampled_from([report, output, progress]))
    def append(self, kind) -> None:  # type: ignore[no-untyped-def]
        stored = self.spool.append(kind())
        assert stored is not None
        assert stored.seq == len(self.appended) + 1
        self.appended.append(stored.SerializeToString())

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.accepted = max(self.accepted, data.draw(st.integers(0, len(self.appended))))
        self.spool.acknowledge(self.accepted)

    @rule(closed=st.booleans())
    def kill(self, closed: bool) -> None:
        if closed:
            self.spool.close()
        self.spool = Spool(Path(self._folder.name))
        self.spool.acknowledge(self.accepted)  # the welcome says it again

    @invariant()
    def waits_exactly_what_was_not_accepted(self) -> None:
        assert [m.SerializeToString() for m in self.spool.waiting()] == self.appended[self.accepted :]

    def teardown(self) -> None:
        self.spool.close()
        self._folder.cleanup()


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_a_report_finds_room_on_a_full_disk_and_a_torn_write_leaves_nothing_behind(tmp_path: Path) -> None:
    """The size limit of the process stands for the disk: a write over it is cut short, or refused."""
    script = f"""
import errno, resource, signal
from pathlib import Path
from node.spool import Spool
from protos.gen import membership_pb2 as pb
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
spool = Spool(folder)
log = pb.Durable(job_id="j", logs={{"lines": ["x" * 1000]}})
spool.append(log)
size = (folder / "spool").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    spool.append(pb.Durable(job_id="j", logs={{"lines": ["y" * 1000]}}))
except OSError as error:
    assert error.errno in (errno.EFBIG, errno.ENOSPC), error
else:
    raise SystemExit("written over the limit")
assert (folder / "spool").stat().st_size == size
print([message.seq for message in Spool(folder).waiting()])
report = {{"state": "DONE", "outcome_json": b"{{}}" + b" " * 1000}}
spool.append(pb.Durable(job_id="j", report=report))
print([message.seq for message in spool.waiting()])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["[1]", "[1, 2]"]), done.stderr


def test_a_disk_too_full_to_compact_leaves_a_spool_that_still_takes_reports(tmp_path: Path) -> None:
    """As on a disk whose last block another job holds: nothing can be written beside the file, appending works."""
    spool = Spool(tmp_path)
    spool.append(report("j-1"))
    beside = tmp_path / "spool.new"
    beside.mkdir()
    assert [message.seq for message in spool.acknowledge(1)] == [1]
    spool.append(report("j-2"))
    assert numbers(Spool(tmp_path)) == [1, 2]  # sent once more: the coordinator knows number 1
    beside.rmdir()
    spool.acknowledge(2)
    spool.append(report("j-3"))
    spool.close()
    assert numbers(Spool(tmp_path)) == [3]

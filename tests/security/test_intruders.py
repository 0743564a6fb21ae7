"""Members that say what they may not: each is refused by its role, its certificate or its place in the job."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from coordinator.authority import check_request, open_authority
from protos import documents, enrol, limits
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.credentials import Credential
from protos.errors import AccessError, ErrorCode, Exhausted, HiveError, SpecError, Unreachable
from protos.gen import artifacts_pb2, jobs_pb2, work_pb2
from protos.gen import membership_pb2 as pb
from protos.ids import Digest, Fence, JobId
from protos.states import AttemptState
from protos.token import Role, parse_token
from protos.work import Checkpoint, HeldLease, Metrics, Outcome, Progress
from tests.e2e.cluster import until
from tests.security.at_rest import contents
from tests.security.conftest import JOB, Working
from tests.security.intruder import Intruder, calling, hello

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FAR = 999_999
LOSS = -123.5


def joined(working: Working, role: str, name: str) -> Credential:
    made = asyncio.run(enrol.enrol(working.cluster.address, parse_token(working.token(role)), name))
    assert made.role == role
    return made


def refused(working: Working, credential: Credential, call: Any) -> HiveError:
    """The error of one call with this credential."""

    async def main() -> HiveError:
        try:
            async with calling(working.session_address, credential) as stubs:
                await call(stubs)
        except HiveError as error:
            return error
        raise AssertionError("it was not refused")

    return asyncio.run(main())


# ---- roles


def test_a_nodes_credential_submits_nothing_and_makes_no_token(working: Working) -> None:
    node = working.node("n0")
    spec = JOB.read_bytes()
    for call in (
        lambda stubs: stubs.jobs.Submit(jobs_pb2.SubmitRequest(spec_json=spec), timeout=10),
        lambda stubs: stubs.jobs.Plan(jobs_pb2.SubmitRequest(spec_json=spec), timeout=10),
        lambda stubs: stubs.jobs.Control(jobs_pb2.ControlRequest(job_id=working.job_id, action="cancel"), timeout=10),
        lambda stubs: stubs.jobs.CreateToken(jobs_pb2.TokenRequest(role="admin", lifetime_s=60), timeout=10),
        lambda stubs: stubs.jobs.Nodes(jobs_pb2.NodesRequest(), timeout=10),
    ):
        assert refused(working, node, call).code is ErrorCode.FORBIDDEN


def test_a_submitter_makes_no_token_and_removes_no_node(working: Working) -> None:
    submitter = joined(working, "submitter", "guest")
    for call in (
        lambda stubs: stubs.jobs.CreateToken(jobs_pb2.TokenRequest(role="node", lifetime_s=60), timeout=10),
        lambda stubs: stubs.jobs.ListTokens(jobs_pb2.ListRequest(), timeout=10),
        lambda stubs: stubs.jobs.ControlNode(jobs_pb2.NodeControlRequest(node_id="n0", action="remove"), timeout=10),
        lambda stubs: stubs.membership.Probe(pb.Echo(content=b"x"), timeout=10),
    ):
        assert refused(working, submitter, call).code is ErrorCode.FORBIDDEN

    with pytest.raises(HiveError) as caught:
        asyncio.run(_attach(working, submitter))
    assert caught.value.code is ErrorCode.FORBIDDEN


async def _attach(working: Working, credential: Credential) -> None:
    async with Intruder.attached(working.session_address, credential, hello(credential.name, "s-x")):
        pass


# ---- membership and certificates


def test_a_removed_node_is_refused_at_once_and_when_it_comes_back(working: Working) -> None:
    node = joined(working, "node", "fired")

    async def main() -> None:
        async with Intruder.attached(working.session_address, node, hello("fired", "s-fired")) as intruder:
            removing = asyncio.to_thread(working.cluster.ask, "node", "remove", node.id)
            _, how = await asyncio.gather(removing, intruder.ended(30.0))
            assert how is None or how.code is ErrorCode.UNAUTHENTICATED
        with pytest.raises(AccessError, match="no longer a member"):
            async with Intruder.attached(working.session_address, node, hello("fired", "s-fired")):
                pass
        with pytest.raises(AccessError, match="no longer a member"):
            async with calling(working.session_address, node) as stubs:
                await stubs.artifacts.Missing(artifacts_pb2.MissingRequest(digests=["0" * 64]), timeout=10)
        with pytest.raises(AccessError):  # nor does its key give it a new certificate
            await enrol.rejoin(working.cluster.address, node)

    asyncio.run(main())


def test_an_expired_certificate_opens_nothing(working: Working) -> None:
    node = working.node("n0")
    authority = open_authority(working.cluster.home / "coordinator")
    key = check_request(enrol.request_for(node.key_pem))
    old = authority.issue(key, Role.NODE, "n0", time.time() - limits.CERTIFICATE_HOURS * 3600 - 3600)
    expired = replace(node, certificate_pem=old.certificate_pem.decode())
    assert old.subject_id == node.id
    error = refused(
        working, expired, lambda stubs: stubs.membership.Probe(pb.Echo(content=b"x"), timeout=10, wait_for_ready=False)
    )
    assert isinstance(error, Unreachable), error


def test_a_certificate_that_nobody_enrolled_is_no_member(working: Working) -> None:
    """Even with the authority's key: membership is what the store says."""
    authority = open_authority(working.cluster.home / "coordinator")
    key_pem = enrol.new_key_pem()
    issued = authority.issue(check_request(enrol.request_for(key_pem)), Role.ADMIN, "forged", time.time())
    forged = replace(
        working.owner, id=issued.subject_id, key_pem=key_pem, certificate_pem=issued.certificate_pem.decode()
    )
    error = refused(working, forged, lambda stubs: stubs.jobs.List(jobs_pb2.ListRequest(), timeout=10))
    assert error.code is ErrorCode.UNAUTHENTICATED


# ---- the place in a job


def _lies(working: Working, fence: int, rank: int, first_seq: int) -> list[pb.Durable]:
    """What would end, speed up, poison or deface the job, were it believed."""
    metrics = Metrics(time.time(), FAR, 0, "train", LOSS, FAR)
    progress = Progress((metrics,), FAR, FAR, 0, 1, "train", FAR)
    checkpoint = Checkpoint(FAR, FAR, Manifest((FileEntry("model.safetensors", Digest("0" * 64), 1),)))
    report = work_pb2.AttemptReport(
        state="DONE", outcome_json=documents.encode(Outcome(AttemptState.DONE, FAR, FAR, held_step=FAR))
    )
    bodies: list[dict[str, Any]] = [
        {"progress_json": documents.encode(progress)},
        {"checkpoint_json": documents.encode(checkpoint)},
        {"logs": work_pb2.LogLines(lines=["forged"])},
        {"report": report},
    ]
    return [
        pb.Durable(seq=first_seq + number, job_id=working.job_id, fence=fence, rank=rank, **body)
        for number, body in enumerate(bodies)
    ]


def check_unharmed(working: Working, fence: int) -> None:
    job = working.cluster.show(working.job_id)
    assert (job["state"], job["fence"]) == ("RUNNING", fence)
    assert job["step"] < FAR
    folder = working.cluster.home / "coordinator" / "jobs" / working.job_id
    for path, content in contents(folder):
        assert b"forged" not in content and str(LOSS).encode() not in content, path
    events = working.cluster.hive("events", "-o", "json").stdout
    assert str(LOSS) not in events
    working.goes_on()


def test_a_node_outside_the_group_changes_nothing_of_the_job(working: Working) -> None:
    node = joined(working, "node", "stranger")
    fence = working.cluster.show(working.job_id)["fence"]

    async def main() -> None:
        lease = HeldLease(JobId(working.job_id), Fence(fence), 0, AttemptState.RUNNING)
        first = hello("stranger", "s-stranger", (lease,))
        async with Intruder.attached(working.session_address, node, first) as intruder:
            seq = 1
            for rank in (0, 1, 7):
                for lie in _lies(working, fence, rank, seq):
                    await intruder.durable(lie)
                    seq += 1
            call = work_pb2.StoreCall(
                call_id=1, job_id=working.job_id, fence=fence, operation="set", keys=["x"], value=b"y", deadline_s=1
            )
            assert (await intruder.store(call)).status == "refused"

    asyncio.run(main())
    check_unharmed(working, fence)
    assert sorted(working.cluster.show(working.job_id)["nodes"]) == ["n0", "n1"]


def test_a_replayed_message_does_nothing_a_second_time(working: Working) -> None:
    """1. n1 is stopped and an impostor with its credential and spool takes its place. 2. It repeats numbers that were
    accepted with another content. 3. It says something new three times. 4. The job goes on without it."""
    cluster = working.cluster
    node = cluster.nodes["n1"]
    spool_id = (cluster.folder / "n1" / "node" / "spool" / "spool.id").read_text().strip()
    before = cluster.show(working.job_id)
    rank = before["nodes"].index("n1")
    node.kill()

    async def main() -> None:
        lease = HeldLease(JobId(working.job_id), Fence(before["fence"]), rank, AttemptState.RUNNING)
        first = hello("n1", spool_id, (lease,))
        async with Intruder.attached(working.session_address, working.node("n1"), first) as impostor:
            known = impostor.welcome.acknowledged_seq
            assert known > 4, "its reports and its progress were accepted"
            for lie in _lies(working, before["fence"], rank, known - 3):
                await impostor.durable(lie)
            new = pb.Durable(seq=known + 1, job_id=working.job_id, fence=before["fence"], rank=rank)
            new.logs.lines.append("said once")
            for _ in range(3):
                await impostor.durable(new)

    asyncio.run(main())
    again = until(
        lambda: (job := cluster.show(working.job_id))["fence"] > before["fence"] and job, "the group forms again"
    )
    after = cluster.wait_step(working.job_id, again["step"] + 20)
    assert after["state"] == "RUNNING" and after["step"] < FAR
    said = (cluster.home / "coordinator" / "jobs" / working.job_id / f"rank-{rank}.log").read_text()
    assert "forged" not in said and said.count("said once") == 1
    node.start()
    working.begin()


# ---- sizes and contents


def test_a_message_over_the_limit_is_refused_and_the_coordinator_lives(working: Working) -> None:
    async def main() -> None:
        content = bytes(limits.MAX_MESSAGE_BYTES + 1024)
        options = (("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "hive-coordinator"))
        node = working.node("n0")
        secure = grpc.ssl_channel_credentials(
            node.ca_pem.encode(), node.key_pem.encode(), node.certificate_pem.encode()
        )
        async with grpc.aio.secure_channel(working.session_address, secure, options=options) as line:
            probe = line.unary_unary("/hive.v1.Membership/Probe", pb.Echo.SerializeToString, pb.Echo.FromString)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await probe(pb.Echo(content=content), timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(main())
    spec = b"name: x\n#" + b"x" * limits.MAX_JOB_SPEC_BYTES
    error = refused(
        working,
        working.owner,
        lambda stubs: stubs.jobs.Submit(jobs_pb2.SubmitRequest(spec_json=spec), timeout=10),
    )
    assert isinstance(error, (SpecError, Exhausted))


@pytest.mark.parametrize(
    "path", ["../escape.py", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\..\\b", "", "a\0b", "a/.."]
)
def test_a_manifest_with_an_unsafe_path_is_refused(working: Working, path: str) -> None:
    entry = FileEntry("PATH", digest_bytes(b""), 0)
    document = documents.encode(Manifest((entry,))).replace(b'"PATH"', documents.encode_as(str, path))
    spec = JOB.read_bytes()
    request = jobs_pb2.SubmitRequest(spec_json=spec, code_json=document)
    submit = refused(working, working.owner, lambda stubs: stubs.jobs.Submit(request, timeout=10))
    assert isinstance(submit, SpecError), submit
    locate = jobs_pb2.LocateRequest(manifest_json=document)
    assert isinstance(refused(working, working.owner, lambda stubs: stubs.jobs.Locate(locate, timeout=10)), SpecError)


@pytest.mark.parametrize("digest", ["", "0" * 63, "../../../../etc/passwd", "G" * 64, "0" * 64 + "/x"])
def test_what_is_no_digest_reaches_no_file(working: Working, digest: str) -> None:
    async def get(stubs: Any) -> None:
        async for _ in stubs.artifacts.Get(artifacts_pb2.GetRequest(digest=digest), timeout=10):
            pass

    async def put(stubs: Any) -> None:
        await stubs.artifacts.Put(
            iter([artifacts_pb2.PutChunk(digest=digest, total_bytes=1, content=b"x")]), timeout=10
        )

    for call in (get, put):
        assert isinstance(refused(working, working.node("n0"), call), SpecError)


def test_content_under_another_contents_digest_is_not_kept(working: Working) -> None:
    digest = digest_bytes(b"what was promised")
    content = b"what is delivered"
    chunk = artifacts_pb2.PutChunk(digest=digest, total_bytes=len(content), content=content)

    async def put(stubs: Any) -> None:
        await stubs.artifacts.Put(iter([chunk]), timeout=10)

    assert refused(working, working.node("n0"), put).code is ErrorCode.CORRUPT

    async def missing() -> list[str]:
        async with calling(working.session_address, working.node("n0")) as stubs:
            reply = await stubs.artifacts.Missing(artifacts_pb2.MissingRequest(digests=[digest]), timeout=10)
            return list(reply.digests)

    assert asyncio.run(missing()) == [digest]
    blobs = working.cluster.home / "coordinator" / "blobs"
    assert not [path for path, held in contents(blobs) if held == content]

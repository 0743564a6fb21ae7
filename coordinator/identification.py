"""From a submission to what its model and data are: in a confined child for files, on a node for Python source.

Owns the choice of who looks and a small memory of what was found. The coordinator itself never opens a model.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from coordinator.identify.confine import identify_file, identify_files, usable_as_weights
from coordinator.sessions import Session, Sessions
from coordinator.submission import Submission
from protos import documents
from protos.artifact import Manifest
from protos.errors import Blame, ErrorCode, HiveError, SpecError, Unreachable
from protos.ids import Digest, JobId, NodeId
from protos.jobspec import entry_point
from protos.plan import Identification
from protos.states import Reason
from protos.work import Fault, TaskKind
from strategies.hugging_face import CONFIG_FILE

_REMEMBERED = 256
READERS_AT_ONCE = max(os.cpu_count() or 1, 2)  # each may take a core and hundreds of megabytes
BUILD_S = 60.0  # for the user's own code: importing it, opening the data, building the model
_READ_BYTES_PER_S = 20e6  # so much longer for data that must be read
_BEFORE_S = 90.0  # a node may have to import torch, fetch the data and let others go first
_OVERRUNS = 2  # of the same model, on nodes that were busy with other work too


class Refusal(SpecError):
    """The user's model or data cannot be used, with the reason that a job shows."""

    def __init__(self, reason: Reason, blame: Blame, error: HiveError) -> None:
        super().__init__(error.message, error.hint, code=error.code, blame=blame, details=error.details)
        self.reason = reason


class Identifier:
    """`build_s`: how long the user's code may take on a node before it counts as hanging; `readers_at_once`: how many
    confined children may read files at the same time, the others wait."""

    def __init__(
        self,
        sessions: Sessions,
        blob: Callable[[Digest], Path],
        build_s: float = BUILD_S,
        readers_at_once: int = READERS_AT_ONCE,
    ) -> None:
        self._sessions = sessions
        self._build_s = build_s
        self._readers = asyncio.Semaphore(readers_at_once)
        self._overruns: OrderedDict[str, int] = OrderedDict()
        self._blob = blob
        self._known: OrderedDict[str, tuple[Identification, Session | None]] = OrderedDict()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def check_file(self, submission: Submission) -> None:
        """Refuse at once a model file that hive cannot train or take weights from. Raises SpecError (exit 3)."""
        spec = submission.spec
        if submission.weights is None:
            return
        names = {file.path for file in submission.weights.files}
        if not entry_point(spec.model.source) and CONFIG_FILE in names:
            await self._check_directory(submission.weights)
            return
        async with self._readers:
            profile = await identify_file(self._blob(submission.weights.files[0].digest))
        if entry_point(spec.model.source):
            if not usable_as_weights(profile):
                raise SpecError(
                    f"model.weights: {spec.model.weights} is {profile.format}, which holds no weights that hive loads",
                    "give a .safetensors file, or a state dict written by torch.save",
                    code=ErrorCode.MODEL_UNUSABLE,
                )
            return
        if not profile.trainable:
            message = f"{spec.model.source} is {profile.format} ({profile.family}, {profile.parameters:,} parameters)"
            raise SpecError(f"{message}: it cannot be trained as it is", profile.why_not, code=ErrorCode.MODEL_UNUSABLE)

    async def _check_directory(self, files: Manifest) -> None:
        """That hive trains such a configuration, and that weights and their index are what they say."""
        async with self._readers:
            profile = await identify_files("model.source", {file.path: self._blob(file.digest) for file in files.files})
        if not profile.trainable:
            raise SpecError(f"model.source cannot be trained: {profile.why_not}", code=ErrorCode.MODEL_UNUSABLE)

    async def identify(
        self, submission: Submission, job_id: JobId, nodes: tuple[NodeId, ...], nobody: str = "no node has joined"
    ) -> Identification:
        """Ask the nodes in turn, the least asked first. Raises Refusal for what the user must change, Unreachable when
        no node could say; `nobody` is why there is none to ask."""
        key = submission.key
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:  # many jobs of one sweep: the first asks, the others wait for its answer
            return await self._identify(key, submission, job_id, nodes, nobody)

    async def _identify(
        self, key: str, submission: Submission, job_id: JobId, nodes: tuple[NodeId, ...], nobody: str
    ) -> Identification:
        if (known := self._recall(key, submission, nodes)) is not None:
            return known
        data = (each.bytes for each in (submission.data, submission.test) if each is not None)
        build_s = self._build_s + sum(data) / _READ_BYTES_PER_S
        task = replace(submission.task(TaskKind.IDENTIFY, job_id), deadline_s=build_s)
        trouble = nobody
        left, unfit = list(nodes), list[Fault]()
        while left:
            node_id = min(left, key=self._sessions.open_tasks)  # of equal ones the first
            left.remove(node_id)
            session = self._sessions.get(node_id)
            try:
                outcome = await self._sessions.run_task(node_id, task, _BEFORE_S + build_s)
            except HiveError as error:
                trouble = error.message
                continue
            if outcome.fault is None and outcome.document:
                found = _understood(outcome.document)
                self._remember(key, found, session)
                return found
            if outcome.fault is not None and outcome.fault.lacking:
                unfit.append(outcome.fault)  # that node lacks the data, or a package: the next may have them
            elif outcome.fault is not None and (not outcome.fault.retryable or self._again(key, outcome.fault)):
                raise _refusal(_the_models_doing(outcome.fault))
            trouble = outcome.fault.message if outcome.fault else "the node answered nothing"
        if unfit and len(unfit) == len(nodes):
            raise _refusal(unfit[0])
        raise Unreachable(
            f"the model cannot be identified yet: {trouble}",
            "start a node with hive-node start --token TOKEN (hive token create prints the command)",
        )

    def _again(self, key: str, fault: Fault) -> bool:
        """It overran its time, or its worker died, again: once may be the machine's doing."""
        if fault.reason not in (Reason.MODEL_UNUSABLE, Reason.NODE_LOST):
            return False
        self._overruns[key] = self._overruns.pop(key, 0) + 1
        while len(self._overruns) > _REMEMBERED:
            self._overruns.popitem(last=False)
        return self._overruns[key] >= _OVERRUNS

    def _recall(self, key: str, submission: Submission, nodes: tuple[NodeId, ...]) -> Identification | None:
        """What was found before. Data that come with Python or a package are those of the node that looked: what it
        found counts while that node is connected as it was then."""
        if key not in self._known:
            return None
        found, session = self._known[key]
        if submission.data is None and session not in [self._sessions.get(node_id) for node_id in nodes]:
            return None
        self._known.move_to_end(key)
        return found

    def _remember(self, key: str, found: Identification, session: Session | None) -> None:
        self._known[key] = found, session
        self._known.move_to_end(key)
        self._overruns.pop(key, None)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


def _understood(document: str) -> Identification:
    try:
        return documents.decode(Identification, document)
    except SpecError as error:  # asking again would give the same
        raise Refusal(Reason.MODEL_UNUSABLE, Blame.COORDINATOR, error) from None


def _the_models_doing(fault: Fault) -> Fault:
    if fault.reason is not Reason.NODE_LOST:
        return fault
    message = f"the worker that built the model or read the data died, each time: {fault.message}"
    return replace(fault, reason=Reason.MODEL_UNUSABLE, blame=Blame.USER_CODE, message=message)


def _refusal(fault: Fault) -> Refusal:
    code = {
        Reason.DATA_UNUSABLE: ErrorCode.DATA_UNUSABLE,
        Reason.MODEL_UNUSABLE: ErrorCode.MODEL_UNUSABLE,
        Reason.USER_CODE: ErrorCode.MODEL_UNUSABLE,
    }.get(fault.reason, ErrorCode.JOB_FAILED)
    reason = Reason.MODEL_UNUSABLE if fault.reason is Reason.USER_CODE else fault.reason
    return Refusal(reason, fault.blame, HiveError(fault.message, fault.hint, code=code, details=fault.last_lines))

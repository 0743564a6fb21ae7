from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Offer(_message.Message):
    __slots__ = ("task_json", "ttl_s")
    TASK_JSON_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    task_json: bytes
    ttl_s: float
    def __init__(self, task_json: _Optional[bytes] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("job_id", "fence", "mode", "reason")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    fence: int
    mode: str
    reason: str
    def __init__(self, job_id: _Optional[str] = ..., fence: _Optional[int] = ..., mode: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class AttemptReport(_message.Message):
    __slots__ = ("state", "outcome_json")
    STATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_JSON_FIELD_NUMBER: _ClassVar[int]
    state: str
    outcome_json: bytes
    def __init__(self, state: _Optional[str] = ..., outcome_json: _Optional[bytes] = ...) -> None: ...

class LogLines(_message.Message):
    __slots__ = ("lines",)
    LINES_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lines: _Optional[_Iterable[str]] = ...) -> None: ...

class TaskRequest(_message.Message):
    __slots__ = ("call_id", "task_json", "deadline_s")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_JSON_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    task_json: bytes
    deadline_s: float
    def __init__(self, call_id: _Optional[int] = ..., task_json: _Optional[bytes] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class TaskCancel(_message.Message):
    __slots__ = ("call_id",)
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    def __init__(self, call_id: _Optional[int] = ...) -> None: ...

class TaskResult(_message.Message):
    __slots__ = ("call_id", "outcome_json")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_JSON_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    outcome_json: bytes
    def __init__(self, call_id: _Optional[int] = ..., outcome_json: _Optional[bytes] = ...) -> None: ...

class StoreCall(_message.Message):
    __slots__ = ("call_id", "job_id", "fence", "operation", "keys", "value", "expected", "amount", "deadline_s")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    job_id: str
    fence: int
    operation: str
    keys: _containers.RepeatedScalarFieldContainer[str]
    value: bytes
    expected: bytes
    amount: int
    deadline_s: float
    def __init__(self, call_id: _Optional[int] = ..., job_id: _Optional[str] = ..., fence: _Optional[int] = ..., operation: _Optional[str] = ..., keys: _Optional[_Iterable[str]] = ..., value: _Optional[bytes] = ..., expected: _Optional[bytes] = ..., amount: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class StoreReply(_message.Message):
    __slots__ = ("call_id", "status", "value", "number", "message")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    status: str
    value: bytes
    number: int
    message: str
    def __init__(self, call_id: _Optional[int] = ..., status: _Optional[str] = ..., value: _Optional[bytes] = ..., number: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class FileQuestion(_message.Message):
    __slots__ = ("call_id", "manifest_json")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    manifest_json: bytes
    def __init__(self, call_id: _Optional[int] = ..., manifest_json: _Optional[bytes] = ...) -> None: ...

class FileAnswer(_message.Message):
    __slots__ = ("call_id", "present_digests")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    present_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, call_id: _Optional[int] = ..., present_digests: _Optional[_Iterable[str]] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Document(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class NodesRequest(_message.Message):
    __slots__ = ("lan",)
    LAN_FIELD_NUMBER: _ClassVar[int]
    lan: bool
    def __init__(self, lan: _Optional[bool] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("spec_json", "code_json", "data_json", "test_json", "weights_json", "idempotency_key")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    CODE_JSON_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    TEST_JSON_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_JSON_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    spec_json: bytes
    code_json: bytes
    data_json: bytes
    test_json: bytes
    weights_json: bytes
    idempotency_key: str
    def __init__(self, spec_json: _Optional[bytes] = ..., code_json: _Optional[bytes] = ..., data_json: _Optional[bytes] = ..., test_json: _Optional[bytes] = ..., weights_json: _Optional[bytes] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class IdentifyRequest(_message.Message):
    __slots__ = ("model_json", "code_json", "weights_json")
    MODEL_JSON_FIELD_NUMBER: _ClassVar[int]
    CODE_JSON_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_JSON_FIELD_NUMBER: _ClassVar[int]
    model_json: bytes
    code_json: bytes
    weights_json: bytes
    def __init__(self, model_json: _Optional[bytes] = ..., code_json: _Optional[bytes] = ..., weights_json: _Optional[bytes] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("limit", "all")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    limit: int
    all: bool
    def __init__(self, limit: _Optional[int] = ..., all: _Optional[bool] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ("job_id", "after_step")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_step: int
    def __init__(self, job_id: _Optional[str] = ..., after_step: _Optional[int] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("job_id", "action")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    action: str
    def __init__(self, job_id: _Optional[str] = ..., action: _Optional[str] = ...) -> None: ...

class NodeControlRequest(_message.Message):
    __slots__ = ("node_id", "action")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    action: str
    def __init__(self, node_id: _Optional[str] = ..., action: _Optional[str] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("after_seq", "job_id", "follow")
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    after_seq: int
    job_id: str
    follow: bool
    def __init__(self, after_seq: _Optional[int] = ..., job_id: _Optional[str] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("seq", "time_unix_s", "kind", "job_id", "node_id", "payload_json")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_JSON_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time_unix_s: float
    kind: str
    job_id: str
    node_id: str
    payload_json: bytes
    def __init__(self, seq: _Optional[int] = ..., time_unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., job_id: _Optional[str] = ..., node_id: _Optional[str] = ..., payload_json: _Optional[bytes] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("job_id", "rank", "follow", "after_bytes")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    AFTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    rank: int
    follow: bool
    after_bytes: int
    def __init__(self, job_id: _Optional[str] = ..., rank: _Optional[int] = ..., follow: _Optional[bool] = ..., after_bytes: _Optional[int] = ...) -> None: ...

class LogChunk(_message.Message):
    __slots__ = ("text", "end_bytes", "finished", "state")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    END_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    end_bytes: int
    finished: bool
    state: str
    def __init__(self, text: _Optional[bytes] = ..., end_bytes: _Optional[int] = ..., finished: _Optional[bool] = ..., state: _Optional[str] = ...) -> None: ...

class TokenRequest(_message.Message):
    __slots__ = ("role", "uses", "lifetime_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    uses: int
    lifetime_s: float
    def __init__(self, role: _Optional[str] = ..., uses: _Optional[int] = ..., lifetime_s: _Optional[float] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("token_id",)
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    def __init__(self, token_id: _Optional[str] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("manifest_json",)
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    manifest_json: bytes
    def __init__(self, manifest_json: _Optional[bytes] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("missing_digests", "shared_digests")
    MISSING_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    missing_digests: _containers.RepeatedScalarFieldContainer[str]
    shared_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, missing_digests: _Optional[_Iterable[str]] = ..., shared_digests: _Optional[_Iterable[str]] = ...) -> None: ...

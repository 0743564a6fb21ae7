from protos.gen import work_pb2 as _work_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("protocol", "minimum_protocol", "secret", "csr_der", "name")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    minimum_protocol: int
    secret: str
    csr_der: bytes
    name: str
    def __init__(self, protocol: _Optional[int] = ..., minimum_protocol: _Optional[int] = ..., secret: _Optional[str] = ..., csr_der: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate_pem", "ca_pem", "subject_id", "role", "session_port", "expires_unix_s")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_PORT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    ca_pem: bytes
    subject_id: str
    role: str
    session_port: int
    expires_unix_s: float
    def __init__(self, certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., subject_id: _Optional[str] = ..., role: _Optional[str] = ..., session_port: _Optional[int] = ..., expires_unix_s: _Optional[float] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_der",)
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    csr_der: bytes
    def __init__(self, csr_der: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate_pem", "expires_unix_s")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    expires_unix_s: float
    def __init__(self, certificate_pem: _Optional[bytes] = ..., expires_unix_s: _Optional[float] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "minimum_protocol", "software", "name", "capacity_json", "leases_json", "spool_id", "activity", "activity_reason", "peers")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_JSON_FIELD_NUMBER: _ClassVar[int]
    LEASES_JSON_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_REASON_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    minimum_protocol: int
    software: str
    name: str
    capacity_json: bytes
    leases_json: bytes
    spool_id: str
    activity: str
    activity_reason: str
    peers: bool
    def __init__(self, protocol: _Optional[int] = ..., minimum_protocol: _Optional[int] = ..., software: _Optional[str] = ..., name: _Optional[str] = ..., capacity_json: _Optional[bytes] = ..., leases_json: _Optional[bytes] = ..., spool_id: _Optional[str] = ..., activity: _Optional[str] = ..., activity_reason: _Optional[str] = ..., peers: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "node_id", "heartbeat_s", "lease_ttl_s", "acknowledged_seq")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_SEQ_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    node_id: str
    heartbeat_s: float
    lease_ttl_s: float
    acknowledged_seq: int
    def __init__(self, protocol: _Optional[int] = ..., node_id: _Optional[str] = ..., heartbeat_s: _Optional[float] = ..., lease_ttl_s: _Optional[float] = ..., acknowledged_seq: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("number", "sent_s", "load", "activity", "activity_reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    sent_s: float
    load: float
    activity: str
    activity_reason: str
    def __init__(self, number: _Optional[int] = ..., sent_s: _Optional[float] = ..., load: _Optional[float] = ..., activity: _Optional[str] = ..., activity_reason: _Optional[str] = ...) -> None: ...

class HeartbeatEcho(_message.Message):
    __slots__ = ("number", "sent_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SENT_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    sent_s: float
    def __init__(self, number: _Optional[int] = ..., sent_s: _Optional[float] = ...) -> None: ...

class Durable(_message.Message):
    __slots__ = ("seq", "job_id", "fence", "rank", "report", "checkpoint_json", "progress_json", "logs")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_JSON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_JSON_FIELD_NUMBER: _ClassVar[int]
    LOGS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    job_id: str
    fence: int
    rank: int
    report: _work_pb2.AttemptReport
    checkpoint_json: bytes
    progress_json: bytes
    logs: _work_pb2.LogLines
    def __init__(self, seq: _Optional[int] = ..., job_id: _Optional[str] = ..., fence: _Optional[int] = ..., rank: _Optional[int] = ..., report: _Optional[_Union[_work_pb2.AttemptReport, _Mapping]] = ..., checkpoint_json: _Optional[bytes] = ..., progress_json: _Optional[bytes] = ..., logs: _Optional[_Union[_work_pb2.LogLines, _Mapping]] = ...) -> None: ...

class NodeMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "durable", "store_call", "capacity_json", "file_answer", "leaving", "task_result", "probe_result")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    STORE_CALL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_JSON_FIELD_NUMBER: _ClassVar[int]
    FILE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    TASK_RESULT_FIELD_NUMBER: _ClassVar[int]
    PROBE_RESULT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    durable: Durable
    store_call: _work_pb2.StoreCall
    capacity_json: bytes
    file_answer: _work_pb2.FileAnswer
    leaving: Leaving
    task_result: _work_pb2.TaskResult
    probe_result: ProbeResult
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., durable: _Optional[_Union[Durable, _Mapping]] = ..., store_call: _Optional[_Union[_work_pb2.StoreCall, _Mapping]] = ..., capacity_json: _Optional[bytes] = ..., file_answer: _Optional[_Union[_work_pb2.FileAnswer, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., task_result: _Optional[_Union[_work_pb2.TaskResult, _Mapping]] = ..., probe_result: _Optional[_Union[ProbeResult, _Mapping]] = ...) -> None: ...

class Echo(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason", "for_good")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FOR_GOOD_FIELD_NUMBER: _ClassVar[int]
    reason: str
    for_good: bool
    def __init__(self, reason: _Optional[str] = ..., for_good: _Optional[bool] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "echo", "offer", "stop", "acknowledged", "store_reply", "file_question", "task_request", "task_cancel", "roster", "probe_order")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    STORE_REPLY_FIELD_NUMBER: _ClassVar[int]
    FILE_QUESTION_FIELD_NUMBER: _ClassVar[int]
    TASK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TASK_CANCEL_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PROBE_ORDER_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    echo: HeartbeatEcho
    offer: _work_pb2.Offer
    stop: _work_pb2.Stop
    acknowledged: Acknowledged
    store_reply: _work_pb2.StoreReply
    file_question: _work_pb2.FileQuestion
    task_request: _work_pb2.TaskRequest
    task_cancel: _work_pb2.TaskCancel
    roster: SignedRoster
    probe_order: ProbeOrder
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., echo: _Optional[_Union[HeartbeatEcho, _Mapping]] = ..., offer: _Optional[_Union[_work_pb2.Offer, _Mapping]] = ..., stop: _Optional[_Union[_work_pb2.Stop, _Mapping]] = ..., acknowledged: _Optional[_Union[Acknowledged, _Mapping]] = ..., store_reply: _Optional[_Union[_work_pb2.StoreReply, _Mapping]] = ..., file_question: _Optional[_Union[_work_pb2.FileQuestion, _Mapping]] = ..., task_request: _Optional[_Union[_work_pb2.TaskRequest, _Mapping]] = ..., task_cancel: _Optional[_Union[_work_pb2.TaskCancel, _Mapping]] = ..., roster: _Optional[_Union[SignedRoster, _Mapping]] = ..., probe_order: _Optional[_Union[ProbeOrder, _Mapping]] = ...) -> None: ...

class Acknowledged(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class SignedRoster(_message.Message):
    __slots__ = ("roster_json", "signature")
    ROSTER_JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    roster_json: bytes
    signature: bytes
    def __init__(self, roster_json: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ProbeOrder(_message.Message):
    __slots__ = ("call_id", "subject", "peer_id")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    subject: str
    peer_id: str
    def __init__(self, call_id: _Optional[int] = ..., subject: _Optional[str] = ..., peer_id: _Optional[str] = ...) -> None: ...

class ProbeResult(_message.Message):
    __slots__ = ("call_id", "rtt_minimum_s", "rtt_median_s", "upload_bytes_per_s", "download_bytes_per_s", "network", "problem", "unanswered")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    RTT_MINIMUM_S_FIELD_NUMBER: _ClassVar[int]
    RTT_MEDIAN_S_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    rtt_minimum_s: float
    rtt_median_s: float
    upload_bytes_per_s: float
    download_bytes_per_s: float
    network: str
    problem: str
    unanswered: bool
    def __init__(self, call_id: _Optional[int] = ..., rtt_minimum_s: _Optional[float] = ..., rtt_median_s: _Optional[float] = ..., upload_bytes_per_s: _Optional[float] = ..., download_bytes_per_s: _Optional[float] = ..., network: _Optional[str] = ..., problem: _Optional[str] = ..., unanswered: _Optional[bool] = ...) -> None: ...

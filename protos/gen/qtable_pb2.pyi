from protos.gen import jobs_pb2 as _jobs_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class QTableRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class QTableImport(_message.Message):
    __slots__ = ("content", "name")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    name: str
    def __init__(self, content: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

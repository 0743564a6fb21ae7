"""Bounds that both ends of a wire enforce. One place, units in the names."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
MAX_JOB_SPEC_BYTES = 256 * 1024
MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
MAX_MANIFEST_FILES = 10_000
MAX_CODE_BYTES = 64 * 1024 * 1024
MAX_LOG_LINE_BYTES = 8 * 1024
MAX_STORE_VALUE_BYTES = 1024 * 1024
MAX_STORE_KEYS = 10_000
MAX_STORE_BYTES = 64 * 1024 * 1024  # of all values of one generation
MAX_NODES_PER_JOB = 64
MAX_RANKS_PER_JOB = 256  # a node may be several
MAX_NAME_CHARACTERS = 100
MAX_INT64 = 2**63 - 1
MAX_COUNT = 2**31 - 1  # of steps, epochs, rows of a batch
MAX_RATE = 1e30  # a learning rate that is still a number of float32 beside the weights
MAX_CHECKPOINT_S = 365 * 86400.0

DEFAULT_ENROLMENT_PORT = 7700
DEFAULT_SESSION_PORT = 7701
HEARTBEAT_S = 1.0
LEASE_TTL_S = 5.0
RECONNECT_GRACE_S = 15.0
CALL_DEADLINE_S = 30.0
CERTIFICATE_HOURS = 24

"""The tables, one column per field of the record of the same name. Migrations bring a database to exactly this."""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from protos.errors import Blame
from protos.states import AttemptState, Eligibility, JobState, NodeLink, Reason

metadata = sa.MetaData()


def _enum(kind: type[StrEnum]) -> sa.Enum:
    """Text in the database, so that a new state needs no migration; the enum in Python."""
    return sa.Enum(
        kind,
        native_enum=False,
        create_constraint=False,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("state", _enum(JobState), nullable=False),
    sa.Column("reason", _enum(Reason), nullable=False),
    sa.Column("spec_json", sa.LargeBinary, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("updated_s", sa.Double, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("blame", _enum(Blame)),
    sa.Column("exit_code", sa.Integer),
    sa.Column("code_json", sa.LargeBinary),
    sa.Column("data_json", sa.LargeBinary),
    sa.Column("test_json", sa.LargeBinary),
    sa.Column("weights_json", sa.LargeBinary),
    sa.Column("profile_json", sa.LargeBinary),
    sa.Column("plan_json", sa.LargeBinary),
    sa.Column("fence", sa.BigInteger, nullable=False),
    sa.Column("retries", sa.Integer, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("samples", sa.BigInteger, nullable=False),
    sa.Column("strategy", sa.Text, nullable=False),
    sa.Column("checkpoint_json", sa.LargeBinary),
    sa.Column("result_json", sa.LargeBinary),
    sa.Column("idempotency_key", sa.String(200), unique=True),
    sa.Column("started_s", sa.Double),
    sa.Column("finished_s", sa.Double),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Index("jobs_state", "state"),
    sa.Index("jobs_created", "created_s", "job_id"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("fence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("node_id", sa.String(64), nullable=False),
    sa.Column("state", _enum(AttemptState), nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("updated_s", sa.Double, nullable=False),
    sa.Column("outcome_json", sa.LargeBinary),
    sa.Column("version", sa.BigInteger, nullable=False),
)

members = sa.Table(
    "members",
    metadata,
    sa.Column("node_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("link", _enum(NodeLink), nullable=False),
    sa.Column("eligibility", _enum(Eligibility), nullable=False),
    sa.Column("last_seen_s", sa.Double, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("capacity_json", sa.LargeBinary),
    sa.Column("left", sa.Boolean, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_id", sa.String(64), primary_key=True),
    sa.Column("secret_hash", sa.String(128), nullable=False, unique=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("uses_left", sa.BigInteger),
    sa.Column("expires_s", sa.Double, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("revoked", sa.Boolean, nullable=False),
)

token_uses = sa.Table(
    "token_uses",
    metadata,
    sa.Column("token_id", sa.String(64), sa.ForeignKey("tokens.token_id"), primary_key=True),
    sa.Column("key_id", sa.String(128), primary_key=True),
    sa.Column("used_s", sa.Double, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("job_id", sa.String(64)),
    sa.Column("node_id", sa.String(64)),
    sa.Column("payload_json", sa.LargeBinary, nullable=False),
    sa.Column("chain", sa.String(64), nullable=False),
    sa.Index("events_job", "job_id", "seq"),
)

spools = sa.Table(
    "spools",
    metadata,
    sa.Column("node_id", sa.String(64), primary_key=True),
    sa.Column("spool_id", sa.String(64), primary_key=True),
    sa.Column("accepted", sa.BigInteger, nullable=False),
)

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(200), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

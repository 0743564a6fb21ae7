"""Jobs, attempts, members, tokens, the event log, spools and meta."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("spec_json", sa.LargeBinary, nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("updated_s", sa.Double, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("blame", sa.String(32)),
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
    )
    op.create_index("jobs_state", "jobs", ["state"])
    op.create_index("jobs_created", "jobs", ["created_s", "job_id"])
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("fence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("node_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("updated_s", sa.Double, nullable=False),
        sa.Column("outcome_json", sa.LargeBinary),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "members",
        sa.Column("node_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("link", sa.String(32), nullable=False),
        sa.Column("eligibility", sa.String(32), nullable=False),
        sa.Column("last_seen_s", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("capacity_json", sa.LargeBinary),
        sa.Column("left", sa.Boolean, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("token_id", sa.String(64), primary_key=True),
        sa.Column("secret_hash", sa.String(128), nullable=False, unique=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("uses_left", sa.BigInteger),
        sa.Column("expires_s", sa.Double, nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("revoked", sa.Boolean, nullable=False),
    )
    op.create_table(
        "token_uses",
        sa.Column("token_id", sa.String(64), sa.ForeignKey("tokens.token_id"), primary_key=True),
        sa.Column("key_id", sa.String(128), primary_key=True),
        sa.Column("used_s", sa.Double, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_s", sa.Double, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("job_id", sa.String(64)),
        sa.Column("node_id", sa.String(64)),
        sa.Column("payload_json", sa.LargeBinary, nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
    )
    op.create_index("events_job", "events", ["job_id", "seq"])
    op.create_table(
        "spools",
        sa.Column("node_id", sa.String(64), primary_key=True),
        sa.Column("spool_id", sa.String(64), primary_key=True),
        sa.Column("accepted", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )

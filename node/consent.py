"""What the owner of a machine agrees to by starting a node: said in words, refused where it is too much. Pure."""

from __future__ import annotations

from protos.errors import AccessError, ErrorCode


def statement(user: str, coordinator: str | None) -> str:
    """As which user whose jobs will run."""
    whose = f"the coordinator at {coordinator}" if coordinator else "the coordinator that the token is from"
    return (
        f"jobs will run on this machine as user {user!r}, and can read and write what {user!r} can: code from everyone "
        f"who may submit to {whose}. There is no sandbox yet: join only people you trust."
    )


def check_user(uid: int, allow_root: bool) -> None:
    """Raises AccessError (forbidden) for root without the owner's word."""
    if uid == 0 and not allow_root:
        raise AccessError(
            "this would run other people's code as root",
            "start it as an ordinary user, or say --allow-root when you mean it",
            code=ErrorCode.FORBIDDEN,
        )

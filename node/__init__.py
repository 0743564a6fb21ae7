"""Everything on a member's machine. Never imports coordinator."""

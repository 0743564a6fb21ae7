"""What two machines must agree on. Imports nothing from the other rooms."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before any import of grpc: what it prints, we report ourselves

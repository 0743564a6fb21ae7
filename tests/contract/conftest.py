"""What starts ranks lies with the tests of the strategies."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "strategies"))

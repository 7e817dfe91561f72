"""Where the package under test is: a process that a test starts there finds the same one, installed or not."""

from __future__ import annotations

from pathlib import Path

import pfkey

ROOT = Path(pfkey.__file__).parent.parent

"""Make the clone importable as the collection that it is."""

from __future__ import annotations

import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
for entry in (CLONE, CLONE / ".collections"):
    sys.path.insert(0, str(entry))

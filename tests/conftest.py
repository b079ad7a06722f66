"""Make the clone importable as the collection that it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

CLONE = Path(__file__).resolve().parent.parent
for entry in (CLONE, CLONE / ".collections"):
    sys.path.insert(0, str(entry))

# The same examples in each run, so that a change is judged, not the day; HYPOTHESIS_PROFILE=default looks for others.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

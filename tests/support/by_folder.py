"""Which process runs which tests: all of a folder in one, which share what was traced for them."""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling


class ByFolder(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a process a folder at a time, those with the most tests first."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the folder of a test."""
        return str(PurePosixPath(nodeid.split("::", 1)[0]).parent)

"""What may be refused, read from the documentation.

`docs/refusals.md` is a set of tables whose second column has, in backticks, what a message
contains. A refusal that is not listed there is a fault like any other exception.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "refusals.md"
#: what nobody raises on purpose
_ACCIDENTS = (AttributeError, LookupError, AssertionError, UnboundLocalError, RecursionError)


@functools.cache
def listed() -> Mapping[str, tuple[str, ...]]:
    """Texts of messages by the heading of their table."""
    found: dict[str, tuple[str, ...]] = {}
    heading = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 5 and not cells[1].strip().startswith("--"):
            texts = re.findall(r"`([^`]+)`", cells[2])
            found[heading] = (*found.get(heading, ()), *texts)
    return found


def is_listed(error: BaseException, headings: Collection[str] = ()) -> bool:
    """Whether an error is a refusal that the documentation lists, under one of these headings.

    Args:
        error: what was raised.
        headings: of the tables to look at; all of them when empty.
    """
    if isinstance(error, _ACCIDENTS):
        return False
    message = " ".join(str(error).split())
    tables = listed()
    unknown = set(headings) - set(tables)
    if unknown:
        raise ValueError(f"{DOCUMENT.name} has no heading {', '.join(sorted(unknown))}")
    texts = (text for h in headings or tables for text in tables[h])
    return any(text in message for text in texts)

"""MkDocs calls this while it builds the site."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):<code>[~!]?([^<]*)</code>")


def on_page_content(html: str, **_context: Any) -> str:
    """Show the roles of Sphinx in docstrings (:func:`name`) as the name."""
    return _ROLE.sub(r"<code>\1</code>", html)

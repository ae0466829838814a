"""The audit as one HTML page that needs nothing else: style, script and data stand inside it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any


def render(title: str, facts: Sequence[tuple[str, str]], data: dict[str, Any]) -> str:
    """The page.

    Args:
        title: of the page: the model's name.
        facts: name and value of what a reader should know first.
        data: of `audit.audit`.
    """
    read = lambda name: (files("dsv4_jax.analysis") / "page" / name).read_text(encoding="utf-8")  # noqa: E731
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    # "</" may not stand inside a script: the text of a document could end it.
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    parts = {"TITLE": html.escape(title), "FACTS": rows, "STYLE": read("style.css"), "SCRIPT": read("script.js")}
    page = read("page.html")
    for name, part in (parts | {"DATA": embedded}).items():
        page = page.replace("{{" + name + "}}", part)
    return page

"""Docstrings as Markdown: references such as ``:func:`name``` become links, and examples become blocks of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["DocstringsAsMarkdown"]

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([^`]+)`")
_BLOCK = re.compile(r"^( *)(?:>>> |\.\. math:: ).*(?:\n(?!\s*$).*)*\n?", re.MULTILINE)


def as_markdown(text: str, scope: str = "") -> str:
    """A docstring's text; what is named without its module is looked for in ``scope``, a module or a class."""

    def link(match: re.Match[str]) -> str:
        target = match[2]
        short = target.rpartition(".")[2] if match[1] else target
        place = target if "." in target or not scope else f"{scope}.{target}"
        return f'<autoref identifier="{place}" optional><code>{short}</code></autoref>'

    def block(match: re.Match[str]) -> str:
        indent, lines = match[1], match[0].rstrip().replace(".. math:: ", "")
        language = "pycon" if ">>>" in match[0] else "text"
        return f"{indent}```{language}\n{lines}\n{indent}```\n"

    # Formulas are shown as they are written: what would set them is fetched from elsewhere.
    text = re.sub(r":math:`([^`]+)`", r"`\1`", text)
    return _BLOCK.sub(block, _ROLE.sub(link, text))


class DocstringsAsMarkdown(Extension):
    """Of every object that mkdocstrings reads."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Replace the text of a docstring."""
        if obj.docstring is None:
            return
        scope = obj.path if obj.is_module or obj.is_class else obj.path.rpartition(".")[0]
        words = re.findall(_ROLE, obj.docstring.value)
        if obj.is_class and any(name not in obj.members for _, name in words if "." not in name):
            scope = obj.module.path
        obj.docstring.value = as_markdown(obj.docstring.value, scope)

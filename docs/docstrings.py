"""Makes docstrings readable as Markdown: formulas as MathML, short sections as bold words.

Browsers show MathML by themselves, so that the pages need no script for formulas.
"""

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

DISPLAYED = re.compile(r"^( *)\.\. math::(.*?)(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r":math:`(.*?)`", re.DOTALL)
# Sections of a paragraph, which Google's style would show as boxes.
SHORT = re.compile(r"^(Guarantees and cost|Guarantees|Cost|References):(?:\s+|$)")


class Readable(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the text of one docstring, if there is one."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """Returns a docstring as Markdown.

    Args:
      text: with formulas of reStructuredText, and Google's sections.
    """
    text = DISPLAYED.sub(lambda found: _mathml(found[2], "block"), text)
    text = INLINE.sub(lambda found: _mathml(found[1], "inline"), text)
    # The name that griffe knows.
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return "\n\n".join(_paragraph(each) for each in text.split("\n\n"))


def _mathml(formula: str, display: str) -> str:
    return convert(" ".join(formula.split()), display=display)


def _paragraph(text: str) -> str:
    """Puts the name of a short section in bold, and its lines flush, since indents mean code."""
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if SHORT.match(line)]
    if not starts:
        return text
    parts = [lines[: starts[0]]] if starts[0] else []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        section = [line.strip() for line in lines[start:end]]
        section[0] = SHORT.sub(r"**\1.** ", section[0])
        parts.append(section)
    return "\n\n".join("\n".join(part) for part in parts)

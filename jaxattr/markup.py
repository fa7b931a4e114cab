"""Pieces of HTML and PNG that are pure functions: text that stays text, tables, bars, pictures."""

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

BLUE, ORANGE = "#3b82d6", "#d9731a"
"""Of what raises and of what lowers; told apart by the colour-blind, on white and on black."""

# Characters that reorder or hide others, or that HTML cannot hold. The joiners that spell emoji
# and some scripts are none.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def escaped(text: Any) -> str:
    """Makes text that may be anything safe to stand in HTML, in an element or in an attribute.

    Args:
      text: of any origin.

    Returns:
      The text, escaped; characters that hide or reorder others are spelled out, as in ⟨U+202E⟩.

    Example:
      >>> print(escaped('<b title="x">'))
      &lt;b title=&quot;x&quot;&gt;
    """
    seen = _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(text).replace("\r\n", "\n"))
    return html.escape(seen, quote=True)


def isolated(text: Any) -> str:
    """Returns escaped text whose direction of writing leaves what is beside it alone.

    Args:
      text: of any origin.
    """
    return f"<bdi>{escaped(text)}</bdi>"


def number(value: float, sign: str = "") -> str:
    """Writes a number with three digits that count, and a minus that is as wide as a plus.

    Args:
      value: any float.
      sign: "+" to show that of positive numbers.

    Example:
      >>> number(-0.012345), number(float("inf"), "+"), number(1234567.0)
      ('−0.0123', '+∞', '1.23e+06')
      >>> number(2994.6)
      '2,995'
    """
    if math.isnan(value):
        return "not a number"
    whole = 999.5 <= abs(value) < 1e6
    text = (f"{value:{sign},.0f}" if whole else f"{value:{sign}.3g}").replace("inf", "∞")
    return f"−{text[1:]}" if text.startswith("-") else text


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Makes a small table for a notebook, in the colours of whatever is around it.

    Args:
      headings: of the columns; empty for none.
      rows: cells; what is no text of `Markup` is escaped.
      caption: above it.

    Returns:
      HTML.
    """
    cell = "padding:.15em .8em .15em 0;text-align:left;vertical-align:top;white-space:nowrap"

    def line(tag: str, cells: Iterable[Any]) -> str:
        made = "".join(f'<{tag} style="{cell}">{_content(each)}</{tag}>' for each in cells)
        return f"<tr>{made}</tr>"

    head = f"<thead>{line('th', headings)}</thead>" if headings else ""
    body = "".join(line("td", row) for row in rows)
    above = f'<caption style="{cell}">{escaped(caption)}</caption>' if caption else ""
    style = "border-collapse:collapse;font-variant-numeric:tabular-nums"
    return f'<table style="{style}">{above}{head}<tbody>{body}</tbody></table>'


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def bar(share: float, colour: str = BLUE) -> Markup:
    """Makes a bar for a notebook.

    Args:
      share: of the full length, between 0 and 1.
      colour: in CSS.

    Returns:
      HTML.
    """
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return Markup(
        '<span style="display:inline-block;width:8em;height:.6em;background:rgba(128,128,128,.2)">'
        f'<span style="display:block;height:100%;width:{width:.1f}%;background:{colour}"></span>'
        "</span>"
    )


def listed(texts: Sequence[str]) -> str:
    """Returns a list for a notebook, or nothing if there are no items.

    Args:
      texts: of the items.
    """
    items = "".join(f"<li>{escaped(text)}</li>" for text in texts)
    return f'<ul style="margin:.4em 0">{items}</ul>' if texts else ""


def png(pixels: np.ndarray) -> bytes:
    """Encodes a picture.

    Args:
      pixels: uint8 [h, w], or [h, w, 1 | 3 | 4].

    Returns:
      A PNG file.
    """
    h, w = pixels.shape[:2]
    pixels = np.ascontiguousarray(pixels).reshape(h, w, -1)
    kind = {1: 0, 3: 2, 4: 6}[pixels.shape[2]]
    header = struct.pack(">IIBBBBB", w, h, 8, kind, 0, 0, 0)
    body = min((zlib.compress(each, 6) for each in _filtered(pixels)), key=len)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def data_uri(file: bytes) -> str:
    """Returns a PNG file as an address that holds it.

    Args:
      file: its bytes.
    """
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def _content(cell: Any) -> str:
    return cell if isinstance(cell, Markup) else escaped(cell)


def _filtered(pixels: np.ndarray) -> Iterable[bytes]:
    """The pixels, their differences to the left and to above; smooth pictures shrink with these."""
    h = len(pixels)
    left, above = np.zeros_like(pixels), np.zeros_like(pixels)
    left[:, 1:], above[1:] = pixels[:, :-1], pixels[:-1]
    for kind, values in enumerate((pixels, pixels - left, pixels - above)):
        rows = np.concatenate([np.full((h, 1), kind, np.uint8), values.reshape(h, -1)], axis=1)
        yield rows.tobytes()


def _chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

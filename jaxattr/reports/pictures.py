"""Pixels as small PNG files that together stay within a budget."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxattr.markup import data_uri, png

LONGEST_SIDE = 256
"""Pixels; larger pictures are shrunk to it, since they are shown smaller still."""

BUDGET = 3_000_000
"""Bytes of all pictures of a page of up to 1,700, as files; a third more as text."""

PER_PICTURE = BUDGET // 1700

SAMPLE = 32
"""Pictures whose sizes stand for all."""

# (bits per channel, how many pixels a side are averaged), from the finest.
_QUALITIES = ((8, 1), (5, 1), (5, 2), (4, 3), (4, 4), (4, 6), (4, 8), (3, 12), (3, 16))


class Range(NamedTuple):
    """What is black and what is white."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns pixels into addresses that hold them, all in the same way.

    Attributes:
      span: what is black and white in pictures that are not uint8.
      bits: kept of each channel.
      block: pixels a side that are averaged.
    """

    span: Range
    bits: int = 8
    block: int = 1

    def file(self, pixels: np.ndarray) -> bytes:
        """Returns a PNG file.

        Args:
          pixels: [h, w] or [h, w, 1 | 3 | 4].
        """
        drawn = pixels if pixels.dtype == np.uint8 else _as_bytes(pixels, self.span)
        block = self.block * -(-max(pixels.shape[:2]) // LONGEST_SIDE)
        return png(_rounded(_averaged(drawn, min(block, *pixels.shape[:2])), self.bits))

    def address(self, pixels: np.ndarray) -> str:
        """Returns a data URI; arguments as `file`."""
        return data_uri(self.file(pixels))

    @property
    def note(self) -> str:
        """What was lost, in words; empty if nothing was."""
        if (self.bits, self.block) == _QUALITIES[0]:
            return ""
        shrunk = f", at 1/{self.block} of their size" if self.block > 1 else ""
        kept = f"{self.bits} bits per channel{shrunk}"
        return f"Pictures are shown with {kept}, to keep the page small."


def encoder(pictures: Sequence[np.ndarray]) -> Encoder:
    """Chooses how to encode the pictures of a page: as they are, if they fit the budget.

    Args:
      pictures: all of them, [h, w] or [h, w, 1 | 3 | 4].

    Returns:
      The finest encoder with which they fit, by the sizes of some of them.
    """
    budget = max(BUDGET, PER_PICTURE * len(pictures))
    span = span_of(pictures)
    some = pictures[:: -(-len(pictures) // SAMPLE) or 1]
    for bits, block in _QUALITIES:
        found = Encoder(span, bits, block)
        mean = np.mean([len(found.file(pixels)) for pixels in some]) if some else 0
        if mean * len(pictures) <= budget:
            break
    return found


def span_of(pictures: Sequence[np.ndarray]) -> Range:
    """Says what is black and what is white: 0 and 1, or -1 and 1, or the ends of what there is.

    Args:
      pictures: of the page; those of uint8 are left out, as they need none.
    """
    finite = [x[np.isfinite(x)] for x in pictures if x.dtype != np.uint8]
    ends = [(float(x.min()), float(x.max())) for x in finite if x.size]
    if not ends:
        return Range(0, 1)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    for known in (Range(0, 1), Range(-1, 1)):
        if known.low <= low and high <= known.high:
            return known
    return Range(low, high)


def _as_bytes(pixels: np.ndarray, span: Range) -> np.ndarray:
    values = np.nan_to_num(pixels.astype(np.float64), nan=span.low)
    share = (values - span.low) / ((span.high - span.low) or 1.0)
    return np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)


def _averaged(pixels: np.ndarray, block: int) -> np.ndarray:
    """Means over blocks; the last rows and columns that fill none are left out."""
    if block == 1:
        return pixels
    h, w = (side // block for side in pixels.shape[:2])
    cut = pixels[: h * block, : w * block].reshape(h, block, w, block, -1)
    return np.rint(cut.mean(axis=(1, 3))).astype(np.uint8)


def _rounded(pixels: np.ndarray, bits: int) -> np.ndarray:
    steps = 2**bits - 1
    return np.rint(np.rint(pixels / 255 * steps) * (255 / steps)).astype(np.uint8)

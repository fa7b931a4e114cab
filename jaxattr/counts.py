"""Numbers of callers: counts and ids are whole ones, and nothing that only equals one."""

import contextlib
import operator
from typing import Any

import numpy as np


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: "1 checkpoint", "2,000 examples"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def whole_number(name: str, value: Any, *, least: int | None = 1) -> int:
    """Returns a caller's count as an int.

    What equals an int and is none must go no further: compiled functions are kept by their counts,
    and 2.0 would be found in place of 2.

    Args:
      name: of the argument, for the message.
      value: an int of Python or NumPy.
      least: the smallest that is of use, or None for any.

    Returns:
      The int.

    Raises:
      TypeError: if it is a float, a bool or a string.
      ValueError: if it is too small.
    """
    try:
        found = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(
            f"{name} must be a whole number, an int, got {value!r:.60} of type "
            f"{type(value).__name__}."
        )
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}.")
    return found


def real_numbers(name: str, values: Any) -> np.ndarray:
    """Returns a caller's numbers as float64.

    Args:
      name: of the argument, for the message.
      values: a number, or an array of some.

    Raises:
      TypeError: if they are complex, or no numbers.
    """
    found = np.asarray(values)
    if found.dtype == object and not any(isinstance(each, str) for each in found.flat):
        with contextlib.suppress(TypeError, ValueError):  # of tables; None is what is missing
            found = found.astype(np.float64)
    if found.dtype.kind in "cOSUTmM":
        kind = found.dtype.type.__name__.strip("_")
        got = f"{kind} {list(found.shape)}" if found.ndim else f"{values!r:.60}"
        raise TypeError(f"{name} must be real numbers, got {got}.")
    return found.astype(np.float64)


def real_number(name: str, value: Any, *, least: float | None = None) -> float:
    """Returns a caller's number as a float.

    Args:
      name: of the argument, for the message.
      value: a number.
      least: the smallest that is of use, all of which are finite; or None for any.

    Raises:
      TypeError: if it is none, or several.
      ValueError: if it is too small, or not finite where there is a smallest.
    """
    found = real_numbers(name, value)
    if found.ndim:
        raise TypeError(f"{name} must be one number, got an array {list(found.shape)}.")
    if least is not None and not (np.isfinite(found) and found >= least):
        raise ValueError(f"{name} must be finite and at least {least:g}, got {value}.")
    return float(found)


def flag(name: str, value: Any) -> bool:
    """Returns a caller's yes or no; "no" would count as yes.

    Args:
      name: of the argument, for the message.
      value: a bool of Python, NumPy or JAX.

    Raises:
      TypeError: if it is anything else.
    """
    if np.shape(value) or np.asarray(value).dtype != bool:
        raise TypeError(f"{name} must be True or False, got {value!r:.60}.")
    return bool(value)


def checked_ids(ids: Any, examples: int, name: str, count: int | None = None) -> np.ndarray:
    """Returns ids of training examples, or raises if they are none.

    Args:
      ids: of a user, [b].
      examples: n.
      name: what they are, for the message.
      count: how many there must be; default: one or more.

    Raises:
      ValueError: if they are no integers, or out of range.
    """
    ids = np.asarray(ids)
    whole = ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids) > 0
    fits = whole and count in (None, len(ids)) and ((ids >= 0) & (ids < examples)).all()
    if not fits:
        got = f" from {ids.min()} to {ids.max()}" if whole else ""
        raise ValueError(
            f"{name} must be integers [{count or 'b'}] from 0 to {examples - 1}, ids of training "
            f"examples; got {ids.dtype} {list(ids.shape)}{got}."
        )
    return ids

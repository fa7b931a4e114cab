"""Times functions against each other, taking turns, so that a busy machine disturbs all alike."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds per call.

    Attributes:
      seconds: of each repeat.
      memory: temporary bytes of the compiled program, or None if it is no single program.
    """

    seconds: np.ndarray
    memory: int | None

    def ratio(self, base: "Timing") -> tuple[float, float, float]:
        """Returns the median, lowest and highest ratio to another function, turn by turn."""
        ratios = self.seconds / base.seconds
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], int]:
    """Compiles a function for some arguments.

    Args:
      function: a pure function.
      *arguments: what it is called with.

    Returns:
      A function without arguments that runs it to its end, and its temporary memory in bytes.
    """
    program = jax.jit(function).lower(*arguments).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return lambda: jax.block_until_ready(program(*arguments)), analysis.temp_size_in_bytes


def take_turns(
    functions: Mapping[str, tuple[Callable[[], Any], int | None]], repeats: int
) -> dict[str, Timing]:
    """Times functions in turns.

    Args:
      functions: {name: (function without arguments, its memory)}.
      repeats: turns; one more goes before as a warm-up.

    Returns:
      {name: timing}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, (function, _) in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(np.array(seconds[name]), functions[name][1]) for name in functions}


def machine() -> str:
    """Returns what this ran on, for the heading of a table."""
    device = jax.devices()[0]
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}), {versions}"

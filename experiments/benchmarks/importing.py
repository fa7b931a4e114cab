"""What importing takes: python -m experiments.benchmarks.importing.

`import jaxattr` beside `import jax, optax`, each in a process of its own, taking turns. GOAL is the
most that the first may take of the second; the exit status says whether it was met.
"""

import argparse
import resource
import subprocess
import sys

import numpy as np
from rich.console import Console

from experiments.benchmarks import timing

GOAL = 1.3


def main() -> None:
    """Times both and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="processes of each")
    repeats = parser.parse_args().repeats
    turns = [(seconds("import jax, optax"), seconds("import jaxattr")) for _ in range(repeats)]
    base, ours = np.min(turns, axis=0)
    met = ours <= GOAL * base
    console = Console(width=120)
    console.print(timing.machine())
    console.print(
        f"import jax, optax {base:.2f} s; import jaxattr {ours:.2f} s, {ours / base:.2f} times; "
        f"goal {GOAL} {'met' if met else 'MISSED'} (least of {repeats})"
    )
    sys.exit(not met)


def seconds(statement: str) -> float:
    """Processor time that a statement takes in a new interpreter; a busy machine adds to others."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

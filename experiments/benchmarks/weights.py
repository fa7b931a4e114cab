"""What learning weights costs: a step beside the products that it needs, and as n grows.

python -m experiments.benchmarks.weights                 # a step; then n = 10,000 and 100,000
python -m experiments.benchmarks.weights --n 1000000     # 2 GB of bfloat16 on disk
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.benchmarks import synthetic, timing
from jaxattr.weights import learning, optimising, shortlists
from jaxattr.weights.optimising import FitOptions

GOAL = 1.5
GROUPS, TOP_K, MODELS = 8, 20, 64


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.weights", description=__doc__
    )
    parser.add_argument("--q", type=int, default=64, help="learning queries")
    parser.add_argument("--n", type=int, action="append", help="training examples")
    parser.add_argument("--p", type=int, default=1024, help="features")
    parser.add_argument("--m", type=int, default=GROUPS, help="groups, of the growth alone")
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(*grow(arguments, arguments.n[0], arguments.one))
        return
    console = Console(width=120)
    console.print(timing.machine())
    console.print(step_table(arguments))
    console.print(growth_table(arguments, arguments.n or [10_000, 100_000]))


def step_table(arguments: argparse.Namespace) -> Table:
    """Times a step, with all contributions and with a shortlist, beside its bare products."""
    shown = Table(
        title=f"One step, {arguments.q} queries, {GROUPS} groups; bare: as many products of the "
        "same sizes, forward and backward. Ratio: median of the turns, lowest to highest."
    )
    for heading in ("contributions of", "bare step", "step", "spread", "goal"):
        shown.add_column(heading)
    for name, listed in (("20,000 examples", 20_000), ("a shortlist of 512", 512)):
        found = _time_step(arguments, listed, complete=listed > 512)
        bare, step = found["bare"], found["step"]
        middle, low, high = step.ratio(bare)
        milliseconds = bare.seconds.min() / arguments.steps * 1e3
        shown.add_row(
            name, f"{milliseconds:.2f} ms", f"{middle:.2f}", f"{low:.2f}-{high:.2f}",
            f"{GOAL} {'met' if middle <= GOAL else 'MISSED'}",
        )  # fmt: skip
    return shown


def _time_step(
    arguments: argparse.Namespace, listed: int, complete: bool
) -> dict[str, timing.Timing]:
    generator = np.random.default_rng(0)
    q, m = arguments.q, GROUPS
    parts = jnp.asarray(generator.standard_normal((q, listed, m)), jnp.float32)
    whole = shortlists.everything(parts, jnp.ones(m))
    if not complete:
        whole = whole._replace(dropped=jnp.full(q, -1e30, parts.dtype))
    options = FitOptions(TOP_K, False, None, arguments.steps)
    _, loop = optimising.begin(jax.random.key(0), q, m, options)

    def learn() -> Any:
        return optimising.run(whole, np.arange(q), loop, np.ones(m), 1.0, 0.1, options)

    @jax.jit
    def bare(parts: jax.Array, gram: Any) -> jax.Array:
        """The products alone: scores and norms of every query, and their transposes."""

        def step(w: jax.Array, _: None) -> tuple[jax.Array, None]:
            scores = jnp.matmul(parts, w, precision="highest")  # [q, s]
            back = jnp.einsum("qs,qsm->m", scores, parts, precision="highest")
            if gram is not None:
                back = back + jnp.einsum("qmk,k->m", gram, w, precision="highest")
            return back / jnp.linalg.norm(back), None

        return jax.lax.scan(step, jnp.ones(m), None, length=arguments.steps)[0]

    return timing.take_turns(
        {
            "bare": (lambda: jax.block_until_ready(bare(parts, whole.gram)), None),
            "step": (lambda: jax.block_until_ready(learn()), None),
        },
        arguments.repeats,
    )


def growth_table(arguments: argparse.Namespace, sizes: list[int]) -> Table:
    """Builds, searches and learns from an index on disk, in a process of its own per size."""
    shown = Table(
        title=f"From disk: bfloat16, {arguments.p} features, {arguments.m} groups, {arguments.q} "
        f"queries, {arguments.steps} steps, outcomes of {MODELS} models; seconds, and the largest "
        "memory of the whole process"
    )
    for heading in (
        "n",
        "on disk",
        "build",
        "top-k",
        "learn",
        "passes",
        "from outcomes",
        "again",
        "memory",
    ):
        shown.add_column(heading)
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "experiments.benchmarks.weights", "--one", folder]
            command += ["--n", str(n), "--q", str(arguments.q), "--p", str(arguments.p)]
            command += ["--steps", str(arguments.steps), "--m", str(arguments.m)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            build, top, learn, outcomes, again, passes, memory = done.stdout.split()[-7:]
            shown.add_row(
                f"{n:,}", f"{n * arguments.p * 2 / 1e9:.2f} GB", f"{float(build):.1f}",
                f"{float(top):.1f}", f"{float(learn):.1f}", passes, f"{float(outcomes):.1f}",
                f"{float(again):.1f}", f"{float(memory):.2f} GB",
            )  # fmt: skip
    return shown


def grow(arguments: argparse.Namespace, n: int, folder: str) -> tuple[float, ...]:
    """Returns seconds to build, search, learn (twice from outcomes); passes; memory in GB."""
    warnings.simplefilter("ignore")
    times = [time.perf_counter()]
    path = pathlib.Path(folder) / "index"
    index = synthetic.index(n, arguments.p, arguments.m, path=path, dtype=jnp.bfloat16)
    times.append(time.perf_counter())
    features = ja.query_features(index, synthetic.queries(arguments.q, arguments.p))
    jax.block_until_ready(ja.top_k(index, features, k=10))
    times.append(time.perf_counter())
    learning._WHOLE_BYTES = 0  # as with more examples than these
    fit = ja.learn_weights(index, features, top_k=TOP_K, steps=arguments.steps)
    times.append(time.perf_counter())
    masks = ja.evaluation.random_subsets(jax.random.key(0), n, MODELS, fraction=0.25)
    outputs = np.random.default_rng(0).normal(size=(MODELS, arguments.q))
    outcomes = ja.Outcomes(masks, outputs)
    for _ in range(2):
        ja.learn_weights(index, features, outcomes=outcomes)
        times.append(time.perf_counter())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return (*np.diff(times), fit.passes, memory)


if __name__ == "__main__":
    main()

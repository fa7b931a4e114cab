"""What moves between devices, counted in the compiled programs; and a pod-scale build on paper.

python -m experiments.benchmarks.scaling
"""

import argparse
import collections
import math
import os
import re
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

DEVICES = (1, 2, 4, 8)
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
SIZES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "s8": 1, "u8": 1}

# TPU v5p: bfloat16 peak and memory per chip, inter-chip and storage bandwidth as published or
# assumed; only the plan on paper uses them.
CHIPS, PEAK, MEMORY, STORAGE = 256, 459e12, 95e9, 100e9 / 8 * 64


def main() -> None:
    """Prints the counts, from one process per number of devices; then the plan."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.scaling", description=__doc__
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        for name, found in count(arguments.one).items():
            print(f"{name}|{found}")
        return
    console = Console(width=120)
    shown = Table(title="Collectives per step, by kind: number x bytes on each device")
    shown.add_column("step")
    for devices in DEVICES:
        shown.add_column(f"{devices} devices")
    rows: dict[str, list[str]] = collections.defaultdict(list)
    for devices in DEVICES:
        flags = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "experiments.benchmarks.scaling", "--one", str(devices)]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        for line in done.stdout.splitlines():
            name, found = line.split("|")
            rows[name].append(found)
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    console.print(shown)
    console.print(paper())


def count(devices: int) -> dict[str, str]:
    """Counts the collectives of every step on so many devices.

    Args:
      devices: over which examples are spread.

    Returns:
      {step: what moves}.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxattr as ja
    from jaxattr.features.bases import NOTHING
    from jaxattr.fitting import passes
    from jaxattr.index.checkpoint_builds import _kernel_sums
    from jaxattr.scores import ranking
    from jaxattr.weights import shortlists

    sizes = (64, 256, 256, 10)
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    params = {f"layer{i}": jnp.ones(pair) / pair[0] for i, pair in enumerate(pairs)}
    data = {"x": np.ones((64, 64), np.float32), "y": np.arange(64) % 10}

    def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        x = example["x"]
        for layer in params.values():
            x = jnp.tanh(x @ layer)
        return -jax.nn.log_softmax(x)[example["y"]]

    mesh = jax.make_mesh((devices,), ("data",))
    method = ja.logra(loss, rank=8)
    index = ja.build_index(method, params, data, batch_size=64, microbatch=8, mesh=mesh)
    place, layout, featurize = index.place, index.layout, index.featurizer
    assert featurize is not None
    ids = place.batch(lambda rows: rows, np.arange(64))
    batch = place.batch(lambda rows: jax.tree.map(lambda x: x[rows], data), np.arange(64))
    step = passes._compiled_features(place, featurize.step)
    given = (
        featurize.key,
        index.checkpoints[0],
        batch,
        ids,
        featurize.draw(0, NOTHING, place),
        NOTHING,
    )
    phi = step(*given).features
    each = jax.jit(place.per_shard(_kernel_sums(method.kernel, layout, 64, phi.dtype)))
    arrays = next(index.rows.slabs(["features", "examples"], index.size)).arrays
    w = place.whole(jnp.ones(len(layout.names)))
    queries = place.gathered(phi)
    start, absorb, merge = shortlists.compiled_pass(place, layout, 16, False, 10)
    listed = start(w, queries)
    search = ranking.top_k_of_arrays(place, layout, "identity", 10, 1, 1)
    exponent = jnp.asarray(0, jnp.int32)
    weighted = ranking.weigh_step(place, layout)(w, queries, exponent)
    return {
        "features": collectives(step, *given),
        "kernel statistics of a batch": collectives(each, 0, phi, ids >= 0),
        "kernel statistics, at the end": collectives(place.sum_of_shards, each(0, phi, ids >= 0)),
        "features of 64 queries, to all": collectives(place.gathered, phi),
        "scores": collectives(ranking.score_step(place, "identity"), weighted, arrays),
        "top 10": collectives(search, w, queries, arrays, exponent),
        "weights: a slab": collectives(absorb, listed, queries, arrays, 0, 0),
        "weights: the end of a pass": collectives(merge, listed),
    }


def collectives(function: Any, *arguments: Any) -> str:
    """Returns the collectives of a compiled program, such as "2 all-reduce x 512 B".

    Args:
      function: jittable.
      *arguments: what it is called with.
    """
    import jax

    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    found: dict[str, list[int]] = collections.defaultdict(list)
    for shape, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        size = sum(
            SIZES.get(dtype, 8) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
        )
        found[kind].append(size)
    if not found:
        return "none"
    return ", ".join(f"{len(sizes)} {kind}: {sum(sizes):,} B" for kind, sizes in found.items())


def paper() -> Table:
    """A build for 10^9 examples and a model of 10^9 parameters on 256 chips, on paper."""
    examples, parameters, tokens, layers, rank = 1e9, 1e9, 512, 16 * 7, 16
    features = layers * rank**2
    # A forward and backward pass is 6 operations per parameter and token; without weight gradients
    # 4. Measured on the GPT of features.py, rank 16, features take 0.70 of a gradient: 4.2.
    per_example = 4.2 * parameters * tokens
    utilisation = 0.4
    seconds = examples * per_example / (CHIPS * PEAK * utilisation)
    disk = examples * features * 2
    statistics = layers * (rank**2) ** 2 * 4
    queries = 1000
    scan = max(disk / STORAGE, 2 * queries * examples * features / (CHIPS * PEAK * utilisation))
    shown = Table(
        title=f"On paper: {examples:.0e} examples of {tokens} tokens, {parameters:.0e} parameters, "
        f"LoGRA rank {rank} on {layers} matrices, {CHIPS} x v5p at {utilisation:.0%} of its peak"
    )
    for heading in ("what", "amount", "from"):
        shown.add_column(heading)
    for row in (
        ("features", f"{features:,} per example", "rank squared per matrix"),
        ("arithmetic", f"{examples * per_example:.1e}", "4.2 per parameter and token, measured"),
        ("time", f"{seconds / 3600 / 24:.1f} days", "arithmetic over peak and utilisation"),
        ("on disk", f"{disk / 1e12:.0f} TB", "bfloat16"),
        ("written", f"{disk / seconds / 1e9:.2f} GB/s by all hosts", "disk over time"),
        ("between chips, per block", "0 B", "counted"),
        ("between chips, once", f"{statistics / 1e6:.0f} MB summed", "counted: kernel statistics"),
        ("parameters per chip", f"{parameters * 4 / CHIPS / 1e6:.0f} MB", "FSDP, float32"),
        ("rows in memory", f"{disk / CHIPS / 1e9:.0f} GB of {MEMORY / 1e9:.0f}", "too many: disk"),
        ("one top-k pass", f"{scan / 60:.0f} min", f"{queries} queries; storage {STORAGE:.0e} B/s"),
        ("weights", "5 to 20 passes", "measured, weights.py"),
    ):
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    main()

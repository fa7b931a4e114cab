"""What attribution of GPT-2 small on WikiText-103 takes: planned from shapes, without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jaxattr as ja
from experiments.language import gpt2
from jaxattr import language

GPT2_SMALL = gpt2.Config(
    vocabulary=50257, context=512, width=768, depth=12, heads=12, dtype=jnp.bfloat16
)
WIKITEXT103_ROWS = 118_000_000 // 512  # its training tokens in rows of 512


class Rows:
    """As many rows as WikiText-103 has, without their content."""

    def __len__(self) -> int:
        return WIKITEXT103_ROWS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        zeros = np.zeros(GPT2_SMALL.context, np.int32)
        return {"inputs": zeros, "targets": zeros, "mask": np.ones(len(zeros), bool)}


def plans(mesh: Mesh | None) -> dict[str, Any]:
    """Plans each method; compiles its step, computes nothing.

    Args:
      mesh: devices to spread over.

    Returns:
      {method: plan}.
    """
    loss = language.loss(gpt2.logits_fn(GPT2_SMALL))
    methods = {
        "TracIn, rank 16": ja.tracin(loss, projection=ja.projections.two_sided(16)),
        "LoGRA, rank 16": ja.logra(loss, rank=16),
    }
    return {
        name: ja.plan(
            method, _shapes(), Rows(), batch_size=64, microbatch=8, mesh=mesh, on_disk=True,
            dtype=jnp.bfloat16,
        )
        for name, method in methods.items()
    }  # fmt: skip


def arithmetic() -> float:
    """Floating-point operations of one pass: 6 per parameter and token, 2 more to rematerialise.

    XLA's own count takes a scan over layers for one layer.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(_shapes()))
    return 8.0 * parameters * WIKITEXT103_ROWS * GPT2_SMALL.context


def _shapes() -> Any:
    return jax.eval_shape(lambda: gpt2.initial(GPT2_SMALL, jax.random.key(0)))

"""What an index of a large model would take on a pod of TPUs: arithmetic, nothing measured."""

from typing import NamedTuple

from rich.table import Table


class Case(NamedTuple):
    """What the plan is of. The model is Llama 2 7B, the chips are TPU v5e.

    Attributes:
      params: of the model, in bfloat16.
      layers: each with seven matrices.
      width: of the model.
      hidden: of its feed-forward.
      heads: of its attention.
      vocabulary: tokens.
      examples: rows of the training set.
      tokens: of each.
      at_once: rows whose gradients a chip makes at once.
      rank: of LoGRA, per side.
      chips: of the pod.
      hosts: of the chips, each with its own way to the disk.
      flops: of a chip, at its best in bfloat16.
      used: share of them that is reached.
      read: bytes per second that a host reads.
      link: bytes per second that a chip gets from the others.
    """

    params: float = 7e9
    layers: int = 32
    width: int = 4096
    hidden: int = 11_008
    heads: int = 32
    vocabulary: int = 32_000
    examples: float = 1e8
    tokens: int = 512
    at_once: int = 8
    rank: int = 16
    chips: int = 64
    hosts: int = 16
    flops: float = 197e12
    used: float = 0.4
    read: float = 1e9
    link: float = 200e9


def plan(case: Case) -> Table:
    """Makes the plan, with the arithmetic of each line.

    Args:
      case: what it is of.

    Returns:
      A table for a terminal.
    """
    shown = Table(
        title=f"On paper: LoGRA, rank {case.rank}; {case.params:.0e} parameters, "
        f"{case.examples:.0e} examples of {case.tokens} tokens, {case.chips} TPU v5e (16 GB each)"
    )
    for heading in ("what", "how much", "arithmetic"):
        shown.add_column(heading)
    for section in (_disk(case), _memory(case), _time(case)):
        for row in section:
            shown.add_row(*row)
        shown.add_section()
    return shown


def features(case: Case) -> int:
    """Features of an example: rank^2 of each matrix of each layer.

    Args:
      case: what the plan is of.
    """
    return case.rank**2 * 7 * case.layers


def bytes_per_row(case: Case) -> int:
    """Bytes of an example in int8: one per feature, and a float32 scale per 64 of them.

    Args:
      case: what the plan is of.
    """
    return features(case) + 4 * features(case) // 64


def hours(case: Case) -> float:
    """Hours of one pass over the examples.

    Args:
      case: what the plan is of.
    """
    needed = 6 * case.params * case.tokens * case.examples
    return needed / (case.chips * case.flops * case.used) / 3600


def _disk(case: Case) -> list[tuple[str, str, str]]:
    p, row = features(case), bytes_per_row(case)
    return [
        ("features per example", f"{p:,}", f"{case.rank}^2 x 7 matrices x {case.layers} layers"),
        ("bytes per example", f"{row:,}", "int8, and a float32 scale per 64 features"),
        ("disk", f"{row * case.examples / 1e12:.1f} TB", f"{row:,} B x {case.examples:.0e}"),
        (
            "beside it, while it is built",
            f"{2 * p * case.examples / 1e12:.1f} TB",
            f"{p:,} x 2 B x {case.examples:.0e}: bfloat16, until the Gram matrices are known",
        ),
    ]


def _memory(case: Case) -> list[tuple[str, str, str]]:
    groups = 7 * case.layers
    sides = case.layers * (4 * 2 * case.width + 3 * (case.width + case.hidden))
    layer, positions = case.params / case.layers, case.at_once * case.tokens
    several = f"{case.at_once} x {case.tokens} tokens"
    parts = {
        "parameters": (2 * case.params / case.chips, "bfloat16, spread over all chips (FSDP)"),
        "two layers, gathered": (2 * 2 * layer, "the one in use and the next"),
        "projections": (4 * case.rank * sides, "float32: rank x (inputs + outputs), whole"),
        "Gram matrices": (
            4 * groups * case.rank**4, f"float32: {groups} of {case.rank**2} x {case.rank**2}",
        ),
        "inputs of layers": (
            2 * case.layers * positions * case.width, f"bfloat16, {several}; the rest remat-ed",
        ),
        "one layer's activations": (
            4 * positions * (8 * case.width + 3 * case.hidden + 2 * case.heads * case.tokens),
            f"float32, {several}: 8 as wide as the model, 3 hidden ones, 2 of attention",
        ),
        "logits and cotangent": (2 * 4 * positions * case.vocabulary, f"float32, {several}"),
    }  # fmt: skip
    total = sum(size for size, _ in parts.values())
    lines = [(what, f"{size / 1e9:.2f} GB", how) for what, (size, how) in parts.items()]
    return [*lines, ("memory per chip", f"{total / 1e9:.2f} GB", "all of these, of 16 GB")]


def _time(case: Case) -> list[tuple[str, str, str]]:
    needed, building = 6 * case.params * case.tokens * case.examples, hours(case)
    size, raw = bytes_per_row(case) * case.examples, 2 * features(case) * case.examples
    steps = case.examples / (case.chips * case.at_once)
    gathering = 2 * 2 * case.params / case.link
    step = building * 3600 / steps
    reading = size / (case.hosts * case.read)
    # Each chip has the queries, and widens what it reads to float32.
    products = 2 * 1000 * features(case) * case.examples / (case.chips * case.flops / 8)
    return [
        ("operations", f"{needed:.2e}", f"6 x {case.params:.0e} x {case.tokens} x "
         f"{case.examples:.0e}: forward 2, backward 4; no more for remat, as LoGRA saves 2"),
        ("hours to build", f"{building:.0f}", f"{case.chips} chips x {case.used:.0%} of "
         f"{case.flops / 1e12:.0f} TFLOP/s; one pass, no learned basis"),
        ("written meanwhile", f"{raw / case.hosts / building / 3600 / 1e6:.1f} MB/s",
         f"by each of {case.hosts} hosts"),
        ("of each step, gathering", f"{gathering:.2f} of {step:.1f} s",
         f"2 x {2 * case.params / 1e9:.0f} GB of parameters at {case.link / 1e9:.0f} GB/s"),
        ("second stage", f"{(raw + size) / (case.hosts * case.read) / 60:.0f} minutes",
         "bfloat16 read, int8 written"),
        ("search of all, reading", f"{reading / 60:.0f} minutes",
         f"{case.read / 1e9:.0f} GB/s for each host"),
        ("search of all, products", f"{products:.0f} seconds",
         "1000 queries, float32 products at an eighth of the bfloat16 rate"),
    ]  # fmt: skip

"""Features and EK-FAC beside other libraries: same model, same data, same process, same device.

On a GPU both multiply float32 as JAX does by default there, in TF32.

Needs, in an environment of its own beside jaxattr:

    pip install torch==2.13.0 transformers peft accelerate datasets einops opt_einsum
    pip install --no-deps bergson dattri kronfluence einconv simple-parsing docstring-parser petname
    pip install -e .

python -m experiments.benchmarks.peers
"""

import argparse
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config import IndexConfig
from bergson.gradients import GradientProcessor
from datasets import Dataset
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import jaxattr as ja
from experiments.benchmarks import ekfac, features, models, timing

WIDTH, DEPTH, HEADS, LENGTH, VOCABULARY = 256, 4, 4, 128, 512
RANK = 16

# Before JAX takes most of a GPU's memory, which the others need too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
DEVICE = "cpu" if jax.default_backend() == "cpu" else "cuda"


class Block(nn.Module):
    """The block of `models.GPTBlock`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [b, t, width] to [b, t, width]."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The model of `models.gpt`, with the same number of parameters."""

    device = torch.device(DEVICE)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def base_model(self) -> nn.Module:
        """Where the layers are, as a model of transformers has it."""
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids [b, t] to logits [b, t, vocabulary]."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


def total_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over tokens and examples."""
    logits = model(ids[:, :-1])
    return functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum"
    )


class LanguageModelling(Task):
    """What kronfluence wants to know."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
        """The summed loss, on the data's own labels."""
        del sample
        return total_loss(model, batch[0])

    def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
        """The same."""
        return total_loss(model, batch[0])

    def get_influence_tracked_modules(self) -> list[str]:
        """The 16 dense layers."""
        parts = ("qkv", "out", "up", "down")
        return [f"blocks.{i}.{part}" for i in range(DEPTH) for part in parts]


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.peers", description=__doc__
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--examples", type=int, default=64, help="of the factor fit")
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=PEERS, help="EK-FAC of one library, once")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory_of:
        run = PEERS[arguments.memory_of]
        run(arguments.examples, arguments.batch, arguments.queries[0])
        print(_most_memory(arguments.memory_of) >> 20)
        return
    console = Console(width=110)
    console.print(f"{timing.machine()}, torch {torch.__version__}")
    console.print(features_table(arguments.batch, arguments.repeats))
    console.print(ekfac_table(arguments.examples, arguments.batch))
    console.print(without_store_table(arguments.examples, arguments.batch, arguments.queries))


def features_table(batch: int, repeats: int) -> Table:
    """Milliseconds per example of two-sided features of the 16 dense layers."""
    subject = models.gpt(batch)
    ids = torch.tensor(np.asarray(subject.batch), device=DEVICE).long()
    model = GPT().to(DEVICE)
    method = ja.tracin(subject.loss, projection=ja.projections.two_sided(RANK))
    featurize = ja.featurizer(
        method, subject.params, subject.batch[0], groups=models.dense_layers, microbatch=batch
    )

    def torch_gradient() -> None:
        model.zero_grad()
        total_loss(model, ids).backward()

    found = timing.take_turns(
        {
            "jax gradient": timing.compiled(
                features.gradient(subject), subject.params, subject.batch
            ),
            "torch gradient": (_to_its_end(torch_gradient), None),
            "jaxattr": timing.compiled(
                lambda params, batch: featurize(params, batch), subject.params, subject.batch
            ),
            "bergson": (_to_its_end(_bergson(GPT().to(DEVICE), ids)), None),
            "dattri LoGra": (_to_its_end(_dattri(GPT().to(DEVICE), ids)), None),
        },
        repeats,
    )
    shown = Table(title=f"Features of 16 dense layers, rank {RANK}, batch {batch}")
    for heading in ("what", "ms per example", "of its own gradient", "jaxattr over it"):
        shown.add_column(heading)
    ours = found["jaxattr"]
    for name, each in found.items():
        own = found["jax gradient" if name in ("jaxattr", "jax gradient") else "torch gradient"]
        shown.add_row(
            name,
            f"{np.median(each.seconds) / batch * 1000:.3g}",
            f"{each.ratio(own)[0]:.2f}",
            "{:.2f} ({:.2f}-{:.2f})".format(*ours.ratio(each)),
        )
    return shown


def ekfac_table(examples: int, batch: int) -> Table:
    """Seconds per stage of exact EK-FAC of the 16 dense layers, empirical Fisher."""
    subject = models.gpt(examples)
    ids = torch.tensor(np.asarray(subject.batch)).long()
    theirs = [_kronfluence(ids, batch) for _ in range(2)][1]
    ours = ekfac.best_stages(subject, batch, 2)
    scores = f"scores of {ekfac.QUERIES} queries"
    features_stage = "features and eigenvalues"
    rows = {
        "covariances": (ours["covariances"], theirs["covariances"]),
        "eigenvectors": (ours["eigenvectors"], theirs["eigenvectors"]),
        "eigenvalues (ours: and features)": (ours[features_stage], theirs["eigenvalues"]),
    }
    totals = [sum(row[i] for row in rows.values()) for i in (0, 1)]
    rows["fit, all"] = (totals[0], totals[1])
    rows[scores] = (ours[scores], theirs["scores"])
    rows["fit and scores"] = (totals[0] + ours[scores], totals[1] + theirs["scores"])
    rows["a plain gradient pass"] = (ours["plain gradient"], theirs["plain gradient"])
    shown = Table(title=f"EK-FAC of 16 dense layers, {examples} examples, batch {batch}; seconds")
    for heading in ("stage", "jaxattr", "kronfluence", "ratio"):
        shown.add_column(heading)
    for stage, (mine, other) in rows.items():
        shown.add_row(stage, f"{mine:.2f}", f"{other:.2f}", f"{mine / other:.2f}")
    return shown


def without_store_table(examples: int, batch: int, queries: Sequence[int]) -> Table:
    """Seconds of exact EK-FAC that keeps no gradients, and what it holds at most."""
    shown = Table(title=f"EK-FAC that keeps no gradients, {examples} examples, batch {batch}")
    for heading in ("queries", "what", "jaxattr", "kronfluence", "ratio"):
        shown.add_column(heading)
    for count in queries:
        ours, theirs = (
            [run(examples, batch, count) for _ in range(2)][1] for run in PEERS.values()
        )
        both = ours, theirs
        for each in both:
            each["both"] = each["fit"] + each["scores"]
        for each, name in zip(both, PEERS, strict=True):
            each["peak of a process, MiB"] = _peak(name, examples, batch, count)
        for what, mine in ours.items():
            ratio = mine / theirs[what]
            shown.add_row(str(count), what, f"{mine:.2f}", f"{theirs[what]:.2f}", f"{ratio:.2f}")
    return shown


def _most_memory(name: str) -> int:
    """Bytes that this process held at most, of the device's memory where that is its own."""
    if DEVICE == "cuda":
        stats = jax.devices()[0].memory_stats() or {}
        ours = name == "jaxattr"
        return stats["peak_bytes_in_use"] if ours else torch.cuda.max_memory_allocated()
    # Not getrusage, which begins with the size of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) << 10


def _peak(name: str, examples: int, batch: int, queries: int) -> float:
    """The most memory that a process of its own held, in MiB; all libraries are imported in it."""
    command = [sys.executable, "-m", "experiments.benchmarks.peers", "--memory-of", name]
    sizes = ["--examples", str(examples), "--batch", str(batch), "--queries", str(queries)]
    found = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def _gradients_forgotten(examples: int, batch: int, queries: int) -> dict[str, float]:
    ids = torch.tensor(np.asarray(models.gpt(max(examples, queries)).batch)).long()
    spent = _kronfluence(ids[:examples], batch, ids[:queries])
    fit = spent["covariances"] + spent["eigenvectors"] + spent["eigenvalues"]
    return {"fit": fit, "scores": spent["scores"]}


@functools.cache
def _subject(size: int) -> models.Subject:
    return models.gpt(size)  # one loss, so that its programs are compiled once


def _without_store(examples: int, batch: int, queries: int) -> dict[str, float]:
    subject = _subject(max(examples, queries))
    method = ja.ekfac(subject.loss, rank=1 << 20)
    train = jax.tree.map(lambda x: x[:examples], subject.batch)
    asked = jax.tree.map(lambda x: x[:queries], subject.batch)
    started = time.perf_counter()
    index = ja.build_index(
        method, subject.params, train, groups=models.dense_layers, batch_size=batch, store=False
    )
    fitted = time.perf_counter()
    jax.block_until_ready(ja.score(index, asked))
    return {"fit": fitted - started, "scores": time.perf_counter() - fitted}


def _to_its_end(run: Callable[[], None]) -> Callable[[], None]:
    """Waits for the device, which torch does not."""

    def whole() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return whole


def _bergson(model: GPT, ids: torch.Tensor) -> Callable[[], None]:
    data = Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
    config = IndexConfig(run_path=tempfile.mkdtemp())

    def run() -> None:
        model.zero_grad()
        collector = InMemoryCollector(
            model=model,
            data=data,
            cfg=config,
            processor=GradientProcessor(projection_dim=RANK),
            target_modules=set(LanguageModelling().get_influence_tracked_modules()),
        )
        with collector:
            total_loss(model, ids).backward()
            collector.process_batch(list(range(len(ids))), losses=torch.zeros(len(ids)))

    return run


def _dattri(model: GPT, ids: torch.Tensor) -> Callable[[], None]:
    def loss(model: nn.Module, batch: Any, device: str) -> torch.Tensor:
        del device
        return total_loss(model, batch[0])

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    # Its set-up calls the model with the batch itself, which is one token too long.
    loader = DataLoader(TensorDataset(ids), batch_size=len(ids))

    def run() -> None:
        attributor = LoGraAttributor(
            task,
            layer_names=LanguageModelling().get_influence_tracked_modules(),
            hessian="Identity",
            proj_dim=RANK**2,
            offload="none",
            device=DEVICE,
            cache_dir=tempfile.mkdtemp(),  # else it writes where it stands
        )
        attributor._setup_compressors(DataLoader([{"ids": row[:-1]} for row in ids], len(ids)))
        attributor.cache(loader)

    return run


def _kronfluence(
    ids: torch.Tensor, batch: int, asked: torch.Tensor | None = None
) -> dict[str, float]:
    """Seconds of each stage; of the first training examples as queries, unless others are given."""
    asked = ids[: ekfac.QUERIES] if asked is None else asked
    task, data = LanguageModelling(), TensorDataset(ids)
    model = prepare_model(GPT(), task)
    analyzer = Analyzer(
        "benchmark",
        model,
        task,
        cpu=DEVICE == "cpu",
        disable_tqdm=True,
        log_level=logging.ERROR,
        output_dir=tempfile.mkdtemp(),
        disable_model_save=True,
    )
    factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    queries = TensorDataset(asked)
    shared: dict[str, Any] = {"factors_name": "f"}
    fit = shared | {"dataset": data, "per_device_batch_size": batch, "factor_args": factors}
    stages = {
        "covariances": functools.partial(analyzer.fit_covariance_matrices, **fit),
        "eigenvectors": functools.partial(
            analyzer.perform_eigendecomposition, factor_args=factors, **shared
        ),
        "eigenvalues": functools.partial(analyzer.fit_lambda_matrices, **fit),
        "scores": functools.partial(
            analyzer.compute_pairwise_scores,
            scores_name="s",
            query_dataset=queries,
            train_dataset=data,
            per_device_query_batch_size=min(len(asked), 64),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=None),
            **shared,
        ),
    }
    spent = {}
    for name, stage in stages.items():
        started = time.perf_counter()
        _to_its_end(stage)()
        spent[name] = time.perf_counter() - started
    plain, there = GPT().to(DEVICE), ids.to(DEVICE)

    def gradients() -> None:
        for part in there.split(batch):
            plain.zero_grad()
            total_loss(plain, part).backward()

    started = time.perf_counter()
    _to_its_end(gradients)()
    spent["plain gradient"] = time.perf_counter() - started
    return spent


PEERS = {"jaxattr": _without_store, "kronfluence": _gradients_forgotten}
"""EK-FAC that keeps no gradients: (examples, batch, queries) -> seconds of fit and scores."""


if __name__ == "__main__":
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    main()

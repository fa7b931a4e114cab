"""Attributes a small GPT-2 to the documents that it was trained on, and says how right that is.

python -m experiments.language                     # Python's documentation; eight to twenty minutes on two cores
python -m experiments.language --full              # two models, 48 half-subsets each
python -m experiments.language --data wiki.train.tokens --weights gpt2/ --full   # on a GPU
python -m experiments.language --facts all         # also facts that a search for words does not find
python -m experiments.language --plan              # what GPT-2 small on WikiText-103 takes
"""  # noqa: E501

import argparse
import dataclasses
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments import command_line, ground_truth
from experiments.language import corpus, costs, facts, figures, pretrained, study, text
from experiments.language.study import Config, Result, Retrieval, Subject
from experiments.language.text import Tokenizer
from experiments.language.training import Recipe, perplexity
from jaxattr import evaluation, files
from jaxattr.fitting.eigenbases import TruncationWarning
from jaxattr.weights.report import WeightWarning

FACTS = {"stated": ("stated",), "all": tuple(facts.KINDS)}
TITLE = "Which documents taught the model this?"


def main() -> None:
    """Runs the study."""
    # A device per core, for retraining: XLA leaves cores idle in the many small steps of one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    arguments = _arguments()
    console, started = command_line.console(), time.monotonic()
    if arguments.plan:
        _print_plans(console)
        return
    warnings.simplefilter("ignore", WeightWarning)  # they stand in the file of results
    warnings.simplefilter("ignore", TruncationWarning)
    config = study.FULL if arguments.full else study.QUICK
    config, tokenizer, start = _model(config, arguments.weights)
    context = config.model.context
    longest = context - 1 if isinstance(tokenizer, text.Bytes) else 4 * context
    if arguments.data is None:
        texts = text.documentation()
    else:
        texts = text.pieces(text.read(arguments.data), longest)
    found = corpus.assemble(
        text.deduplicated(texts, 80, longest), tokenizer,
        context=context, train=config.train, queries=config.queries, known=config.known,
        kinds=FACTS[arguments.facts],
    )  # fmt: skip
    runs = []
    for run in range(config.runs):
        console.print(
            f"[bold]model {run + 1} of {config.runs}[/bold]: pretraining, then "
            f"{config.subsets * config.seeds} models on halves of {config.train} documents"
        )
        subject = study.prepare(config, found, arguments.folder, run, start)
        console.print(_fluency(subject))
        runs.append(_measure(subject, config, console))
        if run == 0:
            _draw(subject, runs[0].results, arguments.folder)
    console.print(lds_table(runs))
    console.print(facts_table(runs, found.kinds))
    name = "full" if arguments.full else "quick"
    name += ".json" if arguments.facts == "stated" else f"_{arguments.facts}_facts.json"
    with files.written_whole(arguments.folder / name) as partial:
        partial.write_text(json.dumps([as_json(run, found.kinds) for run in runs], indent=1))
    console.print(
        f"{time.monotonic() - started:.0f} s. In {arguments.folder}/: who_taught_it.html (tokens "
        f"coloured by influence), weights.png, {name}."
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """All figures of one model.

    Attributes:
      results: {method: figures}.
      baselines: {name: figures on the facts}.
      facts_patch: {(method, weights) or name: tail-patch on the facts, [facts, k]}.
      texts_patch: {(method, weights) or "chance": tail-patch on evaluation documents, [q, k]}.
    """

    results: dict[str, Result]
    baselines: dict[str, Retrieval]
    facts_patch: dict[Any, np.ndarray]
    texts_patch: dict[Any, np.ndarray]


def _measure(subject: Subject, config: Config, console: Console) -> Run:
    results: dict[str, Result] = {}
    for method in study.METHODS:
        console.print(f"  {method}")
        results[method] = study.measure(subject, method, config)
    for method in ("TracIn", "EK-FAC"):
        name = f"{method}, by kind"
        console.print(f"  {name}")
        results[name] = study.measure(subject, method, config, study.by_kind)
    found = study.measure_baselines(subject, config)
    console.print("  tail-patch")
    pairs = [(m, w) for m in results for w in ("uniform", "learned")]
    facts = {(m, w): results[m].facts[w].top for m, w in pairs}
    texts = {(m, w): results[m].top_texts[w] for m, w in pairs}
    shape = texts["TracIn", "uniform"].shape
    chance = np.random.default_rng(1).integers(len(subject.corpus.texts), size=shape)
    corpus = subject.corpus
    return Run(
        results,
        found,
        study.tail_patch(
            subject, corpus.questions, facts | {name: b.top for name, b in found.items()}
        ),
        study.tail_patch(subject, corpus.evaluation, texts | {"chance": chance}),
    )


def _draw(subject: Subject, results: dict[str, Result], folder: Path) -> None:
    by_layer = {m: results[m].weights["learned"] for m in study.METHODS}
    figures.draw_weights(by_layer, folder / "weights.png")
    corpus = subject.corpus
    shown = {name: np.concatenate([corpus.questions[name][:3], corpus.evaluation[name][:5]])
             for name in corpus.questions}  # fmt: skip
    # Of methods with the identity as kernel, the documents' tokens are coloured too.
    method = study.METHODS["TracIn"](subject)
    ja.report(
        ja.build_index(method, subject.params, corpus.train, batch_size=32),
        shown,
        weights=results["TracIn"].weights["learned"],
        k=3,
        decode=lambda token: corpus.tokenizer.pieces([token])[0],
        title=TITLE,
        path=folder / "who_taught_it.html",
    )


def _fluency(subject: Subject) -> str:
    held_out = perplexity(subject.logits_fn, subject.params, subject.corpus.evaluation)
    answers = perplexity(subject.logits_fn, subject.params, subject.corpus.questions)
    return (
        f"  perplexity per token {held_out:.2f} on held-out documents, {answers:.2f} on answers "
        "to the invented facts"
    )


def lds_table(runs: list[Run]) -> Table:
    """Makes the table of LDS and tail-patch, means over runs.

    Args:
      runs: one per model.

    Returns:
      A table for a terminal.
    """
    table = Table(
        title="LDS in % on held-out documents, 95 % interval over subsets in brackets; tail-patch: "
        "change in % of the mean token probability after one step on a top proponent",
        padding=(0, 0, 0, 1),
    )
    kinds = list(next(iter(runs[0].results.values())).lds)
    patched = ("tail-patch uniform", "tail-patch learned")
    for heading in ("method", *kinds, "learned - uniform", *patched):
        table.add_column(heading.replace(" ", "\n", 1))
    for method in runs[0].results:
        found = [run.results[method] for run in runs]
        cells = [_mean_of([each.lds[kind] for each in found]) for kind in kinds]
        difference = _mean_of([each.difference for each in found], "+")
        patches = [
            _interval(np.concatenate([run.texts_patch[method, w] for run in runs]), 3)
            for w in ("uniform", "learned")
        ]
        table.add_row(method, *cells, difference, *patches)
    chance = np.concatenate([run.texts_patch["chance"] for run in runs])
    table.add_row("chance", *["-"] * (len(kinds) + 1), _interval(chance, 3), "")
    return table


def facts_table(runs: list[Run], kinds: list[str]) -> Table:
    """Makes the table of retrieval of the facts' sources, all runs together.

    Args:
      runs: one per model.
      kinds: of the facts; if there are several, each has a column.

    Returns:
      A table for a terminal.
    """
    table = Table(
        title="Invented facts: is the source document the first proponent (recall@1, %), mean "
        "reciprocal rank, and tail-patch of the answer's mean token probability, %; intervals over "
        "facts",
        padding=(0, 0, 0, 1),
    )
    several = list(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else []
    for heading in ("method", "weights", "recall@1", *several, "MRR", "tail-patch"):
        table.add_column(heading)

    def add(name: str, weights: str, found: list[Retrieval], patches: list[np.ndarray]) -> None:
        hits = np.concatenate([each.hits for each in found])
        mrr = np.mean([each.mrr for each in found])
        patch = _interval(np.concatenate(patches), 2)
        by_kind = _by_kind(hits, kinds * len(found)) if several else {}
        each = [f"{100 * by_kind[kind]:.0f}" for kind in several]
        table.add_row(name, weights, _interval(hits[:, None], 0), *each, f"{mrr:.2f}", patch)

    for method in runs[0].results:
        for weights in ("uniform", "learned"):
            found = [run.results[method].facts[weights] for run in runs]
            add(method, weights, found, [run.facts_patch[method, weights] for run in runs])
    for name in runs[0].baselines:
        found = [run.baselines[name] for run in runs]
        add(name, "-", found, [run.facts_patch[name] for run in runs])
    return table


def as_json(run: Run, kinds: list[str]) -> dict[str, Any]:
    """The figures of one model, for a file.

    Args:
      run: of the model.
      kinds: of the facts.
    """
    return {
        "methods": {
            method: {
                "lds": {k: [lds.mean, lds.low, lds.high] for k, lds in result.lds.items()},
                "learned_minus_uniform": vars(result.difference),
                "recall_at_1": {k: float(r.hits.mean()) for k, r in result.facts.items()},
                "recall_at_1_by_kind": {
                    k: _by_kind(r.hits, kinds) for k, r in result.facts.items()
                },
                "mrr": {k: r.mrr for k, r in result.facts.items()},
                "weights": result.weights,
                "shares": result.shares,
                "warnings": result.warnings,
            }
            for method, result in run.results.items()
        },
        "baselines": {
            name: {
                "recall_at_1": float(b.hits.mean()),
                "recall_at_1_by_kind": _by_kind(b.hits, kinds),
                "mrr": b.mrr,
            }
            for name, b in run.baselines.items()
        },
        "tail_patch": {
            where: {" ".join(k) if isinstance(k, tuple) else k: float(v.mean()) for k, v in
                    found.items()}
            for where, found in (("facts", run.facts_patch), ("texts", run.texts_patch))
        },
    }  # fmt: skip


def _model(config: Config, weights: Path | None) -> tuple[Config, Tokenizer, Any]:
    """Configuration, tokenizer and, if they are given, pretrained parameters."""
    if weights is None:
        return config, text.Bytes(), None
    on_cpu = jax.default_backend() == "cpu"
    model, params, tokenizer = pretrained.load(weights, jnp.float32 if on_cpu else jnp.bfloat16)
    model = dataclasses.replace(model, context=min(model.context, 512))
    position = params["position"]["embedding"][: model.context]
    params = params | {"position": {"embedding": position}}
    tuning = Recipe(epochs=3, batch=8, rate=3e-5)
    return dataclasses.replace(config, model=model, tuning=tuning), tokenizer, params


def _print_plans(console: Console) -> None:
    console.print(f"GPT-2 small on WikiText-103, {jax.device_count()} devices of this machine")
    for name, plan in costs.plans(ground_truth.mesh_of_devices()).items():
        console.print(f"[bold]{name}[/bold]\n{plan}", highlight=False)
    total = costs.arithmetic()
    console.print(
        f"One pass over the data is {total:.2g} floating-point operations: at 40 % of 989 Tflop/s "
        f"(H100) {total / 0.4 / 989e12 / 60:.1f} minutes, on 16 TPU v5e (197 Tflop/s each) "
        f"{total / 0.4 / 197e12 / 16 / 60:.1f}. TracIn and LoGRA make one pass, EK-FAC two."
    )


def _arguments() -> argparse.Namespace:
    parser = command_line.parser("language", __doc__)
    parser.add_argument("--data", type=Path, help="text, WikiText or .jsonl file, or a folder")
    parser.add_argument("--weights", type=Path, help="a GPT-2 as Hugging Face stores it")
    parser.add_argument("--facts", choices=FACTS, default="stated", help="kinds of facts")
    parser.add_argument("--plan", action="store_true", help="GPT-2 small on WikiText-103: the cost")
    return parser.parse_args()


def _mean_of(found: list[Any], sign: str = "") -> str:
    """Means over runs, of means and of interval ends: models are few, so no interval over them."""
    mean, low, high = (
        100 * np.mean([getattr(each, name) for each in found]) for name in ("mean", "low", "high")
    )
    return f"{mean:{sign}.1f}\n[{low:{sign}.1f}, {high:{sign}.1f}]"


def _by_kind(hits: np.ndarray, kinds: list[str]) -> dict[str, float]:
    """Share of the facts of each kind whose source comes first."""
    return {kind: float(hits[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}


def _interval(values: np.ndarray, digits: int) -> str:
    each = values.mean(axis=1)
    low, high = evaluation.mean_interval(each)
    ends = f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
    return f"{100 * each.mean():.{digits}f} {ends}"


if __name__ == "__main__":
    main()

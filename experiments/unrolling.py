"""Unrolled influence on digits: does it say what models do that are trained again, weighted?

python -m experiments.unrolling            # five minutes of one core

Prints the LDS of unrolled scores, of EK-FAC and of TracIn against models of the very run that was
unrolled, with some examples left out of their batches, and against models of other runs.
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.digits import data, models, training

TRAIN, QUERIES, SUBSETS = 300, 32, 48
LEFT_OUT = (0.05, 0.5)


class Setting(NamedTuple):
    """How a model is trained, and how much is unrolled.

    Attributes:
      model: key of `models.RECIPES`.
      learning_rate: of Adam, at its peak; the recipe's is 5e-3 for the MLP, 1.5e-2 for the ViT.
      eps_root: what is added under Adam's root.
      unrolled: runs whose scores are averaged too, the explained one among them.
    """

    model: str
    learning_rate: float
    eps_root: float
    unrolled: int = 1


SETTINGS = (
    Setting("mlp", 5e-3, 1e-8, unrolled=3),
    Setting("mlp", 2e-3, 1e-5, unrolled=3),
    Setting("vit", 1.5e-2, 1e-8),
    Setting("vit", 2e-3, 1e-5),
)


class Subject(NamedTuple):
    """A model to explain.

    Attributes:
      run: its training.
      others: the same training from other keys.
    """

    run: ja.TrainingRun
    others: list[ja.TrainingRun]


def subject(setting: Setting, model: models.Model, digits: data.Digits) -> Subject:
    """Trains by Adam whose root has a derivative everywhere."""

    def optimizer(steps: int) -> Any:
        schedule = optax.cosine_onecycle_schedule(steps, setting.learning_rate)
        return optax.adamw(schedule, eps_root=setting.eps_root, weight_decay=1e-3)

    fit = ja.trainer(
        training.loss(model), model.init, digits.train, optimizer=optimizer, batch_size=25,
        epochs=model.recipe.epochs,
    )  # fmt: skip
    run, *others = (fit.run(jax.random.key(seed)) for seed in range(setting.unrolled + 1))
    return Subject(run, others)


def study(setting: Setting, console: Console) -> Table:
    """Measures one model."""
    digits = data.load(train=TRAIN, evaluation=QUERIES)
    model = models.make_model(setting.model)
    margin, queries = training.margin(model), digits.evaluation
    run, others = subject(setting, model, digits)
    began = time.perf_counter()
    scores = {"unrolled": ja.unroll(run, margin, queries)}
    console.print(f"{setting}: {len(run)} steps unrolled in {time.perf_counter() - began:.0f} s")
    if others[1:]:
        each = [scores["unrolled"], *(ja.unroll(other, margin, queries) for other in others[1:])]
        scores[f"unrolled, mean of {len(each)} runs"] = np.mean(each, axis=0)
    params = run.params(run.trained())
    for method in (ja.ekfac, ja.tracin):
        index = ja.build_index(method(training.loss(model)), params, digits.train)
        scores[index.method.name if index.method else ""] = np.asarray(ja.score(index, queries))
    table = Table("LDS in %", *(f"{run}, {share:.0%} out" for share in LEFT_OUT for run in RUNS))
    found: dict[str, list[str]] = {name: [] for name in scores}
    for share in LEFT_OUT:
        masks = ja.evaluation.random_subsets(jax.random.key(5), TRAIN, SUBSETS, fraction=1 - share)
        for trained in (run, others[0]):
            params = jax.vmap(trained.params)(trained.trained(masks))
            of_one = jax.tree.map(lambda leaf: leaf[:, None], params)
            outputs = ja.evaluation.outputs(margin, of_one, queries)
            for method_name, values in scores.items():
                found[method_name].append(str(ja.lds(values, masks, outputs)))
    for method_name, cells in found.items():
        table.add_row(method_name, *cells)
    return table


RUNS = ("same run", "other run")

if __name__ == "__main__":
    console = Console(width=140)
    for setting in SETTINGS:
        console.print(study(setting, console))

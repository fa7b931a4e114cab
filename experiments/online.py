"""Attribution inside a training loop: who taught the model what it now gets most wrong?

python -m experiments.online            # a minute; pictures and checkpoints in runs/online/

A small network learns handwritten digits, of which one in twenty has a wrong label, on a mesh over
all devices. The loop is an ordinary one: a Flax `TrainState`, Optax, an Orbax `CheckpointManager`.
Every 100 steps the checkpoints that were saved so far are restored and become TracIn's; one jitted
call then finds the proponents of the batch's worst examples, which are mostly the wrong labels.
"""

import argparse
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

import jaxattr as ja
from experiments.digits import data

matplotlib.use("Agg")

from matplotlib import pyplot as plt

BATCH, WORST, SHOWN, CHECKPOINTS = 128, 4, 5, 3


class Net(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [b, 8, 8] to logits [b, 10]."""
        x = nn.relu(nn.Conv(16, (3, 3))(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))


def main() -> None:
    """Trains, attributes on the way, and draws what was found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.online", description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--every", type=int, default=100, help="steps between attributions")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/online"))
    arguments = parser.parse_args()
    Loop(arguments.out, arguments.every).run(arguments.steps)


class Loop:
    """A training loop that looks back every so often."""

    def __init__(self, out: pathlib.Path, every: int) -> None:
        self.out, self.every, self.console = out.absolute(), every, Console()
        axes = (AxisType.Auto,)
        self.mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=axes)
        self.spread = NamedSharding(self.mesh, PartitionSpec("data"))
        self.train, self.wrong = noisy_digits()
        self.model, self.compilations = Net(), 0
        jax.monitoring.register_event_duration_secs_listener(self.count)
        params = self.model.init(jax.random.key(0), jnp.zeros((1, 8, 8)))["params"]
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        state = TrainState.create(apply_fn=self.model.apply, params=params, tx=optax.adam(1e-3))
        self.state = jax.device_put(state, everywhere)
        self.method = ja.tracin(self.loss, projection=ja.projections.two_sided(8))

    def loss(self, params: Any, example: Any, key: jax.Array) -> jax.Array:
        """The loss of one example."""
        del key
        logits = self.model.apply({"params": params}, example["image"][None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])

    def count(self, event: str, duration_secs: float, **more: Any) -> None:
        """Counts the programs that XLA compiles."""
        del duration_secs, more
        self.compilations += event == "/jax/core/compile/backend_compile_duration"

    def run(self, steps: int) -> None:
        """Trains for so many steps.

        Args:
          steps: how many.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        keep = ocp.CheckpointManagerOptions(max_to_keep=CHECKPOINTS, create=True)
        generator, found, compiled = np.random.default_rng(0), [], []
        with ocp.CheckpointManager(self.out / "checkpoints", options=keep) as manager:
            for step in range(1, steps + 1):
                ids = generator.choice(len(self.wrong), BATCH, replace=False)
                batch = jax.device_put({k: x[ids] for k, x in self.train.items()}, self.spread)
                self.state, losses = train_step(self.state, batch)
                jax.block_until_ready(losses)  # as a loop does that logs its loss
                if step % self.every == 0:
                    manager.save(step, args=ocp.args.StandardSave(self.state))
                    manager.wait_until_finished()
                    if len(manager.all_steps()) == CHECKPOINTS:
                        before = self.compilations
                        found.append(self.look_back(step, manager, batch, losses, ids))
                        compiled.append(self.compilations - before)
        self.draw(found)
        self.console.print(
            f"Programs compiled, by look back: {compiled}. Picture: {self.out / 'worst.png'}"
        )

    def look_back(
        self, step: int, manager: ocp.CheckpointManager, batch: Any, losses: Any, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the proponents of the batch's worst examples.

        Args:
          step: of training.
          manager: of the checkpoints.
          batch: [b, ...], over the mesh.
          losses: [b].
          ids: of the batch [b].

        Returns:
          The ids of the worst examples [w], and of their proponents [w, k].
        """
        started = time.perf_counter()
        restored = [
            manager.restore(each, args=ocp.args.StandardRestore(self.state))
            for each in sorted(manager.all_steps())
        ]
        checkpoints = [state.params for state in restored]
        index = ja.build_index(self.method, checkpoints, self.train, mesh=self.mesh)
        attribute = ja.attributor(index, k=SHOWN + 1)
        built = time.perf_counter() - started

        worst = jnp.argsort(-losses)[:WORST]
        top = attribute(jax.tree.map(lambda x: x[worst], batch))
        worst = ids[np.asarray(worst)]
        wrong = int(self.wrong[worst].sum())
        self.console.print(
            f"step {step}: loss {float(losses.mean()):.3f}; of the {WORST} worst examples "
            f"{wrong} have a wrong label; checkpoints {manager.all_steps()}, index {built:.1f} s"
        )
        # An example in the training set is its own first proponent.
        others = [
            row[row != me][:SHOWN] for row, me in zip(np.asarray(top.ids), worst, strict=True)
        ]
        return worst, np.stack(others)

    def draw(self, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Draws the last look back: worst examples, and the digits that taught the model the same.

        Args:
          found: what `look_back` returned.
        """
        worst, proponents = found[-1]
        figure, axes = plt.subplots(WORST, SHOWN + 1, figsize=(8, 6))
        for row, (me, others) in enumerate(zip(worst, proponents, strict=True)):
            for column, each in enumerate([me, *others]):
                axis, label = axes[row, column], int(self.train["label"][each])
                axis.imshow(self.train["image"][each], cmap="gray_r")
                axis.axis("off")
                title = f"labelled {label}"
                color = "#d1242f" if self.wrong[each] else "black"
                axis.set_title(title, fontsize=9, color=color)
        figure.suptitle(
            "The batch's worst examples (left), and the training digits that most push the model\n"
            "towards the label that it is given (TracIn over three checkpoints); red: wrong label",
            fontsize=10,
        )
        figure.tight_layout()
        self.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.out / "worst.png", dpi=120)
        plt.close(figure)


@jax.jit
def train_step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
    """One step of training.

    Args:
      state: parameters and optimizer.
      batch: [b, ...], over the mesh.

    Returns:
      The next state, and the losses of the batch before it [b].
    """

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), losses

    gradient, losses = jax.grad(mean_loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradient), losses


def noisy_digits() -> tuple[data.Images, np.ndarray]:
    """Returns training digits of which one in twenty has a wrong label, and which, bool [n]."""
    train = data.load().train
    generator = np.random.default_rng(1)
    wrong = generator.random(len(train["label"])) < 0.05
    shift = generator.integers(1, 10, len(wrong))
    labels = np.where(wrong, (train["label"] + shift) % 10, train["label"])
    return {"image": train["image"], "label": labels.astype(np.int32)}, wrong


if __name__ == "__main__":
    main()

"""A picture of quality against cost."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from experiments import pictures
from experiments.leaderboard.measuring import Figures


def draw(found: list[Figures], path: Path) -> None:
    """Draws LDS against gradient passes, a panel for each model.

    Args:
      found: all rows.
      path: of the PNG.
    """
    domains = list(dict.fromkeys(each.domain for each in found))
    figure, axes = plt.subplots(
        1, len(domains), figsize=(1 + 4.6 * len(domains), 4.4), squeeze=False, layout="constrained"
    )
    for axis, domain in zip(axes[0], domains, strict=True):
        for each in (row for row in found if row.domain == domain):
            cost = max(each.passes, 0.05)
            mean, low, high = (100 * x for x in each.lds["uniform"])
            axis.plot([cost, cost], [low, high], color=pictures.UNIFORM, linewidth=1, zorder=1)
            axis.plot(cost, mean, "o", color=pictures.UNIFORM, markersize=6)
            top = mean
            if "learned" in each.lds:
                top = 100 * each.lds["learned"][0]
                axis.annotate(
                    "", (cost, top), (cost, mean),
                    arrowprops={"arrowstyle": "-|>", "color": pictures.LEARNED},
                )  # fmt: skip
                axis.plot(cost, top, "o", color=pictures.LEARNED, markersize=5)
            axis.annotate(
                each.method, (cost, max(top, mean)), xytext=(4, 4), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(domain)
        axis.set_xlabel("cost, gradient passes over the training set")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    axes[0, 0].set_ylabel("LDS, % (higher is better)")
    figure.suptitle("Quality against cost: grey, uniform weights with interval; blue, learned")
    pictures.save(figure, path, tight=False)

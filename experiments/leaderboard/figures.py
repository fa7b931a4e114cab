"""A picture of quality against cost."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from experiments import pictures
from experiments.leaderboard.measuring import Figures


def draw(found: list[Figures], path: Path) -> None:
    """Draws the LDS of every method, from cheap to dear, a panel for each model.

    Args:
      found: all rows.
      path: of the PNG.
    """
    domains = list(dict.fromkeys(each.domain for each in found))
    rows = {
        domain: sorted((r for r in found if r.domain == domain), key=lambda r: -r.passes)
        for domain in domains
    }
    height = 1.4 + 0.3 * max(map(len, rows.values()))
    figure, axes = plt.subplots(
        1, len(domains), figsize=(1 + 4.4 * len(domains), height), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, domain in zip(axes[0], domains, strict=True):
        own = rows[domain]
        places = np.arange(len(own))
        mean, low, high = 100 * np.array([each.lds["uniform"] for each in own]).T
        axis.hlines(places, low, high, color=pictures.UNIFORM, linewidth=1)
        axis.plot(mean, places, "o", color=pictures.UNIFORM, label="uniform weights, 95 % interval")
        learned = [100 * each.lds.get("learned", [np.nan])[0] for each in own]
        axis.plot(learned, places, "o", color=pictures.LEARNED, label="weights from outcomes")
        names = [f"{each.method} ({_cost(each.passes)})" for each in own]
        axis.set_yticks(places, names, fontsize=8)
        axis.set_title(domain)
        axis.set_xlabel("LDS, % (in brackets: gradient passes)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    pictures.save(figure, path, tight=False)


def _cost(passes: float) -> str:
    return f"{passes:.1f}" if passes < 10 else f"{passes:,.0f}"

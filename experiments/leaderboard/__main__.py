"""Every method beside each other, one model per domain: LDS, QLD, cost, bytes.

python -m experiments.leaderboard                  # ViT and ResNet on digits
python -m experiments.leaderboard vit resnet gpt unet
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import jaxattr as ja
from experiments.leaderboard import domains, figures, measuring
from experiments.leaderboard.domains import Domain
from experiments.leaderboard.measuring import Figures

DOMAINS: dict[str, Callable[[Path], Domain]] = {
    "vit": lambda folder: domains.classifier("vit", folder),
    "resnet": lambda folder: domains.classifier("resnet", folder),
    "gpt": domains.gpt,
    "unet": domains.unet,
}


BEYOND = ("ASTRA", "Fisher, all layers", "EShampoo", domains.UNROLLED_ONCE, domains.UNROLLED)
"""Methods that are compared with EK-FAC."""


def main() -> None:
    """Measures, prints and draws."""
    # A device per core, for retraining: XLA leaves cores idle in the many small steps of one.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    given, console, started = _arguments(), Console(width=130), time.monotonic()
    warnings.simplefilter("ignore", ja.WeightWarning)
    warnings.simplefilter("ignore", ja.ConvergenceWarning)  # residuals are what iterations buy
    found: list[Figures] = []
    for name in given.domains:
        console.print(f"[bold]{name}[/bold]: training")
        domain = DOMAINS[name](given.folder)
        results = given.folder / "leaderboard"
        rows: list[Figures] = []
        for entry in domain.entries:
            if given.only and entry.name not in given.only:
                continue
            rows.append(measuring.measure(domain, entry, results))
            console.print(f"  {entry.name}: LDS {_percent(rows[-1].lds['uniform'], '')}")
        if given.queries:
            console.print(f"  models without the strongest of {given.queries} queries")
            rows = measuring.with_qld(
                domain, rows, results, removed=given.removed, asked=given.queries
            )
        found += rows
        for line in against_ekfac(domain, results, given.only):
            console.print(f"  {line}")
    for name in given.domains:
        own = [row for row in found if row.domain == name]
        if own:
            console.print(table(own))
    figures.draw(found, given.folder / "leaderboard.png")
    console.print(
        f"{time.monotonic() - started:.0f} s. In {given.folder}/: leaderboard.png, and a .json for "
        "each row in leaderboard/."
    )


def against_ekfac(domain: Domain, results: Path, only: list[str] | None) -> list[str]:
    """What dearer methods add to EK-FAC.

    Args:
      domain: the model.
      results: folder of the rows.
      only: names of the methods that were measured; None for all.
    """
    entries = {entry.name: entry for entry in domain.entries if not only or entry.name in only}
    base = entries.get("EK-FAC, whole", entries.get("EK-FAC"))
    others = [entries[name] for name in BEYOND if name in entries]
    if base is None:
        return []
    return [
        f"{entry.name}, {kind}, minus {base.name}, uniform: {change}"
        for entry in others
        for kind, change in measuring.differences(domain, (entry, base), results).items()
    ]


def table(found: list[Figures]) -> Table:
    """Makes the table of one model, from cheap to dear.

    Args:
      found: its rows.
    """
    shown = Table(title=f"{found[0].domain}: percent, with 95 % intervals")
    headings = (
        "method", "passes", "bytes", "LDS", "learned adds", "QLD", "QLD, learned"
    )  # fmt: skip
    for heading in headings:
        shown.add_column(heading)
    for row in sorted(found, key=lambda row: row.passes):
        shown.add_row(
            row.method, f"{row.passes:.1f}", f"{row.bytes:,.0f}",
            _percent(row.lds["uniform"], ""), _percent(row.gain, "+"),
            _plain(row.qld.get("uniform")), _plain(row.qld.get("learned")),
        )  # fmt: skip
    return shown


def _percent(values: list[float] | None, sign: str) -> str:
    if values is None:
        return ""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} [{low}, {high}]"


def _plain(values: list[float] | None) -> str:
    return "" if values is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("domains", nargs="*", choices=[*DOMAINS, []], default=["vit", "resnet"])
    parser.add_argument("--folder", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--queries", type=int, default=24, help="of QLD; 0 for none")
    parser.add_argument("--removed", type=float, default=0.05, help="share removed, for QLD")
    return parser.parse_args()


if __name__ == "__main__":
    main()

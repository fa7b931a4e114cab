"""All benchmarks, one after the other, each in a process of its own; what they print is kept.

python -m experiments.benchmarks --device            # what an accelerator changes
python -m experiments.benchmarks --device --quick    # the same in small, to try it on a CPU
python -m experiments.benchmarks                     # all
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

DEVICE = {
    "precision": ("", "--examples 8"),
    "accelerator": ("", "--rows 2 --batch 1 --length 32 --depth 1"),
    "features": (
        "--model gpt --model resnet9 --rank 16 --batch 256",
        "--model gpt --batch 4 --rank 4 --repeats 1",
    ),
    "ekfac": ("--examples 512 --batch 64", "--examples 4 --batch 2 --repeats 1"),
    "scoring": ("", "--n 2000 --p 256 --q 8 --repeats 1"),
    "weights": ("", "--n 2000 --q 8 --steps 10 --repeats 1"),
    "tokens": ("", "--length 16 --k 2 --repeats 1"),
    "peers": ("--examples 512 --batch 64", "--examples 16 --queries 4 --repeats 1"),
}
"""What is measured on an accelerator: options there, and what makes it small."""

OTHERS = {
    "compiling": "--model resnet9 --repeats 1",
    "compression": "--train 64 --subsets 8 --n 1000 --p 64 --repeats 1",
    "identity": "--n 2000",
    "importing": "--repeats 1",
    "reranking": "--n 2000 --p 256 --repeats 1",
    "scaling": "",
    "store": "--n 4000",
}
"""The rest, of the host and its disk: what makes it small."""


def main() -> None:
    """Runs them, and ends with 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", action="store_true", help="only what an accelerator changes")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    given, console = parser.parse_args(), Console()
    given.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, options in chosen(given.device, given.quick).items():
        if name == "peers" and importlib.util.find_spec("kronfluence") is None:
            console.print("peers: skipped, their libraries are not installed")
            continue
        if not run(name, options.split(), given.folder, console):
            failed.append(name)
    console.print(f"What they printed is in {given.folder}/.")
    if failed:
        sys.exit(f"These failed: {', '.join(failed)}.")


def chosen(device: bool, quick: bool) -> dict[str, str]:
    """What is run, and its options.

    Args:
      device: only what an accelerator changes, at sizes for one.
      quick: at small sizes.
    """
    sizes = {name: small if quick else large for name, (large, small) in DEVICE.items()}
    if device:
        return sizes
    every = {name: small for name, (_, small) in DEVICE.items()} | OTHERS
    return every if quick else dict.fromkeys(every, "")


def run(name: str, options: list[str], folder: Path, console: Console) -> bool:
    """Runs one benchmark, and keeps what it prints.

    Args:
      name: of its module.
      options: of its command line.
      folder: for name.txt, and name.log of warnings and errors.
      console: where its tables are shown.

    Returns:
      Whether it ran to its end.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *options]
    output = folder / f"{name}.txt"
    with output.open("w") as tables, (folder / f"{name}.log").open("w") as log:
        wide = os.environ | {"COLUMNS": "110"}
        done = subprocess.run(command, stdout=tables, stderr=log, env=wide, check=False)
    console.print(f"[bold]{name}[/bold]: {time.monotonic() - started:.0f} s", highlight=False)
    console.print(output.read_text(), markup=False, highlight=False)
    if done.returncode:
        console.print(f"{name} ended with {done.returncode}: see {folder / name}.log")
    return not done.returncode


if __name__ == "__main__":
    main()

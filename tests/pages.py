"""The code of the documentation: what a page, a README or a notebook tells its reader to run."""

import json
import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"
NOTEBOOKS = ROOT / "docs" / "notebooks"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def blocks(path):
    """Python code of a page, block by block, with the scripts that it shows in their place."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = FENCE.findall(text)
    assert len(found) == text.count("```py"), f"{path.name}: a block is indented or has no end"
    return [SNIPPET.sub(lambda each: (ROOT / "docs" / each[1]).read_text(), one) for one in found]


def run(path):
    """Runs the blocks of a page in one namespace, as a reader would: in float32, on its own."""
    namespace = {"__name__": "__main__"}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for number, block in enumerate(blocks(path)):
            exec(compile(block, f"{path.name}, block {number + 1}", "exec"), namespace)

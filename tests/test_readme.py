import re
from pathlib import Path

import jax
import pytest


@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_code_in_the_readme_runs():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 9
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        exec("\n".join(blocks), {})

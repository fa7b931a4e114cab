"""Whatever is done to the files of an index is found, or changes nothing."""

import pytest

from tests import tampering


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxattr.NonFiniteWarning")
@pytest.mark.filterwarnings("ignore::jaxattr.weights.report.WeightWarning")
def test_no_damage_is_silent(tmp_path):
    outcomes = tampering.run(600, seed=1, folder=tmp_path)
    silent = [each for each in outcomes if each.outcome == tampering.SILENT]
    assert not silent, tampering.table(outcomes)
    found = [each for each in outcomes if each.outcome == tampering.FOUND]
    assert len(found) > 240
    for each in found:  # and says of which file or folder
        assert str(tmp_path) in each.details
    assert {each.kind for each in found} >= {
        "manifest.json", "seals.json", "features/c/N/N/N", "features/zarr.json", "fitted-N/N/N",
        "examples/c/N/N/N", "self/c/N/N/N", "fitted-N.json", "fitted-N/N/.zarray",
    }  # fmt: skip

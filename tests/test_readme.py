import pytest

from tests.pages import ROOT, blocks, run

README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(blocks(README)) == 1
    run(README)
    assert (tmp_path / "report.html").exists()

import pytest

import jaxattr as ja
from tests import models


@pytest.mark.parametrize("make", [ja.tracin, ja.grad_cos, ja.trak])
def test_citations_are_bibtex_and_name_the_weights(make):
    text = ja.citation(make(models.loss))
    entries = text.split("\n\n")
    assert len(entries) == 2 and "2506.05647" in entries[-1]
    assert all(entry.startswith("@inproceedings{") and entry.endswith("}") for entry in entries)


def test_checkpoint_weights_are_named_when_they_do_not_fit():
    method = ja.grad_cos(models.loss, checkpoint_weights=[0.1, 0.2])
    assert method.weights_of(2) == (0.1, 0.2)
    with pytest.raises(ValueError, match="GradCos was given 2 checkpoint weights for 3"):
        method.weights_of(3)
    assert ja.trak(models.margin).weights_of(4) == (0.25,) * 4

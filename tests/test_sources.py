"""Data as users have it: lists of numbers are arrays, and ragged ones are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.sources import as_source

DOCS, LABELS = [[1, 2, 3], [3, 4, 0], [2, 2, 1]], [0, 1, 1]
ARRAYS = {"ids": np.asarray(DOCS), "label": np.asarray(LABELS)}
PARAMS = {"embedding": jax.random.normal(jax.random.key(0), (5, 2))}


class Listed:
    """A source of given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def loss(params, example, key):
    order = jnp.arange(1, example["ids"].shape[0] + 1)
    summed = (params["embedding"][example["ids"]] * order[:, None]).sum(axis=0)
    return jax.nn.softplus(summed[example["label"]])


def scores(data):
    index = ja.build_index(ja.tracin(loss), PARAMS, data, batch_size=2)
    return np.asarray(ja.score(index, data))


def test_an_error_of_a_source_says_of_which_example():
    class Broken(Listed):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("truncated file")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="truncated file") as caught:
        as_source(Broken(ITEMS), "train").read(np.arange(3))
    assert caught.value.__notes__ == ["Raised by example 2 of train."]


def test_whole_numbers_that_the_first_example_cannot_hold_are_refused():
    items = [{"ids": np.array([1, 2], np.uint8)}, {"ids": np.array([4, 300], np.uint16)}]
    with pytest.raises(ValueError, match="uint8 in example 0, .* hold 300 of example 1"):
        as_source(Listed(items), "train").read(np.arange(2))


ITEMS = [{"ids": ids, "label": label} for ids, label in zip(DOCS, LABELS, strict=True)]


@pytest.mark.parametrize(
    "data",
    [
        Listed(ITEMS),
        Listed([{"ids": [np.int64(i) for i in d["ids"]], "label": d["label"]} for d in ITEMS]),
        {"ids": DOCS, "label": LABELS},
    ],
    ids=["items", "numpy scalars", "columns"],
)
def test_lists_of_numbers_are_arrays(data):
    np.testing.assert_array_equal(scores(data), scores(ARRAYS))
    assert jax.tree.map(jnp.shape, as_source(data, "train").example) == {"ids": (3,), "label": ()}


def test_nested_lists_and_other_lists():
    nested = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]
    for data in (Listed(nested), nested):
        read = as_source(data, "train").read(np.arange(2))
        np.testing.assert_array_equal(read, np.asarray(nested))
    assert as_source({"x": np.ones(2), "nothing": []}, "train").size == 2
    pairs = Listed([[np.ones(2), 0], [np.zeros(2), 1]])  # what holds arrays is a pytree
    x, y = as_source(pairs, "train").read(np.arange(2))
    np.testing.assert_array_equal(x, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(y, [0, 1])


RAGGED = [[1, 2, 3], [3, 4], [2]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (RAGGED, r"example 0 has int64\[3\], example 1 has int64\[2\]\. .* Pad"),
        ([np.asarray(item) for item in RAGGED], r"example 0 has .* example 1 has .*lengths\? Pad"),
        ([{"ids": item} for item in RAGGED], r"has ids int64\[3\], example 1 has ids int64\[2\]"),
        ([{"a": [1]}, {"b": [1]}], "example 0 has a int64.* example 1 has b int64.* same fields"),
        ([[[1, 2], [3]]], r"example 0 of train, row 0 has int64\[2\], row 1 has int64\[1\]"),
    ],
)
def test_examples_of_different_shapes_are_named(items, message):
    with pytest.raises(ValueError, match=message):
        as_source(Listed(items), "train").read(np.arange(len(items)))


def test_examples_differ_in_another_block():
    reader = as_source(Listed(DOCS + RAGGED), "train").read
    reader(np.arange(3))
    with pytest.raises(ValueError, match="example 0 has .* example 4 has"):
        reader(np.arange(3, 6))


def test_ragged_columns_are_refused():
    with pytest.raises(ValueError, match=r"'ids', example 0 has int64\[3\], example 1 has int"):
        as_source({"ids": RAGGED, "label": LABELS}, "train")

"""The report, HTML for notebooks, and tables: pure checks, then a real browser."""

import base64
import csv
import json
import pathlib
import re
import shutil
import struct
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr import language, markup
from jaxattr.files import written_whole
from jaxattr.index.parts import part_products
from jaxattr.reports import cards, examples, pictures, tokens
from jaxattr.scores.ranking import TopK
from jaxattr.sources import as_source

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "</style></pre></title><img src=x onerror=\"document.title='owned'\">",
    '"\'><b onmouseover=alert(1) x="',
    "abc\u202edcba\u2066x\u0000",
    "lone \ud800 surrogate",
    "שלום עולם",
]


def squared(params, example, key):
    return (params["w"] @ example["x"].reshape(-1) - example["y"]) ** 2


def toy(n=12, q=7, shape=(3,), classes=6):
    numbers = np.random.default_rng(0)
    train = {"x": numbers.normal(size=(n, *shape)), "y": np.arange(n) % classes}
    queries = {"x": numbers.normal(size=(q, *shape)), "y": np.arange(q) % classes}
    params = {"w": jnp.asarray(numbers.normal(size=int(np.prod(shape))))}
    return ja.build_index(ja.tracin(squared), params, train, groups=ja.by_leaf), train, queries


def html_of(path):
    return path.read_text("utf-8")


def ids_of(article, kind):
    """Ids of the entries of one side of a card, in order."""
    side = re.search(rf'<section class="side {kind}">(.*?)</section>', article, re.S)[1]
    return [int(i) for i in re.findall(r'<span class="id">#(\d+)</span>', side)]


def articles(page):
    return re.findall(r"<article .*?</article>", page, re.S)


# What is shown.


def test_the_page_holds_the_strongest_of_each_sign_in_order(tmp_path):
    index, _, queries = toy()
    scores = np.asarray(ja.score(index, queries))
    made = ja.report(index, queries, k=4, path=tmp_path / "deep" / "page.html")
    assert made == tmp_path / "deep" / "page.html"
    found = articles(html_of(made))
    assert len(found) == 7
    for row, article in enumerate(found):
        order = np.argsort(-scores[row])
        assert ids_of(article, "pro") == [i for i in order if scores[row, i] > 0][:4]
        opponents = [i for i in order[::-1] if scores[row, i] < 0][:4]
        if opponents:
            assert ids_of(article, "opp") == opponents
        else:
            assert "no training example has a negative score" in article
        assert f"#{order[0]}" in article and markup.number(scores[row].max(), "+") in article


def test_the_queries_that_are_shown_are_those_that_were_scored(tmp_path):
    rows = np.random.default_rng(0).normal(size=(8, 3))
    index = ja.build_index(ja.tracin(lambda p, e, key: (p["w"] @ e) ** 2), {"w": jnp.ones(3)}, rows)
    found = articles(html_of(ja.report(index, (rows[0], rows[1], rows[2]), path=tmp_path / "a")))
    for row, article in enumerate(found):  # rows, and not their columns
        assert all(markup.number(x) in article for x in rows[row])


@pytest.mark.parametrize("label", ["--5", "9" * 5000, "²"])
def test_labels_and_groups_may_look_like_numbers(label, tmp_path):
    _, train, queries = toy()
    index = ja.build_index(
        ja.tracin(lambda p, e, key: squared({"w": p["w1²"]}, e, key)), {"w1²": jnp.ones(3)},
        train, groups=ja.by_leaf(),
    )  # fmt: skip
    page = ja.report(
        index, queries, labels=lambda e: label if e["y"] else "1", path=tmp_path / "page.html"
    )
    assert label in html_of(page)


def test_only_examples_that_are_shown_are_read(tmp_path):
    index, train, queries = toy(n=400)

    class Counted:
        read = []

        def __len__(self):
            return 400

        def __getitem__(self, row):
            self.read.append(row)
            return {name: x[row] for name, x in train.items()}

    page = html_of(ja.report(index, queries, k=2, train=Counted(), path=tmp_path / "page.html"))
    shown = {i for article in articles(page) for kind in ("pro", "opp")
             for i in ids_of(article, kind)}  # fmt: skip
    # Example 0 says what types all have.
    assert sorted(Counted.read) == sorted([0, *shown]) and len(shown) <= 28


def test_an_index_on_disk_needs_its_training_data(tmp_path):
    numbers = np.random.default_rng(0)
    train = {"x": numbers.normal(size=(5, 3)), "y": np.arange(5)}
    method, params = ja.tracin(squared), {"w": jnp.ones(3)}
    ja.build_index(method, params, train, path=tmp_path / "index")
    opened = ja.open_index(tmp_path / "index", method, params)
    with pytest.raises(ValueError, match=r"ja.open_index\(\.\.\., train=\)"):
        ja.report(opened, train, path=tmp_path / "page.html")
    fewer = {name: x[:4] for name, x in train.items()}
    with pytest.raises(ValueError, match="5 examples, got 4"):
        ja.report(opened, train, train=fewer, path=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    page = html_of(ja.report(opened, train, train=train, path=tmp_path / "page.html"))
    assert str(tmp_path / "index") in page
    with_train = ja.open_index(tmp_path / "index", method, params, train=train)
    assert len(articles(html_of(ja.report(with_train, train, path=tmp_path / "page.html")))) == 5


def test_an_index_without_its_method_shows_features(tmp_path):
    index, train, queries = toy()
    stored = ja.build_index(
        index.method, index.checkpoints, train, groups=ja.by_leaf, path=tmp_path / "index"
    )
    features = ja.query_features(stored, queries)
    bare = ja.open_index(tmp_path / "index", train=train)
    page = html_of(ja.report(bare, features, path=tmp_path / "page.html"))
    assert "features were given in its place" in page and "opened without its method" in page
    assert ids_of(articles(page)[0], "pro")


def test_a_folder_is_no_path_and_a_page_is_replaced_whole(tmp_path, monkeypatch):
    index, _, queries = toy()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://bucket/page.html is a URL"):
        ja.report(index, queries, path="gs://bucket/page.html")
    with pytest.raises(ValueError, match="is a folder"):
        ja.report(index, queries, path=tmp_path)
    path = tmp_path / "page.html"
    path.write_text("old")

    def failing(example):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ja.report(index, queries, render=failing, path=path)
    assert path.read_text() == "old"
    ja.report(index, queries, path=path)
    assert "old" != path.read_text()[:3] and list(tmp_path.iterdir()) == [path]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"k": 0}, "at least 1"),
        ({"k": 2.0}, "whole number"),
        ({"predictions": ["a"]}, "one per query, 7, got 1"),
        ({"predictions": "abcdefg"}, "sequence of texts"),
        ({"weights": {"v": 1.0}}, "Missing"),
        ({"render": lambda example: example["x"]}, r"shape \[3\]"),
        ({"render": lambda example: 3}, "of type int"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(tmp_path, given, message):
    index, _, queries = toy()
    with pytest.raises((TypeError, ValueError), match=message):
        ja.report(index, queries, path=tmp_path / "page.html", **given)
    assert not list(tmp_path.iterdir())


def test_labels_without_a_field_are_refused(tmp_path):
    index, train, queries = toy()
    floats = {**queries, "y": queries["y"].astype(float)}
    with pytest.raises(ValueError, match="a single integer, and the fields are"):
        ja.report(index, floats, labels=list("abcdef"), path=tmp_path / "page.html")
    by_number = {0: "zero", 1: "one", 5: "five"}
    named = html_of(ja.report(index, queries, labels=by_number, path=tmp_path / "page.html"))
    assert "zero" in named and "2 (has no name)" in named
    own = ja.report(index, queries, labels=lambda e: f"<{e['y']}>", path=tmp_path / "page.html")
    assert "<dd><bdi>&lt;3&gt;</bdi></dd>" in html_of(own)


def test_labels_name_the_integer_and_those_without_a_name_stay_numbers(tmp_path):
    index, _, queries = toy()
    page = html_of(ja.report(index, queries, labels=["a", "b"], path=tmp_path / "page.html"))
    assert "<dd><bdi>b</bdi></dd>" in page and "5 (has no name)" in page


def test_what_is_guessed():
    square = np.zeros((8, 8), np.float32)
    tokens = {"inputs": np.arange(9), "targets": np.arange(9), "mask": np.ones(9, bool)}
    assert isinstance(examples.guessed({"image": square, "label": np.int32(1)}), examples.Picture)
    assert isinstance(examples.guessed((square[..., None], np.int32(1))), examples.Picture)
    assert isinstance(examples.guessed(np.zeros((32, 32, 3), np.uint8)), examples.Picture)
    assert isinstance(examples.guessed({"x": np.zeros((4, 40))}), examples.Fields)
    assert isinstance(examples.guessed({"x": np.zeros((8, 8, 2))}), examples.Fields)
    assert isinstance(examples.guessed({"other": square}), examples.Fields)
    assert isinstance(examples.guessed({"x": np.zeros(64)}), examples.Fields)
    assert isinstance(examples.guessed(tokens), examples.Tokens)
    series = tokens | {"inputs": np.linspace(0, 1, 9), "targets": np.linspace(0, 1, 9)}
    assert isinstance(examples.guessed(series), examples.Fields)
    table = examples.guessed({"a": np.float32(0.5), "b": np.arange(3), "c": np.linspace(0, 1, 64)})
    assert dict(table.rows) == {"a": "0.5", "b": "[0, 1, 2]", "c": "float64 [64], 0 to 1"}
    key = {"key": jax.random.key(0), "t": np.array(True)}
    assert dict(examples.guessed(key).rows) == {"key": "key<fry> []", "t": "True"}


def test_short_vectors_are_shown_and_long_ones_as_a_range():
    short, long = np.linspace(0, 1, 32, dtype=np.float32), np.linspace(0, 1, 33)
    example = {"a": short, "b": long, "c": np.array([[1, 2], [3, 4]]), "d": np.float32(-0.10512)}
    shown = dict(examples.guessed(example).rows)
    assert shown["a"] == f"[{', '.join(f'{i / 31:.3g}' for i in range(32))}]"
    assert shown["b"] == "float64 [33], 0 to 1"
    assert shown["c"] == "[[1, 2], [3, 4]]" and shown["d"] == "−0.105"


def test_predictions_are_rounded(tmp_path):
    index, _, queries = toy(q=4)
    made = {"floats": np.array([-0.10512, 12345.6, 2, 0.5]), "jax": jnp.array([-0.10512, 1, 2, 3]),
            "mixed": [-0.10512, "seven", 3, np.str_("a")]}  # fmt: skip
    expected = {"floats": ["−0.105", "12,346", "2", "0.5"], "jax": ["−0.105", "1", "2", "3"],
                "mixed": ["−0.105", "seven", "3", "a"]}  # fmt: skip
    for name, values in made.items():
        page = html_of(ja.report(index, queries, predictions=values, path=tmp_path / "page.html"))
        found = re.findall(r"<dt>prediction</dt><dd><bdi>(.*?)</bdi>", page)
        assert found == expected[name]


def test_tables_are_no_end(tmp_path):
    index, _, queries = toy()
    page = html_of(ja.report(index, queries, path=tmp_path / "page.html"))
    assert page.count("ja.report(..., render=)") == 1
    own = ja.report(index, queries, render=lambda e: {"a": 1}, path=tmp_path / "page.html")
    assert "ja.report(..., render=)" not in html_of(own)
    index, _, queries = toy(shape=(4, 4))
    page = html_of(ja.report(index, queries, path=tmp_path / "page.html"))
    assert "ja.report(..., render=)" not in page


WORDS = ["", "a ", "cat ", "sat ", "<down> "]


def texts_setup(**fields):
    def loss(params, example, key):
        return (params["w"][example["ids"]].sum() - example["y"]) ** 2

    numbers = np.random.default_rng(0)
    train = {"ids": numbers.integers(1, 5, (6, 3)), "y": np.arange(6) % 2, **fields}
    return ja.build_index(ja.tracin(loss), {"w": jnp.arange(5.0)}, train), train


def test_integers_are_decoded_whatever_they_are_called(tmp_path):
    index, train = texts_setup()
    page = html_of(ja.report(index, train, decode=WORDS.__getitem__, path=tmp_path / "page.html"))
    found = re.findall(r'</h3><div class="text" dir="auto">(.*?)</div>', page)
    assert found == [markup.escaped("".join(WORDS[i] for i in row)) for row in train["ids"]]
    assert "ja.report(..., render=)" not in page


def test_what_stands_beside_tokens_is_not_decoded():
    row = {"ids": np.array([1, 2, 3]), "attention_mask": np.ones(3, int), "labels": np.int32(1)}
    assert examples.guessed(row, WORDS.__getitem__) == examples.Text("a cat sat ")
    answer = {**row, "labels": np.array([-100, -100, 4]), "weight": np.float32(0.5)}
    shown = dict(examples.guessed(answer, WORDS.__getitem__).rows)
    assert shown == {
        "ids": "a cat sat ", "attention_mask": "[1, 1, 1]", "labels": "<down> ", "weight": "0.5",
    }  # fmt: skip
    alone = examples.guessed(np.array([2, 3]), WORDS.__getitem__)
    assert alone == examples.Text("cat sat ")


def test_decode_is_refused_where_there_is_nothing_to_decode(tmp_path):
    index, _, queries = toy()
    with pytest.raises(ValueError, match=r"nothing to decode: .* 'y': 'int64 \[\]'"):
        ja.report(index, queries, decode=chr, path=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"render": 3}, "render must be a function from ONE example to a picture, .* got 3 of typ"),
        ({"decode": ["a"]}, r"decode must be a function from a token id to its text, got \['a'\]"),
        ({"labels": 3}, "labels must be a sequence of names, or a function"),
        ({"labels": "abc"}, "labels must be a sequence of names, or a function"),
        ({"predictions": 3}, "predictions must be a sequence, one for each query, got 3 of type"),
    ],
)
def test_what_is_no_function_or_sequence_is_refused(tmp_path, given, message):
    index, _, queries = toy()
    with pytest.raises(TypeError, match=message):
        ja.report(index, queries, path=tmp_path / "page.html", **given)
    assert not list(tmp_path.iterdir())


def test_what_render_returns_is_shown(tmp_path):
    index, _, queries = toy()
    as_text = ja.report(index, queries, render=lambda e: "a < b", path=tmp_path / "a.html")
    assert '<div class="text" dir="auto">a &lt; b</div>' in html_of(as_text)
    long = ja.report(index, queries, render=lambda e: "x" * 5000, path=tmp_path / "a.html")
    assert "(3,000 more characters)" in html_of(long)
    table = ja.report(
        index, queries, render=lambda e: {"a": 1, "b": 0.25}, path=tmp_path / "a.html"
    )
    assert '<th scope="row"><bdi>b</bdi></th><td><bdi>0.25</bdi></td>' in html_of(table)


# Pictures.


def decoded(file):
    """Pixels of a PNG file: an oracle for the encoder."""
    width, height, bits, kind = struct.unpack(">IIBB", file[16:26])
    channels = {0: 1, 2: 3, 6: 4}[kind]
    at, body = 8, b""
    while at < len(file):
        (length,) = struct.unpack(">I", file[at : at + 4])
        name, content = file[at + 4 : at + 8], file[at + 8 : at + 8 + length]
        assert struct.unpack(">I", file[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            name + content
        )
        body += content if name == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    values = rows[:, 1:].reshape(height, width, channels).copy()
    for y in range(height):
        if rows[y, 0] == 1:
            values[y] = np.cumsum(values[y], axis=0, dtype=np.uint8)
        elif rows[y, 0] == 2 and y:
            values[y] += values[y - 1]
    assert bits == 8
    return values


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (6, 4, 3), (4, 4, 4), (1, 1)])
def test_png_is_what_went_in(shape):
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    slope = np.broadcast_to(np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)), shape)
    for pixels in (noise, slope.astype(np.uint8), slope.swapaxes(0, 1).astype(np.uint8)):
        expected = pixels.reshape(*pixels.shape[:2], -1)
        np.testing.assert_array_equal(decoded(markup.png(pixels)), expected)


def test_brightness_is_the_same_in_all_pictures():
    dim, bright = np.zeros((4, 4)), np.full((4, 4), 3.0)
    encode = pictures.encoder([dim, bright, np.full((4, 4), 1.5)])
    assert decoded(encode.file(bright)).max() == 255 and decoded(encode.file(dim)).max() == 0
    assert decoded(encode.file(np.full((4, 4), 1.5)))[0, 0, 0] == 128
    assert pictures.span_of([np.array([[0.2, 0.4]])]) == (0, 1)
    assert pictures.span_of([np.array([[-0.2, 0.4]])]) == (-1, 1)
    holes = np.array([[np.nan, np.inf], [0.0, 2.0]])
    assert decoded(pictures.encoder([holes]).file(holes))[..., 0].tolist() == [[0, 255], [0, 255]]
    assert pictures.encoder([]).note == ""


def test_pictures_stay_within_their_budget():
    noise = np.random.default_rng(0).integers(0, 256, (1700, 32, 32, 3)).astype(np.uint8)
    encode = pictures.encoder(list(noise))
    assert sum(len(encode.file(pixels)) for pixels in noise) <= pictures.BUDGET
    assert "5 bits per channel" in encode.note or "their size" in encode.note
    assert pictures.encoder(list(noise[:20])).note == ""
    large = pictures.encoder([np.zeros((1000, 600), np.uint8)])
    assert decoded(large.file(np.zeros((1000, 600), np.uint8))).shape == (250, 150, 1)


def test_each_training_picture_is_in_the_page_once(tmp_path):
    index, _, queries = toy(n=9, q=5, shape=(4, 4))
    page = html_of(ja.report(index, queries, path=tmp_path / "page.html"))
    stored = re.findall(r'<image id="t(\d+)"', page)
    used = re.findall(r'href="#t(\d+)"', page)
    assert len(stored) == len(set(stored)) and set(stored) == set(used) and len(used) > len(stored)
    assert page.count("data:image/png") == len(stored) + 5


# Text that stays text.


def test_text_is_escaped_and_what_hides_is_spelled_out():
    assert markup.escaped("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert markup.escaped("a\u202eb") == "a⟨U+202E⟩b"
    assert markup.escaped("\u0000\u200f\ud800\ufeff") == "⟨U+0000⟩⟨U+200F⟩⟨U+D800⟩⟨U+FEFF⟩"
    assert markup.escaped("a\r\nb\tc") == "a\nb\tc"
    assert markup.escaped("👩\u200d💻 שלום") == "👩\u200d💻 שלום"


def hostile_page(path):
    numbers = np.random.default_rng(0)
    train = {"x": numbers.normal(size=(12, 3)), "y": np.arange(12) % 6}
    queries = {"x": numbers.normal(size=(6, 3)), "y": np.arange(6)}
    names = ("</script><b>w</b>", "\u202ev")

    def loss(params, example, key):
        return (params[names[0]] @ example["x"] - example["y"]) ** 2 + params[names[1]] ** 2

    params = {names[0]: jnp.ones(3), names[1]: jnp.ones(())}
    index = ja.build_index(ja.tracin(loss), params, train, groups=ja.by_leaf)
    return ja.report(
        index, queries, labels=HOSTILE, predictions=HOSTILE, title=HOSTILE[0] + HOSTILE[3],
        render=lambda example: HOSTILE[int(example["y"])], path=path,
    )  # fmt: skip


def test_hostile_text_stays_text(tmp_path):
    page = html_of(hostile_page(tmp_path / "page.html"))
    assert page.count("<script>") == 1 and page.count("</script>") == 1
    assert page.count("<style>") == 1 and page.count("</style>") == 1
    assert "<img src=x" not in page and "<b onmouseover" not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page)


# Queries that are not finite.


def test_queries_that_are_not_finite_are_marked_and_never_ranked(tmp_path):
    index, _, queries = toy()
    queries["x"][3] = np.inf
    with pytest.warns(ja.NonFiniteWarning):
        page = html_of(ja.report(index, queries, path=tmp_path / "page.html"))
    found = articles(page)
    assert "Not finite." in found[3] and '<span class="id">' not in found[3]
    assert 'data-top=""' in found[3] and 'data-top=""' not in found[0]
    assert "1 of 7 queries have gradients that are not finite" in page
    assert all("Not finite." not in each for row, each in enumerate(found) if row != 3)


def test_fewer_examples_than_k_are_fine(tmp_path):
    index, _, queries = toy(n=3)
    page = html_of(ja.report(index, queries, k=8, path=tmp_path / "page.html"))
    for article in articles(page):
        both = [*re.findall(r'<span class="id">#(\d+)</span>', article)]
        assert sorted(both) == ["0", "1", "2"]


def test_squares_have_no_opponents(tmp_path):
    train = {"x": np.random.default_rng(0).normal(size=(9, 3)), "y": np.arange(9) % 2}
    squares = ja.tracin(squared)
    squares = type(squares)(squares.name, squares.rule, squares.kernel, link="square")
    index = ja.build_index(squares, {"w": jnp.ones(3)}, train)
    page = html_of(ja.report(index, train, path=tmp_path / "page.html"))
    assert "Opponents" not in page and "Scores of this method are squares" in page
    scores = np.asarray(ja.score(index, train))
    assert ids_of(articles(page)[0], "pro") == np.argsort(-scores[0])[:8].tolist()


# Weights.


def test_a_fit_is_shown_with_its_gain_shares_and_warnings(tmp_path):
    index, train, queries = toy(n=40, q=12)
    fit = ja.learn_weights(index, queries)
    page = html_of(ja.report(index, queries, weights=fit, path=tmp_path / "page.html"))
    assert "gain over uniform weights: not known" in page and "share of the scores" in page
    assert "learned weights" in page and "inproceedings{pruthi2020tracin" in page
    plain = html_of(ja.report(index, queries, weights=fit.weights, path=tmp_path / "page.html"))
    assert "share of the scores" not in plain and "Weights of 1 parameter groups" in plain


def test_excluded_parameters_are_named(tmp_path):
    train = {"x": np.random.default_rng(0).normal(size=(9, 3)), "y": np.arange(9) % 2}

    def loss(params, example, key):
        return squared(params, example, key) * params["scale"]

    params = {"w": jnp.ones(3), "scale": jnp.ones(())}
    groups = ja.by_leaf(params, exclude="scale")
    index = ja.build_index(ja.tracin(loss), params, train, groups=groups)
    page = html_of(ja.report(index, train, path=tmp_path / "page.html"))
    assert "1 parameter arrays are in no group" in page and "<bdi>scale</bdi>: " in page


# Tokens.


def tokens_setup(method=None, checkpoints=1, squash=jnp.tanh, **where):
    numbers = np.random.default_rng(0)
    documents = [numbers.integers(1, 13, size=length).tolist() for length in (5, 8, 6, 7, 4, 8)]
    rows = language.rows(documents, 8, vocabulary=13)
    asked = language.rows(documents[:3], 8, vocabulary=13, prompts=[2, 3, 1])

    def logits(params, row):
        read = jnp.cumsum(params["embed"][row["inputs"]], axis=0)
        return squash(read @ params["mix"]) @ params["embed"].T

    def draw():
        return {
            "embed": jnp.asarray(numbers.normal(size=(13, 6))),
            "mix": jnp.asarray(numbers.normal(size=(6, 6))),
        }

    loss = language.loss(logits)
    made = ja.tracin(loss) if method is None else method(loss)
    index = ja.build_index(
        made, [draw() for _ in range(checkpoints)], rows, groups=ja.by_leaf, **where
    )
    return index, rows, asked


def trackstar(loss):
    draws = np.random.default_rng(1)
    params = {"embed": jnp.zeros((13, 6)), "mix": jnp.zeros((6, 6))}
    moments = jax.tree.map(lambda x: jnp.asarray(draws.uniform(0.5, 2, x.shape)), params)
    return ja.trackstar(loss, [moments, moments], params, rank=3)


METHODS = {
    "tracin": lambda loss: ja.tracin(loss, checkpoint_weights=[0.5, 2.0]),
    "grad_cos": lambda loss: ja.grad_cos(loss, checkpoint_weights=[0.5, 2.0]),
    "logra": lambda loss: ja.logra(loss, rank=3),
    "ekfac": ja.ekfac,
    "trackstar": trackstar,
    "source": lambda loss: ja.source(loss, learning_rate=0.1, steps=30),
}


@pytest.mark.parametrize("name, place", [*((name, "memory") for name in METHODS),
                                         ("tracin", "disk"), ("tracin", "mesh")])  # fmt: skip
@pytest.mark.parametrize("passes", [0, 8], ids=["forward", "features"])
def test_contributions_of_tokens_are_those_of_scores(name, place, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_PASSES", passes)
    where = {"memory": {}, "disk": {"path": tmp_path / "index", "batch_size": 2}}
    if place == "mesh":
        where["mesh"] = {"mesh": jax.make_mesh((2, 2), ("data", "model"))}
    index, rows, asked = tokens_setup(METHODS[name], checkpoints=2, **where[place])
    weights = {"embed": 0.5, "mix": 1.5}
    scores = np.asarray(ja.score(index, asked, weights=weights))
    pairs = [tokens.Pair(q, n, scores[q, n]) for q in range(3) for n in (4, 1, 5)]
    by_query = tokens.of_queries(index, as_source(asked, "queries"), weights, pairs)
    every = ja.score(index, language.token_features(index, asked), weights=weights)
    expected = np.asarray(every).reshape(3, 8, 6)
    assert set(by_query) == set(pairs)
    for pair, values in by_query.items():
        np.testing.assert_allclose(
            values, expected[pair.query, :, pair.train], atol=1e-10 * np.abs(expected).max()
        )
    features = ja.query_features(index, asked)
    by_train = tokens.of_examples(index, as_source(rows, "train"), features, weights, pairs)
    assert set(by_train) == (set(pairs) if name in ("tracin", "grad_cos") else set())
    for pair, values in by_train.items():
        assert values.sum() == pytest.approx(pair.score, rel=1e-9)
        assert (values[~rows["mask"][pair.train]] == 0).all()


@pytest.mark.parametrize("name", ["grad_cos", "trackstar"])
@pytest.mark.parametrize("passes", [0, 8], ids=["forward", "features"])
def test_tokens_of_queries_whose_squares_leave_the_range(name, passes, monkeypatch):
    monkeypatch.setattr(tokens, "_PASSES", passes)
    found = []
    for size in (1.0, 1e-170):  # whose square is zero in float64

        def method(loss, size=size):
            return METHODS[name](lambda params, row, key: size * loss(params, row, key))

        index, _, asked = tokens_setup(method, checkpoints=2)
        scores = np.asarray(ja.score(index, asked))
        pairs = [tokens.Pair(q, n, scores[q, n]) for q in range(3) for n in (4, 1, 5)]
        each = tokens.of_queries(index, as_source(asked, "queries"), None, pairs)
        assert set(each) == set(pairs)
        found.append(np.stack([*each.values()]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-8 * np.abs(found[0]).max())


@pytest.mark.parametrize("name", ["tracin", "ekfac"])
def test_tokens_of_functions_without_forward_mode(name, monkeypatch):
    monkeypatch.setattr(tokens, "_PASSES", 0)

    @jax.custom_vjp
    def opaque(x):
        return jnp.tanh(x)

    opaque.defvjp(lambda x: (jnp.tanh(x), x), lambda x, ct: (ct * (1 - jnp.tanh(x) ** 2),))
    found = []
    for squash in (opaque, jnp.tanh):
        index, _, asked = tokens_setup(METHODS[name], checkpoints=2, squash=squash)
        pairs = [tokens.Pair(q, n, float(x)) for q, row in enumerate(ja.score(index, asked))
                 for n, x in enumerate(row)]  # fmt: skip
        found.append(tokens.of_queries(index, as_source(asked, "queries"), None, pairs))
    np.testing.assert_allclose(*(np.stack([*each.values()]) for each in found), atol=1e-9)


def test_tokens_of_a_model_that_reads_which_are_asked_for():
    def within(loss):
        def of_row(params, row, key):  # the mask is not at the end alone
            shown = jnp.where(row["mask"], row["inputs"], 0)
            return loss(params, row | {"inputs": shown}, key)

        return ja.tracin(of_row)

    index, _, asked = tokens_setup(within)
    row = {field: each[0] for field, each in asked.items()}
    vectors = index.features[[3, 1]]
    found = part_products(index, row, language.token_of, 8, vectors)
    features = language.token_features(index, {field: each[:1] for field, each in asked.items()})
    np.testing.assert_allclose(found, vectors @ features.features.T, atol=1e-10)


def test_tokens_of_a_loss_that_is_no_sum_are_not_coloured(tmp_path):
    def mean(loss):
        def of_row(params, row, key):
            return loss(params, row, key) / row["mask"].sum()

        return ja.tracin(of_row)

    index, _, asked = tokens_setup(mean)
    page = html_of(ja.report(index, asked, path=tmp_path / "page.html"))
    assert not re.search(r'<i class="[pn]\d', page) and "Blue tokens" not in page
    index, _, asked = tokens_setup()
    page = html_of(ja.report(index, asked, path=tmp_path / "page.html"))
    assert re.search(r'<i class="p8', page) and "Blue tokens" in page


def test_tokens_are_coloured_by_sign_and_size():
    made = cards.coloured(["a", "<b>", "c", "d"], np.ones(4, bool), np.array([2.0, -0.5, 0.0]))
    assert made == (
        '<div class="text tokens" dir="auto">a<i class="p8" title="+2">&lt;b&gt;</i>'
        '<i class="n4" title="−0.5">c</i>d</div>'
    )


def test_of_many_long_rows_the_strongest_tokens_are_shown():
    texts, counted = [f"t{i} " for i in range(100)], np.ones(100, bool)
    values = np.zeros(99)
    values[59], values[62] = 1.0, -0.5  # of tokens 60 and 63
    made = cards.coloured(texts, counted, values, 10)
    text = re.sub("<[^>]+>", "", made)
    first = int(re.match(r"\((\d+) tokens before\) \.\.\. ", text)[1])
    assert first < 60 and first + 10 > 64  # neither is at an end
    assert re.findall(r"t(\d+)", text.partition("... ")[2])[:10] == [
        str(i) for i in range(first, first + 10)
    ]
    assert text.endswith(f" ... ({90 - first} more tokens)") and 'class="p8"' in made
    asked = np.arange(100) >= 95
    assert "(90 tokens before) ... t90 t91" in cards.coloured(texts, asked, None, 10)
    assert "more tokens" not in cards.coloured(texts, asked, None, 10)
    assert "tokens before" not in cards.coloured(texts, counted, values, 100)
    assert cards.coloured(texts, counted, None, 10).startswith(
        '<div class="text tokens" dir="auto">t0 t1 '
    )


def test_a_page_of_100_queries_by_16_rows_of_128_tokens_is_small():
    numbers = np.random.default_rng(0)

    def item():
        ids = numbers.integers(1000, 30000, 129)
        row = {"inputs": ids[:-1], "targets": ids[1:], "mask": np.ones(128, bool)}
        return examples.Item(examples.Tokens(row), None)

    found = [
        cards.Query(q, item(), None, True,
                    tuple(tokens.Pair(q, 16 * q + i, 1.0) for i in range(8)),
                    tuple(tokens.Pair(q, 16 * q + 8 + i, -1.0) for i in range(8)))
        for q in range(100)
    ]  # fmt: skip
    pairs = [pair for query in found for pair in (*query.proponents, *query.opponents)]
    by_query, by_train = ({pair: numbers.normal(size=128) for pair in pairs} for _ in range(2))
    train = {pair.train: item() for pair in pairs}
    most = cards.most_tokens(found, by_query)
    made = cards.Cards(train, None, None, by_query, by_train, False, most)
    assert len("".join(made.query(query) for query in found).encode()) < 5e6
    assert cards.most_tokens(found[:4], {}) > 129  # few rows are shown whole


def test_a_row_ends_with_its_last_target_and_decodes():
    row = {"inputs": np.array([0, 97, 98, 0]), "targets": np.array([97, 98, 0, 0]),
           "mask": np.array([False, True, False, False])}  # fmt: skip
    texts, counted = cards.pieces(row, chr)
    assert texts == ["\0", "a", "b"] and counted.tolist() == [False, False, True]
    assert cards.pieces(row, None)[0] == ["0 ", "97 ", "98 "]
    filler = row | {"targets": np.where(row["mask"], row["targets"], -100)}
    assert cards.pieces(filler, chr)[0] == texts


# Notebooks.


def test_notebooks_show_tables_that_are_escaped():
    index, train, queries = toy(n=40, q=12)
    fit = ja.learn_weights(index, queries)
    top = ja.top_k(index, queries, k=3)
    shown = [x._repr_html_() for x in (index, fit, top)]
    assert "TracIn" in shown[0] and "40" in shown[0]
    assert "gain over uniform weights: not known" in shown[1] and "width:100.0%" in shown[1]
    assert f"#{top.ids[0, 0]}: {markup.number(top.scores[0, 0])}" in shown[2]
    assert "12 queries" in shown[2] and "query</th>" in shown[2]
    scores, masks = (
        np.asarray(ja.score(index, queries)),
        np.random.default_rng(0).random((9, 40)) < 0.5,
    )
    found = ja.lds(scores, masks, masks @ scores.T)
    assert "100.0 % [100.0, 100.0]" in found._repr_html_()
    assert "<b>" not in markup.table(["<b>"], [["<b>"]])


def test_top_k_stays_a_pytree_inside_jit():
    top = TopK(jnp.ones((2, 3), int), jnp.ones((2, 3)))

    @jax.jit
    def inside(top):
        assert top._repr_html_() is None
        return jax.tree.map(lambda x: x + 1, top)

    assert inside(top).ids[0, 0] == 2 and len(jax.tree.leaves(top)) == 2


# Tables.


TOP = TopK(np.array([[2, 0], [-1, -1], [1, -1]]),
           np.array([[3.5, 0.1], [np.nan, np.nan], [-1.0, np.nan]], np.float32))  # fmt: skip


def test_the_table_has_a_row_for_each_example_that_is_there():
    table = TOP.to_pandas()
    assert list(table.columns) == ["query", "rank", "id", "score"]
    assert table.values.tolist()[0] == [0, 1, 2, 3.5] and len(table) == 3
    assert table["query"].tolist() == [0, 0, 2] and table["rank"].tolist() == [1, 2, 1]
    named = TOP.to_pandas(ids=["a", "b", "c"])
    assert list(named.columns) == ["query", "rank", "id", "position", "score"]
    assert named["id"].tolist() == ["c", "a", "b"] and named["position"].tolist() == [2, 0, 1]


def test_names_stay_as_they_are():
    import pandas

    mixed = ["=1+1", ("a", 2), 3]
    assert TOP.to_pandas(ids=mixed)["id"].tolist() == [3, "=1+1", ("a", 2)]
    long = [2**53 + 1, None, 0.5]  # the first is no float
    assert TOP.to_pandas(ids=long)["id"].tolist() == [0.5, 2**53 + 1, None]
    for ids in (np.arange(3) * 10, jnp.arange(3) * 10, pandas.Series([0, 10, 20], index=[2, 1, 0])):
        assert TOP.to_pandas(ids=ids)["id"].tolist() == [20, 0, 10]


def test_csv_and_parquet_hold_the_same(tmp_path):
    import pyarrow.parquet

    TOP.to_csv(tmp_path / "top.csv", ids=['say "c"', "b,b", "é"])
    with (tmp_path / "top.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["query", "rank", "id", "position", "score"]
    assert rows[1:3] == [["0", "1", "é", "2", "3.5"], ["0", "2", 'say "c"', "0", "0.1"]]
    TOP.to_parquet(tmp_path / "top.parquet", ids=["a", "b", "c"])
    read = pyarrow.parquet.read_table(tmp_path / "top.parquet").to_pydict()
    assert read["id"] == ["c", "a", "b"] and read["rank"] == [1, 2, 1]


def test_names_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got 2, and the result holds example 2"):
        TOP.to_csv(tmp_path / "top.csv", ids=["a", "b"])
    names = {"a": 0, "b": 1, "c": 2}
    unordered = (set(names), frozenset(names), names, names.keys(), names.values(), iter(names))
    for ids in ("abc", b"abc", *unordered, (each for each in "abc"), 3, np.ones((3, 2))):
        with pytest.raises(ValueError, match=f"must be a sequence .* got a {type(ids).__name__}"):
            TOP.to_csv(tmp_path / "top.csv", ids=ids)
    with pytest.raises(ValueError, match="of one type"):
        TOP.to_parquet(tmp_path / "top.parquet", ids=["a", 1, {}])
    with pytest.raises(ValueError, match="is a folder"):
        TOP.to_csv(tmp_path)
    monkeypatch.chdir(tmp_path)
    for write in (TOP.to_csv, TOP.to_parquet):
        with pytest.raises(ValueError, match="gs://bucket/top is a URL"):
            write("gs://bucket/top")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxattr\[tables\]'"):
        TOP.to_pandas()
    TOP.to_csv(tmp_path / "top.csv")


# A real browser.


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, path):
    """Opens a page; what was logged before is forgotten."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    return browser


def requests(browser):
    """Addresses that the page asked for, but for itself and what it holds."""
    events = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in events
            if each["method"] == "Network.requestWillBeSent"]  # fmt: skip
    return [url for url in urls if not url.startswith(("data:", "file:"))]


def visible(browser):
    found = "[...document.querySelectorAll('.card')].filter(x => !x.hidden).map(x => +x.dataset.at)"
    return browser.execute_script(f"return {found}")


def press(browser, key):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    index, _, queries = toy(n=60, q=12, shape=(6, 6))
    queries["x"][5] = np.inf
    path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.warns(ja.NonFiniteWarning):
        names = ["zero", "one", "two", "three", "four", "five"]
        return ja.report(index, queries, labels=names, predictions=[*"abcdefghijkl"], path=path)


def test_the_page_opens_without_errors_or_requests(browser, page):
    opened(browser, page)
    assert browser.get_log("browser") == [] and requests(browser) == []
    assert visible(browser) == list(range(12))
    sizes = "return [...document.querySelectorAll('img')].map(x => x.naturalWidth)"
    assert browser.execute_script(sizes) == [6] * 12
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(wide)


def test_filters_filter(browser, page):
    opened(browser, page)
    box = browser.find_element("id", "filter")
    box.send_keys("THREE")
    assert visible(browser) == [3, 9]
    assert browser.find_element("id", "count").text == "2 of 12 queries"
    box.send_keys(" j")
    assert visible(browser) == [9]
    box.send_keys(" nothing")
    assert visible(browser) == [] and browser.find_element("id", "empty").is_displayed()
    box.clear()
    box.send_keys(" ")
    browser.find_element("css selector", "#label option[value=two]").click()
    assert visible(browser) == [2, 8]


def test_sorts_sort(browser, page):
    opened(browser, page)

    def sorted_by(name):
        browser.find_element("css selector", f"#sort option[value={name}]").click()
        return visible(browser)

    tops = browser.execute_script(
        "return [...document.querySelectorAll('.card')].map(x => x.dataset.top)"
    )
    assert tops[5] == ""
    expected = sorted(range(12), key=lambda row: -float(tops[row] or "-inf"))
    assert sorted_by("top") == expected and expected[-1] == 5
    names = ["five", "four", "one", "three", "two", "zero"]
    order = ["zero", "one", "two", "three", "four", "five"]
    assert sorted_by("label") == [
        i for name in names for i in (order.index(name), order.index(name) + 6)
    ]
    assert sorted_by("low")[-1] == 5 and sorted_by("at") == list(range(12))


def test_keys_move_and_help(browser, page):
    from selenium.webdriver import Keys

    opened(browser, page)
    focus = "return document.activeElement.id"
    for key, expected in (("j", "q0"), ("j", "q1"), (Keys.ARROW_RIGHT, "q2"), ("k", "q1"),
                          (Keys.ARROW_LEFT, "q0"), ("k", "q0"), ("/", "filter")):  # fmt: skip
        press(browser, key)
        assert browser.execute_script(focus) == expected
    press(browser, "j")
    assert browser.find_element("id", "filter").get_attribute("value") == "j"
    press(browser, Keys.ESCAPE)
    assert browser.execute_script(focus) == ""
    press(browser, "?")
    assert browser.find_element("id", "help").is_displayed()
    press(browser, Keys.ESCAPE)
    assert not browser.find_element("id", "help").is_displayed()
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    press(browser, "t")
    assert browser.execute_script(ground) != before


def test_weights_sort_by_a_click(browser, tmp_path):
    train = {"x": np.random.default_rng(0).normal(size=(9, 3)), "y": np.arange(9) % 2}
    names = [f"layer_{i}" for i in range(12)]

    def loss(params, example, key):
        return sum(params[name] @ example["x"] for name in names) ** 2

    index = ja.build_index(ja.tracin(loss), {name: jnp.ones(3) for name in names}, train)
    weights = {name: float(i * 7 % 12) for i, name in enumerate(names)}
    path = ja.report(index, train, weights=weights, path=tmp_path / "page.html")
    opened(browser, path)
    listed = "return [...document.querySelectorAll('.weights tbody th')].map(x => x.textContent)"
    assert browser.execute_script(listed) == names  # layer_2 before layer_10
    browser.find_element("css selector", '.weights [data-by="1"] button').click()
    expected = sorted(names, key=lambda name: -weights[name])
    assert browser.execute_script(listed) == expected
    assert browser.get_log("browser") == []


def test_hostile_text_stays_text_in_a_browser(browser, tmp_path):
    opened(browser, hostile_page(tmp_path / "page.html"))
    assert browser.title.startswith("</script><script>") and "⟨U+202E⟩" in browser.title
    assert browser.find_elements("css selector", "body img, body b[onmouseover]") == []
    shown = [each.text for each in browser.find_elements("css selector", ".query .text")]
    assert shown[:3] == HOSTILE[:3] and shown[3] == "abc⟨U+202E⟩dcba⟨U+2066⟩x⟨U+0000⟩"
    assert browser.get_log("browser") == [] and requests(browser) == []
    browser.find_element("css selector", "#label option:nth-child(2)").click()
    assert len(visible(browser)) == 1


def test_a_script_that_got_in_would_not_run(browser, page, tmp_path):
    changed = html_of(page).replace("</main>", "<script>document.title = 'owned'</script></main>")
    path = tmp_path / "page.html"
    path.write_text(changed, encoding="utf-8")
    opened(browser, path)
    assert browser.title != "owned"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_the_page_reads_without_scripts(browser, page, tmp_path):
    path = tmp_path / "page.html"
    bare = re.sub(r"<script>.*?</script>", "", html_of(page), flags=re.S)
    path.write_text(bare, encoding="utf-8")
    opened(browser, path)
    assert visible(browser) == list(range(12))
    assert not browser.find_element("id", "tools").is_displayed()
    use = browser.find_element("css selector", "#q0 use")
    assert use.is_displayed() and use.size["width"] > 30


def test_print_shows_all_and_no_tools(browser, page):
    opened(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not browser.find_element("id", "tools").is_displayed()
        assert browser.find_element("id", "q0").is_displayed()
        printed = browser.execute_cdp_cmd("Page.printToPDF", {})
        assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_page_of_100_queries_by_16_pictures_is_small(browser, tmp_path):
    numbers = np.random.default_rng(0)
    train = {
        "x": numbers.integers(0, 256, (2000, 32, 32, 3)).astype(np.uint8),
        "y": np.arange(2000),
    }
    queries = {
        "x": numbers.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8),
        "y": np.arange(100),
    }

    def loss(params, example, key):
        return params["w"] @ (example["x"].reshape(-1) / 255.0 - 0.5)

    params = {"w": jnp.ones(32 * 32 * 3)}
    index = ja.build_index(ja.tracin(loss), params, train)
    started = time.monotonic()
    path = ja.report(index, queries, path=tmp_path / "page.html")
    assert time.monotonic() - started < 60
    page = html_of(path)
    assert page.count('class="entry"') == 1600 and page.count("<image ") > 1000
    assert path.stat().st_size < 5e6
    opened(browser, path)
    assert browser.get_log("browser") == [] and len(visible(browser)) == 100


def test_the_styles_and_the_script_are_packaged():
    folder = pathlib.Path(ja.__file__).parent / "reports"
    assert {each.name for each in folder.iterdir()} >= {"page.css", "page.html", "page.js"}

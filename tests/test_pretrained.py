"""The loader of Hugging Face weights, against logits that transformers computed."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments.language import gpt2, pretrained, text

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "gpt2"


@pytest.fixture(scope="module")
def tensors():
    return pretrained.safetensors.numpy.load_file(GOLDENS / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    for path in GOLDENS.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def config():
    return pretrained.read_config(json.loads((GOLDENS / "config.json").read_text()))


def test_logits_are_those_of_transformers():
    config, params, tokenizer = pretrained.load(GOLDENS)
    golden = np.load(GOLDENS / "logits.npz")
    apply = gpt2.logits_fn(config)
    logits = jax.jit(jax.vmap(apply, (None, 0)))(params, {"inputs": golden["ids"]})
    assert np.abs(logits - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()
    ids = tokenizer.encode("the cat sat on the dog")
    assert ids == [0, *golden["text_ids"], 0]
    assert "".join(tokenizer.pieces(ids[1:-1])) == "the cat sat on the dog"


def test_names_may_lack_their_prefix_and_old_constants_are_ignored(tensors):
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
    bare["lm_head.weight"] = bare["wte.weight"]
    ours, theirs = (pretrained.from_tensors(given, config()) for given in (bare, tensors))
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_missing_and_unknown_tensors_are_named(tensors):
    less = {name: value for name, value in tensors.items() if "h.1.ln_2.bias" not in name}
    with pytest.raises(ValueError, match=r"Missing: \['h.1.ln_2.bias'\]; unknown: none"):
        pretrained.from_tensors(less, config())
    with pytest.raises(ValueError, match=r"Missing: none; unknown: \['h.0.adapter'\]"):
        pretrained.from_tensors(tensors | {"h.0.adapter": np.ones(3)}, config())


def test_a_tensor_of_a_wrong_shape_is_named(tensors):
    name = next(name for name in tensors if name.endswith("wpe.weight"))
    with pytest.raises(ValueError, match=r"position/embedding has shape \[23, 16\], needed \[24"):
        pretrained.from_tensors(tensors | {name: tensors[name][:-1]}, config())


def test_a_tokenizer_of_another_model_is_refused(folder):
    values = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="tokenizer in .* has 277 tokens, and the model 300"):
        pretrained.load(folder)


def test_another_kind_of_model_is_refused():
    values = json.loads((GOLDENS / "config.json").read_text())
    with pytest.raises(ValueError, match="not of a GPT-2.*'activation_function': 'relu'"):
        pretrained.read_config(values | {"activation_function": "relu"})
    with pytest.raises(ValueError, match="lacks.*n_embd"):
        pretrained.read_config({k: v for k, v in values.items() if k != "n_embd"})


def test_missing_files_are_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="lacks tokenizer.json"):
        pretrained.load(folder)


def test_articles_of_wikitext_are_split_at_their_titles(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(" \n = One = \n \n text \n = = Part = = \n more \n\n = Two words = \n end \n")
    articles = text.read(path)
    assert [a.splitlines()[0].strip() for a in articles] == ["= One =", "= Two words ="]
    assert "Part" in articles[0]


def test_json_lines_and_their_errors(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two"}\n')
    assert text.read(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"title": "two"}\n')
    with pytest.raises(ValueError, match="line 2: needed"):
        text.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        text.read(path)


def test_pieces_lose_no_text_and_are_short():
    whole = ["one two  three\nfour " * 20, "short"]
    made = text.pieces(whole, 30)
    assert "".join(made) == "".join(whole) and max(map(len, made)) <= 30


def test_bytes_round_trip():
    ids = text.Bytes().encode("für\0x")
    assert ids[0] == ids[-1] == 0 and 0 not in ids[1:-1] and max(ids) < 256

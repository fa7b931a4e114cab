"""GPT-2 weights as Hugging Face stores them: config.json, model.safetensors, tokenizer.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from experiments.language.gpt2 import Config

# {theirs: ours}, of one layer; `c_attn` is query, key and value side by side.
LAYER = {
    "ln_1.weight": "norm1/scale",
    "ln_1.bias": "norm1/bias",
    "attn.c_proj.weight": "attention/out/kernel",
    "attn.c_proj.bias": "attention/out/bias",
    "ln_2.weight": "norm2/scale",
    "ln_2.bias": "norm2/bias",
    "mlp.c_fc.weight": "up/kernel",
    "mlp.c_fc.bias": "up/bias",
    "mlp.c_proj.weight": "down/kernel",
    "mlp.c_proj.bias": "down/bias",
}
WHOLE = {
    "wte.weight": "embed/embedding",
    "wpe.weight": "position/embedding",
    "ln_f.weight": "norm/scale",
    "ln_f.bias": "norm/bias",
}
# Constants of old files: causal masks, and the head, which is the embedding again.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library; documents begin and end with `<|endoftext|>`."""

    def __init__(self, path: Path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = self._tokenizer.get_vocab_size()
        self._end = self._tokenizer.token_to_id("<|endoftext|>")

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text."""
        ends = [] if self._end is None else [self._end]
        return [*ends, *self._tokenizer.encode(text).ids, *ends]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the text of each token."""
        return [self._tokenizer.decode([i]) for i in ids]


def load(folder: Path, dtype: Any = jnp.float32) -> tuple[Config, dict[str, Any], FileTokenizer]:
    """Loads a GPT-2.

    Args:
      folder: with `config.json`, `model.safetensors` and `tokenizer.json`.
      dtype: what the model computes in.

    Returns:
      Configuration, parameters as nested dicts, and tokenizer.

    Raises:
      ValueError: if a file is missing, the configuration is of another model, tensors are missing,
        of a wrong shape or unknown, or the tokenizer knows other tokens than the model.
    """
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    config = read_config(json.loads((folder / "config.json").read_text()), dtype)
    tokenizer = FileTokenizer(folder / "tokenizer.json")
    if tokenizer.vocabulary != config.vocabulary:
        raise ValueError(
            f"The tokenizer in {folder} has {tokenizer.vocabulary} tokens, and the model "
            f"{config.vocabulary}: they do not belong together."
        )
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    return config, from_tensors(tensors, config), tokenizer


def read_config(values: dict[str, Any], dtype: Any = jnp.float32) -> Config:
    """Reads a Hugging Face configuration.

    Args:
      values: of `config.json`.
      dtype: what the model computes in.

    Returns:
      The configuration.

    Raises:
      ValueError: if it is of another kind of model.
    """
    needed = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    expected = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    wrong = {k: values[k] for k, v in expected.items() if k in values and values[k] != v}
    if values.get("n_inner") == 4 * values.get("n_embd", 0):
        wrong.pop("n_inner", None)
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"config.json lacks {missing}.")
    if wrong:
        raise ValueError(
            f"config.json is not of a GPT-2 as this code computes it: got {wrong}, needed "
            f"{ {name: expected[name] for name in wrong} }."
        )
    vocabulary, context, width, depth, heads = (values[name] for name in needed)
    return Config(vocabulary, context, width, depth, heads, dtype)


def from_tensors(tensors: dict[str, np.ndarray], config: Config) -> dict[str, Any]:
    """Arranges Hugging Face tensors as our parameters.

    Args:
      tensors: by their names, with or without the prefix `transformer.`.
      config: the model's.

    Returns:
      Nested dicts of float32 arrays; layers are stacked.

    Raises:
      ValueError: naming tensors that are missing, unknown, or of a wrong shape.
    """
    tensors = {
        name.removeprefix("transformer."): value
        for name, value in tensors.items()
        if not name.endswith(IGNORED)
    }
    layers = range(config.depth)
    names = [*LAYER, "attn.c_attn.weight", "attn.c_attn.bias"]
    expected = {*WHOLE, *(f"h.{i}.{name}" for i in layers for name in names)}
    missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or extra:
        raise ValueError(
            f"The tensors are not those of a GPT-2 with {config.depth} layers. "
            f"Missing: {missing or 'none'}; unknown: {extra or 'none'}."
        )
    flat = {ours: tensors[theirs] for theirs, ours in WHOLE.items()}
    for theirs, ours in LAYER.items():
        flat[f"blocks/{ours}"] = _stacked([tensors[f"h.{i}.{theirs}"] for i in layers], theirs)
    for kind in ("weight", "bias"):
        name = f"attn.c_attn.{kind}"
        joined = _stacked([tensors[f"h.{i}.{name}"] for i in layers], name)
        if joined.shape[-1] != 3 * config.width:
            raise ValueError(
                f"Tensor {name} has {joined.shape[-1]} columns, needed {3 * config.width}."
            )
        for part, value in zip(
            ("query", "key", "value"), np.split(joined, 3, axis=-1), strict=True
        ):
            ours = "kernel" if kind == "weight" else "bias"
            flat[f"blocks/attention/{part}/{ours}"] = value
    _check_shapes(flat, config)
    return _nested({name: jnp.asarray(value, jnp.float32) for name, value in flat.items()})


def _stacked(layers: list[np.ndarray], name: str) -> np.ndarray:
    if len({layer.shape for layer in layers}) != 1:
        raise ValueError(f"Tensors {name} differ in shape between layers.")
    return np.stack(layers)


def _check_shapes(flat: dict[str, np.ndarray], config: Config) -> None:
    w, d = config.width, config.depth
    rows = {"embed": config.vocabulary, "position": config.context, "up": w, "down": 4 * w}
    for name, value in flat.items():
        parts = name.split("/")
        stack = (d,) if parts[0] == "blocks" else ()
        out = 4 * w if parts[-2] == "up" else w
        matrix = parts[-1] in ("kernel", "embedding")
        shape = (*stack, rows.get(parts[-2], w), out) if matrix else (*stack, out)
        if value.shape != shape:
            raise ValueError(f"Tensor {name} has shape {list(value.shape)}, needed {list(shape)}.")


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree

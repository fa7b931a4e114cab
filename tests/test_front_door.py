"""What a newcomer's call is answered with: the right result, or the words that mend the call."""

import collections
import dataclasses
import functools
import itertools
import pathlib
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import jaxattr as ja
from jaxattr import language
from jaxattr.inputs.data import as_data
from jaxattr.sources import as_source

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
XS, Y = jnp.asarray(X), np.arange(40) % 2
D, P, KEY = {"x": X}, {"w": jnp.ones((4, 2), jnp.float32)}, jax.random.key(0)
ONE = {"x": X[0]}


def loss(params, example, key):
    return jnp.sum((example["x"] @ params["w"]) ** 2)


def margin(params, example, key):
    return (example["x"] @ params["w"])[0]


M = ja.tracin(loss)
INDEX = ja.build_index(M, P, D)
P_2 = {"w": 2 * P["w"]}
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
LABELLED = ja.build_index(
    ja.tracin(lambda p, e, key: CROSS_ENTROPY(e["x"] @ p["w"], e["y"])), P, {"x": X, "y": Y}
)
FIT = ja.learn_weights(INDEX, D, steps=2)
TRAINER = ja.trainer(loss, P, D, optimizer=optax.sgd(1.0), batch_size=8, epochs=1)


def cross_entropy(params, example, key):
    logits = example["x"] @ params["w"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def build(train, output=loss, params=P, **options):
    return ja.build_index(ja.tracin(output), params, train, **options)


class Items:
    """A source of whatever a function gives."""

    def __init__(self, size, item):
        self.size, self.item = size, item

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.item(i)


class NoLength:
    def __getitem__(self, i):
        return ONE


class Typed(Items):
    dtype = np.float32


class Loader:
    """Like that of PyTorch."""

    dataset = D

    def __len__(self):
        return 5

    def __iter__(self):
        return iter(BATCHES)


class Endless(Items):
    def __len__(self):
        raise TypeError("infinite")


class Frame:
    """Like a table of pandas."""

    iloc = None

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return X


class Regressor(nn.Module):
    noisy: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.noisy)(nn.Dense(3)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not self.noisy)(x))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(4, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.cells = nnx.RNN(nnx.GRUCell(1, 3, rngs=rngs))

    def __call__(self, x):  # [t, 1] -> [t, 3]
        return self.cells(x[None])[0]


RECURRENT = Recurrent(nnx.Rngs(0))
RECURRENT.eval()
RNN = nnx.split(RECURRENT, nnx.Param, ...)


def recurrent_loss(params, example, key):
    return nnx.merge(RNN[0], params, RNN[2])(example["x"]).sum()


COUNTED = itertools.count(1)
ROWS_IN_BATCHES = {name: np.ones((3, 2, 4), int) for name in ("inputs", "targets", "mask")}
VARIABLES = Regressor().init(KEY, X)
LINEN = Regressor()
MODULE = Nnx()
SPLIT = dict(
    zip(("params", "averages"), nnx.split(MODULE, nnx.Param, nnx.BatchStat, ...)[1:3], strict=True)
)
GRAPH, PARAMS, REST = nnx.split(MODULE, nnx.Param, ...)


def linen_loss(variables, example, key):
    return LINEN.apply(variables, example["x"][None]).sum()


def linen_params_loss(params, example, key):
    return LINEN.apply(VARIABLES | {"params": params}, example["x"][None]).sum()


def noisy_linen_loss(variables, example, key):
    return Regressor(noisy=True).apply(variables, example["x"][None]).sum()


def dropout_loss(params, example, key):
    return nn.Dropout(0.5, deterministic=False).apply({}, example["x"]).sum() * params["w"].sum()


def nnx_loss(params, example, key):
    return nnx.merge(GRAPH, params, REST)(example["x"][None]).sum()


def numpy_loss(params, example, key):
    return np.sum(np.asarray(example["x"])) * params["w"].sum()


def branching_loss(params, example, key):
    total = (example["x"] @ params["w"]).sum()
    return total if total > 0 else -total


def counting_loss(params, example, key):
    return sum(params["w"].sum() for _ in range(example["y"]))


def converting_loss(params, example, key):
    return params["w"].sum() * float(example["x"][0])


def batch_loss(params, example, key):
    return optax.l2_loss(jnp.einsum("bi,io->bo", example["x"], params["w"])).sum()


def broadcasting(params, example, key):
    return jnp.sum((params - example) ** 2)


def fields_loss(params, x, y):
    return jnp.sum((x @ params["w"]) ** 2) * y.astype(float)


def labelled_loss(params, example, key):
    logits = example["x"] @ params["w"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def embedded(params, example, key):
    return params["w"][jnp.asarray(example) % 4].sum()


def shorter(params, example, key):
    return params["w"].sum() * example["x"].sum().astype(float)


def first_of(params, example, key):
    return (example[0] * params["w"].sum()).sum() + example[1].sum()


DENOISER = ja.diffusion.Denoiser(lambda p, x, t, e: x, np.linspace(0.9, 0.1, 5))


def denoised(data):
    def predict(params, noisy, timestep, example):
        return noisy @ params["w"] @ params["w"].T

    denoiser = ja.diffusion.Denoiser(predict, np.linspace(0.9, 0.1, 5))
    output = ja.expectation(ja.diffusion.output(denoiser), timesteps=range(5))
    return ja.build_index(ja.d_trak(output), P, data)


def deleted(tree=None):
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), P if tree is None else tree)
    jax.tree.map(lambda x: x.delete(), copies)
    return copies


def narrow(call):
    with jax.enable_x64(False):
        return call()


def in_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        ja.score(build(D), D)  # where nothing is on a mesh it does not matter
        return ja.build_index(M, P, D, mesh=mesh)


RAGGED = [np.arange(3), np.arange(2)]
OBJECTS = np.array([[1, 2, 3], [0, 3]], dtype=object)
MESH = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
BATCHES = Items(5, lambda i: {"x": X[8 * i : 8 * i + 8]})
STATE = TrainState.create(apply_fn=None, params=P, tx=optax.sgd(0.1))

WRONG = {  # name: (call, error, words)
    "an index opened in another order": (
        lambda: ja.open_index("runs/none", P, M), TypeError,
        ["ja.open_index(path, method, checkpoints)"],
    ),
    "a train state as it was restored": (
        lambda: build(D, params={"params": P, "opt_state": [{"mu": P}], "step": 3}), TypeError,
        ["the state of an optimizer", "state['params']"],
    ),
    "an output of a timestep": (
        lambda: ja.build_index(ja.d_trak(lambda params, example, key, timestep: 0.0), P, D),
        TypeError, ["takes a timestep", "ja.expectation("],
    ),
    "checkpoints described": (
        lambda: ja.describe(M, [P, P], ONE), TypeError, ["list of 2", "ONE checkpoint"],
    ),
    "a model where its logits belong": (
        lambda: ja.language.loss(lambda x: x), TypeError,
        ["logits_fn takes (x), and is called as (params, row)"],
    ),
    "logits of a batch": (
        lambda: ja.build_index(
            ja.tracin(ja.language.loss(lambda p, row: p["w"][None][:, [0, 1]])), P,
            ja.language.rows([[1, 0, 1], [0, 1, 1]], 2, vocabulary=2),
        ), ValueError, ["must map ONE row to logits [2, vocabulary]", "returned [1, 2, 2]"],
    ),
    "documents as a tokenizer gives them": (
        lambda: ja.language.rows([{"input_ids": [1, 2]}], 4, vocabulary=8), TypeError,
        ["got mappings", "each['input_ids']"],
    ),
    "tokens of no rows": (
        lambda: ja.language.token_features(INDEX, {"x": X}), TypeError,
        ["`ja.language.rows`", "x float32[40, 4]"],
    ),
    "an image by another name": (
        lambda: denoised({"point": X}), ValueError,
        ["has no 'image', but ['point']", "Denoiser(..., image=name)"],
    ),
    "images as bytes": (
        lambda: denoised({"image": np.ones((4, 3), np.uint8)}), ValueError,
        ["must be floats", "image / 127.5 - 1", "uint8"],
    ),
    "an output of no denoiser": (
        lambda: ja.diffusion.output(loss), TypeError, ["a diffusion.Denoiser(predict, alpha_bar)"],
    ),
    "several patterns": (
        lambda: ja.by_layer(P, exclude=["norm", "bias"]), TypeError,
        ["one regular expression", "'norm|bias'"],
    ),
    # Data
    "no data": (lambda: build(None), TypeError, ["train must be a data set", "None"]),
    "a path": (lambda: build("train.npz"), TypeError, ["train.npz", "__getitem__"]),
    "generator": (
        lambda: build({"x": row} for row in X), TypeError,
        ["generator", "__len__ and __getitem__", "list(train)"],
    ),
    "a loader of batches": (
        lambda: build(Loader()), TypeError, ["Loader", "pass train.dataset, of which"],
    ),
    "iterator": (lambda: build(iter([ONE])), TypeError, ["list_iterator", "__len__"]),
    "loader without items": (
        lambda: build(types.SimpleNamespace(__iter__=1)), ValueError, ["SimpleNamespace"],
    ),
    "iterable": (lambda: build(collections.deque([ONE]).__iter__()), TypeError, ["__getitem__"]),
    "no length": (lambda: build(NoLength()), TypeError, ["NoLength", "lacks __len__"]),
    "endless": (lambda: build(Endless(0, None)), TypeError, ["how many examples", "repeat"]),
    "absurd length": (
        lambda: build(Items(2**62, lambda i: ONE)), ValueError, ["examples", ".repeat()"],
    ),
    "empty": (lambda: build([]), ValueError, ["train is empty"]),
    "no rows": (lambda: build({"x": X[:0]}), ValueError, ["train is empty", "at least one"]),
    "unequal rows": (
        lambda: build({"x": X, "y": Y[:5]}), ValueError,
        ["leading axis", "x float32[40, 4]", "y int64[5]"],
    ),
    "a scalar": (lambda: build({"x": X, "s": 3.0}), ValueError, ["leading axis", "s float64[]"]),
    "ragged arrays": (
        lambda: build(RAGGED), ValueError, ["example 0", "int64[3]", "example 1", "[2]", "rows("],
    ),
    "pictures of several sizes": (
        lambda: build([np.zeros((3, 8, 8 + i)) for i in range(4)]), ValueError,
        ["example 0", "[3, 8, 8]", "example 1", "[3, 8, 9]"],
    ),
    "ragged numbers": (
        lambda: build([[1, 2, 3], [0, 3]], embedded), ValueError,
        ["example 0", "[3]", "example 1", "[2]", "pad", "language.rows"],
    ),
    "ragged field": (
        lambda: build({"x": [[1, 2], [3]]}), ValueError, ["'x'", "example 1", "[1]", "pad"],
    ),
    "ragged source": (
        lambda: build(Items(2, lambda i: {"x": RAGGED[i]}), shorter), ValueError,
        ["example 0", "x int64[3]", "example 1", "x int64[2]", "Pad"],
    ),
    "ragged objects": (
        lambda: build({"x": OBJECTS}), ValueError, ["'x'", "example 0 has 3", "example 1 has 2"],
    ),
    "other fields": (
        lambda: build([ONE, {"z": X[0]}]), ValueError, ["example 1 has z", "the same fields"],
    ),
    "20,000 others": (
        lambda: build([{f"f{i}": X[0]} for i in range(20_000)]), ValueError, ["example 1 has f1 "],
    ),
    "strings": (
        lambda: build(D | {"name": np.array(["a"] * 40)}), ValueError,
        ["'name'", "strings", "ja.without(data, 'name')"],
    ),
    "a list that may be examples or fields": (
        lambda: ja.build_index(ja.tracin(first_of), P, [np.ones((9, 4, 3))] * 2), ValueError,
        ["2 arrays [9, 4, 3]", "2 fields of 9 examples", "np.stack(train)", "tuple(train)"],
    ),
    "ids beyond what JAX takes": (
        lambda: narrow(lambda: build({"x": X, "y": Y.astype(np.int64) + 2**33})), ValueError,
        ["'y' is int64", "int32", "np.unique(ids, return_inverse=True)"],
    ),
    "ids of a source beyond what JAX takes": (
        lambda: narrow(lambda: build(Items(5, lambda i: {"x": X[i], "y": np.int64(2**40 + i)}))),
        ValueError,
        ["example 0 of train", "'y' is int64", "1099511627776"],
    ),
    "parameters that training took": (lambda: build(D, params=deleted()), ValueError,
        ["is deleted", "donate_argnums", "jax.tree.map(jnp.copy, params)"],
    ),
    "data that training took": (lambda: build(deleted(D)), ValueError, ["is deleted"]),
    "a mesh with explicit axes that is set": (in_explicit_mesh, ValueError,
        ["jax.set_mesh", "explicit axes", "AxisType.Auto"],
    ),
    "a list of strings": (lambda: build(["a", "b"]), ValueError, ["strings", "token ids"]),
    "strings in examples": (
        lambda: build(Items(3, lambda i: ONE | {"text": "a"})), ValueError,
        ["example 0 of train", "'text'", "strings"],
    ),
    "objects": (
        lambda: build(D | {"o": np.array([object()] * 40)}), ValueError,
        ["'o'", "object", "pytree"],
    ),
    "dates": (
        lambda: build(D | {"t": np.zeros(40, "datetime64[s]")}), ValueError, ["'t'", "datetime64"],
    ),
    "a table": (lambda: build(Frame()), TypeError, ["Frame", "columns", "to_numpy"]),
    "several sets": (
        lambda: build({"train": BATCHES, "test": BATCHES}), TypeError, ["data['train']"],
    ),
    "no such field": (lambda: ja.without(D, "name"), ValueError, ["no field name", "x"]),
    "batched source": (
        lambda: build(BATCHES, lambda p, e, key: p["w"].T @ e["x"] @ jnp.ones(2)), ValueError,
        ["x float32[8, 4]"],
    ),
    "batched, and the loss says so": (
        lambda: build(BATCHES, lambda p, e, key: (e["x"].reshape(4) @ p["w"]).sum()), ValueError,
        ["without the leading axis of 8", "batched", "ONE example"],
    ),
    # Queries beside training examples
    "batched training set": (
        lambda: ja.score(build(BATCHES), D), ValueError,
        ["'x' is float32[4]", "float32[8, 4]", "the training data come in batches"],
    ),
    "batched queries": (
        lambda: ja.score(INDEX, BATCHES), ValueError, ["float32[8, 4]", "queries come in batches"],
    ),
    "other field": (
        lambda: ja.score(INDEX, {"image": X}), ValueError,
        ["queries have 'image', training examples 'x'"],
    ),
    "other width": (
        lambda: ja.top_k(INDEX, {"x": X[:, :3]}), ValueError,
        ["'x' is float32[3] in queries", "float32[4]"],
    ),
    "other numbers": (
        lambda: ja.score(INDEX, {"x": X.astype(np.uint8)}), ValueError,
        ["uint8", "float32", "Convert"],
    ),
    "an array for a dict": (lambda: ja.score(INDEX, X), ValueError, ["queries", "'x'"]),
    "other batch": (
        lambda: ja.attributor(INDEX)({"x": X[:, :3]}), ValueError, ["float32[3]", "float32[4]"],
    ),
    "foreign features": (
        lambda: ja.score(INDEX, ja.query_features(build({"x": X[:, :3]}, params={"w": P["w"][:3]}),
                                                  {"x": X[:, :3]})), ValueError, ["another index"],
    ),
    # Parameters
    "swapped": (
        lambda: ja.build_index(M, D, P), ValueError, ["checkpoints and train look swapped"],
    ),
    "swapped in a plan": (lambda: ja.plan(M, D, P), ValueError, ["look swapped"]),
    "an nnx module": (
        lambda: build(D, nnx_loss, MODULE), TypeError,
        ["nnx.split(model, nnx.Param"],
    ),
    "what nnx.split returns": (
        lambda: build(D, nnx_loss, nnx.split(MODULE)), TypeError, ["GraphDef", "params alone"],
    ),
    "all state of nnx": (
        lambda: build(D, nnx_loss, nnx.state(MODULE)), TypeError,
        ["random state", "nnx.split"],
    ),
    "a linen module": (
        lambda: build(D, linen_loss, LINEN), TypeError,
        ["model.init", "['params']"],
    ),
    "a TrainState": (lambda: build(D, params=STATE), TypeError, ["TrainState", "state.params"]),
    "a path of parameters": (lambda: build(D, params="run/100"), TypeError, ["run/100", "Orbax"]),
    "a function in the tree": (
        lambda: build(D, params={"w": P["w"], "act": nn.relu}), TypeError,
        ["'act'", "eqx.partition"],
    ),
    "batch statistics": (
        lambda: build(D, linen_loss, VARIABLES), ValueError,
        ["batch statistics", "ja.by_layer(exclude='batch_stats')"],
    ),
    "one level too deep": (
        lambda: build(D, params={"params": P}), ValueError, ["pass params['params']"],
    ),
    "one level too few": (
        lambda: build(D, lambda p, e, key: loss(p["params"], e, key)), ValueError,
        ["{'params': params}"],
    ),
    "no checkpoints": (lambda: build(D, params=[]), ValueError, ["checkpoints is empty"]),
    "another checkpoint": (
        lambda: build(D, params=[P, {"w": P["w"][:3]}]), ValueError,
        ["Checkpoint 1 differs", "w float32[3, 2] instead of float32[4, 2]"],
    ),
    "a checkpoint with more": (
        lambda: build(D, params=[P, P | {"b": jnp.ones(2)}]), ValueError, ["Checkpoint 1", ": b"],
    ),
    "groups by name": (lambda: build(D, groups="layer"), TypeError, ["ja.by_layer", "'layer'"]),
    "nothing but integers": (
        lambda: build(D, params={"w": jnp.ones((4, 2), int)}), ValueError, ["whole numbers"],
    ),
    # Functions
    "no key": (
        lambda: ja.tracin(lambda params, example: 0.0), TypeError,
        ["(params, example)", "(params, example, key)", "Write: lambda"],
    ),
    "four arguments": (
        lambda: ja.trak(lambda params, x, y, key: 0.0), TypeError,
        ["(params, x, y, key)", "example['x']"],
    ),
    "fields as arguments": (
        lambda: build(D | {"y": Y}, fields_loss), ValueError,
        ["fields_loss(params, example['x'], example['y'])"],
    ),
    "a function for a method": (
        lambda: ja.build_index(loss, P, D), TypeError, ["function 'loss'", "ja.tracin(loss)"],
    ),
    "a method that was not called": (
        lambda: ja.describe(ja.ekfac, P, ONE), TypeError, ["ja.ekfac itself", "ja.ekfac(loss)"],
    ),
    "a method for a function": (
        lambda: ja.ekfac(M), TypeError, ["must be a function", "got Method"],
    ),
    "a method for opening": (lambda: ja.open_index("p", loss, P), TypeError, ["ja.tracin(loss)"]),
    "a vector": (
        lambda: build(D, lambda p, e, key: e["x"] @ p["w"]), ValueError,
        ["one float scalar", "float32[2]"],
    ),
    "an auxiliary value": (
        lambda: build(D, lambda p, e, key: (loss(p, e, key), e["x"])), ValueError,
        ["float32[], float32[4]", "[0]"],
    ),
    "an integer": (lambda: build(D, lambda p, e, key: 1), ValueError, ["one float scalar", "int"]),
    "a function of nothing": (
        lambda: build(D, lambda p, e, key: loss(P, e, key)), ValueError,
        ["does not depend on its parameters", "close over the trained ones"],
    ),
    "a tuple, read by name": (
        lambda: build((X, Y)), ValueError, ["by position, example[0]", "{'x': ..., 'y': ...}"],
    ),
    "labels of floats": (
        lambda: build(D | {"y": Y.astype(np.float32)}, labelled_loss), ValueError,
        ["where 'y' holds integers", ".astype(np.int32)", "y float32[]"],
    ),
    "a tuple as arguments": (
        lambda: build((X, Y), fields_loss), ValueError,
        ["called as (params, example, key)", "fields_loss(params, *example)"],
    ),
    "parameters first": (
        lambda: ja.build_index(P, M, D), TypeError,
        ["a pytree (w float32[4, 2])", "ja.build_index(method, checkpoints, train)"],
    ),
    "a training loop of NumPy": (
        lambda: ja.retrain(
            lambda key, ids: P["w"][np.random.permutation(np.asarray(ids))[:2] % 4],
            np.eye(40, dtype=bool), KEY,
        ), ValueError, ["train_fn cannot be traced", "jax.lax.scan", "ja.Outcomes(masks, outputs)"],
    ),
    "outcomes of a loop of NumPy": (
        lambda: ja.outcomes(lambda key, ids: P["w"] * np.asarray(ids)[0], loss, D, 40, key=KEY),
        ValueError, ["train_fn cannot be traced", "ja.trainer makes one"],
    ),
    "a real model of another structure": (
        lambda: ja.outcomes(
            lambda key, ids: {"params": {"w": P["w"] * ids[0]}},
            lambda v, e, key: loss(v["params"], e, key), D, 40, key=KEY, params=P,
        ), ValueError, ["KeyError: 'params'", "{'params': params}"],
    ),
    "settings among parameters": (
        lambda: build(D, params=P | {"rate": 0.5}), ValueError, ["'rate'", "eqx.partition"],
    ),
    "numpy": (lambda: build(D, numpy_loss), ValueError, ["uses NumPy", "jax.numpy"]),
    "a branch": (lambda: build(D, branching_loss), ValueError, ["branches in Python", "jnp.where"]),
    "a range": (lambda: build(D | {"y": Y}, counting_loss), ValueError, ["jnp.arange"]),
    "float()": (lambda: build(D, converting_loss), ValueError, ["float()", "keep it an array"]),
    "a batch wanted": (lambda: build(D, batch_loss), ValueError, ["wants a batch axis", "x[None]"]),
    "state of nnx": (
        lambda: build(D, nnx_loss, PARAMS), ValueError,
        ["copy=True", "nnx.reseed(model, default=key)", "model.eval()"],
    ),
    "an nnx.RNN in evaluation mode": (
        lambda: build({"x": X[:, :, None]}, recurrent_loss, RNN[1]), ValueError,
        ["If it still does, as nnx.RNN", "copy=True"],
    ),
    "state of linen": (
        lambda: build(D, noisy_linen_loss, VARIABLES, groups=ja.by_layer(exclude="batch_stats")),
        ValueError, ["use_running_average=True"],
    ),
    "dropout without a key": (
        lambda: build(D, dropout_loss), ValueError, ["rngs={'dropout': key}", "deterministic=True"],
    ),
    "a name that is not there": (
        lambda: build(D, lambda p, e, key: p["v"].sum()), ValueError,
        ["KeyError: 'v'", "params w float32[4, 2]", "example x float32[4]"],
    ),
    # The rest
    "a path for an index": (lambda: ja.score("run/index", D), TypeError, ["ja.open_index(path"]),
    "queries first": (lambda: ja.top_k(D, INDEX), TypeError, ["index must be an Index"]),
    "a list of weights": (
        lambda: ja.score(INDEX, D, weights=[1.0]), TypeError, ["{group name: weight}", "list"],
    ),
    "another group": (lambda: ja.score(INDEX, D, weights={"v": 1}), ValueError, ["Missing: ['w']"]),
    "k of a float": (lambda: ja.top_k(INDEX, D, k=2.0), TypeError, ["k must be a whole number"]),
    "k of zero": (lambda: ja.top_k(INDEX, D, k=0), ValueError, ["k must be", "40"]),
    "outcomes of something else": (
        lambda: ja.learn_weights(INDEX, D, outcomes=np.ones(3)), TypeError,
        ["ja.outcomes(train_fn"],
    ),
    "another axis": (lambda: build(D, mesh=MESH), ValueError, ["data", "batch"]),
    "a seed for a key": (lambda: build(D, key=3), ValueError, ["key"]),
    "no batch": (lambda: build(D, batch_size=0), ValueError, ["batch_size", "at least 1"]),
    "a number for a projection": (
        lambda: ja.tracin(loss, projection=64), TypeError, ["ja.projections.rademacher(1024)"],
    ),
    "a number for checkpoint weights": (
        lambda: ja.tracin(loss, checkpoint_weights=0.1), TypeError, ["[0.1]"],
    ),
    "a number for a damping": (
        lambda: ja.trak(margin, damping=0.1), ValueError, ["ja.absolute(x) or ja.relative(x)"],
    ),
    "memory in words": (lambda: build(D, memory="8GB"), TypeError, ["memory, in bytes", "'8GB'"]),
    "a batch size, not swapped": (
        lambda: ja.build_index(ja.tracin(broadcasting), X[0], X, batch_size=0), ValueError,
        ["batch_size must be at least 1"],
    ),
    "an axis that broadcasts": (
        lambda: ja.score(INDEX, {"x": X[..., None]}), ValueError, ["float32[4, 1]", "float32[4]"],
    ),
    "a size that broadcasts": (
        lambda: ja.score(build(X, broadcasting, X[0]), X[:, :1]), ValueError,
        ["float32[1]", "float32[4]", "axes of a training example"],
    ),
    "numbers of two kinds": (
        lambda: build(Items(4, lambda i: {"x": X[i], "y": 1 if i < 2 else 0.5})), ValueError,
        ["'y'", "int64 in example 0", "float64 in example 2", "one type"],
    ),
    "shapes for data": (
        lambda: ja.plan(M, P, {"x": jax.ShapeDtypeStruct((9, 4), float)}), TypeError,
        ["'x' is the shape of an array", "np.broadcast_to"],
    ),
    "masked values": (lambda: build({"x": np.ma.array(X)}), ValueError, [".filled(value)"]),
    "records": (
        lambda: build({"x": np.zeros(3, [("a", "f4")])}), ValueError, ["'x'", "Convert it"],
    ),
    "kinds of checkpoints": (
        lambda: build(D, params=[P, {"w": P["w"].astype(int)}]), ValueError, ["w int64[4, 2]"],
    ),
    "verify": (lambda: build(D, verify="yes"), ValueError, ['"all" or "sample"', "'yes'"]),
    "a word for an optimizer": (
        lambda: ja.learn_weights(INDEX, D, optimizer="adam"), TypeError, ["optax.adam"],
    ),
    "ONE query": (
        lambda: ja.score(INDEX, ONE), ValueError,
        ["float32[]", "ONE query, add an axis", "x[None]"],
    ),
    "ONE query with a label": (
        lambda: ja.score(INDEX, ONE | {"y": Y[0]}), ValueError,
        ["x float32[4], y int64[]", "ONE example, add an axis", "x[None]"],
    ),
    "no timestep": (
        lambda: ja.expectation(loss, timesteps=range(3)), TypeError,
        ["(params, example, key)", "(params, example, key, timestep)"],
    ),
    "retraining without ids": (
        lambda: ja.retrain(lambda key: P, np.eye(40, dtype=bool), KEY), TypeError,
        ["train_fn takes (key)", "(key, ids)"],
    ),
    "ids for masks": (
        lambda: ja.retrain(lambda key, ids: P, [[1, 2], [3, 4]], KEY), ValueError,
        ["int64 [2, 2]", "mask[ids] = True"],
    ),
    "arguments of training swapped": (
        lambda: ja.retrain(lambda ids, key: {"w": XS[ids].sum() * jax.random.normal(key)},
                           np.eye(40, dtype=bool), KEY), TypeError,
        ["called as (key, ids)", "train_fn(ids, key)"],
    ),
    "a key for masks": (
        lambda: ja.retrain(lambda key, ids: P, KEY, np.eye(40, dtype=bool)), ValueError,
        ["masks come before the key"],
    ),
    "training that returns more": (
        lambda: ja.outcomes(lambda key, ids: (P, XS[ids]), loss, D, 40, key=KEY, models=8),
        ValueError, ["runs on the first", "train_fn must return it alone"],
    ),
    "arguments swapped": (
        lambda: build(D, lambda example, params, key: loss(params, example, key)), ValueError,
        ["first two arguments swapped", "(params, example, key)"],
    ),
    "fields by position": (
        lambda: build(D, lambda p, e, key: loss(p, {"x": e[0]}, key)), ValueError,
        ["KeyError: 0", "by name, such as example['x']", "as a tuple"],
    ),
    "checkpoints by step": (
        lambda: build(D, params={10: P, 20: P}), ValueError, ["list(checkpoints.values())"],
    ),
    "the state of an optimizer": (
        lambda: build(D, params=(P, optax.adam(1.0).init(P))), ValueError,
        ["Checkpoint 1", "no state of an optimizer"],
    ),
    "one-hot labels": (
        lambda: build(D | {"y": np.eye(2)[Y]}, cross_entropy), ValueError,
        ["'y' holds the class", "np.argmax(..., -1)"],
    ),
    "a column of arrays": (
        lambda: build({"x": np.array([*X, None], object)[:-1]}), ValueError,
        ["each an array of 4", "np.stack(column)"],
    ),
    "filtered out, the first": (
        lambda: build(Items(9, lambda i: {"x": X[i]} if i else None)), ValueError,
        ["holds nothing is None", "filter"],
    ),
    "filtered out, another": (
        lambda: build(Items(9, lambda i: {"x": X[i]} if i != 5 else None)), ValueError,
        ["example 5 has no arrays", "holds nothing is None"],
    ),
    "batches of rows of tokens": (
        lambda: ja.build_index(ja.tracin(language.loss(lambda p, row: p["w"][row["inputs"]])),
                               {"w": jnp.ones((5, 5))}, ROWS_IN_BATCHES), ValueError,
        ["a row of tokens is [t]", "without the leading axis of 2", "batched"],
    ),
    "numbers that are no tokens": (
        lambda: language.rows([[1.9, 2.7]], 4, vocabulary=9), TypeError,
        ["Document 0", "whole numbers", "float64 [2]"],
    ),
    "rows of no tokens": (
        lambda: language.packed([[1, 2, 3]], -1, vocabulary=9), ValueError, ["length", "at least"],
    ),
    "statistics of nnx among parameters": (
        lambda: build(D, lambda s, e, key: (e["x"] @ s["part"]["params"]["dense"]["kernel"]).sum(),
                      {"part": SPLIT}), ValueError,
        ["'^(part/averages/norm/mean|part/averages/norm/var)$'"],
    ),
    "statistics of nnx in a group": (
        lambda: build(D, lambda s, e, key: (e["x"] @ s["params"]["dense"]["kernel"]).sum()
                      * s["averages"]["norm"]["mean"].sum(), SPLIT), ValueError,
        ["batch statistics, 2 arrays (averages/norm/mean", "exclude='averages'"],
    ),
    "augmentation in a source": (
        lambda: build(Items(9, lambda i: {"x": X[i] * next(COUNTED)})), ValueError,
        ["another example 0 each time", "no random augmentation"],
    ),
    "a pattern that no name has": (
        lambda: build(D, groups=ja.by_layer(exclude="Dense")), ValueError,
        ["exclude='Dense' is found in no parameter's name", "Upper and lower case"],
    ),
    "layers of no leaf": (
        lambda: ja.by_leaf(P, stacked="blocks"), ValueError, ["stacked='blocks'", "names: w."],
    ),
    "a group of no leaf": (
        lambda: ja.by_regex(P, {"w": "w", "head": "head"}), ValueError, ["of group 'head' is"],
    ),
    "a shell's pattern": (
        lambda: ja.by_layer(P, exclude="*bias"), ValueError, ["'*bias' is no regular", ".*"],
    ),
    "a frozen backbone by another name": (
        lambda: ja.trainer(
            loss, P, D, optimizer=optax.sgd(1.0), batch_size=1, epochs=1, exclude="backbone"
        ), ValueError, ["exclude='backbone' is found in no parameter's name"],
    ),
    "training on what is not there": (
        lambda: TRAINER(KEY, jnp.arange(30, 50)), ValueError, ["from 0 to 39", "from 30 to 49"],
    ),
    "training on a mask": (
        lambda: TRAINER(KEY, np.ones(40, bool)), ValueError, ["ids must be integers", "bool [40]"],
    ),
    "training on a mask of numbers": (
        lambda: TRAINER(KEY, Y), ValueError, ["all 0 or 1, as a mask is", "np.flatnonzero(mask)"],
    ),
    "ids before the key": (
        lambda: TRAINER(jnp.arange(20), KEY), ValueError, ["key must be one PRNG key", "int"],
    ),
    "a rank that is a float": (
        lambda: ja.logra(loss, rank=2.0), TypeError, ["rank must be a whole number", "2.0"],
    ),
    "bands that are a float": (
        lambda: ja.ekfac(loss, bands=2.0), TypeError, ["bands must be a whole number"],
    ),
    "a mask that is an array": (
        lambda: ja.ekfac(loss, mask=np.ones(4)), TypeError, ["mask must be a function", "ndarray"],
    ),
    "a mask of other positions": (
        lambda: ja.build_index(
            ja.ekfac(lambda p, e, key: jnp.tanh(e["x"] @ p["w"]).sum(), mask=lambda e: np.ones(4)),
            P, {"x": np.ones((9, 3, 4), np.float32)},
        ), ValueError, ["mask must return", "returned [4], and linear maps have [3] positions"],
    ),
    "a rate for each step": (
        lambda: ja.source(loss, learning_rate=[0.1, 0.2], steps=2), ValueError, ["one number"],
    ),
    "a generator of checkpoints": (
        lambda: ja.build_index(M, (p for p in [P]), D), TypeError, ["a generator", "list(...)"],
    ),
    "a report of what was found": (
        lambda: ja.report(ja.top_k(INDEX, D, k=2), D, path="x.html"), TypeError,
        ["index must be an Index, got TopK"],
    ),
    "a gain of bare weights": (
        lambda: ja.evaluation.measured_gain(INDEX, D, FIT.weights, None), TypeError,
        ["what ja.learn_weights returned, got dict", "(index, queries, fit, outcomes)"],
    ),
    "queries in a jit": (
        lambda: jax.jit(lambda q: ja.score(INDEX, q))(D), TypeError, ["ja.attributor(index"],
    ),
    "mislabelled by unit norms": (
        lambda: ja.evaluation.mislabel_auc(1 + 1e-7 * X[:, 0], Y > 0), ValueError,
        ["self_influence is 1 for all", "GradCos and TrackStar"],
    ),
    "a tokenizer's one mapping": (
        lambda: ja.language.rows({"input_ids": [[1, 2]]}, 4, vocabulary=8), TypeError,
        ["pass their ids alone, documents['input_ids']"],
    ),
    "text for tokens": (
        lambda: language.rows(["hello"], 8, vocabulary=50), TypeError, ["token ids", "tokenizer"],
    ),
    "an optimizer that was not called": (
        lambda: ja.trainer(loss, P, D, optimizer=optax.adam, batch_size=1, epochs=1), TypeError,
        ["optax.adam(1e-3)"],
    ),
    "layers for checkpoints": (
        lambda: build(D, lambda p, e, key: (e["x"] @ p[0]["w"]).sum() + p[1]["w"].sum(), [P, P_2]),
        ValueError, ["checkpoints is a list", "of one model: if it is one, pass [params]"],
    ),
    "a folder for a store": (
        lambda: ja.build_index(M, P, D, store="runs/index"), TypeError, ["goes in as path="],
    ),
    "a weight that is text": (
        lambda: ja.score(INDEX, D, weights={"w": "1"}), ValueError, ["one number", "of 'w' is '1'"],
    ),
    "an attributor without a store": (
        lambda: ja.attributor(ja.build_index(M, P, D, store=False), k=1), ValueError,
        ["on disk, or not stored", "store=False"],
    ),
    "labels of examples for names": (
        lambda: ja.report(INDEX, D, labels=["cat", "dog"] * 20, path="x.html"), ValueError,
        ["names of classes", "one per training example"],
    ),
    "an array of labels of examples": (
        lambda: ja.report(INDEX, D, labels=np.array(["cat", "dog"] * 20), path="x.html"),
        ValueError, ["one per training example"],
    ),
    "labels by number": (
        lambda: ja.report(INDEX, D, labels=lambda number: "ab"[number], path="x.html"), ValueError,
        ["labels failed on ONE example", "not its number"],
    ),
    "one prompt": (
        lambda: language.rows([[1, 2], [2, 3]], 4, vocabulary=9, prompts=1), ValueError,
        ["one per document, 2, got 1"],
    ),
    "a pattern for parameters": (lambda: ja.by_layer("head"), TypeError, ["is it exclude=?"]),
    "patterns without names": (
        lambda: ja.by_regex(P, ["w"]), TypeError, ["{group name: pattern}", "['w']"],
    ),
    "truth for labels": (
        lambda: ja.score(LABELLED, {"x": X, "y": Y > 0}), ValueError,
        ["'y' is bool[] in queries, and int64[]"],
    ),
    "a source for training": (
        lambda: ja.trainer(loss, P, BATCHES, optimizer=optax.sgd(1), batch_size=1, epochs=1),
        TypeError, ["arrays", "np.stack"],
    ),
    "an array too wide": (
        lambda: build({"x": X.astype(np.longdouble)}), ValueError, ["'x'", ".astype(np.float64)"],
    ),
    "a weight of None": (
        lambda: ja.score(INDEX, D, weights={"w": None}), ValueError, ["'w' is None"],
    ),
    "one timestep": (
        lambda: ja.expectation(lambda p, e, key, t: loss(p, e, key), timesteps=5), TypeError,
        ["such as [5]"],
    ),
    "timesteps of floats": (
        lambda: ja.expectation(lambda p, e, key, t: loss(p, e, key), timesteps=[0.0, 5.0]),
        TypeError, ["each of timesteps must be a whole number"],
    ),
    "draws of a float": (
        lambda: ja.expectation(lambda p, e, key, t: loss(p, e, key), timesteps=[5], draws=2.0),
        TypeError, ["draws must be a whole number"],
    ),
    "half an example": (
        lambda: build(D, microbatch=2.5), TypeError, ["microbatch must be a whole number"],
    ),
    "one segment": (
        lambda: ja.score_segments(INDEX, D), TypeError, ["pass a list, [index]"],
    ),
    "a function that makes an optimizer": (
        lambda: ja.evaluation.tail_patch(loss, loss, P, D, D, np.zeros((40, 1), int),
                                         optimizer=optax.sgd),
        TypeError, ["optax.adam(1e-3)"],
    ),
    "the state of another optimizer": (
        lambda: ja.evaluation.tail_patch(loss, loss, P, D, D, np.zeros((40, 1), int),
                                         optimizer=optax.adam(1.0),
                                         optimizer_state=optax.sgd(1.0).init(P)),
        ValueError, ["optimizer_state must be of this optimizer"],
    ),
    "patterns that were forgotten": (
        lambda: ja.by_regex(P), TypeError, ["patterns must be {group name: pattern}"],
    ),
    "a schedule where a list belongs": (
        lambda: ja.diffusion.error_profile(DENOISER, timesteps=lambda key: 3), TypeError,
        ["timesteps of an error profile are listed", "range(0, steps, 100)"],
    ),
    "a trajectory of no denoiser": (
        lambda: ja.diffusion.journey(loss, steps=2), TypeError, ["a diffusion.Denoiser("],
    ),
    "half a step": (
        lambda: ja.diffusion.journey(DENOISER, steps=2.5), TypeError, ["steps must be a whole"],
    ),
    "a clip below zero": (
        lambda: ja.diffusion.journey(DENOISER, steps=2, clip=-1.0), ValueError,
        ["clip must be above 0, or None"],
    ),
    "a schedule that is text": (
        lambda: ja.diffusion.loss(ja.diffusion.Denoiser(loss, "linear")), TypeError,
        ["alpha_bar must be an array [steps]", "'linear'"],
    ),
    "a penalty that is text": (
        lambda: ja.learn_weights(INDEX, D, l2="a"), TypeError, ["l2 must be real numbers, got 'a'"],
    ),
    "no noise": (
        lambda: ja.noised(D, [1, 2], KEY, scale=np.nan), ValueError, ["scale must be finite"],
    ),
    "half a prompt": (
        lambda: ja.language.rows([[1, 2, 3]], 4, vocabulary=8, prompts=[1.5]), TypeError,
        ["prompts[0] must be a whole number"],
    ),
    "a prompt of nothing": (
        lambda: ja.language.rows([[1, 2, 3]], 4, vocabulary=8, prompts=[0]), ValueError,
        ["prompts[0] must be at least 1"],
    ),
    "a vocabulary that is text": (
        lambda: ja.language.rows([[1, 2]], 4, vocabulary="8"), TypeError,
        ["vocabulary must be a whole number"],
    ),
    "a table of self-influence": (
        lambda: ja.evaluation.mislabel_auc(np.ones((2, 2)), np.ones((2, 2), bool)), ValueError,
        ["self_influence [2, 2]"],
    ),
    "a share that is text": (
        lambda: ja.evaluation.flip_labels(KEY, Y, fraction="a"), TypeError,
        ["fraction must be real numbers, got 'a'"],
    ),
    "frames as fields": (
        lambda: build({"x": pd.DataFrame(X)}), TypeError,
        ["the field 'x' is a DataFrame", "data['x'].to_numpy()"],
    ),
    "rows of an array in a list": (
        lambda: build({"x": list(X), "y": Y}), ValueError,
        ["the field 'x' is a list of 40", "np.stack(data['x'])"],
    ),
    "the path of the data": (
        lambda: build(pathlib.Path("x.npz")), TypeError, ["is the path", "load it"],
    ),
    "parameters as lists": (
        lambda: build(D, params={"w": [[1.0, 2.0]] * 4}), ValueError, ["jnp.asarray(values)"],
    ),
    "names in a list": (
        lambda: ja.without(D, ["x"]), TypeError, ["one by one, ja.without(data, 'x', 'y')"],
    ),
    "no for an answer": (
        lambda: ja.top_k(INDEX, D, k=2, opponents="no"), TypeError,
        ["opponents must be True or False, got 'no'"],
    ),
    "a path that is a number": (
        lambda: build(D, path=3), ja.StoreError, ["must be a folder or a URL, got 3"],
    ),
    "a web page to write to": (
        lambda: build(D, path="http://localhost:9/b"), ja.StoreError, ["not written to"],
    ),
    "a sampler for the data's own labels": (
        lambda: ja.ekfac(loss, sample=lambda params, example, key: example), ValueError,
        ["sample= is for fisher='true'"],
    ),
    "a schedule of learning rates": (
        lambda: ja.source(loss, learning_rate=lambda step: 0.1, steps=3), ValueError,
        ["learning_rate must be one number", "the mean over the segment"],
    ),
    "a learning rate below zero": (
        lambda: ja.source(loss, learning_rate=-1.0, steps=3), ValueError,
        ["learning_rate must be finite and above 0"],
    ),
    "weights of checkpoints as text": (
        lambda: ja.tracin(loss, checkpoint_weights=["a"]), TypeError,
        ["checkpoint_weights must be real numbers, got str [1]"],
    ),
    "similarities where relevance belongs": (
        lambda: ja.evaluation.recall_at_k(np.zeros((2, 4)), np.full((2, 4), 0.3), 2), ValueError,
        ["relevant must be bool [q, n]", "got fractions"],
    ),
    "no scores to compare": (
        lambda: ja.evaluation.paired_difference(None, None), TypeError, ["as ja.lds makes them"],
    ),
    "no segments": (
        lambda: ja.score_segments(None, D), TypeError, ["must be a list of indexes, got NoneType"],
    ),
    "one document": (
        lambda: ja.language.rows(np.array([1, 2, 3]), 4, vocabulary=8), TypeError,
        ["ONE document, pass [document]"],
    ),
    "a position that a row lacks": (
        lambda: ja.language.token_of({"mask": np.ones(4, bool)}, 9), ValueError,
        ["positions 0 to 3, and no 9"],
    ),
    "targets of another row": (
        lambda: ja.language.log_probabilities(np.zeros((4, 8)), np.zeros(3, int)), ValueError,
        ["targets must be integers [4]", "int64 [3]"],
    ),
    "one argument twice": (
        lambda: ja.linear_map(lambda x, w: x @ w, x=0, w=0), TypeError, ["two arguments"],
    ),
    "no function": (
        lambda: ja.linear_map(3, x=0, w=1), TypeError, ["takes a function, got int"],
    ),
    "one example for an attributor": (
        lambda: ja.attributor(LABELLED, k=2)({"x": X[0], "y": Y[0]}), ValueError,
        ["If this is ONE example, add an axis"],
    ),
    "a damping as text": (
        lambda: ja.relative("0.1"), TypeError, ["Damping must be real numbers, got '0.1'"],
    ),
    "several dampings": (
        lambda: ja.absolute([0.1, 0.2]), TypeError,
        ["Damping must be one number, got an array [2]"],
    ),
    "a dtype that is none": (
        lambda: build(D, dtype="foo"), ValueError, ["dtype must be float32, bfloat16", "'foo'"],
    ),
    "scores that are names": (
        lambda: ja.lds([["a"] * 40] * 3, np.ones((9, 40), bool), np.ones((9, 3))), TypeError,
        ["scores must be real numbers, got str [3, 40]"],
    ),
    "outputs that are complex": (
        lambda: ja.lds(np.ones((3, 40)), np.ones((9, 40), bool), np.ones((9, 3)) + 1j), TypeError,
        ["outputs must be real numbers, got complex128 [9, 3]"],
    ),
    "features where their queries belong": (
        lambda: ja.unroll(TRAINER.run(KEY), margin, ja.query_features(INDEX, D)), TypeError,
        ["queries is QueryFeatures", "pass what they are of"],
    ),
    "a denoiser with its arguments swapped": (
        lambda: ja.diffusion.loss(ja.diffusion.Denoiser(np.ones(5), lambda p, x, t, e: x)),
        TypeError, ["Denoiser(predict, alpha_bar)"],
    ),
}  # fmt: skip


def test_there_are_enough_wrong_calls():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_answered_with_the_right_one(name):
    call, error, words = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error  # and no other error of JAX, which are kinds of these
    assert all(word in message for word in words), message
    assert len(message.split("\n")) <= 6 and len(message) < 1500, message


def same_index(*trains, output=loss, params=P):
    built = [build(train, output, params) for train in trains]
    for other in built[1:]:
        np.testing.assert_allclose(other.features, built[0].features, rtol=2e-6, atol=1e-6)
    return built[0].size


def test_arrays_of_another_byte_order_are_the_same_numbers():
    swapped = {"x": X.astype(">f4"), "y": Y.astype(">i4")}
    params = {"w": np.ones((4, 2), ">f4")}
    index = build(swapped, cross_entropy, params)
    np.testing.assert_array_equal(ja.score(index, swapped), ja.score(LABELLED, D | {"y": Y}))
    ja.trainer(cross_entropy, P, swapped, optimizer=optax.sgd(1.0), batch_size=8, epochs=1)


XY = D | {"y": Y}


def pair_loss(params, example, key):
    x, y = example
    return jnp.sum((x @ params["w"]) ** 2) * (1 + y.sum())


class Pair(collections.namedtuple("Pair", ["x", "y"])):
    """Fields of a batch."""


RIGHT = {
    "list of dicts": lambda: same_index(D, [{"x": row} for row in X]),
    "tuple of dicts": lambda: same_index(D, tuple({"x": row} for row in X)),
    "list of arrays": lambda: same_index(np.asarray([range(8)] * 40), [np.arange(8)] * 40,
                                         [list(range(8))] * 40, output=embedded),
    "list of scalars": lambda: same_index(Y, list(Y), list(map(int, Y)), output=embedded),
    "list of pairs": lambda: same_index((X, Y), list(zip(X, Y, strict=True)), Pair(X, Y),
                                        output=pair_loss),
    "list of lists": lambda: same_index([X, Y], [[x, y] for x, y in zip(X, Y, strict=True)],
                                        output=pair_loss),
    "mapping in a dict": lambda: same_index({"in": D}, {"in": collections.UserDict(D)},
                                            output=lambda p, e, key: loss(p, e["in"], key)),
    "two dicts of one kind": lambda: same_index(
        (D, {"x": X}), [D, D], output=lambda p, e, key: loss(p, e[0], key) * e[1]["x"][0]
    ),
    "a source that has a type": lambda: same_index(D, Typed(40, lambda i: {"x": X[i]})),
    "fields of one shape": lambda: same_index((X, X), [X, X], output=pair_loss),
    "source": lambda: same_index(D, Items(40, lambda i: {"x": X[i]})),
    "source of lists": lambda: same_index(D, Items(40, lambda i: {"x": X[i].tolist()})),
    "user's mapping": lambda: same_index(D, collections.UserDict(D)),
    "without strings": lambda: same_index(
        D, ja.without(D | {"name": np.array(["a"] * 40)}, "name"),
        ja.without([{"x": row, "name": "a"} for row in X], "name"),
        ja.without(Items(40, lambda i: {"x": X[i], "name": "a"}), "name"),
    ),
    "memory map": lambda: same_index(D, {"x": np.asarray(X).view(np.memmap)}),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_data_come_in_many_forms(name):
    assert RIGHT[name]() == 40


def test_other_libraries_data():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source([{"x": row} for row in X])
    assert same_index(D, dataset) == 40
    with pytest.raises((TypeError, ValueError), match="repeat"):
        build(dataset.repeat())
    with pytest.raises(TypeError, match="__getitem__"):
        build(dataset.to_iter_dataset())
    with pytest.raises(ValueError, match="training data come in batches"):
        ja.score(build(dataset.batch(8)), D)


def test_lists_of_numbers_in_a_tuple_are_fields():
    x, y = [1.0, 2.0], [5.0, 7.0]
    output = lambda p, e, key: p["w"].sum() * e[0] * e[1] ** 2  # noqa: E731
    assert same_index((np.array(x), np.array(y)), (x, y), output=output) == 2


def test_examples_may_hold_keys():
    keys = jax.random.split(KEY, 40)

    def noisy(params, example, key):
        return jnp.sum(
            ((example["x"] + jax.random.normal(example["key"], (4,))) @ params["w"]) ** 2
        )

    train = {"x": X, "key": keys}
    listed = [{"x": x, "key": keys[i]} for i, x in enumerate(X)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_index(train, listed, Items(40, listed.__getitem__), output=noisy) == 40


def test_a_source_of_numbers_in_python_is_the_same_however_it_is_read(tmp_path):
    source = Items(40, lambda i: {"x": X[i].tolist(), "y": 0.5 if i < 9 else i % 2})
    output = lambda p, e, key: loss(p, e, key) * e["y"]  # noqa: E731
    index = build(source, output, path=tmp_path / "a", batch_size=4)
    again = build(source, output, path=tmp_path / "a", batch_size=4, verify="sample")
    assert index.size == again.size == 40
    opened = ja.open_index(tmp_path / "a", ja.tracin(output), P, train=source)
    assert opened.train.size == 40


def test_the_reading_of_a_list_is_the_same_everywhere(tmp_path):
    method = ja.tracin(pair_loss)
    ja.build_index(method, P, [X, X], path=tmp_path / "a")
    index = ja.open_index(tmp_path / "a", method, P, train=[X, X], example=[X[0], X[0]])
    assert index.train.size == 40
    assert len(ja.learn_weights(index, [X, X], steps=2).learned_from) == 40


def test_fields_that_are_not_read_may_be_of_any_kind():
    expected = ja.score(INDEX, D)
    trained = build(D | {"label": Y, "more": X})
    for other in (D | {"label": Y.astype(float), "more": X}, D | {"label": Y, "more": X[:, 0]}):
        np.testing.assert_array_equal(ja.score(trained, other), expected)
    jitted = build(D | {"label": Y}, lambda p, e, key: jax.jit(loss)(p, e, key))
    np.testing.assert_array_equal(ja.score(jitted, D | {"label": Y.astype(float)}), expected)


def test_queries_may_have_fields_that_the_loss_does_not_read():
    expected = ja.score(INDEX, D)
    np.testing.assert_array_equal(ja.score(INDEX, D | {"label": Y}), expected)
    trained = build(D | {"label": Y})
    np.testing.assert_array_equal(ja.score(trained, D), expected)
    np.testing.assert_array_equal(ja.score(INDEX, [{"x": row} for row in X]), expected)


def test_queries_may_be_of_another_length_where_the_function_takes_it():
    table = {"e": jnp.asarray(np.random.default_rng(1).normal(size=(9, 3)))}
    output = lambda p, e, key: jnp.sum(p["e"][e["ids"]] ** 2)  # noqa: E731
    train = {"ids": np.arange(12).reshape(4, 3) % 9}
    index = build(train, output, table)
    padded = {"ids": np.array([[1, 2], [3, 4]])}
    expected = ja.score(index, {"ids": np.array([[1, 2], [3, 4]])})
    by_hand = [
        [
            sum(4 * table["e"][a] @ table["e"][a] for a in q for b in n if a == b)
            for n in train["ids"]
        ]
        for q in padded["ids"]
    ]
    np.testing.assert_allclose(expected, by_hand, rtol=1e-9)


def test_batch_statistics_are_left_out_with_the_line_that_is_shown():
    index = build(D, linen_loss, VARIABLES, groups=ja.by_layer(exclude="batch_stats"))
    assert not any(name.startswith("batch_stats") for name in index.layout.names)
    alone = build(D, linen_params_loss, VARIABLES["params"])
    scores = ja.score(index, D), ja.score(alone, D)  # float32, as linen draws parameters
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [ja.tracin, ja.trak, ja.logra, ja.ekfac, lambda f: ja.influence(f, damping=ja.absolute(1.0))],
)
def test_integers_among_the_parameters_are_left_out_and_said_to_be(method):
    params = P | {"step": jnp.asarray(3), "mask": jnp.ones((4, 2), bool)}

    def masked(params, example, key):
        kept = jnp.where(params["mask"].all() & (params["step"] == 3), 1.0, 0.0)
        return jnp.sum(jnp.tanh(example["x"] @ params["w"])) * kept

    def plain(params, example, key):
        return jnp.sum(jnp.tanh(example["x"] @ params["w"]))

    described = str(ja.describe(method(masked), params, ONE))
    assert "step" in described and "int64 has no gradient" in described
    found = ja.score(ja.build_index(method(masked), params, D), D)
    expected = ja.score(ja.build_index(method(plain), P, D), D)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # parameters are float32


def test_checkpoints_that_are_the_same_arrays_are_said_to_be():
    with pytest.warns(UserWarning, match="Checkpoints 0 and 2 are the same arrays.*jnp.copy"):
        ja.build_index(M, [P, P_2, P], D)


def test_a_list_that_may_be_one_model_is_said_to_be():
    def scaled(params, example, key):
        return jnp.sum((example["x"] * params[0] + params[1]) ** 2)

    layers = [jnp.ones(4), jnp.zeros(4)]
    with pytest.warns(UserWarning, match=r"list or tuple of 2, .*pass \[params\]"):
        ja.build_index(ja.tracin(scaled), layers, D)


def test_documents_may_come_from_a_generator():
    documents = [[1, 2, 3], [4, 5]]
    for make in (language.rows, language.packed):
        found = make(iter(documents), 3, vocabulary=9)
        expected = make(documents, 3, vocabulary=9)
        np.testing.assert_array_equal(found["inputs"], expected["inputs"])
    made = functools.partial(language.rows, documents, 3, vocabulary=9)
    masks = [made(prompts=prompts)["mask"] for prompts in ([2, 1], iter([2, 1]))]
    np.testing.assert_array_equal(masks[0], masks[1])


def test_documents_that_can_be_read_once_are_rows():
    class Once:  # as tqdm(generator) is
        def __init__(self):
            self.documents = iter([[1, 2, 3], [4, 5]])

        def __len__(self):
            return 2

        def __iter__(self):
            return self.documents

    assert language.rows(Once(), 3, vocabulary=9)["inputs"].shape == (2, 3)


def test_shapes_of_several_checkpoints_may_be_one():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), P)
    assert ja.plan(M, [shapes] * 3, D).examples == 40


def test_copies_of_the_first_two_are_no_mask():
    assert len(ja.noised({"x": X[:10]}, np.repeat([0, 1], 5), KEY)["x"]) == 10


def test_a_mask_that_is_added_to_logits_leaves_its_row_out():
    rows = language.rows([[1, 2, 3], [4, 3]], 3, vocabulary=9)
    rows["mask"] = np.stack([rows["mask"][0], np.where(rows["mask"][1], 0, -1e9)])
    of_row = language.loss(lambda params, row: params["w"][row["inputs"]])
    with pytest.warns(ja.NonFiniteWarning, match="ids 1"):
        index = ja.build_index(ja.tracin(of_row), {"w": jnp.ones((9, 9))}, rows)
    assert index.non_finite.tolist() == [1]


def test_an_output_that_is_not_finite_is_counted_though_its_gradient_is():
    def loss(params, example, key):
        logits = example["x"] @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    off = XY | {"y": XY["y"] + 1}  # labels 1 and 2 of two classes
    wrong = np.flatnonzero(off["y"] == 2)
    values = jax.vmap(loss, (None, 0, None))(P, off, None)
    assert np.isnan(values[wrong]).all() and np.isfinite(np.delete(values, wrong)).all()
    gradient = jax.grad(loss)(P, jax.tree.map(lambda x: x[wrong[0]], off), None)
    assert np.isfinite(gradient["w"]).all()
    for make in (ja.tracin, ja.grad_cos, ja.logra, ja.ekfac):
        with pytest.warns(ja.NonFiniteWarning, match="20 of 40 .* is a label out of range"):
            index = ja.build_index(make(loss), P, off)
        np.testing.assert_array_equal(index.non_finite, wrong)


def test_weights_of_one_group_say_that_they_change_nothing():
    assert FIT.weights == {"w": 1.0}
    assert "a single weight changes no ranking" in str(FIT)


def test_an_example_that_is_not_read_is_warned_of():
    with pytest.warns(UserWarning, match="does not depend on its example"):
        build(D, lambda p, e, key: jnp.sum(p["w"] ** 2))


def test_an_nnx_model_with_dropout_draws_its_noise_from_the_key():
    def noisy(params, example, key):
        model = nnx.merge(GRAPH, params, REST, copy=True)
        nnx.reseed(model, default=key)
        return jnp.sum(model.dropout(model.dense(example["x"][None])) ** 2)

    same = {"x": np.stack([X[0]] * 20)}
    index = build(same, noisy, PARAMS)
    assert len(np.unique(np.asarray(index.self_contributions).sum(axis=1).round(6))) > 1


def shared_noise(params, example, key):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (4,))
    return jnp.sum(((example["x"] + noise) @ params["w"]) ** 2)


def jitted_noise(params, example, key):
    return jax.jit(lambda w, x: shared_noise({"w": w}, {"x": x}, None))(params["w"], example["x"])


@pytest.mark.parametrize("output", [shared_noise, jitted_noise, jax.jit(shared_noise)])
def test_noise_that_does_not_come_from_the_key_is_warned_of(output):
    with pytest.warns(UserWarning, match="not from its key: every example gets the same noise"):
        build(D, output)


def test_noise_that_comes_from_the_key_or_the_example_is_not():
    def own_noise(params, example, key):
        return jnp.sum(((example["x"] + jax.random.normal(key, (4,))) @ params["w"]) ** 2)

    def by_id(params, example, key):
        return own_noise(params, example, jax.random.fold_in(jax.random.key(0), example["y"]))

    def unused_noise(params, example, key):
        jax.random.normal(jax.random.key(0), (3,))
        return loss(params, example, key)

    def in_a_loop(params, example, key):
        keys = jax.random.split(key, 3)
        return jax.lax.map(lambda key: own_noise(params, example, key), keys).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for output in (own_noise, by_id, in_a_loop, jax.jit(own_noise), unused_noise):
            build(XY, output)


WEIGHTS = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(4, 2)))}


def log_odds(params, example, key):
    logits = example["x"] @ params["w"]
    return logits[example["y"]] - logits[1 - example["y"]]


def test_a_loss_where_a_margin_belongs_is_warned_of():
    with pytest.warns(UserWarning, match="'cross_entropy' was given to TRAK as the margin"):
        ja.build_index(ja.trak(cross_entropy), WEIGHTS, XY)


def test_parameters_that_are_a_list_of_layers_are_described():
    def output(params, example, key):
        return (example["x"] @ params[0]["w"] @ params[1]["w"]).sum()

    found = ja.describe(ja.tracin(output), [{"w": jnp.ones((4, 4))}, {"w": jnp.ones((4, 2))}], ONE)
    assert [leaf.name for leaf in found.leaves] == ["0/w", "1/w"]


def test_a_log_probability_where_a_margin_belongs_is_warned_of():
    separable = {"x": X * 5, "y": (X @ np.asarray(WEIGHTS["w"])).argmax(axis=1)}

    def log_p(params, example, key):
        return -cross_entropy(params, example, key)

    with pytest.warns(UserWarning, match="'log_p' .* never positive, .* like a log-probability"):
        ja.build_index(ja.trak(log_p), WEIGHTS, separable)
    separable["x"][5] = np.nan
    with pytest.warns(UserWarning) as caught:
        ja.build_index(ja.trak(log_p), WEIGHTS, separable)
    assert any("log-probability" in str(each.message) for each in caught)


def test_margins_of_a_model_that_is_always_right_are_not():
    separable = {"x": X * 5, "y": (X @ np.asarray(WEIGHTS["w"])).argmax(axis=1)}
    margins = jax.vmap(log_odds, (None, 0, None))(WEIGHTS, separable, None)
    assert (np.asarray(margins) > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ja.build_index(ja.trak(log_odds), WEIGHTS, separable)


def test_margins_that_shuffling_does_not_change_are_not():
    separable = {"x": X * 5, "y": (X @ np.asarray(WEIGHTS["w"])).argmax(axis=1)}

    def adapted(params, example, key):
        return log_odds({"w": WEIGHTS["w"] + 1e-3 * params["a"] @ params["b"]}, example, key)

    adapters = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 2))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ja.build_index(ja.trak(adapted), adapters, separable)


def test_the_default_of_top_k_is_at_most_the_training_set():
    small = build({"x": X[:7]})
    assert (
        ja.learn_weights(small, D, steps=2).weights
        == ja.learn_weights(small, D, steps=2, top_k=7).weights
    )
    with pytest.raises(ValueError, match="top_k must be between 1 and the 7"):
        ja.learn_weights(small, D, top_k=20)


def test_few_learning_queries_are_warned_of():
    with pytest.warns(ja.WeightWarning, match="few queries: weights were learned from 9"):
        ja.learn_weights(INDEX, {"x": X[:9]}, steps=2)


def test_weights_of_another_index_are_warned_of():
    other = build(D, params={"w": 3 * P["w"]})
    with pytest.warns(UserWarning, match="learned on another index"):
        found = ja.score(other, D, weights=FIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(found, ja.score(other, D, weights=FIT.weights))
        ja.score(build({"x": X[:20]}), D, weights=FIT)  # of the same method and parameters


def test_a_method_is_shown_in_one_line():
    for method in (M, ja.trak(margin), ja.ekfac(loss), ja.das(margin)):
        assert "\n" not in repr(method) and len(repr(method)) < 120
    assert repr(M) == "Method(TracIn of loss: rademacher(1024), kernel identity)"


def test_nothing_is_made_of_a_source_before_its_length_is_known():
    read = []
    for size in (2**63 - 1, 2**31):
        endless = Items(size, lambda i: read.append(i) or ONE)
        for call in (lambda e=endless: as_data(e, "train"), lambda e=endless: build(e)):
            with pytest.raises(ValueError, match="at most 2,147,483,647"):
                call()
        with pytest.raises(ValueError, match="at most 2,147,483,647"):
            ja.score(INDEX, endless)
    assert not read


def test_the_first_line_says_what_one_example_is(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    build(BATCHES)
    assert "5 training examples of x float32[8, 4]" in capsys.readouterr().err


def test_rows_of_tokens_are_what_ragged_lists_become():
    rows = language.rows([[1, 2, 3], [0, 3]], 4, vocabulary=5)
    assert as_source(rows, "train").size == 2


def test_labels_leave_a_whole_part_out():
    labels = jax.tree.map(lambda _: "all", VARIABLES["params"])
    index = build(D, linen_loss, VARIABLES, groups={"params": labels, "batch_stats": None})
    assert index.layout.names == ("all",)


def test_a_source_may_fill_the_same_array_each_time():
    shared = np.empty(4, np.float32)

    def item(i):
        shared[:] = X[i]
        return {"x": shared}

    assert same_index(D, Items(40, item)) == 40


def test_labels_may_have_the_structure_of_a_model_that_can_be_called():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Model:
        w: jax.Array

        def __call__(self, x):
            return x @ self.w

    params, output = Model(P["w"]), lambda model, e, key: jnp.sum(model(e["x"]) ** 2)
    labels = jax.tree.map(lambda _: "all", params)
    assert build(D, output, params, groups=labels).layout.names == ("all",)


def test_labels_with_an_axis_of_one_are_not_taken_for_one_hot():
    with pytest.raises(ValueError) as caught:
        build(D | {"y": X[:, :1]}, lambda p, e, key: (e["x"] @ p["w"][:, 0] - e["y"]) ** 2)
    assert "one-hot" not in str(caught.value) and "sum or index" in str(caught.value)


def test_a_gradient_that_a_rule_makes_of_what_is_not_read_is_no_zero():
    @jax.custom_vjp
    def noted(x, w):
        return x

    noted.defvjp(lambda x, w: (x, w), lambda w, g: (g, w))
    output = lambda p, e, key: noted((e["x"] @ p["w"]).sum(), p["v"])  # noqa: E731
    found = ja.describe(ja.tracin(output), P | {"v": jnp.ones(())}, ONE)
    assert not any("never used" in leaf.route for leaf in found.leaves)

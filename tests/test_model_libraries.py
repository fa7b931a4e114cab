"""Models as their own libraries write them: exact, covered, and in groups that make sense.

Each is skipped where its library is missing; `pip install jaxattr[models]` brings them.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from jaxattr.leaves import named_leaves
from tests import architectures
from tests.linear_map_checks import check
from tests.test_weight_patterns import RANK, assert_features_are_exact

VOCABULARY, LENGTH, CLASSES = 11, 5, 3
WHY = "needs the extra `models`"


@pytest.fixture(autouse=True)
def as_libraries_promote():
    with jax.numpy_rank_promotion("allow"):
        yield


def held(loss, params, batch):
    """Holds features against gradients that are formed; returns groups and the covered share."""
    found = check(loss, params, batch)
    featurize = assert_features_are_exact(loss, params, batch)
    described = ja.describe(ja.logra(loss, rank=RANK), params, jax.tree.map(lambda x: x[0], batch))
    sizes = {name: np.size(x) for name, x in named_leaves(params).items()}
    factored = sum(sizes[leaf] for leaf in featurize.plan.covered) / sum(sizes.values())
    assert abs(described.factored - factored) < 1e-12
    return found, featurize.layout.names, factored


def tokens():
    return np.random.default_rng(2).integers(0, VOCABULARY, (3, LENGTH + 1))


def images(*shape):
    numbers = np.random.default_rng(3)
    return numbers.normal(size=(3, *shape)), numbers.integers(0, CLASSES, 3)


def sequences():
    numbers = np.random.default_rng(4)
    return numbers.normal(size=(3, LENGTH, 4)), numbers.integers(0, CLASSES, 3)


def language_loss(logits_of):
    def loss(params, ids, key):
        del key
        return architectures.cross_entropy(logits_of(params, ids[:-1]), ids[1:])

    return loss


def class_loss(logits_of):
    def loss(params, example, key):
        del key
        x, label = example
        return architectures.cross_entropy(logits_of(params, x), label)

    return loss


def haiku_model(function, *inputs):
    hk = pytest.importorskip("haiku", reason=WHY)
    pure = hk.without_apply_rng(hk.transform(function))
    shapes = jax.eval_shape(pure.init, jax.random.key(0), *inputs)
    return pure.apply, architectures.filled(shapes)


def test_haiku_transformer():
    hk = pytest.importorskip("haiku", reason=WHY)

    def model(ids):
        x = hk.Embed(VOCABULARY, 8, name="tokens")(ids)
        x = x + hk.get_parameter("positions", [LENGTH, 8], init=jnp.zeros)
        mask = jnp.tril(jnp.ones((1, LENGTH, LENGTH)))
        y = hk.LayerNorm(-1, True, True)(x)
        attention = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal(), model_size=8)
        x = x + attention(y, y, y, mask=mask)
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.nets.MLP([16, 8], activation=jax.nn.gelu)(y)
        return hk.Linear(VOCABULARY)(x)

    apply, params = haiku_model(model, tokens()[0, :-1])
    found, names, factored = held(language_loss(apply), params, tokens())
    assert set(found.exact.values()) <= {"used by mul", "used by add"}  # layer norms alone
    assert len(names) == 11 and factored > 0.95


def test_haiku_convolutions():
    hk = pytest.importorskip("haiku", reason=WHY)

    def model(x):
        x = jax.nn.relu(hk.Conv2D(6, 3, stride=2)(x[None]))
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(4, 3, stride=2)(x))
        return hk.Linear(CLASSES)(x.mean((0, 1, 2)))

    data = images(6, 6, 2)
    apply, params = haiku_model(model, data[0][0])
    found, names, factored = held(class_loss(apply), params, data)
    assert not found.exact and len(names) == 4 and factored == 1


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_haiku_recurrent(cell):
    hk = pytest.importorskip("haiku", reason=WHY)

    def model(x):
        core = getattr(hk, cell)(3)
        outputs, _ = hk.static_unroll(core, x, core.initial_state(None))
        return hk.Linear(CLASSES)(outputs[-1])

    data = sequences()
    apply, params = haiku_model(model, data[0][0])
    found, names, factored = held(class_loss(apply), params, data)
    assert len(names) == 2 and factored > 0.8, found.exact


def equinox_model(make):
    eqx = pytest.importorskip("equinox", reason=WHY)
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.key(0)), lambda x: hasattr(x, "shape")
    )
    return lambda params: eqx.combine(params, static), architectures.filled(shapes)


def test_equinox_convolutions():
    eqx = pytest.importorskip("equinox", reason=WHY)

    def make(key):
        keys = jax.random.split(key, 4)
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 6, 3, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.ConvTranspose2d(6, 4, 3, stride=2, key=keys[1]),
                eqx.nn.Lambda(lambda x: jnp.tanh(x).mean((1, 2))),
                eqx.nn.MLP(4, CLASSES, 5, 1, key=keys[2]),
            ]
        )

    model_of, params = equinox_model(make)
    loss = class_loss(lambda params, x: model_of(params)(x))
    found, names, factored = held(loss, params, images(2, 6, 6))
    assert len(names) == 4 and factored > 0.95, found.exact


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_equinox_recurrent(cell):
    eqx = pytest.importorskip("equinox", reason=WHY)

    def make(key):
        first, last = jax.random.split(key)
        return getattr(eqx.nn, cell)(4, 3, key=first), eqx.nn.Linear(3, CLASSES, key=last)

    def logits(params, x):
        core, head = model_of(params)
        state = (jnp.zeros(3), jnp.zeros(3)) if cell == "LSTMCell" else jnp.zeros(3)
        state, _ = jax.lax.scan(lambda state, x: (core(x, state), None), state, x)
        return head(state[0] if cell == "LSTMCell" else state)

    model_of, params = equinox_model(make)
    found, names, factored = held(class_loss(logits), params, sequences())
    assert factored > 0.8, found.exact
    assert len(names) == 2


def test_equinox_transformer():
    eqx = pytest.importorskip("equinox", reason=WHY)

    def make(key):
        keys = jax.random.split(key, 6)
        return {
            "tokens": eqx.nn.Embedding(VOCABULARY, 8, key=keys[0]),
            "positions": jax.random.normal(keys[1], (LENGTH, 8)),
            "norm": eqx.nn.RMSNorm(8),
            "attention": eqx.nn.MultiheadAttention(2, 8, key=keys[2]),
            "mlp": eqx.nn.MLP(8, 8, 12, 1, key=keys[3]),
            "head": eqx.nn.Linear(8, VOCABULARY, key=keys[4]),
        }

    def logits(params, ids):
        model = model_of(params)
        x = jax.vmap(model["tokens"])(ids) + model["positions"]
        y = jax.vmap(model["norm"])(x)
        x = x + model["attention"](y, y, y, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        x = x + jax.vmap(model["mlp"])(x)
        return jax.vmap(model["head"])(x)

    model_of, params = equinox_model(make)
    found, names, factored = held(language_loss(logits), params, tokens())
    assert set(found.exact) == {"norm/weight", "norm/bias"}
    assert len(names) == 10 and factored > 0.95


@pytest.mark.parametrize("tied", [False, True])
def test_penzai_transformer(tied):
    pytest.importorskip("penzai", reason=WHY)
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=tied,
        parameter_dtype=jnp.float64,
        activation_dtype=jnp.float64,
    )
    model = llamalike_common.build_llamalike_transformer(config, jax.random.key(0))
    model, variables = pz.unbind_variables(model, freeze=True)
    params = architectures.filled({each.label: each.value for each in variables})

    def logits(params, ids):
        values = [dataclasses.replace(each, value=params[each.label]) for each in variables]
        places = pz.nx.arange("seq", LENGTH)
        out = pz.bind_variables(model, values)(pz.nx.wrap(ids).tag("seq"), token_positions=places)
        return out.unwrap("seq", "vocabulary")

    found, names, factored = held(language_loss(logits), params, tokens())
    assert all("norm" in leaf for leaf in found.exact), found.exact
    assert factored > 0.9
    assert len(names) == len(params)  # one group for each scale, and not one for each channel


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's own
def test_tunix_llama():
    pytest.importorskip("tunix", reason=WHY)
    from flax import nnx
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=VOCABULARY,
        embed_dim=8,
        hidden_dim=12,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        norm_eps=1e-5,
        rope_theta=10_000,
        weight_tying=True,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: llama.Llama3(config, rngs=nnx.Rngs(0))))
    params = architectures.filled(nnx.to_pure_dict(state))

    def logits(params, ids):
        mask = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
        out, _ = nnx.merge(graph, params)(ids[None], jnp.arange(LENGTH)[None], None, mask)
        return out[0]

    found, names, factored = held(language_loss(logits), params, tokens())
    assert all("norm" in leaf for leaf in found.exact), found.exact
    assert factored > 0.9 and len(names) == len(jax.tree.leaves(params))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformers_gpt2():
    transformers = pytest.importorskip("transformers", reason=WHY)
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("transformers has no Flax models from version 5 on")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=9, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    module = transformers.FlaxGPT2LMHeadModel(config, dtype=jnp.float64, _do_init=False).module
    one = jnp.arange(LENGTH)[None]
    given = one, jnp.ones_like(one), one
    params = architectures.filled(jax.eval_shape(module.init, jax.random.key(0), *given)["params"])

    def logits(params, ids):
        places = jnp.arange(LENGTH)[None]
        given = ids[None], jnp.ones_like(places), places
        return module.apply({"params": params}, *given, deterministic=True).logits[0]

    found, names, factored = held(language_loss(logits), params, tokens())
    assert all("ln_" in leaf for leaf in found.exact), found.exact
    assert factored > 0.9
    assert len(names) == 15


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell"])
def test_linen_recurrent(cell):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(
                nn.RNN(getattr(nn, cell)(3, param_dtype=float))(x[None])[0, -1]
            )

    data = sequences()
    shapes = jax.eval_shape(Recurrent().init, jax.random.key(0), data[0][0])
    loss = class_loss(Recurrent().apply)
    found, names, factored = held(loss, architectures.filled(shapes), data)
    assert factored > 0.85, found.exact


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "operation",
    ["Fp8DotGeneralOp", "NANOOFp8DotGeneralOp", "Fp8DirectDotGeneralOp"],
)
def test_linen_eight_bit_floats(operation):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            make = getattr(nn, operation)
            hidden = nn.Dense(6, param_dtype=float, dot_general_cls=make)(x)
            return nn.Dense(CLASSES, param_dtype=float, dot_general_cls=make)(jnp.tanh(hidden))[-1]

    data = sequences()
    variables = jax.jit(Model().init)(jax.random.key(0), data[0][0])
    params, scales = variables["params"], variables["_overwrite_with_gradient"]

    def logits(params, x):
        return Model().apply({"params": params, "_overwrite_with_gradient": scales}, x)

    found, _, _ = held(class_loss(logits), architectures.filled(params), data)
    kernels = {"Dense_0/kernel", "Dense_1/kernel"}
    assert set(found.maps) == kernels, found.exact


def test_linen_eight_bit_einsum():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in (6, CLASSES):
                kernel = self.param(f"kernel_{size}", nn.initializers.ones, (size, x.shape[-1]))
                x = jnp.tanh(nn.Fp8Einsum(name=f"product_{size}")("ti,oi->to", x, kernel))
            return x[-1]

    data = sequences()
    variables = jax.jit(Model().init)(jax.random.key(0), data[0][0])
    scales = {name: each for name, each in variables.items() if name != "params"}

    def logits(params, x):
        return Model().apply({**scales, "params": params}, x)

    params = jax.tree.map(lambda x: x.astype(float), architectures.filled(variables["params"]))
    found, _, _ = held(class_loss(logits), params, data)
    assert set(found.maps) == {"kernel_6", f"kernel_{CLASSES}"}, found.exact


@pytest.mark.filterwarnings("ignore:.*VariableState:DeprecationWarning")
@pytest.mark.parametrize("backwards, covered", [(None, True), (jnp.int8, False)])
def test_qwix_quantised_training(backwards, covered):
    qwix = pytest.importorskip("qwix", reason=WHY)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(6, param_dtype=float)(x)
            hidden = nn.DenseGeneral((2, 3), param_dtype=float)(jnp.tanh(hidden))
            return nn.DenseGeneral(CLASSES, axis=(-2, -1), param_dtype=float)(hidden)[-1]

    rule = qwix.QtRule(weight_qtype=jnp.int8, act_qtype=jnp.int8, bwd_qtype=backwards)
    model, data = qwix.quantize_model(Model(), qwix.QtProvider([rule])), sequences()
    variables = jax.jit(model.init)(jax.random.key(0), data[0][0])

    def logits(params, x):
        return model.apply({**variables, "params": params}, x)

    params = architectures.filled(variables["params"])
    found, _, _ = held(class_loss(logits), params, data)
    kernels = {"Dense_0/kernel", "DenseGeneral_0/kernel", "DenseGeneral_1/kernel"}
    assert kernels & set(found.maps) == (kernels if covered else set()), found.exact

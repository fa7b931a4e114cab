"""Every rule is held against `vmap(grad)` in float64; rounding is all that may differ."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxattr as ja
from jaxattr import linear_maps
from jaxattr.linear_maps import labels
from tests import architectures
from tests.linear_map_checks import (
    assert_close,
    by_name,
    case_batch,
    check,
    exact_matrices,
    jit,
    normal,
    random_bases,
    zeros,
)


@functools.cache
def model(name):
    return architectures.ALL[name]()


@pytest.mark.parametrize("name", architectures.ALL)
def test_architecture(name):
    found = check(*model(name))
    norms_and_positions = {"scale", "bias", "position", "temperature"}
    assert {leaf.split("/")[-1] for leaf in found.exact} <= norms_and_positions


def test_what_is_found_in_a_tied_and_shared_gpt():
    loss, params, batch = model("gpt_tied_nnx")
    maps = linear_maps.find(loss, params, batch[0]).maps
    tied, shared = maps["embed/embedding"], maps["attention/out/kernel"]
    assert (tied.kind, tied.size_in, tied.size_out) == ("tied", architectures.VOCABULARY, 8)
    assert tied.transposed == (False, True) and tied.bias is None
    assert (shared.kind, shared.uses, shared.size_in) == ("dense", 2, 8)
    assert (shared.in_axes, shared.out_axes, shared.stack) == ((0, 1), (2,), None)


def test_what_is_found_in_a_scanned_gpt():
    loss, params, batch = model("gpt_scan_linen")
    up = linear_maps.find(loss, params, batch[0]).maps["layers/up/kernel"]
    assert (up.stack, up.stack_axes, up.in_axes, up.out_axes) == (3, (0,), (1,), (2,))
    assert (up.uses, up.bias, up.dtype) == (1, "layers/up/bias", jnp.float64)


def scrambled(numbers, leaf):
    """A leaf after a random chain of transposes, splits, merges and repeats."""
    for _ in range(numbers.integers(0, 4)):
        axis = numbers.integers(leaf.ndim)
        before, size, after = leaf.shape[:axis], leaf.shape[axis], leaf.shape[axis + 1 :]
        match numbers.choice(["transpose", "split", "merge", "repeat"], p=[0.5, 0.2, 0.2, 0.1]):
            case "transpose":
                leaf = leaf.transpose(numbers.permutation(leaf.ndim))
            case "split" if size % 2 == 0:
                leaf = leaf.reshape(*before, 2, size // 2, *after)
            case "merge" if after:
                leaf = leaf.reshape(*before, -1, *after[1:])
            case "repeat":
                leaf = jnp.broadcast_to(jnp.expand_dims(leaf, axis), (*before, 2, size, *after))
    return leaf


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_to_a_leaf_the_numbers_are_right(seed):
    """Random routes to random einsums: covered or not, no wrong gradient."""

    def loss(params, example, key):
        del key
        numbers = np.random.default_rng(seed)
        total = 0.0
        roles_by_size = numbers.choice(["in", "out", "both"], 500, p=[0.45, 0.4, 0.15])
        for _ in range(numbers.integers(1, 3)):
            w = scrambled(numbers, params["w"])
            letters = "abcdefgh"[: w.ndim]
            roles = [roles_by_size[size] for size in w.shape]
            x_letters = "".join(c for c, r in zip(letters, roles, strict=True) if r != "out") + "z"
            y_letters = "".join(c for c, r in zip(letters, roles, strict=True) if r != "in") + "z"
            sizes = dict(zip(letters, w.shape, strict=True)) | {"z": 3}
            x = jnp.resize(example, tuple(sizes[c] for c in x_letters))
            y = jnp.einsum(f"{letters},{x_letters}->{y_letters}", w, x)
            total += jnp.sum(jnp.sin(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)))
        return total

    check(loss, {"w": normal(seed, 4, 6, 10)}, normal(seed + 1, 3, 97))


def test_labels_name_every_entry_through_reshapes():
    entries = np.arange(24).reshape(4, 6)
    dims = tuple((labels.Label(axis, size),) for axis, size in enumerate(entries.shape))
    for shape in [(2, 2, 6), (4, 2, 3), (24,), (8, 3), (2, 1, 12), (4, 6)]:
        got = labels.reshaped(dims, shape)
        index = [0, 0]
        for dim, grid in zip(got, np.indices(shape), strict=True):
            rest = grid
            for label in reversed(dim):
                index[label.axis] = index[label.axis] + rest % label.size * label.stride
                rest = rest // label.size
        np.testing.assert_array_equal(entries[tuple(index)], entries.reshape(shape))
    assert labels.reshaped((*dims[::-1],), (3, 8)) is not None  # 6 -> 3, 2
    assert labels.reshaped(dims, (3, 8)) is None  # cuts across the 4


def test_dropout_and_other_uses_of_the_key():
    def loss(params, example, key):
        x = example["x"] * jax.random.bernoulli(key, 0.5, example["x"].shape)
        return jnp.sum(jnp.sin(x @ params["w"] + params["b"][None]))

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": normal(0, 6, 5), "b": normal(1, 5)}
    assert check(loss, params, case_batch(), keys).maps["w"].bias == "b"


def test_remat_policies_are_kept():
    policy = jax.checkpoint_policies.save_only_these_names("saved")

    @functools.partial(jax.checkpoint, policy=policy)
    def block(params, x):
        y = checkpoint_name(jnp.sin(x @ params["w"]), "saved")
        return jnp.sum(jnp.sin(y @ params["v"]))

    params = {"w": normal(0, 6, 6), "v": normal(1, 6, 5)}
    found = check(lambda params, example, key: block(params, example["x"]), params, case_batch())
    assert set(found.maps) == {"w", "v"}


def test_bfloat16_compute_with_float32_params():
    def loss(params, example, key):
        del key
        cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        y = example["x"].astype(jnp.bfloat16) @ cast["w"] + cast["b"][None]
        logits = jnp.matmul(jnp.tanh(y), cast["v"], preferred_element_type=jnp.float32)
        return jnp.sum(jnp.sin(logits))

    params = {"w": normal(0, 6, 8), "b": normal(1, 8), "v": normal(2, 8, 5)}
    params = jax.tree.map(lambda x: np.float32(x), params)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"x": case_batch()["x"]})
    found = check(loss, params, batch, tolerance=0.03)
    assert {leaf: m.dtype for leaf, m in found.maps.items()} == {"w": "float32", "v": "float32"}
    assert found.maps["w"].bias == "b"
    bases = random_bases(found.maps)
    z = zeros(found, bases)
    rewritten = linear_maps.bottleneck(loss, params, {"x": batch["x"][0]})
    grads = jax.grad(rewritten, argnums=2)(params, bases, z, {"x": batch["x"][0]})
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}


def test_the_values_in_z_are_never_read():
    loss, params, batch = model("mlp_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    found = linear_maps.find(loss, params, example)
    bases = random_bases(found.maps)
    z = zeros(found, bases)
    rewritten = linear_maps.bottleneck(loss, params, example)
    gradient = jit(jax.value_and_grad(rewritten, argnums=2))
    at_zero = gradient(params, bases, z, example)
    elsewhere = gradient(params, bases, jax.tree.map(lambda x: x + 1.0, z), example)
    jax.tree.map(np.testing.assert_array_equal, elsewhere, at_zero)


def test_mixed_derivatives_are_those_of_the_projected_gradient():
    """The derivative of dL/dZ along a direction of the parameters: A^T (H v) B."""
    loss, params, batch = model("mlp_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    found = linear_maps.find(loss, params, example)
    bases = random_bases(found.maps)
    z = zeros(found, bases)
    rewritten = linear_maps.bottleneck(loss, params, example)

    def both(params):
        projected = jax.grad(rewritten, argnums=2)(params, bases, z, example)
        return projected, exact_matrices(found, jax.grad(loss)(params, example, None))

    direction = jax.tree.map(np.cos, params)
    got, exact = jit(lambda p, v: jax.jvp(both, (p,), (v,))[1])(params, direction)
    for leaf, (a, b) in bases.items():
        assert_close(got[leaf], a.T @ exact[leaf] @ b, leaf)


def test_a_leaf_inside_a_while_loop_is_named():
    def loss(params, example, key):
        del key
        grow = lambda x: x @ params["w"]  # noqa: E731
        return jax.lax.while_loop(lambda x: x.sum() < 9, grow, example["x"]).sum()

    found = linear_maps.find(loss, {"w": normal(0, 6, 6)}, {"x": normal(1, 4, 6)})
    assert found == linear_maps.LinearMaps({}, {"w": "used by while"})


def test_gradients_of_the_other_leaves_come_from_the_same_pass():
    loss, params, batch = model("vit_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    found = linear_maps.find(loss, params, example)
    bases = random_bases(found.maps)
    rewritten = linear_maps.bottleneck(loss, params, example)
    z = zeros(found, bases)
    got = by_name(jit(jax.grad(rewritten, argnums=(0, 2)))(params, bases, z, example)[0])
    for leaf, expected in by_name(jit(jax.grad(loss))(params, example, None)).items():
        if not leaf.endswith("key/bias"):  # softmax is blind to it: its gradient is rounding alone
            assert_close(got[leaf], expected, leaf)


@pytest.mark.parametrize("name", ["gpt_tied_nnx", "gpt_scan_linen", "separable_bare"])
def test_identity_bases_give_the_exact_gradient(name):
    loss, params, batch = model(name)
    example = jax.tree.map(lambda x: x[0], batch)
    found = linear_maps.find(loss, params, example)
    bases = {leaf: (None, None) for leaf in found.maps}
    rewritten = linear_maps.bottleneck(loss, params, example)
    z = zeros(found, bases)
    got = jit(jax.grad(rewritten, argnums=2))(params, bases, z, example)
    grads = by_name(jit(jax.grad(loss))(params, example, None))
    for leaf, m in found.maps.items():
        assert_close(got[leaf], linear_maps.matrix(m, grads[leaf]), leaf)


def test_identity_with_the_bias_as_one_more_input():
    loss, params, batch = model("mlp_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    m = linear_maps.find(loss, params, example).maps["last/kernel"]
    rewritten = linear_maps.bottleneck(loss, params, example, leaves=[m.leaf])
    b = normal(0, m.size_out, 2)
    z = {m.leaf: np.zeros((m.size_in + 1, 2))}
    got = jit(jax.grad(rewritten, argnums=2))(params, {m.leaf: (None, b)}, z, example)
    grads = by_name(jit(jax.grad(loss))(params, example, None))
    assert_close(got[m.leaf], linear_maps.matrix(m, grads[m.leaf], grads[m.bias]) @ b, "last")


def biggest_buffers(function, *args):
    """Element counts of all arrays of the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = re.findall(r"f(?:32|64)\[([0-9,]+)\]", text)
    return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}


def test_no_array_of_the_size_of_a_batch_of_matrices_is_formed():
    batch, size_in, size_out = 7, 50, 60

    def loss(params, example, key):
        del key
        x = params["embed"][example]
        return jnp.sum(jnp.sin(x @ params["w"] + params["b"][None]) @ params["embed2"].T)

    shapes = {
        "embed": (53, size_in),
        "w": (size_in, size_out),
        "b": (size_out,),
        "embed2": (59, size_out),
    }
    params = {leaf: normal(i, *shape) for i, (leaf, shape) in enumerate(shapes.items())}
    ids = np.arange(batch * 2).reshape(batch, 2)
    found = linear_maps.find(loss, params, ids[0])
    assert set(found.maps) == {"embed", "w", "embed2"}
    bases = random_bases(found.maps)
    rewritten = linear_maps.bottleneck(loss, params, ids[0])
    projected = jax.vmap(jax.grad(rewritten, argnums=2), (None, None, None, 0))
    smallest = batch * size_in * (size_out - 10)
    sizes = biggest_buffers(projected, params, bases, zeros(found, bases), ids)
    assert max(sizes) < smallest
    captured = jax.vmap(linear_maps.capture(loss, params, ids[0]), (None, 0))
    assert max(biggest_buffers(captured, params, ids)) < smallest
    exact = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))  # the test can fail
    assert max(biggest_buffers(exact, params, ids, None)) >= smallest


def test_the_loss_is_traced_once():
    calls = []

    def loss(params, example, key):
        del key
        calls.append(1)
        return jnp.sum(example["x"] @ params["w"])

    params, example = {"w": normal(0, 6, 5)}, jax.tree.map(lambda x: x[0], case_batch())
    found = linear_maps.find(loss, params, example)
    assert len(calls) == 1
    rewritten = linear_maps.bottleneck(loss, params, example)
    bases = random_bases(found.maps)
    calls.clear()
    rewritten(params, bases, zeros(found, bases), example)
    assert not calls


def test_shapes_are_enough_to_find():
    loss, params, batch = model("mlp_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    abstract = jax.eval_shape(lambda: (params, example))
    assert linear_maps.find(loss, *abstract) == linear_maps.find(loss, params, example)


def test_leaves_that_are_not_chosen_stay_as_they_are():
    loss, params, batch = model("mlp_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    captured = linear_maps.capture(loss, params, example, leaves=["last/kernel"])(params, example)
    assert list(captured) == ["last/kernel"]
    rewritten = linear_maps.bottleneck(loss, params, example, leaves=["last/kernel"])
    assert_close(rewritten(params, {}, {}, example), loss(params, example, None), "loss")
    with pytest.raises(ValueError, match="only these are rewritten: .'last/kernel'"):
        rewritten(params, {}, {"first/kernel": np.zeros((2, 2))}, example)


def test_errors_name_what_was_got_and_what_was_needed():
    loss, params, batch = model("vit_linen")
    example = jax.tree.map(lambda x: x[0], batch)
    with pytest.raises(ValueError, match="must return one scalar"):
        linear_maps.find(lambda p, e, k: e[0], params, example)
    with pytest.raises(ValueError, match="'norm1/scale' is no linear map: used by mul"):
        linear_maps.bottleneck(loss, params, example, leaves=["norm1/scale"])
    with pytest.raises(ValueError, match="it is the bias of up/kernel"):
        linear_maps.capture(loss, params, example, leaves=["up/bias"])
    with pytest.raises(ValueError, match="there is none"):
        linear_maps.capture(loss, params, example, leaves=["nothing"])
    rewritten = linear_maps.bottleneck(loss, params, example)
    a, z, b = np.zeros((8, 2)), np.zeros((2, 3)), np.zeros((12, 3))
    with pytest.raises(
        ValueError, match=r"A of 'up/kernel' must have shape \[8, 2\], got \[7, 2\]"
    ):
        rewritten(params, {"up/kernel": (a[1:], b)}, {"up/kernel": z}, example)
    with pytest.raises(ValueError, match="B of 'up/kernel' must have shape"):
        rewritten(params, {"up/kernel": (a, b[1:])}, {"up/kernel": z}, example)
    with pytest.raises(ValueError, match="got the identity"):
        rewritten(params, {"up/kernel": (a, None)}, {"up/kernel": z}, example)
    with pytest.raises(ValueError, match="bases have only"):
        rewritten(params, {}, {"up/kernel": z}, example)
    with pytest.raises(ValueError, match="shapes and dtypes that it was made for"):
        rewritten(params, {}, {}, (example[0][1:], example[1]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
def test_ids_of_a_short_type_are_looked_up_as_they_are(dtype):
    """Among bytes 256 rows are none."""
    rows = 256 if dtype != np.int16 else 40_000
    ids = np.random.default_rng(0).integers(0, 100, (5, 3)).astype(dtype)
    params = {"table": jax.random.normal(jax.random.key(0), (rows, 2))}

    def loss(params, example, key):
        return (jnp.take(params["table"], example, axis=0) ** 2).sum()

    index = ja.build_index(
        ja.tracin(loss, projection=ja.projections.two_sided(rows)), params, ids, batch_size=5
    )
    looked_up = np.asarray(params["table"])[ids] * 2
    expected = np.einsum("qad,nbd,qanb->qn", looked_up, looked_up, ids[:, :, None, None] == ids)
    np.testing.assert_allclose(ja.score(index, ids), expected, rtol=1e-9)


def test_choices_of_several_cases_among_known_numbers():
    params = {"w": jax.random.normal(jax.random.key(0), (2, 3, 3))}

    def loss(params, example, key):
        def layer(x, i):
            at = jax.lax.select_n(jnp.minimum(i, 2), jnp.int32(0), jnp.int32(1), jnp.int32(0))
            return jnp.tanh(x @ params["w"][at]), None

        return jax.lax.scan(layer, example, jnp.arange(3))[0].sum()

    found = ja.describe(ja.logra(loss), params, jnp.ones((2, 3)))
    assert found.leaves[0].groups


@pytest.mark.parametrize("make", [ja.ekfac, ja.kfac, ja.logra, ja.eshampoo])
@pytest.mark.parametrize("shape", [(4, 0), (0, 4, 4)])
def test_matrices_without_entries_are_no_linear_maps(make, shape):
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "none": jnp.zeros(shape)}
    x = jax.random.normal(jax.random.key(1), (6, 2, 4))

    def loss(params, example, key):
        if len(shape) == 2:
            return jnp.tanh(example @ params["w"]).sum() + (example @ params["none"]).sum()
        after = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), example, params["none"])[0]
        return jnp.tanh(after @ params["w"]).sum()

    alone = lambda p, e, key: jnp.tanh(e @ p["w"]).sum()  # noqa: E731
    scores = ja.score(ja.build_index(make(loss), params, x), x)
    expected = ja.score(ja.build_index(make(alone), {"w": params["w"]}, x), x)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_pallas_kernel_with_a_derivative_is_followed():
    """On a GPU kernels like this one are compiled; here they are interpreted."""
    pallas = pytest.importorskip("jax.experimental.pallas")

    def multiply(x, w, out):
        out[...] = x[...] @ w[...]

    @jax.custom_vjp
    def dense(x, w):
        shape = jax.ShapeDtypeStruct((len(x), w.shape[1]), x.dtype)
        return pallas.pallas_call(multiply, out_shape=shape, interpret=True)(x, w)

    dense.defvjp(lambda x, w: (dense(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    params = {"a": jnp.asarray(normal(0, 4, 6)), "b": jnp.asarray(normal(1, 6, 3))}
    x = jnp.asarray(normal(2, 5, 2, 4))

    def loss(product):
        return lambda p, e, key: jnp.tanh(jnp.tanh(product(e, p["a"])) @ p["b"]).sum()

    found, expected = (
        ja.build_index(ja.ekfac(loss(product), rank=9), params, x)
        for product in (dense, jnp.matmul)
    )
    np.testing.assert_allclose(ja.score(found, x), ja.score(expected, x), rtol=1e-9)
    described = ja.describe(ja.ekfac(loss(dense)), params, x[0])
    assert all(leaf.route.startswith("factored") for leaf in described.leaves)

"""Scores of other libraries on fixed weights and data, within 1e-5 in float64.

goldens/peer_goldens.npz holds, for each library and setting, the score matrix it gave ("peer:...")
and the closed form of what it documents ("closed_form:...").
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxattr as ja
from jaxattr import kernels
from jaxattr.features import projections
from jaxattr.features.featurizer import FeatureRule
from jaxattr.identity import Contents
from tests.models import margin_of, one, relative_error

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "peer_goldens.npz")
# The order in which the other libraries flatten the parameters.
LEAVES = ("0.weight", "0.bias", "2.weight", "2.bias")


def array(name):
    value = jnp.asarray(GOLDENS[name])
    return value.astype(jnp.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value


def logits(params, x):
    hidden = jnp.tanh(params["0.weight"] @ x + params["0.bias"])
    return params["2.weight"] @ hidden + params["2.bias"]


def loss(params, example, key):
    del key
    logit = logits(params, example["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logit, example["y"])


def margin(params, example, key):
    del key
    return margin_of(logits(params, example["x"]), example["y"])


def flat_margin(params, example, key):
    """The margin of parameters that are one vector, in the order of LEAVES."""
    shapes = [GOLDENS[f"param:mlp:{name}"].shape for name in LEAVES]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1].tolist()
    parts = jnp.split(params["all"], ends)
    named = {n: p.reshape(s) for n, p, s in zip(LEAVES, parts, shapes, strict=True)}
    return margin(named, example, key)


PARAMS = {name: array(f"param:mlp:{name}") for name in LEAVES}
FLAT = {"all": jnp.concatenate([PARAMS[name].ravel() for name in LEAVES])}
TRAIN = {"x": array("Xtr"), "y": array("ytr")}
QUERIES = {"x": array("Xte"), "y": array("yte")}
EXACT = ja.projections.identity()


def assert_golden(scores, name, *, orientation="qn"):
    for golden in (array(f"peer:{name}"), array(f"closed_form:{name}")):
        golden = golden.T if orientation == "nq" else golden
        assert relative_error(scores, golden) <= 1e-5


def index(method, params=PARAMS, groups=ja.by_leaf):
    return ja.build_index(method, params, TRAIN, groups=groups, batch_size=7)


def fixed(matrices):
    """A projection by a given matrix, on a single group."""
    return Given(Contents(matrices))


@dataclasses.dataclass(frozen=True)
class Given:
    matrix: Contents
    name = "given"
    basis = None

    def dim(self, size):
        return self.matrix.value.shape[1]

    def project(self, key, members):
        (x,) = members.values()
        return x @ self.matrix.value


@pytest.mark.parametrize("groups", [ja.by_leaf, {n: "all" for n in LEAVES}])
@pytest.mark.parametrize(
    ("name", "orientation"),
    [("dattri TracIn (w=0.3, no projection)", "nq"), ("captum TracInCP lr=0.3", "qn")],
)
def test_tracin(name, orientation, groups):
    method = ja.tracin(loss, checkpoint_weights=[0.3], projection=EXACT)
    scores = ja.score(index(method, groups=groups), QUERIES)
    assert_golden(scores, name, orientation=orientation)


def test_kronfluence_identity_is_tracin():
    scores = ja.score(index(ja.tracin(loss, projection=EXACT)), QUERIES)
    assert_golden(scores, "kronfluence identity damping=0.01")


def test_grad_cos():
    scores = ja.score(index(ja.grad_cos(loss, projection=EXACT)), QUERIES)
    assert_golden(scores, "dattri GradCos", orientation="nq")


def traker_parts(params, matrix, damping):
    """TRAK's inner products as traker scales them, and its residuals: traker's features are ours
    over sqrt(size), and it divides the inverse Gram matrix by the mean of its absolute entries."""
    projection = fixed(matrix / params["all"].shape[0] ** 0.5)
    method = ja.trak(flat_margin, damping=ja.absolute(damping), dense=True, projection=projection)
    phi = ja.featurizer(method, params, one(TRAIN))(params, TRAIN)
    inverse = jnp.linalg.inv(phi.T @ phi + damping * jnp.eye(phi.shape[1]))
    built = index(method, params)
    inner = ja.score(built, QUERIES) / built.residual[None] / jnp.abs(inverse).mean()
    return inner, built.residual


@pytest.mark.parametrize("damping", [0.5, 0.001])
def test_traker_without_projection(damping):
    inner, residual = traker_parts(FLAT, jnp.eye(len(FLAT["all"])), damping)
    assert_golden(inner * residual[None], f"traker NoOp lambda={damping}", orientation="nq")


def test_traker_with_its_projections():
    # The second checkpoint holds the weights times 1.3. Averages are taken apart.
    parts = [
        traker_parts({"all": FLAT["all"] * scale}, array(f"P:traker ckpt {c}"), 0.1)
        for c, scale in ((0, 1.0), (1, 1.3))
    ]
    inner, residual = (sum(part[i] for part in parts) / 2 for i in (0, 1))
    assert_golden(inner * residual[None], "traker BasicProjector 2 ckpts", orientation="nq")


def test_dattri_trak_with_its_projection():
    matrix = array("P:dattri TRAK (already |sqrt(k))") / len(FLAT["all"]) ** 0.5
    method = ja.trak(flat_margin, damping=ja.absolute(0.1), dense=True, projection=fixed(matrix))
    scores = ja.score(index(method, FLAT), QUERIES)
    assert_golden(scores, "dattri TRAK normal k=16 reg=0.1", orientation="nq")


BY_LAYER = {"0.weight": "0", "0.bias": "0", "2.weight": "2", "2.bias": "2"}
DAMPINGS = {"0.01": ja.absolute(0.01), "None": ja.relative(0.1)}


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac"])
def test_kronfluence(name, damping):
    if name == "diagonal":
        rule = FeatureRule(loss, EXACT)
        method = ja.Method("diagonal", rule, kernels.SecondMoment(DAMPINGS[damping]))
    else:
        method = {"kfac": ja.kfac, "ekfac": ja.ekfac}[name](loss, damping=DAMPINGS[damping])
    scores = ja.score(index(method, groups=BY_LAYER), QUERIES)
    assert_golden(scores, f"kronfluence {name} damping={damping}")


def masked_loss(params, example, key):
    del key
    each = jax.vmap(lambda x, y: loss(params, {"x": x, "y": y}, None))(example["x"], example["y"])
    return jnp.sum(each * example["mask"])


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac], ids=["kfac", "ekfac"])
def test_kronfluence_with_masked_tokens(method):
    train, queries = (
        {"x": array(f"seq_X{part}"), "y": array(f"seq_y{part}"), "mask": array(f"seq_mask_{part}")}
        for part in ("tr", "te")
    )
    chosen = method(masked_loss, damping=ja.absolute(0.01), mask=lambda example: example["mask"])
    built = ja.build_index(chosen, PARAMS, train, groups=BY_LAYER, batch_size=7)
    assert_golden(ja.score(built, queries), f"kronfluence seq {method.__name__} damping=0.01")


def convolutional_loss(params, example, key):
    del key
    x = jax.lax.conv_general_dilated(
        example["x"][None], params["c.weight"], (2, 2), ((1, 1), (1, 1))
    )
    x = jnp.tanh(x + params["c.bias"].reshape(1, -1, 1, 1)).reshape(-1)
    logit = params["fc.weight"] @ x + params["fc.bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logit, example["y"])


@pytest.mark.parametrize("method", [ja.kfac, ja.ekfac], ids=["kfac", "ekfac"])
def test_kronfluence_with_a_convolution(method):
    leaves = ("c.weight", "c.bias", "fc.weight", "fc.bias")
    params = {name: array(f"param:conv:{name}") for name in leaves}
    groups = {name: name.split(".")[0] for name in leaves}
    train = {"x": array("conv_Xtr"), "y": array("ytr")}
    queries = {"x": array("conv_Xte"), "y": array("yte")}
    chosen = method(convolutional_loss, damping=ja.absolute(0.01))
    built = ja.build_index(chosen, params, train, groups=groups, batch_size=7)
    assert_golden(ja.score(built, queries), f"kronfluence conv {method.__name__} damping=0.01")


def unbiased_loss(params, example, key):
    zero = {name: jnp.zeros_like(PARAMS[name]) for name in ("0.bias", "2.bias")}
    return loss(params | zero, example, key)


def test_logix_raw():
    params = {name: array(f"param:mlp_nobias:{name}") for name in ("0.weight", "2.weight")}
    method = ja.logra(unbiased_loss, rank=64, damping=ja.absolute(0.01 * len(TRAIN["y"])))
    scores = ja.score(index(method, params), QUERIES) * len(TRAIN["y"])
    assert_golden(scores, "logix raw (LoGra w|o lora) damping=0.01")


def test_dattri_block_projected():
    # dattri's curvature is a mean over examples, ours carries no 1/n.
    method = ja.logra(loss, rank=64, damping=ja.relative(0.2))
    scores = ja.score(index(method, groups=BY_LAYER), QUERIES) * len(TRAIN["y"])
    name = "dattri BlockProjectedIF(eFIM, identity proj) damping=0.2"
    assert_golden(scores, name, orientation="nq")


@pytest.mark.parametrize("projection", [EXACT, projections.two_sided(8)], ids=["exact", "factored"])
def test_dattri_data_inf(projection):
    method = ja.data_inf(loss, damping=ja.absolute(0.1), projection=projection)
    scores = ja.score(index(method, groups=BY_LAYER), QUERIES)
    assert_golden(scores, "dattri DataInf reg=0.1", orientation="nq")


@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("projection", [EXACT, projections.two_sided(8)], ids=["exact", "factored"])
def test_dattri_influence(solver, projection):
    method = ja.influence(
        loss, damping=ja.absolute(0.5), solver=solver, tolerance=1e-10, projection=projection
    )
    scores = ja.score(index(method), QUERIES)
    golden = {"exact": "IF-explicit full-batch", "cg": "IF-CG full-batch max_iter=30"}[solver]
    assert_golden(scores, f"dattri {golden}", orientation="nq")


@pytest.mark.parametrize("name", ["NaiveInfluence reg=2.0", "Arnoldi full Krylov dim, reg=2.0"])
def test_captum_influence(name):
    # captum's Hessian is that of the summed loss, and it drops negative directions.
    n = len(TRAIN["y"])
    method = ja.influence(loss, damping=ja.absolute(2.0 / n), positive_only=True)
    scores = ja.score(index(method), QUERIES) / n
    assert_golden(scores, f"captum {name}")

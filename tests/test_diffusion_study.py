"""The pieces of the studies of diffusion models."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattr as ja
from experiments.attributes import drawing, recognition, study
from experiments.diffusion import data, process, schedule, training, unet
from experiments.diffusion.unet import UNetConfig, make_model
from jaxattr import diffusion, linear_maps
from jaxattr.leaves import leaf_names, named_leaves

TINY = UNetConfig(3, (4,), heads=2, patch=2, conditions=(("style", 3), ("subject", 5)))
ADAPTED = TINY._replace(adapter_rank=2, conditions=())


@functools.cache
def model_and_params(config):
    model = make_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, (
        params,
        jax.jit(model.init_adapters)(jax.random.key(1)),
    ) if config.adapter_rank else params


def images(n, size=8):
    pixels = np.asarray(jax.random.uniform(jax.random.key(2), (n, size, size, 3), jnp.float32))
    rng = np.random.default_rng(0)
    return {"image": 2 * pixels - 1, "style": rng.integers(0, 4, n),
            "subject": rng.integers(0, 6, n)}  # fmt: skip


def test_every_matrix_of_the_unet_is_a_linear_map():
    model, params = model_and_params(TINY._replace(widths=(4, 8)))
    denoiser = process.denoiser(model)
    loss = diffusion.loss(denoiser)
    example = jax.tree.map(lambda x: x[0], images(1))
    found = linear_maps.find(
        lambda params, example, key: loss(params, example, key, jnp.array(10)),
        params, example, jax.random.key(0),
    )  # fmt: skip
    matrices = {name for name, leaf in named_leaves(params).items() if leaf.ndim > 1}
    assert matrices == set(found.maps)


def test_images_are_folded_and_unfolded():
    pixels = images(2)["image"]
    np.testing.assert_array_equal(unet._unfold(unet._fold(pixels, 4), 4), pixels)


def test_the_sampler_records_its_trajectory():
    model, params = model_and_params(TINY)
    noise = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    asked = {"style": jnp.array([0, 3]), "subject": jnp.array([5, 1])}
    first, again = (process.sample(model, params, noise, asked, 6) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    assert first.trajectory.shape == (2, 6, 8, 8, 3) and first.timesteps.shape == (2, 6)
    np.testing.assert_allclose(first.trajectory[:, -1], first.image, atol=1e-6)
    assert [first.timesteps[0, 0], first.timesteps[0, -1]] == [schedule.STEPS - 1, 0]


def test_a_perfect_denoiser_is_sampled_to_its_image():
    """If every image is the same, the noise is known, and the sampler must find the image."""
    target = jnp.asarray(images(1)["image"])

    class Known:
        def apply(self, params, noisy, timesteps, asked):
            left = jnp.asarray(schedule.ALPHA_BAR)[timesteps][:, None, None, None]
            return (noisy - jnp.sqrt(left) * target) / jnp.sqrt(1 - left)

    noise = jax.random.normal(jax.random.key(3), (1, 8, 8, 3))
    np.testing.assert_allclose(process.sample(Known(), {}, noise, {}).image, target, atol=1e-3)


def test_adapters_begin_as_nothing_and_are_all_that_is_trained():
    model, (base, adapters) = model_and_params(ADAPTED)
    plain, _ = model_and_params(TINY._replace(conditions=()))
    batch = {"image": jnp.asarray(images(4)["image"])}
    zero = jax.tree.map(jnp.zeros_like, adapters)
    t = jnp.arange(4)
    adapted = jax.jit(model.apply)((base, zero), batch["image"], t, {})
    np.testing.assert_allclose(
        adapted, jax.jit(plain.apply)(base, batch["image"], t, {}), rtol=1e-6
    )
    train = training.trainer(model, batch, training.Recipe(3, 2), adapters_of=base)
    trained = jax.jit(train)(jax.random.key(0), jnp.arange(4))
    assert jax.tree.structure(trained) == jax.tree.structure(adapters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))


@pytest.mark.slow
def test_training_lowers_the_loss():
    model, params = model_and_params(TINY)
    batch = {name: jnp.asarray(x) for name, x in images(8).items()}
    recipe = training.Recipe(60, 8, 5e-3, 0.8, dropped=0.3)
    trained = training.train_one(model, batch, recipe, jax.random.key(0))
    losses = [
        np.mean([training.batch_loss(model, p, batch, jax.random.key(i)) for i in range(8)])
        for p in (params, trained)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_convolutions_are_the_same_with_and_without_patches():
    model, params = model_and_params(TINY._replace(widths=(4, 8)))
    other = make_model(TINY._replace(widths=(4, 8), patches=False))
    assert jax.tree.structure(jax.eval_shape(other.init, jax.random.key(0))) == jax.tree.structure(
        params
    )
    pixels, t = jnp.asarray(images(2)["image"]), jnp.array([100, 700])
    asked = {"style": jnp.array([0, 3]), "subject": jnp.array([5, 1])}
    found, expected = (jax.jit(each.apply)(params, pixels, t, asked) for each in (other, model))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_network_that_predicts_images_says_what_the_noise_is():
    model, params = model_and_params(TINY)
    other = make_model(TINY._replace(predicts_image=True))
    noisy, t = jnp.asarray(images(2)["image"]), jnp.array([100, 700])
    asked = {"style": jnp.array([0, 3]), "subject": jnp.array([5, 1])}
    clean = jax.jit(model.apply)(params, noisy, t, asked)
    left = schedule.ALPHA_BAR[np.asarray(t)][:, None, None, None]
    noise = jax.jit(other.apply)(params, noisy, t, asked)
    np.testing.assert_allclose(np.sqrt(left) * clean + np.sqrt(1 - left) * noise, noisy, atol=1e-5)


def test_an_example_without_an_attribute_is_refused():
    model, params = model_and_params(TINY)
    example = jax.tree.map(lambda x: x[0], images(1))
    del example["style"]
    loss = diffusion.loss(process.denoiser(model))
    with pytest.raises(ValueError, match="The example has no style: the model asks for style, su"):
        loss(params, example, jax.random.key(0), jnp.array(3))


def test_queries_for_one_attribute():
    pictures = drawing.draw(6, 0)
    alone = study.ask_alone(pictures, "style")
    assert (alone["style"] == pictures["style"]).all()
    assert (alone["subject"] == len(drawing.SUBJECTS)).all()
    with pytest.raises(ValueError, match="The queries have no background"):
        study.ask_alone({k: v for k, v in pictures.items() if k != "background"}, "style")
    with pytest.raises(ValueError, match="There are no queries for style: nothing to learn"):
        study.ask_alone({name: x[:0] for name, x in pictures.items()}, "style")
    with pytest.raises(ValueError, match="6 queries leave subject open, at positions .0, 1"):
        study.ask_alone(alone, "subject")


def test_pictures_are_a_function_of_seed_and_position():
    few, many = drawing.draw(5, 3), drawing.draw(9, 3)
    for name, values in few.items():
        np.testing.assert_array_equal(values, many[name][:5])
    assert few["image"].shape == (5, 16, 16, 3) and np.abs(few["image"]).max() <= 1
    assert not np.array_equal(few["image"], drawing.draw(5, 4)["image"])


def test_attributes_are_independent():
    pictures = drawing.draw(150, 0)
    triples = {tuple(pictures[name][i] for name in study.ATTRIBUTES) for i in range(150)}
    assert len(triples) == 6 * 5 * 5 == 150


def test_images_from_a_file(tmp_path):
    path = tmp_path / "images.npz"
    pixels = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    labels = np.arange(4)[:, None]
    np.savez(path, x_train=pixels[:3], y_train=labels[:3], x_test=pixels[3:], y_test=labels[3:])
    found = data.load(path, 2, 1)
    assert found.train["image"].shape == (2, 2, 2, 3) and found.train["label"].shape == (2,)
    assert sorted(np.concatenate([part["label"] for part in found])) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="There are 4 images, asked for 6"):
        data.load(path, 2, 2)
    with pytest.raises(ValueError, match="There is no file"):
        data.load(tmp_path / "nothing.npz", 2, 1)
    np.savez(path, x_train=pixels)
    with pytest.raises(ValueError, match="has no x_test, y_test, y_train"):
        data.load(path, 2, 1)


def test_pictures_are_recognised_by_what_they_show():
    train, drawn = drawing.draw(300, 0), drawing.draw(100, 1)
    found = recognition.recognised(train, drawn, drawn, "style", 5)
    assert found.drawn == found.generated > 0.85 and found.chance == 0.2
    mislabelled = drawn | {"style": (drawn["style"] + 1) % 5}
    assert recognition.recognised(train, drawn, mislabelled, "style", 5).generated < 0.15


def test_a_gain_is_paired_by_query():
    def of(precision):
        return dict.fromkeys(study.ATTRIBUTES, study.Retrieval(np.array(precision), None, None))

    own = {f"w_{name}": of([0.25, 0.75, 1.25]) for name in study.ATTRIBUTES}
    table = own | {"uniform": of([0.0, 0.5, 1.0]), "w_all": of([1.25, 0.75, 0.25])}
    table["uniform, attribute alone"] = table["own w, attribute alone"] = of([1.0, 0.0])
    gains = study.Result(table, {}).gains
    assert gains["own w - uniform"]["style"] == (0.25, 0.25, 0.25)
    assert gains["own w - uniform, attribute alone"]["style"] == (0.0, 0.0, 0.0)
    mean, low, high = gains["own w - w_all"]["style"]
    assert mean == 0 and low < -0.5 and high > 0.5


@pytest.mark.slow
def test_labels_are_in_no_group_and_weights_are_learned_for_each_attribute():
    config = study.Config(
        timesteps=1, dim=8, unet=study.QUICK.unet._replace(widths=(4,), heads=2)
    )  # fmt: skip
    model, params = model_and_params(config.unet)
    train, full = drawing.draw(30, 0), drawing.draw(6, 1)
    learning = {name: study.ask_alone(drawing.draw(5, 2), name) for name in study.ATTRIBUTES}
    subject = study.Subject(
        model, process.denoiser(model), train, [params], learning | {"all": full}, full, {}
    )
    index = study.index_of(subject, study.methods(subject.denoiser, config)["D-TRAK"])
    embeddings = {f"conditions/{name}/embedding" for name in study.ATTRIBUTES}
    assert set(leaf_names(params)) - set(index.layout.names) == embeddings
    result = study.measure(subject, index)
    assert set(result.fits) == {*study.ATTRIBUTES, "all"}
    # The noise of a query goes by its place among those whose features are taken together.
    asked = [*subject.learning.values(), full]
    joined = {name: np.concatenate([part[name] for part in asked]) for name in full}
    again = ja.score(index, joined, weights=result.fits["style"].weights)[-6:]
    expected = study.retrieval(again, train, full, "subject")
    np.testing.assert_array_equal(result.table["w_style"]["subject"].precision, expected.precision)


def test_relevance_is_a_shared_attribute():
    train = {name: np.array([0, 1, 1, 0] * 4) for name in study.ATTRIBUTES}
    queries = {name: np.array([1]) for name in study.ATTRIBUTES}
    scores = (train["style"] == 1)[None].astype(float)
    found = study.retrieval(scores, train, queries, "style")
    assert (found.precision[0], found.hit[0], found.recall[0]) == (0.8, True, 1.0)


def test_every_number_of_the_table_has_a_heading():
    from experiments.diffusion import __main__ as study_main

    interval = types.SimpleNamespace(mean=0.2, low=0.1, high=0.3)
    lds = dict.fromkeys(("uniform", "learned", "fitted to truth"), interval)
    found = {"DAS": types.SimpleNamespace(lds=lds, difference=interval)}
    table = study_main.lds_table({"unet": {"held-out": found}})
    assert [column.header.replace("\n", " ") for column in table.columns] == [
        "model", "queries", "method", *lds, "learned - uniform"
    ]  # fmt: skip
    assert all(next(iter(column.cells)) for column in table.columns)

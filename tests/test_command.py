"""The command: it calls the library, prints what that says, and refuses in one line."""

import csv
import datetime
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import uuid

import jax
import numpy as np
import optax
import pytest
import tensorstore as ts
from click.testing import CliRunner

import jaxattr as ja
from jaxattr.command import printing
from jaxattr.command.main import main
from jaxattr.command.options import Bytes
from jaxattr.command.tasks import place_in
from jaxattr.evaluation import measured_gain, retraining
from jaxattr.sources import track
from jaxattr.store.folder import Folder
from jaxattr.weights import saving
from tests import models

ROOT = pathlib.Path(__file__).parent.parent
TASK = """
import jax
import jaxattr as ja
from tests import models

train = models.data(53)
queries = models.data(6, seed=1)
learning_queries = models.data(24, seed=2)
checkpoints = models.mlp_params()
method = ja.tracin(models.loss, projection=ja.projections.identity())
groups = ja.by_leaf
batch_size = 8
output = models.margin
ids = [f"example {i}" for i in range(53)]


def start(key):
    return models.mlp_params(key)


import optax

train_fn = ja.trainer(
    models.loss, start, train, optimizer=optax.sgd(0.3), batch_size=4, epochs=3
)
"""
METHOD = ja.tracin(models.loss, projection=ja.projections.identity())
PARAMS, TRAIN, QUERIES = models.mlp_params(), models.data(53), models.data(6, seed=1)
LEARNING = models.data(24, seed=2)


def call(*arguments, code=0, **options):
    found = CliRunner().invoke(main, [str(each) for each in arguments], **options)
    assert found.exit_code == code, (found.output, found.exception)
    return found


def as_json(*arguments, code=0):
    return json.loads(call(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "task.py").write_text(TASK)
    call("build", folder / "task.py", "--path", folder / "index")
    return folder


@pytest.fixture
def place(built, tmp_path):
    """A copy of the task and of its index, whose files a test may change."""
    return pathlib.Path(shutil.copytree(built, tmp_path / "place"))


@pytest.fixture
def few_at_once(monkeypatch):
    """Counts the models that are trained; four in memory at once."""
    trained, found = retraining.trained, []

    def counted(*arguments, **options):
        for chunk in trained(*arguments, **options | {"at_once": 4}):
            found.append(len(chunk))
            yield chunk

    monkeypatch.setattr(importlib.import_module("jaxattr.evaluation.outcomes"), "trained", counted)
    return found


def index_at(folder):
    return ja.open_index(folder / "index", METHOD, PARAMS)


def test_build_is_build_index(place):
    index, direct = index_at(place), ja.build_index(METHOD, PARAMS, TRAIN, groups=ja.by_leaf)
    np.testing.assert_allclose(index.features, direct.features, rtol=1e-12)
    again = call("build", place / "task.py", "--path", place / "index")
    assert "TracIn, finished" in again.stdout
    assert again.stderr.startswith("it was there already, and finished: nothing was built")
    shutil.rmtree(place / "index")
    anew = call("build", place / "task.py", "--path", place / "index")
    assert anew.stderr.startswith("built in ")


def test_extend(place):
    task = place / "task.py"
    task.write_text(TASK.replace("models.data(53)", "grown") + "ids = None\n")
    lines = "import jax.numpy as jnp\nfrom tests import models\nold = models.data(53)\n"
    lines += "grown = jax.tree.map(lambda x: jnp.concatenate([x, x[:7]]), old)\n"
    task.write_text("import jax\n" + lines + task.read_text())
    refused = call("build", task, "--path", place / "index", code=1)
    assert "train: the index has 53 examples, got 60; extend=True adds" in refused.stderr
    extended = call("build", task, "--path", place / "index", "--extend")
    assert extended.stderr.startswith("built in ") and "examples     60" in extended.stdout


def test_describe_and_plan_say_what_the_library_says(built):
    example = models.one(TRAIN)
    described = ja.describe(METHOD, PARAMS, example, groups=ja.by_leaf)
    assert call("describe", built / "task.py").stdout == f"{described}\n"
    assert as_json("describe", built / "task.py")["leaves"][0]["name"] == "layer0/bias"
    options = {"groups": ja.by_leaf, "batch_size": 8, "on_disk": True}
    planned = ja.plan(METHOD, PARAMS, TRAIN, **options, memory=1 << 20)
    assert call("plan", built / "task.py", "--memory", "1MiB").stdout == f"{planned}\n"
    assert as_json("plan", built / "task.py")["index_bytes"] == planned.index_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("2000", 2000), ("2e9", 2 * 10**9), ("1.5GiB", 3 << 29), ("3 MB", 3 * 10**6), ("4Ki", 4096)],
)
def test_bytes(text, count):
    assert Bytes().convert(text, None, None) == count


def test_top_names_the_users_own_ids(built, tmp_path):
    out = tmp_path / "top.csv"
    found = as_json(
        "top", built / "task.py", "--path", built / "index", "--k", 3, "--csv", out
    )  # fmt: skip
    expected = ja.top_k(index_at(built), QUERIES, k=3)
    names = [[f"example {i}" for i in row] for row in expected.ids.tolist()]
    assert [each["ids"] for each in found["queries"]] == names
    scores = [each["scores"] for each in found["queries"]]
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-12)
    with out.open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == sum(names, [])
    shown = call("top", built / "task.py", "--path", built / "index", "--k", 3)
    assert names[0][0] in shown.stdout and "uniform weights" in shown.stderr


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("range(60)", "ids must have one for each of the 53 examples, got 60"),
        ("range(52)", "ids must have one for each of the 53 examples, got 52"),
        ("set(range(53))", "ids must be a sequence .* got a set"),
        ("(i for i in range(53))", "ids must be a sequence .* got a generator"),
    ],
)
def test_ids_that_do_not_fit_are_refused_before_anything_is_written(place, ids, message):
    (place / "task.py").write_text(TASK + f"\nids = {ids}\n")
    arguments = ("top", place / "task.py", "--path", place / "index", "--csv", place / "top.csv")
    with pytest.raises(ValueError, match=message):
        raise ValueError(call(*arguments, code=1).stderr)
    assert not (place / "top.csv").exists()
    remote = (*arguments[:-1], "gs://bucket/top.csv")
    (place / "task.py").write_text(TASK)
    assert "is a URL" in call(*remote, code=1).stderr


def test_ids_of_any_kind_stay_as_they_are(place):
    (place / "task.py").write_text(TASK + "\nids = ['=1+1', ('a', 1), 2.5, *range(3, 53)]\n")
    found = as_json("top", place / "task.py", "--path", place / "index", "--k", 53)["queries"]
    names = ["=1+1", ["a", 1], 2.5, *range(3, 53)]
    expected = ja.top_k(index_at(place), QUERIES, k=53).ids.tolist()
    assert [each["ids"] for each in found] == [[names[i] for i in row] for row in expected]


def test_top_of_a_file_of_queries_and_opponents(built, tmp_path):
    np.savez(tmp_path / "few.npz", **jax.tree.map(lambda x: x[2:4], QUERIES))
    arguments = ("top", built / "task.py", "--path", built / "index", "--k", 2)
    found = as_json(*arguments, "--queries", tmp_path / "few.npz", "--opponents")
    expected = ja.top_k(index_at(built), QUERIES, k=2, opponents=True).scores[2:4]
    scores = [each["scores"] for each in found["queries"]]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    (tmp_path / "no.npz").write_text("nothing")
    refused = call(*arguments, "--queries", tmp_path / "no.npz", code=1)
    assert refused.stderr.endswith(
        f"error: {tmp_path / 'no.npz'} holds no arrays as np.savez writes them.\n"
    )
    (tmp_path / "cut.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:-50])
    np.save(tmp_path / "one.npy", QUERIES["x"])
    for name, message in (("cut.npz", ".\n"), ("one.npy", ", but one as np.save does: ")):
        refused = call(*arguments, "--queries", tmp_path / name, code=1).stderr
        start = f"error: {tmp_path / name} holds no arrays as np.savez writes them{message}"
        assert refused.splitlines(True)[-1].startswith(start) and "Traceback" not in refused


def test_training_data_are_not_loaded_where_they_are_not_needed(place):
    unreadable = TASK.replace("train = models.data(53)", "def train():\n    raise OSError('far')")
    unreadable = unreadable.replace("start, train,", "start, models.data(53),")
    (place / "task.py").write_text(unreadable)
    call("top", place / "task.py", "--path", place / "index")
    refused = call("plan", place / "task.py", code=1)
    assert refused.stderr == f"error: far ({place / 'task.py'}:7)\n"


def test_weights_are_learned_kept_and_used(place, few_at_once):
    task, path = place / "task.py", place / "index"
    told = call("weights", task, "--path", path, "--models", 8)
    assert few_at_once == [4, 4] and "gain" in told.stdout
    assert told.stdout.count("warning:") == 0  # they are on the other stream
    index = index_at(place)
    fit = saving.load_fit(f"{path}.weights.json", index)
    stored = json.loads((place / "index.weights.json").read_text())
    assert stored["groups"] == list(index.layout.names)
    found = as_json("top", task, "--path", path, "--k", 3)["queries"]
    expected = ja.top_k(index, QUERIES, k=3, weights=fit)
    scores = [each["scores"] for each in found]
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-12)
    said = call("top", task, "--path", path, "--k", 3).stderr
    assert ("not shown to be above zero: --uniform" in said) == (fit.gain.low <= 0)
    uniform = as_json("top", task, "--path", path, "--k", 3, "--uniform")["queries"]
    assert uniform != found
    again = as_json("weights", task, "--path", path, "--models", 8)
    assert few_at_once == [4, 4] and again["weights"] == fit.weights


def test_retraining_goes_on_where_it_was_killed(place, monkeypatch, few_at_once):
    task, path = place / "task.py", place / "index"
    outcomes = importlib.import_module("jaxattr.evaluation.outcomes")
    counted = outcomes.trained

    def killed(*arguments, **options):
        for number, chunk in enumerate(counted(*arguments, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(outcomes, "trained", killed)
    stopped = call("weights", task, "--path", path, "--models", 8, code=130)
    assert stopped.stdout == "" and "interrupted: run the same again" in stopped.stderr
    assert not (place / "index.weights.json").exists()
    monkeypatch.setattr(outcomes, "trained", counted)
    del few_at_once[:]
    call("weights", task, "--path", path, "--models", 8)
    assert few_at_once == [4]  # of two


def test_weights_without_outcomes(place):
    found = as_json("weights", place / "task.py", "--path", place / "index", "--without-outcomes")
    fit = ja.learn_weights(index_at(place), LEARNING)
    assert found["weights"] == pytest.approx(fit.weights) and found["gain"] is None
    assert not (place / "index.outcomes.npz").exists()


def test_outcomes_that_would_not_be_used_are_refused(place):
    task, path = place / "task.py", place / "index"
    options = ("--path", path, "--outcomes", place / "o.npz")
    found = call("weights", task, *options, "--without-outcomes", code=2)
    assert "leave --without-outcomes out" in found.stderr
    task.write_text(TASK.replace("train_fn = ", "other = "))
    assert "name train_fn and output" in call("weights", task, *options, code=2).stderr


def test_weights_are_beside_the_index_wherever_one_stands(place, monkeypatch):
    monkeypatch.chdir(place / "index")
    call("weights", place / "task.py", "--path", ".", "--without-outcomes")
    monkeypatch.chdir(place)
    found = call("top", place / "task.py", "--path", "index/.")
    assert "with the weights of" in found.stderr
    (place / "index.weights.json").write_text("nonsense")
    refused = call("top", place / "task.py", "--path", "index", code=1).stderr
    assert "it is no JSON" in refused and "learn the weights again" in refused


def test_a_fit_comes_back_as_it_was(place):
    index = index_at(place)
    outcomes = ja.Outcomes(
        np.random.default_rng(0).random((8, 53)) < 0.5,
        np.random.default_rng(1).normal(size=(8, 24)),
    )
    with pytest.warns(ja.WeightWarning):
        fit = ja.learn_weights(index, LEARNING, outcomes=outcomes)
    saving.save_fit(place / "fit.json", fit, index)
    back = saving.load_fit(place / "fit.json", index)
    for name, value in vars(fit).items():
        np.testing.assert_equal(getattr(back, name), value)
    assert str(back) == str(fit) and saving.load_fit(place / "none.json", index) is None


def test_only_a_fit_of_the_index_is_saved_and_read(place):
    index = index_at(place)
    fit = ja.learn_weights(index, LEARNING, steps=2)
    grouped = ja.build_index(METHOD, PARAMS, TRAIN, groups=ja.by_layer)
    with pytest.raises(ValueError, match=r"exactly the index's groups. Missing: \['layer0'"):
        saving.save_fit(place / "fit.json", fit, grouped)
    assert not (place / "fit.json").exists()
    saving.save_fit(place / "fit.json", fit, index)
    stored = json.loads((place / "fit.json").read_text())
    first = index.layout.names[0]
    for name, values, message in (
        ("weights", fit.weights | {first: -1.0}, "at least 0, got {'layer0/bias': -1.0}"),
        ("weights", fit.weights | {first: float("nan")}, "finite and at least 0, got"),
        ("weights", fit.weights | {"other": 1.0}, r"unknown: \['other'\]"),
        ("weights", fit.weights | {first: "1"}, "damaged"),
        ("shares", {"other": 1.0}, r"shares of a fit are .* got \['other'\]"),
        ("tail_ratio", fit.tail_ratio | {first: "1"}, "must be real number, not str"),
    ):
        changed = stored | {"fit": stored["fit"] | {name: values}}
        (place / "fit.json").write_text(json.dumps(changed))
        with pytest.raises(ja.StoreError, match=f"{message}.*or learn the weights again"):
            saving.load_fit(place / "fit.json", index)


@pytest.mark.parametrize(
    ("path", "folder", "name"),
    [
        ("w.json", ".", "w.json"),
        ("/w.json", "/", "w.json"),
        ("file:///w.json", "/", "w.json"),
        ("a/../w.json", ".", "w.json"),
        ("memory://run/w.json", "memory://run", "w.json"),
    ],
)
def test_where_a_file_of_weights_is(path, folder, name):
    found, called = saving._place(path)
    assert (found.path, called) == (Folder(folder).path, name)


@pytest.mark.parametrize("path", ["", "/tmp/", "folder/..", "gs://w.json", "gs://bucket/"])
def test_what_names_no_file_of_weights_is_refused(path):
    with pytest.raises(ja.StoreError):
        saving._place(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ja.by_leaf", "ja.by_layer"), "only in the file .'layer0/bias'.*only in the index .'lay"),
        (("models.mlp_params()", "models.mlp_params(jax.random.key(1))"), "weights of another ind"),
    ],
)
def test_weights_of_another_index_are_refused(place, change, message):
    task, path = place / "task.py", place / "index"
    call("weights", task, "--path", path, "--without-outcomes")
    task.write_text(TASK.replace(*change))
    shutil.rmtree(path)
    call("build", task, "--path", path)
    refused = call("top", task, "--path", path, code=1)
    with pytest.raises(ja.StoreError, match=message):
        saving.load_fit(f"{path}.weights.json", ja.open_index(path))
    assert refused.stderr.startswith("error: ") and "--uniform" in refused.stderr
    call("top", task, "--path", path, "--uniform")


def test_lds_with_and_without_weights(place, few_at_once):
    arguments = "lds", place / "task.py", "--path", place / "index", "--models", 8
    found = as_json(*arguments)
    assert few_at_once == [4, 4]
    outcomes = ja.outcomes(
        trainer(), models.margin, QUERIES, 53, key=jax.random.fold_in(jax.random.key(0), 2),
        models=8, fraction=0.5, path=place / "index.lds.npz",
    )  # fmt: skip
    assert few_at_once == [4, 4]  # the same, or they had been refused
    index = index_at(place)
    expected = ja.lds(ja.score(index, QUERIES), outcomes.masks, outcomes.outputs)
    assert found["uniform"]["mean"] == pytest.approx(expected.mean)
    call("weights", place / "task.py", "--path", place / "index", "--without-outcomes")
    fit = saving.load_fit(place / "index.weights.json", index)
    gain = measured_gain(index, QUERIES, fit, outcomes)
    assert call(*arguments).stdout == f"{gain}\n"
    assert str(gain.uniform) in str(gain) and str(gain.learned) in str(gain)
    assert str(gain.uniform).endswith("]")


def trainer():
    return ja.trainer(
        models.loss, models.mlp_params, TRAIN, optimizer=optax.sgd(0.3), batch_size=4, epochs=3
    )


def test_an_index_is_looked_for_before_the_task_is_loaded(place):
    task, path = place / "task.py", place / "none"
    task.write_text("raise RuntimeError('loaded')\n" + TASK)
    for command in ("report", "top", "weights", "lds"):
        refused = call(command, task, "--path", path, code=1)
        then = f"build it first: jaxattr build {task} --path {path}"
        assert refused.stderr == f"error: There is no index at {path}: {then}\n"
    refused = call("top", place / "no.py", "--path", path, code=1)
    assert refused.stderr.startswith("error: There is no task file")


def test_lds_needs_to_retrain(place):
    (place / "task.py").write_text(TASK.replace("output = models.margin", ""))
    refused = call("lds", place / "task.py", "--path", place / "index", code=1)
    assert "task.py does not name output, and models must be retrained" in refused.stderr


def test_warnings_are_lines(place):
    (place / "task.py").write_text(
        TASK.replace(
            "= models.data(53)", "= models.data(53)\ntrain['x'] = train['x'].at[5].set(1e999)"
        )
    )
    shutil.rmtree(place / "index")
    told = call("build", place / "task.py", "--path", place / "index")
    lines = told.stderr.splitlines()
    assert [line for line in lines if line.startswith("warning: 1 of 53 training examples have")]
    assert "Traceback" not in told.stderr and "1 of them left out" in told.stdout


def test_info(built):
    found = as_json("info", built / "index")
    assert found["finished"] and found["method"] == "TracIn" and found["examples"] == 53
    index = index_at(built)
    assert list(found["groups"]) == list(index.layout.names)
    assert found["bytes"] == 53 * (107 * 8 + 2 * 8 + 8 * 8 + 4 * 4)
    assert found["made_from"]["projection"] == "Identity"
    assert "finished" in call("info", built / "index").stdout
    assert "it is empty" in call("info", "", code=1).stderr
    nothing = call("info", built / "nothing", code=1)
    assert nothing.stderr.startswith("error: There is no index at ")


def test_the_path_of_an_index_is_an_argument_or_an_option(built, tmp_path):
    path, out = built / "index", tmp_path / "features.npz"
    for command, more in (("info", ()), ("verify", ()), ("export", ("--out", out))):
        expected = as_json(command, path, *more)
        assert as_json(command, "--path", path, *more) == expected
        for wrong in ((), (path, "--path", path)):
            refused = call(command, *wrong, *more, code=2)
            assert f"Say once where the index is: jaxattr {command} PATH." in refused.stderr


def test_info_of_an_index_that_is_not_finished(place):
    (place / "index/complete.json").unlink()
    found = as_json("info", place / "index")
    assert not found["finished"] and found["done"] == {"features/0": 7} and found["blocks"] == 7
    assert "not finished: features/0 7 of 7 blocks" in call("info", place / "index").stdout
    assert "not finished" in call("verify", place / "index", code=1).stderr


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_names_all_that_is_damaged(place):
    path = place / "index"
    assert as_json("verify", path) == {"chunks": 28, "damaged": [], "whole": True}
    flipped(path / "features/c/3/0/0")
    (path / "self/c/2/0/0").unlink()
    shutil.copy(path / "digests/c/0/0/0", path / "digests/c/1/0/0")  # whole, in another's place
    found = as_json("verify", path, code=1)
    assert [line.split(" ")[0] for line in found["damaged"]] == [
        "features/c/3/0/0", "self/c/2/0/0", "digests/c/1/0/0",
    ]  # fmt: skip
    told = call("verify", path, code=1)
    assert "features/c/3/0/0 cannot be read" in told.stdout and "Traceback" not in told.output
    flipped(path / "manifest.json")
    assert "manifest.json is damaged" in call("verify", path, code=1).stderr


def test_verify_reads_what_was_fitted(tmp_path):
    ja.build_index(ja.ekfac(models.loss), PARAMS, TRAIN, path=tmp_path / "index")
    assert as_json("verify", tmp_path / "index")["whole"]
    folder = tmp_path / "index/fitted-0"
    largest = max(folder.glob("[0-9]*/0*"), key=lambda file: file.stat().st_size)
    flipped(largest)
    found = as_json("verify", tmp_path / "index", code=1)["damaged"]
    assert len(found) == 1 and "fitted-0" in found[0]


def test_export(built, tmp_path):
    index, out = index_at(built), tmp_path / "features.npz"
    call("export", built / "index", "--out", out)
    with np.load(out) as found:
        np.testing.assert_array_equal(found["features"][:, 0], index.features)
        assert found["groups"].tolist() == list(index.layout.names)
        owners = found["groups"][found["group_of_column"]]
        assert (owners[index.layout.slices["layer1/bias"]] == "layer1/bias").all()
        assert found["ids"].tolist() == list(range(53))
    array = tmp_path / "features.zarr"
    assert as_json("export", built / "index", "--out", array)["shape"] == [53, 1, 107]
    spec = {"driver": "zarr3", "kvstore": Folder(array).spec("")}
    stored = ts.open(spec, open=True).result()
    np.testing.assert_array_equal(stored[:, 0].read().result(), index.features)
    assert json.loads((array / "zarr.json").read_text())["attributes"]["method"] == "TracIn"
    assert "not empty" in call("export", built / "index", "--out", array, code=1).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = 1\ntrain = 2\n", "task.py does not name checkpoints. A task file names"),
        ("method = 1\ntrain = 2\ncheckpoint = 3\n", "task.py:3: checkpoint is no name that a task "
         "has, and nothing in the file uses it: did you mean checkpoints?"),
        (TASK + "qeuries = 1\nmesh, grups = 1, 2\n", None),
        (TASK.replace("queries =", "querys =", 1), "task.py:7: querys is no name that a task has"),
        (TASK.replace("groups =", "group =", 1), "task.py:11: group is no .* did you mean groups?"),
        (TASK.replace("queries =", "_querys =", 1), None),
        ("method = 1\ndef tran():\n    pass\nx = tran, 2\n", "does not name checkpoints and train. "
         "A task file names method, checkpoints and train; .*task.py:2 has tran"),
        ("method = (\n", r"task.py:1: it is no Python: '\(' was never closed"),
        ("\n\nimport no_such_module\n", "task.py:3: No module named 'no_such_module': install it"),
        ("import sys\nsys.modules['sklearn'] = None\nfrom sklearn import datasets\n",
         "task.py:3: .*sklearn.*: pip install scikit-learn"),
        (TASK + "\n\n1 / 0\n", "task.py:[0-9]+: ZeroDivisionError: division by zero"),
        (TASK.replace("models.data(53)", "models.data('x')"), "task.py:6"),
        (TASK + "method = 3\n", "task.py: method must be one of jaxattr's, such as ja.trac.*got 3"),
        (TASK + "method = ja.tracin\n", "task.py: method is a function that needs loss. It must"),
    ],
)  # fmt: skip
def test_task_files_that_cannot_be_used(tmp_path, text, message, monkeypatch):
    if "sklearn" in text:  # so that it is there again for other tests
        monkeypatch.setitem(sys.modules, "sklearn", None)
    needed = "method = train = checkpoints = None\n"
    if "import" in text and "models" not in text:
        text = text.rstrip("\n") + f"\n{needed}"
    (tmp_path / "task.py").write_text(text)
    if message is None:
        call("describe", tmp_path / "task.py")
        return
    refused = call("describe", tmp_path / "task.py", code=1)
    with pytest.raises(ValueError, match=message):
        raise ValueError(refused.stderr)
    assert refused.stdout == "" and "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and refused.stderr.startswith("error: ")


def test_errors_in_the_functions_of_a_task_say_where(place):
    task = place / "task.py"
    lines = TASK + "\n\ndef loss(params, example, key):\n    return example['labl']\n"
    task.write_text(lines.replace("tracin(models.loss", "tracin(lambda *x: loss(*x)"))
    refused = call("describe", task, code=1)
    number = task.read_text().splitlines().index("    return example['labl']") + 1
    assert "KeyError: 'labl'" in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and f"({task}:{number})" in refused.stderr
    traced = call("describe", task, "--traceback", code=1)
    assert "Traceback" in traced.stderr and traced.stderr.endswith(refused.stderr)


@pytest.mark.parametrize("name", ["output", "train_fn"])
def test_errors_in_modules_beside_a_task_say_where(place, name):
    """Retrained models have another structure than the functions of a module want."""
    (place / "beside.py").write_text(
        "def output(params, example, key):\n"
        "    return params['params']\n\n\n"
        "def train_fn(key, ids):\n"
        "    return {}['params']\n"
    )
    task = place / "task.py"
    task.write_text(f"{TASK}\n\nfrom beside import {name}\n")
    if name == "output":
        nested = "lambda key, ids: {'params': inner(key, ids)['layer0']['bias'].sum()}"
        task.write_text(f"{task.read_text()}inner = train_fn\ntrain_fn = {nested}\n")
    try:
        told = call("weights", task, "--path", place / "index", "--models", 8, code=1)
    finally:
        sys.path.remove(str(place))
        del sys.modules["beside"]
    line = {"output": 2, "train_fn": 6}[name]
    assert "Traceback" not in told.stderr
    last = told.stderr.splitlines()[-1]
    assert "KeyError: 'params'" in told.stderr and f"{place / 'beside.py'}:{line}" in last


def test_what_an_error_was_raised_for_says_where(tmp_path):
    path = tmp_path / "task.py"
    path.write_text("")
    code = "\n\ndef fails():\n    raise KeyError('x')\n"
    names = {}
    exec(compile(code, str(path.resolve()), "exec"), names)

    def raised(hide):
        try:
            names["fails"]()
        except KeyError as error:
            raise RuntimeError from (ValueError() if hide else error)

    for hide in (False, True):
        with pytest.raises(RuntimeError) as found:
            raised(hide)
        assert place_in(found.value, path) == f"{path}:4"
    with pytest.raises(RuntimeError) as found:
        raise RuntimeError
    assert place_in(found.value, path) is None


def test_errors_where_a_task_makes_its_data_say_where(place):
    task = place / "task.py"
    task.write_text(TASK + "\n\ndef queries():\n    return {}['x']\n")
    refused = call("top", task, "--path", place / "index", code=1)
    line = len(task.read_text().splitlines())
    assert refused.stderr == f"with uniform weights\nerror: {task}:{line}: KeyError: 'x'\n"


def test_a_fault_of_the_library_shows_its_traceback(built, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr(ja, "plan", broken)
    told = call("plan", built / "task.py", code=1)
    assert "Traceback" in told.stderr and "RuntimeError: a fault" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Usage"),
        (("bild",), 2, "No such command 'bild'"),
        (("build", "x.py"), 2, "Missing option '--path'"),
        (("plan", "x.py", "--memory", "lots"), 2, "'lots' is no number of bytes"),
        (("plan", "x.py"), 1, "There is no task file x.py: `jaxattr new x` makes one"),
        (("plan", "."), 1, ". cannot be read: Is a directory"),
        (("--version",), 0, f"jaxattr, version {ja.__version__}"),
        (("-h",), 0, "Which training examples made my model do this?"),
        (("top", "-h"), 0, "--opponents"),
    ],
)
def test_usage(arguments, code, message):
    assert message in call(*arguments, code=code).output


def test_distributed_needs_other_processes(built):
    command = [sys.executable, "-m", "jaxattr", "build", built / "task.py", "--distributed"]
    told = subprocess.run(
        [*command, "--path", built / "other"], capture_output=True, text=True, cwd=ROOT
    )
    assert told.returncode == 1 and told.stderr.startswith("error: ")
    assert "coordinator_address" in told.stderr and not (built / "other").exists()


def test_new_refuses_to_overwrite(tmp_path):
    assert "is written" in call("new", tmp_path / "mine").stdout
    (tmp_path / "mine.py").write_text("kept")
    assert "is there already" in call("new", tmp_path / "mine.py", code=1).stderr
    assert (tmp_path / "mine.py").read_text() == "kept"
    assert "names no file" in call("new", ".", code=1).stderr
    assert "my task.py' --path 'runs/my task'" in call("new", tmp_path / "my task").stdout
    refused = call("new", tmp_path / "no/mine", code=1).stderr
    assert refused.endswith(f"needs a folder {tmp_path / 'no'}: make it, or give another name.\n")
    refused = call("new", tmp_path / "mine.py/more", code=1).stderr
    assert "cannot be written: Not a directory. Give the name" in refused


def test_a_task_file_ends_with_py(tmp_path):
    for name, text in (("README.md", "# A title\n"), ("plain", "plain words\n")):
        (tmp_path / name).write_text(text)
        refused = call("build", tmp_path / name, "--path", tmp_path / "index", code=1).stderr
        expected = "is no task file: the name of a task file ends with .py."
        assert refused == f"error: {tmp_path / name} {expected}\n"


@pytest.mark.slow
def test_the_first_three_commands_make_a_page(tmp_path):
    """As anyone types them, in an empty folder."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}

    def run(*arguments):
        command = [sys.executable, "-m", "jaxattr", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
        )

    run("new", "demo")
    built = run("build", "demo.py", "--path", "runs/demo")
    training, took = built.stderr.splitlines()  # and no progress without a terminal
    assert training.endswith("demo.params.") and took.startswith("built in ")
    trained = (tmp_path / "demo.params").read_bytes()
    told = json.loads(run("report", "demo.py", "--path", "runs/demo", "--json").stdout)
    assert (tmp_path / "demo.params").read_bytes() == trained
    page = (tmp_path / told["page"]).read_text()
    assert page.count("data:image/png;base64,") > 150 and "seven" in page


def test_the_entry_point_is_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["jaxattr"].split(":")
    assert getattr(importlib.import_module(module), name) is main


def test_importing_the_library_leaves_the_command_out():
    program = "import sys, jaxattr; assert not {'click', 'jaxattr.command'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_what_json_cannot_hold_is_null():
    found = printing.plain({"a": np.array([1.0, np.nan]), "b": (np.int32(2), float("inf"))})
    assert found == {"a": [1.0, None], "b": [2, None]}


def test_what_json_does_not_know_is_its_text():
    day, number = datetime.date(2020, 1, 2), uuid.UUID(int=7)
    found = printing.plain({"a": day, "b": [number], "c": np.array([day]), "d": pathlib.Path("x")})
    assert found == {"a": "2020-01-02", "b": [str(number)], "c": ["2020-01-02"], "d": "x"}


def test_what_a_task_prints_is_not_in_the_document(place):
    task = place / "task.py"
    task.write_text("print('hello')\n" + task.read_text())
    call("build", task, "--path", place / "index")
    found = call("top", task, "--path", place / "index", "--json")
    assert json.loads(found.stdout)["queries"] and "hello" in found.stderr
    assert "hello" in call("top", task, "--path", place / "index").stdout


def test_progress_says_its_rate_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    assert list(track(iter(range(5)), "working", 5)) == list(range(5))
    told = capsys.readouterr()
    assert "working" in told.err and "/5" in told.err and "left" in told.err and not told.out
    monkeypatch.delenv("FORCE_COLOR")
    assert list(track(iter(range(5)), "working", 5)) == list(range(5))
    assert capsys.readouterr().err == ""

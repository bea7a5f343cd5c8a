"""Claims that train on a data set, on other data than the digits."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import only_claims, reproduce

from bn_jax.lab import data
from bn_jax.lab.commands import reproduction
from bn_jax.lab.experiments import EXPERIMENTS, labelled, parallel, reproducing, sweeps
from bn_jax.lab.experiments.labelled import Labelled, Needs, Split
from bn_jax.lab.experiments.verdicts import Above, Experiment, Result, Setting, SubClaim

CLASSES, SHAPE = 12, (6, 7, 2)
# So many that every class is in every part as often as any claim needs.
EXAMPLES = 4000
WITH_DATA = [name for name, one in EXPERIMENTS.items() if one.data is not None]
WITHOUT = (
    "gradient_explosion",
    "decoupling",
    "vanishing_gradients",
    "orthogonal_representations",
    "joint_batch",
)


def make_dataset(examples=2000, classes=CLASSES):
    generator = np.random.default_rng(0)
    y = generator.permutation(np.arange(examples) % classes).astype(np.int32)
    means = generator.normal(size=(classes, *SHAPE))
    x = means[y] + generator.normal(size=(examples, *SHAPE))
    return data.Dataset(x.astype(np.float32), y)


def make_labelled(examples=2000, classes=CLASSES):
    return Labelled(make_dataset(examples, classes), classes, "mine.npz", "0" * 64)


def run_on_data(setting):
    trials = sweeps.draw_trials(setting, steps=2, batch_size=4)
    means = trials.digits.test.x.mean((1, 2))
    few = trials.digits.few(8)
    values = {"1a": 1 + means, "1b": 1 + means, "1c": 1 + means}
    return Result(values, {"level": setting.level(0.2)}, splits={"1b": few.split})


def draw(figure, curves):
    figure.subplots().plot([curves["level"]])


def sub_claim(key, **options):
    return SubClaim(key, key, f"sentence {key}", "mean", Above(0.5), is_resplit=True, **options)


ON_DATA = Experiment(
    1,
    "on_data",
    "A claim",
    "me",
    (sub_claim("1a"), sub_claim("1b"), sub_claim("1c", is_of_digits=True)),
    "a protocol",
    "limits",
    run_on_data,
    draw,
    data=Needs(trained=40),
)


@pytest.fixture
def two(monkeypatch, tmp_path):
    only_claims(monkeypatch, ON_DATA, ON_DATA._replace(number=2, name="without", data=None))
    monkeypatch.chdir(tmp_path)
    data.save_npz(Path("mine.npz"), make_dataset(60, 3))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_record_names_the_data(two, monkeypatch, capsys, processes):
    options = ("--seeds", 3, "--processes", processes, "--data", "mine.npz", "--out", "found")
    extra = ("all",) if processes == 1 else ("on_data",)
    assert reproduce(monkeypatch, *extra, *options) == 0
    printed = capsys.readouterr()
    found = json.loads(Path("found/on_data.json").read_text())
    assert found["data"].pop("sha256").isalnum()
    assert found["data"] == {
        "name": "mine.npz",
        "examples": 60,
        "image_shape": list(SHAPE),
        "num_classes": 3,
    }
    size = "60 images of 6x7x2, 3 classes"
    assert found["protocol"].startswith(f"on mine.npz ({size}) in the place of the digits")
    assert f"On mine.npz in the place of the digits: {size}, SHA-256" in " ".join(
        printed.out.split()
    )
    whole, few, of_digits = found["sub_claims"]
    assert whole["split"] == {"trained": 42, "tested": 12}
    assert few["split"] == {"trained": 8, "tested": 12}
    widths = [of_one["settings"][""]["for_other_data"]["high"] - 1 for of_one in (whole, few)]
    assert widths[1] > 1.5 * widths[0] > 0
    assert of_digits["verdict"] == "not testable here" and "ten classes" in of_digits["reason"]
    # A third of the examples is of each class: chance, from which 0.2 is a ninth of the way to 1.
    assert found["curves"]["level"] == pytest.approx(1 / 3 + (2 / 3) / 9)
    if processes == 1:
        expected = "--data does not concern without, which train on no data or only on the digits"
        assert printed.err.startswith(f"bn-jax: warning: {expected}")
        assert printed.err.count("\n") == 1 and not Path("found/without.json").exists()
    assert reproduce(monkeypatch, "--show", "1", "--results", "found") == 0
    assert "On mine.npz in the place of the digits" in capsys.readouterr().out


def test_the_record_of_the_digits_names_them(two, monkeypatch, capsys):
    assert reproduce(monkeypatch, "all", "--seeds", 2, "--processes", 1, "--out", "found") == 0
    found, without = (
        json.loads(Path(f"found/{name}.json").read_text()) for name in ("on_data", "without")
    )
    expected = {"name": "digits", "examples": 1797, "image_shape": [8, 8, 1], "num_classes": 10}
    assert found["data"] == expected and without["data"] is None
    assert found["sub_claims"][0]["split"] == {"trained": 1259, "tested": 359}
    assert found["sub_claims"][2]["verdict"] == "reproduced"
    assert found["curves"]["level"] == 0.2 and found["protocol"] == "a protocol"
    assert "in the place of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "examples", "code", "message"),
    [
        (("without",), 60, 2, "--data: received with without, which trains on no data .* on_data"),
        (("all", "2"), 60, 2, "--data: received with without, which trains on no data .* on_data"),
        (("1",), 30, 2, "--data: mine.npz: received 21 training examples, expected at least 40, f"),
        (("all",), 30, 2, "--data: no claim can be tested on mine.npz .30 images"),
        (("1",), 2, 2, "--data: received 2 examples, expected at least 3"),
    ],
)
def test_data_that_do_not_fit(two, monkeypatch, capsys, names, examples, code, message):
    data.save_npz(Path("mine.npz"), make_dataset(examples, 2))
    options = ("--data", "mine.npz", "--seeds", 2, "--out", "found")
    assert reproduce(monkeypatch, *names, *options) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(errors) == 1 and not Path("found").exists()
    (line,) = errors
    assert re.match(f"bn-jax: error: {message}", line), line


BAD = {
    "missing": (None, "--data: mine.npz does not exist"),
    "garbage": (b"no zip", "--data: mine.npz cannot be read as an .npz file of numbers"),
    "features": ({"x": np.ones((9, 5)), "y": np.arange(9) % 2}, r"--data: array x has shape \(9"),
    "one class": ({"x": np.ones((9, 5, 5)), "y": np.zeros(9, int)}, "--data: "),
    "no labels": ({"x": np.ones((9, 5, 5))}, "--data: mine.npz holds no array 'y'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(two, monkeypatch, capsys, case):
    content, message = BAD[case]
    path = Path("mine.npz")
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    assert reproduce(monkeypatch, "on_data", "--data", "mine.npz", "--out", "found") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(f"bn-jax: error: {message}", error), error


@pytest.mark.parametrize(
    ("needs", "lacks"),
    [
        (Needs(), None),
        (Needs(trained=42, classes=3, per_class=1, features=84, side=6), None),
        (Needs(trained=43), "received 42 training examples, expected at least 43"),
        (Needs(classes=4), "received 3 classes, expected at least 4"),
        (Needs(side=7), "received 6 pixels on the shorter side, expected at least 7"),
        (Needs(features=85), "received 84 pixels that vary, expected at least 85"),
        (Needs(per_class=40), "received 1. training examples in each class, expected at least 40"),
        (
            Needs(per_class=1, per_class_tested=9),
            "received [0-4] validation and test examples in each class, expected at least 9",
        ),
    ],
)
def test_what_data_lack_is_said(needs, lacks):
    found = needs.missing(make_labelled(60, 3), [0, 1])
    assert (found is None) == (lacks is None)
    assert lacks is None or re.fullmatch(lacks, found)


def test_a_class_without_images_is_found():
    of_three = make_labelled(60, 3)._replace(num_classes=4)
    found = Needs(per_class=1).missing(of_three, [0])
    assert found == "received 0 training examples in each class, expected at least 1"


def test_splits_that_do_not_fit_into_memory_are_refused():
    huge = make_labelled()._replace(
        dataset=data.Dataset(
            np.broadcast_to(np.float32(0), (10**6, 1000, 1000, 3)), make_dataset(9).y
        )
    )
    with pytest.raises(ValueError, match=r"16 splits of mine.npz .* of memory, expected at most"):
        labelled.check_memory(huge, 16)


def test_the_split_of_a_trial_is_what_it_holds():
    setting = Setting(2, data=make_labelled())
    trials = sweeps.draw_trials(setting, 3, 8)
    assert trials.split == setting.labelled.split == Split(1400, 400)
    assert trials.digits.few(100).split == Split(100, 400)
    assert trials.digits.few(100, tests_rest=True).split == Split(100, 1700)
    assert setting.labelled.sample(500) == Split(1500, 500)


def test_which_claims_take_data():
    without = set(EXPERIMENTS) - set(WITH_DATA)
    assert without == {*WITHOUT, "corruptions"}
    for name in WITH_DATA:
        needs: Any = EXPERIMENTS[name].data
        assert needs.missing(labelled.digits(), range(16)) is None, name


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_claim_trains_on_the_data_alone(name, monkeypatch, tmp_path):
    # Sweeps are only traced: their results are random numbers.
    real = parallel.run_each
    losses = optax.softmax_cross_entropy_with_integer_labels

    def refuse():
        raise AssertionError("it loads the digits")

    def loss(logits, labels):
        assert logits.shape[-1] == CLASSES
        return losses(logits, labels)

    def run_each(run, number, *inputs, layout=None):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
            return real(run, number, *inputs, layout=layout)
        found = jax.eval_shape(lambda *given: run(jnp.int32(0), *given), *inputs)
        draws = np.random.default_rng(0)
        return jax.tree.map(
            lambda leaf: draws.uniform(0.3, 1, (number, *leaf.shape)).astype(leaf.dtype), found
        )

    monkeypatch.setattr(data, "load_digits", refuse)
    monkeypatch.setattr(optax, "softmax_cross_entropy_with_integer_labels", loss)
    for module in (parallel, sweeps):
        monkeypatch.setattr(module, "run_each", run_each)
    labelled.digits.cache_clear()
    setting = Setting(2, quick=True, data=make_labelled(EXAMPLES))
    outcome = reproducing.reproduce(EXPERIMENTS[name], setting, tmp_path)
    assert outcome.failure is None and outcome.record is not None
    assert outcome.record["data"]["num_classes"] == CLASSES
    assert reproduction.read(name, tmp_path) == outcome.record
    for one in outcome.record["sub_claims"]:
        if one["split"] is not None:
            assert sum(one["split"].values()) <= EXAMPLES and one["split"]["trained"] > 0

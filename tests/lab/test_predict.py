"""`bn-jax predict`, and runs on folders of images and on datasets that are made in code."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import assert_close, bars, copy_of, files, make_small_resnet, small_disk

import bn_jax as bn
from bn_jax import training
from bn_jax.lab import command as cli
from bn_jax.lab import data, fitting, prediction, runs, trainer
from bn_jax.lab.errors import CommandError

NAMES = ("horizontal", "neither [red]", "vertical")
# The class of `bars` with each label.
NAME_OF = ("horizontal", "vertical", "neither [red]")


@pytest.fixture(scope="module", autouse=True)
def small(compile_quickly):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_model", make_small_resnet)
        patch.setattr(runs, "ARMS", (runs.SYNCHRONIZED,))
        yield


def pixels(examples, seed=0):
    """Images as bytes, which a PNG keeps, and their labels."""
    arrays = bars(examples, seed)
    return np.clip(arrays["x"], 0, 255).astype(np.uint8), arrays["y"]


def write_folder(folder, x, y, names=NAME_OF):
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        path = folder / names[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of images, a run on it, and a run on a dataset that was made in code."""
    home = tmp_path_factory.mktemp("predict")
    # Before a training asks for the one that it needs.
    assert len(jax.devices()) == 4
    options: dict[str, Any] = {"devices": 1, "epochs": 6, "batch_size": 16}
    x, y = pixels(120)
    write_folder(home / "photos", x, y)
    trainer.start(trainer.Request(home / "photos", home / "run", **options))
    dataset = data.from_iterable(zip(x, y, strict=True))
    trainer.start(trainer.Request(dataset, home / "unnamed", **options))
    return home


def state_of(folder):
    return runs.restore(runs.read_run(folder), training.make_mesh(jax.devices()[:1]))


def define_probabilities(folder, x):
    """Of images as bytes: what the model of a run says, by its variables and its metrics alone."""
    state = state_of(folder)
    facts = json.loads((folder / "metrics.json").read_text())["data"]
    standardized = (np.asarray(x, np.float64)[..., None] - facts["mean"]) / facts["std"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = make_small_resnet(runs.SYNCHRONIZED, 3)
    return jax.nn.softmax(model.apply(variables, jnp.asarray(standardized, jnp.float32), False))


def read_csv(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        header, *rows = csv.reader(stream)
    return header, [row[:2] for row in rows], np.array([row[2:] for row in rows], np.float64)


# --- predictions --------------------------------------------------------------------------------


def test_predictions_are_those_of_the_model(home, command, tmp_path):
    x, y = pixels(9, seed=5)
    write_folder(tmp_path, x[:3], y[:3], [".", ".", "."])
    for number in range(3):
        (tmp_path / f"{number:03}.png").rename(tmp_path / f"{number}.png")
    write_folder(tmp_path / "more", x[3:5], y[3:5], [".", ".", "."])
    # Colour without colours is grayscale.
    Image.fromarray(x[5]).convert("RGB").save(tmp_path / "rgb.BMP")
    np.savez(tmp_path / "a.npz", x=x[6:])
    before = files(home), files(tmp_path)
    given = ("0.png", "a.npz", "more", "rgb.BMP", "2.png", "1.png")
    code, out, err = command("predict", home / "run", *given, "--out", "p.csv")
    assert (code, err) == (0, "")
    names = ["0.png", "a.npz[0]", "a.npz[1]", "a.npz[2]", "more/000.png", "more/001.png",
             "rgb.BMP", "2.png", "1.png"]  # fmt: skip
    order = [0, 6, 7, 8, 3, 4, 5, 2, 1]
    header, rows, probabilities = read_csv(tmp_path / "p.csv")
    assert header == ["file", "class", *(f"p({name})" for name in NAMES)]
    expected = np.asarray(define_probabilities(home / "run", x[order]), np.float64)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    assert rows == [[name, NAMES[row.argmax()]] for name, row in zip(names, expected, strict=True)]
    # It has learned what is easy, in the order of the names and not of the labels.
    right = [name == NAME_OF[label] for (_, name), label in zip(rows, y[order], strict=True)]
    assert sum(right) >= 8
    lines = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    for row, (name, chosen), probability in zip(lines, rows, probabilities, strict=True):
        second = np.argsort(probability)[-2]
        assert [cell.strip() for cell in row] == [
            name, chosen, f"{probability.max():.1%}", NAMES[second], f"{probability[second]:.1%}",
        ]  # fmt: skip
    assert out.endswith("Saved in p.csv\n")
    assert files(home) == before[0]
    (tmp_path / "p.csv").unlink()
    assert files(tmp_path) == before[1]


def test_classes_without_names_are_numbers(home, command, tmp_path):
    x, _ = pixels(60, seed=6)
    np.savez(tmp_path / "a.npz", x=x)
    code, out, err = command("predict", home / "unnamed", "a.npz", "--out", "p.csv")
    assert (code, err) == (0, "")
    header, rows, probabilities = read_csv(tmp_path / "p.csv")
    assert header == ["file", "class", "p(0)", "p(1)", "p(2)"]
    expected = np.asarray(define_probabilities(home / "unnamed", x), np.float64)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    assert [row[1] for row in rows] == [str(label) for label in expected.argmax(1)]
    assert sum("│ a.npz[" in line for line in out.splitlines()) == 50
    assert "\nand 10 more images; --out FILE.csv writes all\n" in out


def test_recalibrated_and_folded_runs(home, command, tmp_path):
    """In a process too, which gets the folded one: its program is independent of the model."""
    x, _ = pixels(6, seed=5)
    write_folder(tmp_path / "new", x, [0] * 6, ["."])
    shown = {}
    for name in ("recalibrate", "fold"):
        assert command(name, home / "run", "--out", name)[0] == 0
        code, out, err = command("predict", name, "new", "--out", f"{name}.csv")
        assert (code, err) == (0, "")
        header, rows, probabilities = read_csv(tmp_path / f"{name}.csv")
        assert header[2:] == [f"p({name})" for name in NAMES]
        assert [row[0] for row in rows] == [f"new/{number:03}.png" for number in range(6)]
        of = home / "run" if name == "fold" else tmp_path / name
        expected = np.asarray(define_probabilities(of, x), np.float64)
        np.testing.assert_allclose(probabilities, expected, atol=5e-5)
        shown[name] = out
    root = os.path.dirname(os.path.dirname(os.path.dirname(cli.__file__)))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bn_jax.lab.command", "predict", "fold", "new"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown["fold"].replace("Saved in fold.csv\n", "")


def test_predict_refuses(home, command, tmp_path):
    x, y = pixels(3)
    write_folder(tmp_path, x, y, [".", ".", "."])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full.csv").touch()
    os.mkfifo(tmp_path / "pipe")
    np.savez(tmp_path / "y.npz", y=y)
    np.savez(tmp_path / "wide.npz", x=np.zeros((3, 4, 5)))
    np.savez(tmp_path / "first.npz", x=np.zeros((3, 1, 4, 4)))
    np.savez(tmp_path / "colour.npz", x=np.zeros((3, 4, 4, 3)))
    (copy_of(home / "run", tmp_path / "damaged") / "checkpoint/manifest.ocdbt").write_bytes(b"0")
    run = home / "run"
    cases = {
        (run, "000.png", "large.png", "wide.png", "000.png"): "FILES: images have the size (height "
        "x width) 4x4 (2 images, e.g. 000.png), 8x8 (1 image, large.png), 4x5 (1 image, wide.png), "
        "expected 4x4 as in training; resize or crop them",
        (run, "large.png"): "FILES: images have the size (height x width) 8x8 (1 image, large.png)",
        (run, "text.png"): "FILES: text.png cannot be read as an image (cannot identify image file",
        (run, "notes.txt"): "FILES: notes.txt cannot be read as an image (cannot identify",
        (run, "colour.png"): "FILES: colour.png is in colour, expected grayscale as the run",
        (run, "no.png"): "FILES: no.png does not exist; give an image file",
        (run, "no.npz"): "FILES: no.npz does not exist; give the path of an .npz file",
        (run, "pipe"): "FILES: pipe cannot be read as an image (pipe is a pipe, expected a reg",
        (run, "empty"): "FILES: empty holds no image (.bmp, ",
        (run, home / "photos"): f"FILES: {home / 'photos'} holds the folder {NAMES[0]}, expected",
        (run, "y.npz"): "FILES: y.npz holds no array 'x', only ['y']; write it with numpy.savez(fi",
        (run, "wide.npz"): "FILES: received images of shape (4, 5, 1), expected (4, 4, 1) [H, W, C]"
        " as the run was trained on; resize them",
        (run, "first.npz"): "FILES: received images of shape (1, 4, 4), expected (4, 4, 1) [H, W, "
        "C] as the run was trained on; they have their channels first: x.transpose(0, 2, 3, 1)",
        (run, "colour.npz"): "FILES: received images of shape (4, 4, 3), expected (4, 4, 1) [H, W, "
        "C] as the run was trained on; give images with as many channels",
        (run, "n" * 300): "FILES: nnn",
        (run, "000.png", "--out", "full.csv"): "--out: full.csv exists; choose another name or",
        (run, "000.png", "--out", "no/a.csv"): "--out: no/a.csv cannot be made (No such file",
        ("damaged", "000.png"): "DIR: damaged/checkpoint is missing or damaged",
        ("no run", "000.png"): "DIR: no run does not exist, expected the folder",
        (run,): "Missing argument 'FILES'.",
    }  # fmt: skip
    before = files(tmp_path)
    for arguments, message in cases.items():
        code, out, err = command("predict", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"bn-jax: error: {message}"), (arguments, err)
        assert err.count("\n") == 1, arguments
    assert files(tmp_path) == before


def test_pixels_of_another_range(home, command, tmp_path):
    """Training pixels are from some 70 to some 110."""
    x, _ = pixels(3)
    Image.fromarray(x[0]).save(tmp_path / "good.png")
    Image.fromarray((x[0] > 90).astype(np.uint8) * 255).save(tmp_path / "white.png")
    np.savez(tmp_path / "scaled.npz", x=x / 255)
    low, high = (f(np.load(home / "run/test.npz")["x"]) for f in (np.min, np.max))
    assert command("predict", home / "run", "good.png")[2] == ""
    for name, span in {"white.png": "0 to 255", "scaled.npz": "0."}.items():
        code, out, err = command("predict", home / "run", name)
        assert code == 0 and f" {name}" in out
        assert err.startswith(f"bn-jax: warning: FILES: pixels are from {span}")
        assert f"but from {low:g} to {high:g} in the test part of the run: what is pr" in err
        assert err.count("\n") == 1


def test_files_that_are_ignored_are_told(home, command, tmp_path):
    x, y = pixels(3)
    write_folder(tmp_path / "new", x, y, [".", ".", "."])
    (tmp_path / "new/photo.heic").touch()
    write_folder(tmp_path / "classes", x, y)
    (tmp_path / "classes/README").touch()
    for arguments, start in {
        ("predict", home / "run", "new"): "FILES: 1 file without the suffix of an image (.bmp, ",
        ("eval", home / "run", "--data", "classes"): "--data: 1 file without the suffix of an ima",
    }.items():
        code, out, err = command(*arguments)
        assert code == 0 and out
        assert err.startswith(f"bn-jax: warning: {start}") and err.count("\n") == 1
        assert "ignored, e.g. " in err


def test_digits_as_bytes_are_noticed():
    """scikit-learn's digits are from 0 to 16; a user's picture is not."""
    known = data.load_digits().x
    assert prediction.warn_of_range(known[:1], known) == []
    (large,) = prediction.warn_of_range(known[:1] * 16, known)
    assert "pixels are from 0 to 240, but from 0 to 16" in large
    (scaled,) = prediction.warn_of_range(known[:1] / np.float32(16), known)
    assert "pixels are from 0 to 0.9375, but from 0 to 16" in scaled


def test_a_name_that_is_no_text(home, command, tmp_path):
    x, _ = pixels(1)
    Image.fromarray(x[0]).save(tmp_path / "a.png")
    name = os.fsdecode(b"\xff[bold].png")
    (tmp_path / "a.png").rename(tmp_path / name)
    code, out, err = command("predict", home / "run", name, "--out", "p.csv")
    assert (code, err) == (0, "") and "\N{REPLACEMENT CHARACTER}[bold].png" in out
    assert read_csv(tmp_path / "p.csv")[1][0][0] == name


# --- runs on folders and on datasets ------------------------------------------------------------


def test_a_run_remembers_its_classes(home):
    metrics = json.loads((home / "run/metrics.json").read_text())
    assert metrics["data"]["class_names"] == list(NAMES)
    assert metrics["config"]["data"] == str(home / "photos")
    assert runs.read_run(home / "run").class_names == NAMES
    assert runs.read_run(home / "unnamed").class_names is None


def test_folders_for_saved_runs(home, command, tmp_path):
    """The same images as arrays and as a folder that lacks a class give the same."""
    x, y = pixels(40, seed=5)
    kept = y != 1
    write_folder(tmp_path / "new", x[kept], y[kept])
    labels = np.array([NAMES.index(NAME_OF[label]) for label in y[kept]])
    order = np.argsort(labels, kind="stable")
    np.savez(tmp_path / "new.npz", x=x[kept][order], y=labels[order])
    for name in ("eval", "audit", "recalibrate"):
        said = []
        for number, given in enumerate(("new", "new.npz")):
            out = [] if name == "eval" else ["--out", f"{name}{number}"]
            code, text, err = command(name, home / "run", "--data", given, *out)
            assert (code, err) == (0, "")
            said.append(text.replace("new.npz", "new").replace(f"{name}1", f"{name}0"))
        if name != "recalibrate":
            assert said[0] == said[1]
    one, other = (state_of(tmp_path / f"recalibrate{number}").batch_stats for number in (0, 1))
    assert_close(one, other, tolerance=1e-12)
    # What has other names has other labels.
    np.savez(tmp_path / "named.npz", x=x, y=y, class_names=NAME_OF)
    assert command("eval", home / "run", "--data", "named.npz")[2].startswith(
        f"bn-jax: error: --data: array class_names is {list(NAME_OF)}, expected {list(NAMES)} as in"
    )
    np.savez(tmp_path / "named.npz", x=x[kept], y=labels, class_names=NAMES)
    said = command("eval", home / "run", "--data", "named.npz")[1]
    assert said.split(" accuracy")[1] in command("eval", home / "run", "--data", "new")[1]
    # Without --data it is the training part of the folder.
    assert command("recalibrate", home / "run", "--out", "again")[0] == 0
    (tmp_path / "new" / "zebra").mkdir()
    Image.fromarray(x[0]).save(tmp_path / "new/zebra/0.png")
    code, out, err = command("eval", home / "run", "--data", "new")
    assert (code, out) == (2, "")
    assert err == (
        "bn-jax: error: --data: new has the classes 'zebra', which the run does not know, expected "
        "some of 'horizontal', 'neither [red]', 'vertical'; rename or remove these folders\n"
    )


def test_an_exported_run_knows_the_classes(home, command, tmp_path):
    assert command("export", home / "run", "--out", "new")[0] == 0
    assert bn.load_exported(tmp_path / "new").class_names == NAMES


def test_a_dataset_is_saved_with_its_run(home, command, monkeypatch, tmp_path):
    """Interrupted by a real signal, resumed by the command, and recalibrated from the same file."""
    x, y = pixels(40)
    dataset = data.from_iterable([(x, y)])
    fit = fitting.fit

    def interrupted_fit(*arguments, **options):
        for number, reached in enumerate(fit(*arguments, **options)):
            yield reached
            if number == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    request = trainer.Request(
        data.NamedDataset(dataset, NAME_OF), tmp_path / "new", devices=1, epochs=3, batch_size=16
    )
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit", interrupted_fit)
        with pytest.raises(CommandError, match="interrupted; continue with bn-jax train --resume"):
            trainer.start(request)
    assert command("train", "--resume", "new")[0] == 0
    saved = runs.read_run(tmp_path / "new")
    assert saved.class_names == NAME_OF
    assert saved.data_file is not None and saved.data_file == tmp_path / "new/data.npz"
    np.testing.assert_array_equal(data.load_npz(saved.data_file).x, dataset.x)
    code, _, err = command("recalibrate", "new")
    assert (code, err) == (0, "")
    # A finished run is not overwritten.
    finished = files(tmp_path)
    with pytest.raises(CommandError, match="new exists and is not empty; choose another name"):
        trainer.start(request)
    assert files(tmp_path) == finished


def test_full_disks(home, command, tmp_path):
    np.savez(tmp_path / "many.npz", x=pixels(99)[0])
    x, y = np.random.default_rng(0).normal(size=(99, 8, 8, 1)), np.arange(99) % 3
    noise = data.from_iterable([(x, y)])
    with small_disk(tmp_path / "disk", "8k"):
        with pytest.raises(CommandError, match=r"No space left on device.*; nothing was saved"):
            trainer.start(trainer.Request(noise, tmp_path / "disk/run", devices=1))
        assert list((tmp_path / "disk").iterdir()) == []
        options = ("many.npz", "--out", tmp_path / "disk/p.csv")
        code, _, err = command("predict", home / "run", *options)
        assert code == 1 and err.startswith("bn-jax: error: [Errno 28] No space left on device")
        assert err.count("\n") == 1 and list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    "names", [["a"], ["a", "b", "b"], ["a", "b", "\x1b[2J"], [0, 1, 2], "abc", {"a": 1}]
)
def test_names_of_classes_that_a_run_cannot_have(home, tmp_path, names):
    path = copy_of(home / "run", tmp_path / "run") / "metrics.json"
    metrics = json.loads(path.read_text())
    # As a run of version 0.2.0, which sealed nothing.
    del metrics["sha256"]
    del metrics["data"]["class_names"]
    path.write_text(json.dumps(metrics))
    assert runs.read_run(tmp_path / "run").class_names is None
    metrics["data"]["class_names"] = names
    path.write_text(json.dumps(metrics))
    message = r"class_names.*expected|expected.*class_names"
    with pytest.raises(CommandError, match=message) as caught:
        runs.read_run(tmp_path / "run")
    assert caught.value.code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "dataset",
    [
        (np.zeros((9, 4, 4)), np.arange(9) % 3),
        (bars()["x"], bars()["y"] / 2),
        (bars()["x"], np.zeros(60, int)),
    ],
)
def test_a_dataset_that_cannot_be_learned_leaves_nothing(dataset, tmp_path):
    with pytest.raises(CommandError, match="--data: "):
        trainer.start(trainer.Request(data.Dataset(*dataset), tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_train_tells_once_what_looks_like_a_mistake(command, tmp_path):
    arrays = bars(30)
    np.savez(tmp_path / "odd.npz", x=arrays["x"], y=1 + (np.arange(30) > 26))
    options = ("--data", "odd.npz", "--epochs", "1", "--devices", "2", "--out", "run")
    code, out, err = command("train", *options)
    assert code == 0 and "warning" not in out
    lines = err.splitlines()
    starts = itertools.repeat("bn-jax: warning: --data: ")
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert len(lines) == len(set(lines)) >= 2
    assert "labels start at 1, so class 0 has no example" in lines[0]
    assert "1 of 2 classes with fewer than 10 examples" in lines[1]

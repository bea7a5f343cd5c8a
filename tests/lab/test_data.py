import io
import itertools
import os
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from support import bars

from bn_jax.lab import data
from bn_jax.lab.datasets import oddities, problem
from bn_jax.lab.errors import CommandError


def numbered(examples):
    """Images that carry their own number, so that each can be recognized."""
    x = np.broadcast_to(
        np.arange(examples, dtype=np.float32)[:, None, None, None], (examples, 2, 2, 1)
    )
    return data.Dataset(x, np.arange(examples, dtype=np.int32))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("examples", [1, 7, 8, 9, 17])
def test_every_example_is_in_exactly_one_batch(examples, shuffled):
    rng = np.random.default_rng(0) if shuffled else None
    seen = []
    for batch in data.batches(numbered(examples), 8, rng):
        assert batch.x.shape == (8, 2, 2, 1) and batch.y.shape == (8,) and batch.mask.shape == (8,)
        assert batch.x.dtype == np.float32 and batch.y.dtype == np.int32
        np.testing.assert_array_equal(batch.x[batch.mask][:, 0, 0, 0], batch.y[batch.mask])
        assert not batch.x[~batch.mask].any()
        seen.extend(batch.y[batch.mask].tolist())
    assert sorted(seen) == list(range(examples))
    assert (seen == list(range(examples))) == (not shuffled or examples == 1)


@pytest.mark.parametrize("examples", [1, 7, 9, 16])
def test_rows_are_those_of_the_whole_batch(examples):
    whole, first, second = (
        list(data.batches(numbered(examples), 8, np.random.default_rng(0), rows))
        for rows in (slice(None), slice(0, 4), slice(4, 8))
    )
    assert len(whole) == len(first) == len(second)
    for batch, *parts in zip(whole, first, second, strict=True):
        for leaf, *rows in zip(batch, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(rows), leaf)


@pytest.mark.parametrize("examples", [3, 4, 5, 9, 10, 11, 100, 1797])
def test_split_covers_the_dataset_without_overlap(examples):
    splits = data.split(numbered(examples), seed=1)
    parts = [part.y.tolist() for part in splits]
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == list(range(examples))
    for part in splits:
        np.testing.assert_array_equal(part.x[:, 0, 0, 0], part.y)
    if examples >= 100:
        shares = [len(part) / examples for part in parts]
        np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.01)


def test_split_depends_on_the_seed_alone():
    def first(seed):
        return data.split(numbered(50), seed).test.y.tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_split_of_two_examples():
    with pytest.raises(ValueError, match="received 2 examples, expected at least 3"):
        data.split(numbered(2), 0)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_standardized_training_images_have_mean_0_and_std_1(offset):
    x = np.random.default_rng(0).normal(offset, 3.0, (200, 4, 4, 1)).astype(np.float32)
    dataset = data.Dataset(x, np.zeros(200, np.int32))
    standardized = data.standardize(dataset, *data.mean_and_std(dataset))
    assert standardized.x.dtype == np.float32
    np.testing.assert_allclose(standardized.x.mean(dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(standardized.x.std(dtype=np.float64), 1, rtol=1e-6)


def test_constant_images_cannot_be_standardized():
    dataset = data.Dataset(np.full((3, 2, 2, 1), 7, np.float32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"every pixel of x in the training part is 7\.0"):
        data.mean_and_std(dataset)


def test_digits():
    digits = data.load_digits()
    assert digits.x.shape == (1797, 8, 8, 1) and digits.x.dtype == np.float32
    assert digits.y.dtype == np.int32
    assert (digits.x.min(), digits.x.max()) == (0, 16)
    assert set(digits.y.tolist()) == set(range(10))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_load_npz(tmp_path, dtype, channels):
    x = np.arange(5 * 2 * 3).reshape((5, 2, 3) + (1,) * len(channels))
    x = np.broadcast_to(x, (5, 2, 3, *channels)).astype(dtype)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([0, 1, 2, 1, 0], np.uint16))
    dataset = data.load_npz(tmp_path / "d.npz")
    assert dataset.x.shape == (5, 2, 3, *(channels or (1,))) and dataset.x.dtype == np.float32
    np.testing.assert_array_equal(dataset.x[0, :, :, 0].ravel(), np.arange(6))
    assert dataset.y.tolist() == [0, 1, 2, 1, 0] and dataset.y.dtype == np.int32


X = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
Y = np.array([0, 1, 2, 0, 1, 2])
WITH_NAN = np.where(X == 3, np.nan, X)
RENUMBERED = r"number the classes, e\.g\. y = numpy\.unique\(y, return_inverse=True\)\[1\]"
RECORDS = np.zeros(6, [("pixels", "f4", (2, 2)), ("label", "i4")])
BAD_ARRAYS = {
    "no y": (dict(x=X), r"holds no array 'y', only \['x'\]; write it with numpy.savez"),
    "neither": (dict(a=X), r"holds no array 'x' and no array 'y', only \['a'\]"),
    "objects": (dict(x=X.astype(object), y=Y), "array x of .* never unpickled, expected numbers"),
    "labels as objects": (dict(x=X, y=Y.astype(object)), "array y of .* never unpickled"),
    "flat images": (dict(x=X[:, 0], y=Y), r"x has shape \(6, 2\), expected non-empty \[N, H, W\]"),
    "flat squares": (dict(x=np.zeros((6, 49)), y=Y), r"reshape it, e\.g\. x\.reshape\(-1, 7, 7\)$"),
    "flat colour": (
        dict(x=np.zeros((6, 48)), y=Y),
        r"x\.reshape\(-1, 4, 4, 3\), or x\.reshape\(-1, 3, 4, 4\)\.transpose\(0, 2, 3, 1\)$",
    ),
    "rank 5": (dict(x=X[..., None, None], y=Y), r"x has shape \(6, 2, 2, 1, 1\)"),
    "no images": (dict(x=X[:0], y=Y[:0]), r"x has shape \(0, 2, 2\), expected non-empty"),
    "images without pixels": (dict(x=X[:, :0], y=Y), r"x has shape \(6, 0, 2\), expected non-em"),
    "swapped": (dict(x=Y, y=X), r"x has shape \(6,\) and array y \(6, 2, 2\), .*swap them"),
    "swapped columns": (dict(x=Y[:, None], y=X[..., None]), "swap them"),
    "text": (dict(x=X.astype(str), y=Y), "x has dtype <U32, expected real numbers; cast it"),
    "yes and no": (dict(x=X > 3, y=Y), r"x has dtype bool, .*cast it, e\.g\. x\.astype\('float32"),
    "complex": (dict(x=X * 1j, y=Y), r"x has dtype complex64, .*e\.g\. numpy\.abs\(x\)"),
    "bfloat16": (
        dict(x=X.astype(jnp.bfloat16), y=Y),
        r"x has dtype \|V2, expected real numbers; .*cast before saving, x\.astype\('float32'\)",
    ),
    "records": (
        dict(x=np.broadcast_to(RECORDS[:, None, None], (6, 2, 2)), y=Y),
        "x has dtype records with the fields pixels, label, expected real numbers; store the num",
    ),
    "NaN": (
        dict(x=WITH_NAN, y=Y),
        r"x holds NaN, infinity or numbers beyond float32, .*\(1 of 24 are not, the first in image "
        "0",
    ),
    "infinity": (dict(x=np.where(X == 22, np.inf, X), y=Y), "NaN.* in image 5"),
    "too large": (
        dict(x=X.astype(float) * 1e300, y=Y),
        "numbers beyond float32, expected finite numbers",
    ),
    "too few labels": (
        dict(x=X, y=Y[:5]),
        r"y has shape \(5,\), expected \(6,\), one label per image of x; add labels$",
    ),
    "too many labels": (dict(x=X[:5], y=Y), r"y has shape \(6,\), expected \(5,\), .*; remove lab"),
    "images last": (
        dict(x=np.zeros((4, 4, 3, 9)), y=np.arange(9) % 3),
        r"expected \(4,\), .*9 images along the last axis: x = numpy\.moveaxis\(x, -1, 0\)",
    ),
    "a column of labels": (dict(x=X, y=Y[:, None]), r"\(6, 1\), .*reshape it: y\.reshape\(-1\)"),
    "a row of labels": (dict(x=X, y=Y[None]), r"\(1, 6\), .*reshape it: y\.reshape\(-1\)"),
    "one-hot labels": (
        dict(x=X, y=np.eye(3)[Y]),
        r"y has shape \(6, 3\), expected \(6,\), .*one-hot; .*numpy\.argmax\(y, axis=1\)",
    ),
    "labels for each pixel": (
        dict(x=X, y=np.ones((6, 2, 2))),
        r"y has shape \(6, 2, 2\), expected",
    ),
    "whole floats": (dict(x=X, y=Y * 1.0), r"y has dtype float64, .*cast it, e\.g\. y\.astype"),
    "float labels": (dict(x=X, y=Y / 2), f"y has dtype float64, .*it holds 0\\.5, .*{RENUMBERED}"),
    "no label": (dict(x=X, y=np.where(Y, Y, np.nan)), "y has dtype float64, .*remove these exampl"),
    "booleans": (dict(x=X, y=Y > 0), r"y has dtype bool, .*cast it: y\.astype\('int32'\)"),
    "names": (dict(x=X, y=Y.astype(str)), f"y has dtype <U21, expected integers; {RENUMBERED}"),
    "bfloat16 labels": (dict(x=X, y=Y.astype(jnp.bfloat16)), r"y has dtype \|V2, .*before saving"),
    "records of labels": (
        dict(x=X, y=RECORDS),
        "y has dtype records with the fields pixels, label",
    ),
    "negative labels": (dict(x=X, y=Y - 1), r"y holds labels from -1 to 1, expected 0 to 5"),
    "huge labels": (dict(x=X, y=Y + 2**40), r"labels from 1099511627776 to .*expected 0 to 5"),
    "huger labels": (
        dict(x=X, y=Y.astype("u8") + 2**63),
        r"labels from 922.* to .*expected 0 to 5",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_load_npz_refuses_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load_npz(tmp_path / "bad.npz")


def npy():
    file = io.BytesIO()
    np.save(file, X)
    return file.getvalue()


def zipped_text():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", "no array")
        archive.writestr("y", "no array")
    return file.getvalue()


def truncated():
    file = io.BytesIO()
    np.savez(file, x=X, y=Y)
    return file.getvalue()[:-40]


BAD_BYTES = {
    "empty": b"",
    "text": b"x,y\n1,2\n",
    "zip magic": b"PK\x03\x04 and nothing more",
    "npy": npy(),
    "zip of text": zipped_text(),
    "truncated": truncated(),
}


def test_a_file_that_decompresses_to_more_than_the_memory(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=X, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.npy", b"")
        archive.getinfo("x.npy").file_size = 2**45
    with pytest.raises(ValueError, match=r"its arrays need 35,184\.4 GB of memory, expected at mo"):
        data.load_npz(path)


@pytest.mark.parametrize("content", BAD_BYTES.values(), ids=BAD_BYTES)
def test_load_npz_refuses_files(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    message = (
        r"bad\.npz cannot be read as an \.npz file of numbers|array x has shape \(\), expected"
    )
    with pytest.raises(ValueError, match=message):
        data.load_npz(path)


def test_load_npz_refuses_folders_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    for name, message in {
        "": r"cannot be read as an \.npz file of numbers \(.* is a folder, expected a regular f",
        "no.npz": r"no\.npz does not exist; give the path",
        "pipe.npz": "pipe.npz is a pipe, expected a regular file",
        "loop.npz": "Too many levels of symbolic links",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load_npz(tmp_path / name)


def test_load_npz_with_known_classes(tmp_path):
    np.savez(tmp_path / "d.npz", x=X[:2], y=np.array([7, 9]))
    assert data.load_npz(tmp_path / "d.npz", num_classes=10).y.tolist() == [7, 9]
    with pytest.raises(ValueError, match=r"from 7 to 9, expected 0 to 8 \(9 classes\)"):
        data.load_npz(tmp_path / "d.npz", num_classes=9)


# What an error advises, and the array that it is the new value of.
ADVISED = {
    "flat squares": ("x", "x.reshape(-1, 7, 7)"),
    "flat colour": ("x", "x.reshape(-1, 3, 4, 4).transpose(0, 2, 3, 1)"),
    "text": ("x", "x.astype('float32')"),
    "yes and no": ("x", "x.astype('float32')"),
    "complex": ("x", "numpy.abs(x)"),
    "bfloat16": ("x", "x.astype('float32')"),
    "images last": ("x", "numpy.moveaxis(x, -1, 0)"),
    "a column of labels": ("y", "y.reshape(-1)"),
    "a row of labels": ("y", "y.reshape(-1)"),
    "one-hot labels": ("y", "numpy.argmax(y, axis=1)"),
    "whole floats": ("y", "y.astype('int32')"),
    "float labels": ("y", "numpy.unique(y, return_inverse=True)[1]"),
    "booleans": ("y", "y.astype('int32')"),
    "names": ("y", "numpy.unique(y, return_inverse=True)[1]"),
    "bfloat16 labels": ("y", "y.astype('int32')"),
    "negative labels": ("y", "numpy.unique(y, return_inverse=True)[1]"),
    "huge labels": ("y", "numpy.unique(y, return_inverse=True)[1]"),
    "huger labels": ("y", "numpy.unique(y, return_inverse=True)[1]"),
}


@pytest.mark.parametrize("case", ADVISED)
def test_the_advice_of_an_error_works(tmp_path, case):
    arrays, _ = BAD_ARRAYS[case]
    name, advice = ADVISED[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError) as caught:
        data.load_npz(tmp_path / "bad.npz")
    assert advice in str(caught.value)
    fixed = eval(advice, {"numpy": np, **arrays})
    np.savez(tmp_path / "good.npz", **{**arrays, name: fixed})
    assert len(data.load_npz(tmp_path / "good.npz").y) == (9 if case == "images last" else 6)


def test_class_names_of_an_npz(tmp_path):
    saved, names = data.Dataset(X[..., None], Y.astype(np.int32)), ("cat", "dög", "emu", "fox")
    data.save_npz(tmp_path / "d.npz", saved, names)
    loaded, read = problem.load_labelled(tmp_path / "d.npz")
    assert read == names and problem.load(tmp_path / "d.npz", 0).num_classes == 4
    for part, whole in zip(loaded, saved, strict=True):
        assert part.dtype == whole.dtype
        np.testing.assert_array_equal(part, whole)
    data.save_npz(tmp_path / "unnamed.npz", saved)
    assert problem.load_labelled(tmp_path / "unnamed.npz").class_names is None


BAD_NAMES = {
    "too few": (["a", "b"], "class_names has 2 names, expected 3 or more, one for each class; add"),
    "equal": (["a", "b", "b"], "class_names has equal or empty names, or control characters"),
    "empty": (["a", "b", ""], "class_names has equal or empty names, or control characters"),
    "of a terminal": (["a", "b", "\x1b[2J"], "equal or empty names, or control characters"),
    "numbers": ([0, 1, 2], r"class_names has shape \(3,\) and dtype int64, expected strings, one"),
    "objects": ([["a"], None, 2], "array class_names of .* holds Python objects, which are never"),
    "a table": ([["a"], ["b"], ["c"]], r"class_names has shape \(3, 1\) and dtype <U1, expected"),
}


@pytest.mark.parametrize(("names", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_class_names_that_are_none(tmp_path, names, message):
    array = np.array(names, object if None in names else None)
    np.savez(tmp_path / "d.npz", x=X, y=Y, class_names=array)
    with pytest.raises(CommandError, match=f"--data: .*{message}"):
        problem.load(tmp_path / "d.npz", 0)


def test_load_images_needs_no_labels(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    np.testing.assert_array_equal(data.load_images(tmp_path / "x.npz"), X[..., None])
    np.savez(tmp_path / "y.npz", y=Y)
    with pytest.raises(ValueError, match=r"no array 'x', only \['y'\].*savez\(file, x=images\)$"):
        data.load_images(tmp_path / "y.npz")


# --- what looks like a mistake ------------------------------------------------------------------


def odd(x, y, class_names=None, seed=0):
    dataset = data.check_dataset(data.Dataset(x, y))
    splits = data.split(dataset, seed)
    return oddities.find_oddities(data.NamedDataset(dataset, class_names), splits)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def classes(*counts):
    """Images of noise and labels, of which there are so many of each class."""
    y = np.repeat(np.arange(len(counts)), counts)
    return noise(len(y), 5, 5), y


def test_ordinary_data_have_nothing_odd():
    assert odd(**bars()) == ()
    assert odd(*classes(10, 10)) == ()
    assert odd(noise(30, 32, 32, 3), np.arange(30) % 3) == ()
    assert odd(noise(30, 3, 3, 3), np.arange(30) % 3) == ()
    assert odd(noise(30, 4, 4, 4), np.arange(30) % 3) == ()
    assert odd(noise(30, 1, 1, 64), np.arange(30) % 3) == ()
    assert odd(noise(20, 256, 256, 1)[:, :, :, 0], np.arange(20) % 2) == ()
    assert odd(*data.load_digits()) == ()


ODD = {
    "from 1": (*classes(0, 20, 20), "labels start at 1, so class 0 has no example: an output"),
    "from 3": (*classes(0, 0, 0, 20, 20), "labels start at 3, so classes 0 to 2 have no example"),
    "a gap": (*classes(20, 0, 20), "labels up to 2 leave out 1: an output of the network is"),
    "gaps": (*classes(0, 20, 0, 20), "labels up to 3 leave out 0, 2: "),
    "many gaps": (*classes(20, *[0] * 8, 20), "leave out 1, 2, 3, 4, 5 and 3 more: "),
    "few": (
        *classes(9, 20, 10),
        "1 of 3 classes with fewer than 10 examples, of which the test part gets 2 on average: 0; "
        "the fewest, 9, has 0; add",
    ),
    "fewer": (*classes(9, 8, 20), "2 of 3 classes with fewer than 10 examples, .*: 0, 1; the fewe"),
    "channels first": (
        noise(30, 3, 32, 32),
        np.arange(30) % 3,
        r"images of 3 x 32 pixels with 32 channels look as .* x\.transpose\(0, 2, 3, 1\)",
    ),
    "one channel first": (noise(30, 1, 28, 28), np.arange(30) % 3, "images of 1 x 28 pixels with"),
    "alpha first": (noise(30, 4, 9, 7), np.arange(30) % 3, "images of 4 x 9 pixels with 7 channe"),
    "opaque": (
        np.concatenate([noise(30, 5, 5, 3), np.full((30, 5, 5, 1), 255)], axis=3),
        np.arange(30) % 3,
        r"channel 3 of 4 is 255 in every pixel, .* numpy\.delete\(x, \[3\], axis=-1\)",
    ),
    "large": (noise(20, 256, 257), np.arange(20) % 2, "images have 256x257 pixels, more than 256x"),
    "one image of two classes": (
        np.concatenate([noise(99, 5, 5), noise(1, 5, 5)]),
        np.arange(100) % 2,
        "1 images occur with different labels, e.g. 0 and 1; check how y was written",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("x", "y", "line"), ODD.values(), ids=ODD)
def test_what_looks_like_a_mistake(x, y, line):
    found = odd(x, y)
    assert len(found) == 1 and "\n" not in found[0]
    with pytest.raises(AssertionError, match=line):
        raise AssertionError(found[0])


def test_test_images_that_are_in_the_training_part():
    x, y = np.concatenate([noise(30, 5, 5)] * 2), np.tile(np.arange(30) % 3, 2)
    train, _, test = (part.y.tolist() for part in data.split(numbered(60), 0))
    copies = sum((number + 30) % 60 in train for number in test)
    (line,) = odd(x, y)
    assert line.startswith(f"{copies} of 12 test images are in the training part too, ")
    advice = "first = numpy.unique(x, axis=0, return_index=True)[1]; x, y = x[first], y[first]"
    assert line.endswith(advice)
    names = {"numpy": np, "x": x, "y": y}
    exec(advice, names)
    assert len(names["y"]) == 30 and odd(names["x"], names["y"]) == ()
    # A few among many are no mistake.
    x, y = noise(2000, 5, 5), np.arange(2000) % 3
    train, _, test = (part.y.tolist() for part in data.split(numbered(2000), 0))
    for copy, (image, label) in zip(test[:3], zip(train, y[train], strict=True), strict=False):
        x[copy], y[copy] = x[image], label
    assert odd(x, y) == ()
    for copy, (image, label) in zip(test[:4], zip(train, y[train], strict=True), strict=False):
        x[copy], y[copy] = x[image], label
    assert "4 of 400 test images" in odd(x, y)[0]


def test_a_class_that_the_training_part_lacks():
    x, y = classes(30, 30, 1)
    # The single example is in the training part of most seeds.
    lacking = [seed for seed in range(20) if 2 not in data.split(data.Dataset(x, y), seed).train.y]
    for seed in (lacking[0], min(set(range(20)) - set(lacking))):
        found = odd(x, y, ("cat", "dog", "emu"), seed)
        assert found[0].startswith("1 of 3 classes with fewer than 10 examples")
        lines = [line for line in found if "no example of class 2 (emu), which cannot be" in line]
        assert len(lines) == (seed in lacking)
        assert len(found) == 1 + len(lines)


# --- iterables ----------------------------------------------------------------------------------


PAIRS = list(zip(X, Y.tolist(), strict=True))
SOURCES = {
    "pairs": PAIRS,
    "lists": [list(pair) for pair in PAIRS],
    "a generator": (pair for pair in PAIRS),
    "x and y": [{"x": x, "y": np.int64(y)} for x, y in PAIRS],
    "image and label": [{"image": x[..., None], "label": y, "id": b"1"} for x, y in PAIRS],
    "batches": [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "dictionaries": [{"images": X[:1], "labels": Y[:1]}, {"images": X[1:], "labels": Y[1:]}],
    "padded batches": list(data.batches(data.Dataset(X[..., None], Y), 4)),
    "masked dictionaries": [{"x": X[[0, 5, 1]], "y": Y[[0, 5, 1]], "mask": np.array([1, 0, 1])},
                            {"x": X[:2], "y": Y[:2], "mask": [False, False]},
                            (X[2:], Y[2:])],
    "arrays of JAX": [(jnp.asarray(x), jnp.asarray(y)) for x, y in PAIRS],
    "nested lists": [(x.tolist(), y) for x, y in PAIRS],
    "half precision": [(x.astype(jnp.bfloat16), y) for x, y in PAIRS],
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_from_iterable(source):
    dataset = data.from_iterable(source)
    assert dataset.x.dtype == np.float32 and dataset.y.dtype == np.int32
    np.testing.assert_array_equal(dataset.x, X[..., None])
    assert dataset.y.tolist() == Y.tolist()


def test_from_an_iterable_of_unknown_length():
    assert data.from_iterable(Unsized()).y.tolist() == Y.tolist()


def test_from_an_endless_iterable():
    dataset = data.from_iterable(itertools.cycle(PAIRS), max_examples=8)
    assert dataset.y.tolist() == [*Y.tolist(), 0, 1]
    batches = itertools.cycle([(X, Y)])
    assert data.from_iterable(batches, max_examples=8).y.tolist() == [*Y.tolist(), 0, 1]
    assert data.from_iterable(PAIRS, max_examples=8).y.tolist() == Y.tolist()


class Unsized:
    """As a loader of PyTorch over a data set without length."""

    def __len__(self):
        raise TypeError("it has no length")

    def __iter__(self):
        return iter(PAIRS)


class Endless:
    """As long as a data set of Grain that repeats."""

    def __len__(self):
        return sys.maxsize

    def __iter__(self):
        raise AssertionError("nobody has to wait until it is noticed")


def masked():
    while True:
        yield {"x": X, "y": Y, "mask": np.zeros(6)}


LARGE = (np.broadcast_to(np.float32(0), (40_000, 1_000, 1_000)), np.zeros(40_000, np.int32))
BAD_SOURCES = {
    "no iterable": (7, TypeError, "source is of type int, expected an iterable"),
    "a path": ("data.npz", TypeError, "source is of type str, .* use load_npz"),
    "a dictionary of arrays": ({"x": X, "y": Y}, TypeError, r"is of type dict, .* zip\(x, y\)"),
    "two arrays": ((X, Y), TypeError, r"element 0 of source is an array of shape \(6, 2, 2\), .*z"),
    "an array": (X, TypeError, r"element 0 of source is an array of shape \(2, 2\)"),
    "triples": ([(X[0], 1, 2)], TypeError, "element 0 of source is a tuple of 3, expected"),
    "other keys": ([{"pixels": 1}], TypeError, r"has the keys \['pixels'\], expected .*; rename"),
    "nothing": ([], ValueError, "source yielded no example; an iterator can be read only once"),
    "no label": ([(X, 1), (X, Y[:2])], ValueError, r"element 1 .* x of shape \(6, 2, 2\) and y of"),
    "one-hot": ([(X[0], np.eye(3)[0])], ValueError, r"y of shape \(3,\), expected an image and on"),
    "a long mask": ([{"x": X, "y": Y, "mask": [1]}], ValueError, r"mask of shape \(1,\), expected"),
    "ragged": ([([[1], [1, 2]], 0)], ValueError, "x of element 0 of source is no array of numbers"),
    "flat": ([(X[0, 0], 0)], ValueError, r"array x has shape \(1, 2\), expected"),
    "text": ([("abc", 0)] * 2, ValueError, "array x has shape"),
    "names": ([(x, f"class {y}") for x, y in PAIRS], ValueError, "y has dtype <U7, .* number the "),
    "NaN": ([(WITH_NAN, Y)], ValueError, "x holds NaN"),
    "sizes": (
        [*PAIRS, (np.zeros((3, 2)), 0), (np.zeros((4, 3, 2)), Y[:4]), (np.zeros((2, 9)), 0)],
        ValueError,
        r"2x2 \(6 images, e\.g\. element 0\), 3x2 \(5 images, e\.g\. element 6\), 2x9 \(1 image, "
        r"element 8\), expected one; resize or crop",
    ),
    "endless": (itertools.repeat((X[0], 1)), ValueError, "more than 2,000 examples and may be end"),
    "endlessly nothing": (masked(), ValueError, "more than 2,000 examples and may be endless"),
    "endless sizes": (itertools.cycle([(X[0], 0), (X[:, 0], 0)]), ValueError, "may be endless"),
    "a length": (Endless(), ValueError, "may be endless, expected .* take with max_examples"),
    "large": (itertools.repeat(LARGE), ValueError, "images of 1000x1000 need .* GB of memory, exp"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "error", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_from_iterable_refuses(monkeypatch, source, error, message):
    monkeypatch.setattr(data, "ENDLESS", 2000)
    with pytest.raises(error, match=message):
        data.from_iterable(source)


def test_datasets_of_grain():
    grain = pytest.importorskip("grain")
    examples = [{"image": x, "label": y} for x, y in PAIRS]
    source = grain.MapDataset.source(examples)
    for dataset in (source, source.to_iter_dataset(), source.batch(4), source.shuffle(seed=0)):
        loaded = data.from_iterable(dataset)
        assert sorted(loaded.y.tolist()) == sorted(Y.tolist())
        order = loaded.x[:, 0, 0, 0].argsort()
        np.testing.assert_array_equal(loaded.x[order], X[..., None])
    assert len(data.from_iterable(source.repeat(), max_examples=8).y) == 8
    for forever in (source.repeat(), source.repeat().to_iter_dataset().batch(2)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="endless"):
            patch.setattr(data, "ENDLESS", 2000)
            data.from_iterable(forever)

import io
import itertools
import zipfile

import numpy as np
import pytest

from bn_jax.lab import data


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
BAD_ARRAYS = {
    "no y": (dict(x=X), r"holds no array 'y', only \['x'\]; write it with numpy.savez"),
    "neither": (dict(a=X), r"holds no array 'x' and no array 'y', only \['a'\]"),
    "objects": (dict(x=X.astype(object), y=Y), "cannot be read as an .npz file of numbers"),
    "flat images": (dict(x=X[:, 0], y=Y), r"x has shape \(6, 2\), expected non-empty \[N, H, W\]"),
    "rank 5": (dict(x=X[..., None, None], y=Y), r"x has shape \(6, 2, 2, 1, 1\)"),
    "no images": (dict(x=X[:0], y=Y[:0]), r"x has shape \(0, 2, 2\), expected non-empty"),
    "text": (dict(x=X.astype(str), y=Y), "x has dtype <U32, expected real numbers; cast it"),
    "complex": (dict(x=X * 1j, y=Y), "x has dtype complex64, expected real numbers"),
    "NaN": (dict(x=WITH_NAN, y=Y), "x holds NaN, infinity or numbers beyond float32"),
    "infinity": (dict(x=np.where(X == 3, np.inf, X), y=Y), "NaN"),
    "too large": (
        dict(x=X.astype(float) * 1e300, y=Y),
        "numbers beyond float32, expected finite numbers",
    ),
    "too few labels": (dict(x=X, y=Y[:5]), r"y has shape \(5,\), expected \(6,\), one label per"),
    "one-hot labels": (dict(x=X, y=np.eye(3)[Y]), r"y has shape \(6, 3\), expected \(6,\)"),
    "float labels": (dict(x=X, y=Y / 2), "y has dtype float64, expected integers; cast it"),
    "negative labels": (dict(x=X, y=Y - 1), r"y holds labels from -1 to 1, expected 0 to 5"),
    "huge labels": (dict(x=X, y=Y + 2**40), r"labels from 1099511627776 to .*expected 0 to 5"),
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
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_npz(tmp_path)
    with pytest.raises(ValueError, match=r"no\.npz does not exist; give the path"):
        data.load_npz(tmp_path / "no.npz")


def test_load_npz_with_known_classes(tmp_path):
    np.savez(tmp_path / "d.npz", x=X[:2], y=np.array([7, 9]))
    assert data.load_npz(tmp_path / "d.npz", num_classes=10).y.tolist() == [7, 9]
    with pytest.raises(ValueError, match=r"from 7 to 9, expected 0 to 8 \(9 classes\)"):
        data.load_npz(tmp_path / "d.npz", num_classes=9)

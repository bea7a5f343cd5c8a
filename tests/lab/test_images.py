"""Image files and folders of them: real files that Pillow writes, and worse ones."""

import os
import pty
import shutil
import struct
import sys
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from support import bars

from bn_jax.lab import data, images
from bn_jax.lab.datasets import array_checks, problem
from bn_jax.lab.errors import CommandError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
DEEP = GRAY.astype(np.uint16) * 257
OPAQUE = np.full((6, 5), 255, np.uint8)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def few_colours():
    return Image.fromarray(COLOUR).quantize(8)


def save(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


# --- files --------------------------------------------------------------------------------------

READ = {
    "gray.png": (GRAY, {}, GRAY),
    "GRAY.BMP": (GRAY, {}, GRAY),
    "gray.pgm": (GRAY, {}, GRAY),
    "colour.png": (COLOUR, {}, COLOUR),
    "colour.ppm": (COLOUR, {}, COLOUR),
    "colour.tiff": (COLOUR, {}, COLOUR),
    "colour.webp": (COLOUR, {"lossless": True}, COLOUR),
    "palette.png": (few_colours(), {}, np.asarray(few_colours().convert("RGB"))),
    "palette.gif": (few_colours(), {}, np.asarray(few_colours().convert("RGB"))),
    "two.png": (GRAY > 99, {}, np.where(GRAY > 99, 255, 0)),
    "two.pbm": (GRAY > 99, {}, np.where(GRAY > 99, 255, 0)),
    "deep.png": (DEEP, {}, DEEP),
    "deep.tif": (DEEP, {}, DEEP),
    "integers.tif": (GRAY.astype(np.int32) * 7000, {}, GRAY * 7000.0),
    "floats.tif": (GRAY.astype(np.float32) / 8, {}, GRAY / 8),
    "opaque.png": (np.dstack([COLOUR, OPAQUE]), {}, COLOUR),
    "gray opaque.png": (Image.fromarray(np.dstack([GRAY, OPAQUE]), "LA"), {}, GRAY),
    "cmyk.tif": (Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR),
    "turned.png": (COLOUR, turned(6), np.rot90(COLOUR, -1)),
    "upside down.png": (GRAY, turned(3), GRAY[::-1, ::-1]),
    "deep mirrored.png": (DEEP, turned(2), DEEP[:, ::-1]),
    "a name that lies.jpg": (COLOUR, {"format": "PNG"}, COLOUR),
}


@pytest.mark.parametrize("name", READ)
def test_pixels_are_read_as_they_are(tmp_path, name):
    image, options, pixels = READ[name]
    x = images.read_images([save(tmp_path / name, image, **options)])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, pixels.reshape(1, *pixels.shape[:2], -1))


def test_photos_of_a_camera(tmp_path):
    smooth = np.add.outer(np.arange(48), np.arange(64))[..., None].repeat(3, 2).astype(np.uint8)
    photo = save(tmp_path / "a.jpg", smooth, quality=95, **turned(8))
    # With a preview behind the photo.
    preview = Image.fromarray(smooth[::4, ::4])
    several = save(tmp_path / "b.JPG", smooth, format="MPO", save_all=True, append_images=[preview])
    np.testing.assert_allclose(images.read_images([photo])[0], np.rot90(smooth), atol=4)
    np.testing.assert_allclose(images.read_images([several])[0], smooth, atol=4)


def test_grayscale_among_colour_becomes_colour(tmp_path):
    paths = [save(tmp_path / "a.png", GRAY), save(tmp_path / "b.png", COLOUR)]
    x = images.read_images(paths)
    assert x.shape == (2, 6, 5, 3)
    np.testing.assert_array_equal(x[0], GRAY[..., None].repeat(3, 2))
    np.testing.assert_array_equal(x[1], COLOUR)
    np.testing.assert_array_equal(images.read_images(paths[:1], (6, 5, 3)), x[:1])


def test_colour_becomes_grayscale_only_where_nothing_is_lost(tmp_path):
    equal = save(tmp_path / "equal.png", GRAY[..., None].repeat(3, 2))
    colour = save(tmp_path / "colour.png", COLOUR)
    np.testing.assert_array_equal(images.read_images([equal], (6, 5, 1))[0, ..., 0], GRAY)
    message = r"colour\.png is in colour, expected grayscale .* e\.g\. with Pillow's image\.convert"
    with pytest.raises(ValueError, match=message):
        images.read_images([equal, colour], (6, 5, 1))


def png(width, height, raw):
    """A PNG in two colours, of which Pillow itself would not write so large a one."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_files_that_are_no_usable_images(tmp_path):
    large = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    other = Image.fromarray(COLOUR[::-1])
    see_through = np.dstack([COLOUR, GRAY])
    ghost = "ghostscript was here"
    cannot = "cannot be read as an image ("
    expected = {
        "text.png": cannot,
        "empty.jpg": cannot,
        "bomb.png": f"{cannot}Image size (144000000 pixels) exceeds limit of 89478485",
        "larger.png": f"{cannot}Image size (2500000000 pixels) exceeds limit",
        "script.eps": cannot,
        "an old format.png": cannot,
        "pipe.png": "pipe.png is a pipe, expected a regular file",
        "folder.png": "folder.png is a folder, expected a regular file",
        "loop.png": "Too many levels of symbolic links",
        "dangling.png": "does not exist; give an image file",
        "missing.png": "does not exist; give an image file",
        "moving.gif": "has 2 frames, expected one; save one of them by itself",
        "moving.png": "has 2 frames, expected one; save one of them by itself",
        "moving.webp": "has 2 frames, expected one; save one of them by itself",
        "pages.tif": "has 2 frames, expected one; save one of them by itself",
        "clear.png": "has transparent pixels, expected opaque ones; put it on a background, e.g. ",
        "clear palette.png": "has transparent pixels, expected opaque ones; put it on a backgroun",
        "clear gray.png": "has transparent pixels, expected opaque ones; put it on a background",
        "nan.tif": "array x holds NaN, infinity or numbers beyond float32",
    } | {f"half.{suffix}": cannot for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm")}
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000, bytes(12_000 * 1501)))
    (tmp_path / "larger.png").write_bytes(png(50_000, 50_000, b""))
    (tmp_path / "script.eps").write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({ghost}) print quit\n"
    )
    save(tmp_path / "an old format.png", COLOUR, format="PCX")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name in ("moving.png", "moving.webp", "pages.tif"):
        save(tmp_path / name, COLOUR, save_all=True, append_images=[other])
    save(tmp_path / "moving.gif", few_colours(), save_all=True, append_images=[other.quantize(8)])
    save(tmp_path / "clear.png", see_through)
    save(tmp_path / "clear palette.png", few_colours(), transparency=0)
    save(tmp_path / "clear gray.png", GRAY, transparency=int(GRAY[0, 0]))
    save(tmp_path / "nan.tif", np.where(GRAY > 99, np.nan, 1).astype(np.float32))
    for name in expected:
        if name.startswith("half."):
            whole = Image.fromarray(large)
            path = save(tmp_path / name, whole.quantize(64) if name.endswith("gif") else whole)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, message in expected.items():
        with pytest.raises(ValueError) as caught:
            images.read_images([tmp_path / name])
        assert message in str(caught.value), (name, str(caught.value))
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or name == "nan.tif"


def test_the_advice_for_transparent_pixels_works(tmp_path):
    path = save(tmp_path / "clear.png", np.dstack([COLOUR, GRAY]))
    with pytest.raises(ValueError) as caught:
        images.read_images([path])
    advice = str(caught.value).split("e.g. ")[1]
    eval(advice, {"Image": Image, "image": Image.open(path)}).save(path)
    assert images.read_images([path]).shape == (1, 6, 5, 3)


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{number}.png", GRAY) for number in range(3)]
    terminal, ours = pty.openpty()
    with os.fdopen(ours, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        assert len(images.read_images(paths)) == 3
        shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert "reading images" in shown and "100%" in shown


def test_without_pillow(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", GRAY)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CommandError, match=r"PIL is not installed; install with pip install 'bn-j"):
        images.read_images([path])


def test_uneven_sizes_are_listed(tmp_path):
    small = [save(tmp_path / f"{number}.png", GRAY) for number in range(3)]
    wide = [
        save(tmp_path / "wide.png", GRAY.T),
        save(tmp_path / "exif.png", GRAY, **turned(6)),
    ]
    large = [save(tmp_path / "large.png", np.ones((9, 9), np.uint8))]
    with pytest.raises(ValueError) as caught:
        images.read_images([*large, *small, *wide])
    assert str(caught.value) == (
        f"images have the size (height x width) 6x5 (3 images, e.g. {small[0]}), 5x6 (2 images, "
        f"e.g. {wide[0]}), 9x9 (1 image, {large[0]}), expected one; resize or crop them, "
        "e.g. with PIL.ImageOps.fit(image, (width, height))"
    )
    message = r"\(height x width\) 6x5 \(3 images.*, expected 9x9 as in training; resize"
    with pytest.raises(ValueError, match=message):
        images.read_images(small, (9, 9, 1))
    many = [save(tmp_path / f"h{h}.png", np.ones((h, 3), np.uint8)) for h in range(1, 9)]
    with pytest.raises(ValueError, match=r"5x3 .* and 3 more sizes, expected one"):
        images.read_images(many)


def test_depths_are_not_mixed(tmp_path):
    paths = [save(tmp_path / "a.png", DEEP), save(tmp_path / "b.png", GRAY)]
    message = r"bits for a pixel: 16 \(1 image, .*a\.png\), 8 \(1 image, .*b\.png\); bring"
    with pytest.raises(ValueError, match=message):
        images.read_images(paths)


def test_more_images_than_the_memory_holds(tmp_path, monkeypatch):
    folder_of(tmp_path, cat=[GRAY] * 3, dog=[GRAY] * 3)
    monkeypatch.setattr(array_checks, "_physical_memory", lambda: 12 * 30 * 6)
    assert len(images.load_folder(tmp_path).dataset.y) == 6
    monkeypatch.setattr(array_checks, "_physical_memory", lambda: 12 * 30 * 6 - 1)
    # Noticed after the first image.
    (tmp_path / "dog/2.png").write_text("no image")
    message = r"6 images of 6x5x1 need 0\.0 GB of memory, expected at most the 0\.0 GB of this ma"
    with pytest.raises(ValueError, match=message):
        images.load_folder(tmp_path)


# --- folders ------------------------------------------------------------------------------------


def folder_of(tmp_path, **classes):
    """A folder with a subfolder for each class, in which images are numbered in its name."""
    for name, pixels in classes.items():
        (tmp_path / name).mkdir(parents=True)
        for number, image in enumerate(pixels):
            save(tmp_path / name / f"{number}.png", image)
    return tmp_path


def test_a_folder_has_a_class_in_each_subfolder(tmp_path):
    folder = folder_of(tmp_path, Zebra=[GRAY], ant=[GRAY[::-1], GRAY[:, ::-1]], **{"10": [GRAY]})
    save(folder / "ant/B.PNG", GRAY * 0)
    (folder / "ant/.hidden.png").write_text("no image")
    (folder / ".git").mkdir()
    (folder / "ant/.ipynb_checkpoints").mkdir()
    assert images.describe_ignored(folder) is None
    (folder / "ant/Thumbs.db").touch()
    (folder / "README").touch()
    (folder / "far").symlink_to("ant")
    dataset, class_names = images.load_folder(folder)
    assert class_names == ("10", "Zebra", "ant", "far")
    assert dataset.y.dtype == np.int32 and dataset.y.tolist() == [0, 1, 2, 2, 2, 3, 3, 3]
    expected = [GRAY, GRAY, GRAY[::-1], GRAY[:, ::-1], GRAY * 0]
    np.testing.assert_array_equal(dataset.x[:5, ..., 0], np.stack(expected))
    ignored = images.describe_ignored(folder)
    assert ignored is not None
    assert ignored.startswith("3 files without the suffix of an image (.bmp, .gif, ")
    assert ignored.endswith(f" ignored, e.g. {folder / 'README'}")


class Unnamed(NamedTuple):
    """A model whose classes have no names."""

    num_classes: int
    class_names: None
    image_shape: tuple[int, ...]


def test_the_classes_of_a_run(tmp_path):
    folder = folder_of(tmp_path, emu=[GRAY], cat=[GRAY])
    dataset, class_names = images.load_folder(folder, ("cat", "dog", "emu"))
    assert dataset.y.tolist() == [0, 2] and class_names == ("cat", "dog", "emu")
    message = (
        r"has the classes 'emu', which the run does not know, expected some of 'cat', 'dog'; r"
    )
    with pytest.raises(ValueError, match=message):
        images.load_folder(folder, ("cat", "dog"))
    names = [f"class {number}" for number in range(12)]
    with pytest.raises(ValueError, match=r"'cat', 'emu', .* 'class 9' and 2 more; rename"):
        images.load_folder(folder, names)
    # Where classes have no names, folders are named by labels.
    with pytest.raises(ValueError, match=r"'cat', 'emu', .* of '0', '1', '2'; rename"):
        problem.load_labelled(folder, Unnamed(3, None, (6, 5, 1)))
    (folder / "emu").rename(folder / "2")
    (folder / "cat").rename(folder / "0")
    assert problem.load_labelled(folder, Unnamed(3, None, (6, 5, 1))).dataset.y.tolist() == [0, 2]


def test_folders_that_are_no_data(tmp_path):
    good = folder_of(tmp_path / "good", cat=[GRAY], dog=[GRAY])

    def variant(name):
        return shutil.copytree(good, tmp_path / name)

    save(variant("unsorted") / "a.jpg", GRAY)
    (tmp_path / "empty").mkdir()
    (variant("empty class") / "emu").mkdir()
    (variant("text class") / "emu").mkdir()
    (tmp_path / "text class/emu/a.txt").touch()
    shutil.move(variant("parts"), tmp_path / "around/parts")
    (variant("loop") / "cat/again").symlink_to("..")
    (variant("cycle") / "cycle").symlink_to("cycle")
    (variant("odd name") / "a\nb").mkdir()
    os.mkdir(os.fsencode(variant("bytes")) + b"/\xff")
    (variant("pipe") / "cat/p.png").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe/cat/p.png")
    expected = {
        "unsorted": "holds images that have no class, e.g. a.jpg, expected one folder for each c",
        "empty": "holds no folder, expected one folder for each class",
        "empty class": "emu holds no image .*; remove the folder or add images",
        "text class": "emu holds no image",
        "around": "parts holds the folder cat, expected .*, or give .*/around/parts itself if its",
        "loop": "cat holds the folder again, expected images alone",
        "odd name": r"holds a folder of the name 'a\\nb', expected the name of a class in Unicode",
        "bytes": r"holds a folder of the name '\\udcff', expected the name of a class in Unicode",
        "pipe": "p.png is a pipe, expected a regular file",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message) as caught:
            images.load_folder(tmp_path / name)
        assert "\n" not in str(caught.value)
    # A link to itself is no folder.
    assert len(images.load_folder(tmp_path / "cycle").dataset.y) == 2


def test_a_folder_is_learned_as_the_same_arrays(tmp_path):
    """One that has been written from arrays; names beside, everything is the same."""
    arrays = bars()
    x = np.clip(arrays["x"], 0, 255).astype(np.uint8)
    order = np.argsort(arrays["y"], kind="stable")
    np.savez(tmp_path / "d.npz", x=x[order], y=arrays["y"][order])
    for label in range(3):
        (tmp_path / f"folder/class {label}").mkdir(parents=True)
    for number, (image, label) in enumerate(zip(x, arrays["y"], strict=True)):
        save(tmp_path / f"folder/class {label}/{number:03}.png", image)
    one, other = (problem.load(tmp_path / name, seed=3) for name in ("d.npz", "folder"))
    assert other.class_names == ("class 0", "class 1", "class 2") and one.class_names is None
    assert (one.mean, one.std, one.num_classes) == (other.mean, other.std, other.num_classes)
    for part, same in zip(one.splits, other.splits, strict=True):
        np.testing.assert_array_equal(part.x, same.x)
        np.testing.assert_array_equal(part.y, same.y)
    assert one.oddities == other.oddities == ()
    # The data set is another when a class has another name, or when it is the same in memory.
    assert problem.load(images.load_folder(tmp_path / "folder"), 3).sha256 == other.sha256
    (tmp_path / "folder/class 2").rename(tmp_path / "folder/class 3")
    (tmp_path / "folder/notes.txt").touch()
    renamed = problem.load(tmp_path / "folder", 3)
    assert len({one.sha256, other.sha256, renamed.sha256}) == 3
    assert len(renamed.oddities) == 1 and "notes.txt" in renamed.oddities[0]


def test_one_class_is_none(tmp_path):
    folder_of(tmp_path, cat=[GRAY, GRAY[::-1], GRAY[:, ::-1]])
    with pytest.raises(CommandError, match="expected at least 2 classes"):
        problem.load(tmp_path, 0)


def test_pictures_in_an_iterable(tmp_path):
    """What torchvision's `ImageFolder` yields."""
    pairs = [(few_colours(), 0), (Image.fromarray(COLOUR), 1)]
    x = data.from_iterable(pairs).x
    np.testing.assert_array_equal(x, [np.asarray(few_colours().convert("RGB")), COLOUR])
    clear = Image.fromarray(np.dstack([COLOUR, GRAY]))
    with pytest.raises(ValueError, match="x of element 1 of source has transparent pixels"):
        data.from_iterable([pairs[0], (clear, 1)])

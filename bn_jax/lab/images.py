"""Image files, and folders of them with one subfolder for each class, read with Pillow."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bn_jax.lab.console.arguments import require
from bn_jax.lab.data import Dataset, NamedDataset
from bn_jax.lab.datasets.array_checks import (
    Array,
    FloatArray,
    Sizes,
    check_images,
    check_memory,
)
from bn_jax.lab.files.reading import open_regular

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["describe_ignored", "list_images", "load_folder", "pixels_of", "read_images"]

# Pillow reads more formats, some of them by running other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
CLASSES_LISTED = 10


class _UnsuitableError(ValueError):
    """What is wrong with an image that Pillow can read."""


def load_folder(
    folder: Path,
    class_names: Sequence[str] | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> NamedDataset:
    """Loads a folder that holds one subfolder of images for each class.

    Hidden files and folders are ignored, and so are files whose suffix is that of no image (see
    `describe_ignored`). See `read_images` for how images are read.

    Args:
        folder: has a subfolder for each class, and no image beside them.
        class_names: the names of the subfolders in the order of the labels; some may be missing.
            None: all subfolders are classes, sorted by name.
        image_shape: as for `read_images`.

    Returns:
        The dataset and the names of its classes; files are sorted by class and name.

    Raises:
        ValueError: there are no classes, another class than those in `class_names`, a class
            without images, or folders in that of a class; or see `read_images`.
    """
    classes = _list_classes(folder)
    names = [path.name for path in classes] if class_names is None else list(class_names)
    unknown = [path.name for path in classes if path.name not in names]
    if unknown:
        raise ValueError(
            f"{folder} has the classes {_list_names(unknown)}, which the run does not know, "
            f"expected some of {_list_names(names)}; rename or remove these folders"
        )
    files = [
        (path, names.index(one.name))
        for one in classes
        for path in list_images(one, f"give {one} itself if its folders are the classes")
    ]
    x = read_images([path for path, _ in files], image_shape)
    dataset = Dataset(x, np.array([label for _, label in files], np.int32))
    return NamedDataset(dataset, tuple(names))


def _list_classes(folder: Path) -> list[Path]:
    classes, others = _entries(folder)
    images = [path for path in others if _is_image(path)]
    if images or not classes:
        found = f"images that have no class, e.g. {images[0].name}" if images else "no folder"
        raise ValueError(
            f"{folder} holds {found}, expected one folder for each class, with its images; move "
            "every image to the folder of its class"
        )
    for path in classes:
        if not path.name.isprintable():
            raise ValueError(
                f"{folder} holds a folder of the name {path.name!r}, expected the name of a class "
                "in Unicode, without control characters; rename it"
            )
    return classes


def list_images(folder: Path, fix: str = "give its folders one by one") -> list[Path]:
    """Lists the images of a folder.

    Args:
        folder: of images alone; hidden files and files without the suffix of an image are ignored.
        fix: what to do with a folder that holds others, for the message.

    Returns:
        The images, sorted by name.

    Raises:
        ValueError: there is none, or there is a folder beside them.
    """
    folders, others = _entries(folder)
    images = [path for path in others if _is_image(path)]
    if folders:
        raise ValueError(
            f"{folder} holds the folder {folders[0].name}, expected images alone; move its images "
            f"up, or {fix}"
        )
    if not images:
        raise ValueError(
            f"{folder} holds no image ({', '.join(SUFFIXES)}); remove the folder or add images"
        )
    return images


def describe_ignored(folder: Path) -> str | None:
    """Describes what `load_folder` ignored, or returns None if there is nothing.

    Args:
        folder: as for `load_folder`.
    """
    folders, others = _entries(folder)
    others += [path for one in folders for path in _entries(one)[1]]
    ignored = [path for path in others if not _is_image(path)]
    if not ignored:
        return None
    files = f"{len(ignored)} files" if len(ignored) > 1 else "1 file"
    return (
        f"{files} without the suffix of an image ({', '.join(SUFFIXES)}) ignored, e.g. {ignored[0]}"
    )


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the folders in a folder, and what else is there, but for what is hidden."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        folders = [path for path in entries if path.is_dir()]
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be read ({error.strerror}); give a folder of images that you may read"
        ) from error
    return folders, sorted(set(entries) - set(folders))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - CLASSES_LISTED
    return ", ".join(map(repr, names[:CLASSES_LISTED])) + (f" and {more} more" if more > 0 else "")


def read_images(paths: Sequence[Path], image_shape: tuple[int, ...] | None = None) -> FloatArray:
    """Reads image files of one size.

    - Pixels keep their values: 0 to 255, or 0 to 65535 in grayscale images of 16 bits.
    - Palettes, CMYK and other colour spaces become RGB, two levels become 0 and 255.
    - If one image is in colour, grayscale images become colour of three equal channels.
    - Images are turned as their EXIF orientation says.

    Args:
        paths: of at least one image.
        image_shape: [H, W, C] that a model expects, with 1 channel for grayscale or 3 for colour.
            A colour image becomes grayscale only if its channels are equal. None: as the rules
            above say.

    Returns:
        The images, float32 [N, H, W, C].

    Raises:
        ValueError: a file is no image or damaged; an image has several frames, transparent pixels,
            or colours where grayscale is expected; or images differ in size or depth.
        CommandError: Pillow is not installed.
    """
    require("PIL")
    size, channels = (None, None) if image_shape is None else (image_shape[:2], image_shape[2])
    if channels not in (None, 1, 3):
        raise ValueError(
            f"image files have 1 or 3 channels, expected {channels} as the run was trained on; "
            "give an .npz file"
        )
    images: list[Array] = []
    sizes, depths = Sizes(), Sizes()
    for path in _with_progress(paths):
        pixels = _read_image(path)
        depths.add((8 * pixels.dtype.itemsize,), str(path))
        if sizes.add(pixels.shape[:2], str(path)):
            images.append(pixels if channels is None else _with_channels(pixels, channels, path))
            check_memory(len(paths), images[-1].shape)
        else:
            # The images of a second size are only counted.
            images.clear()
    sizes.check_all_are(size)
    if len(depths) > 1:
        raise ValueError(
            f"images have different numbers of bits for a pixel: {depths}; bring their pixels to "
            "one range first"
        )
    most = max(image.shape[2] for image in images)
    return check_images(np.stack([_with_channels(image, most, "") for image in images]))


def _with_progress(paths: Sequence[Path]) -> Iterable[Path]:
    if not sys.stderr.isatty():
        return paths
    from rich import progress
    from rich.console import Console

    return progress.track(
        paths, "reading images", console=Console(stderr=True), transient=True, update_period=0.5
    )


def _read_image(path: Path) -> Array:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Of a small file that decompresses to more pixels than any photo has.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path) as stream, Image.open(stream, formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                # A camera's MPO file holds previews after the photo.
                if frames > 1 and image.format != "MPO":
                    raise _UnsuitableError(
                        f"has {frames} frames, expected one; save one of them by itself"
                    )
                return pixels_of(image)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give an image file") from None
    except _UnsuitableError as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:
        # The file may hold anything, and Pillow's decoders raise errors of different types.
        raise ValueError(
            f"{path} cannot be read as an image ({error}), expected one in the format "
            f"{', '.join(FORMATS)}; repair or remove it"
        ) from error


def pixels_of(image: "Image.Image") -> Array:
    """Returns the pixels of an image as `read_images` says.

    Args:
        image: of any mode.

    Returns:
        Numbers [H, W, C] with 1 or 3 channels.

    Raises:
        ValueError: it has transparent pixels.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)[..., None]
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise _UnsuitableError(
                "has transparent pixels, expected opaque ones; put it on a background, e.g. "
                "Image.alpha_composite(Image.new('RGBA', image.size, 'white'), "
                "image.convert('RGBA')).convert('RGB')"
            )
        image = image.convert("RGB")
    pixels = np.asarray(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _with_channels(pixels: Array, channels: int, path: Path | str) -> Array:
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if (pixels != pixels[..., :1]).any():
        raise ValueError(
            f"{path} is in colour, expected grayscale as the run was trained on; convert it, e.g. "
            "with Pillow's image.convert('L')"
        )
    return pixels[..., :1]

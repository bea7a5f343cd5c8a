"""The batches of a data set: opened once a pass, and what of each the forward function gets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from bn_jax._paths import format_path

Inputs: TypeAlias = str | int | Callable[[Any], Any] | None
"""What of a batch the forward function gets: a key, an index or a function; None for all of it."""

# The kinds of NumPy's dtypes that are no numbers: objects, text and dates.
NO_NUMBERS = "OSUMm"


# --- the iterable -------------------------------------------------------------------------------


def opened(batches: Any) -> Iterable[Any]:
    """Returns the iterable of a pass, or raises the TypeError for what is not one of batches."""
    if callable(batches) and not isinstance(batches, Iterable):
        batches = batches()
    kind = type(batches).__name__
    if isinstance(batches, Mapping) or hasattr(batches, "_fields"):
        raise TypeError(
            f"batches is a {kind}, which is one batch; expected an iterable of batches: write "
            "[batch]."
        )
    if _is_array(batches):
        raise TypeError(
            f"batches is an array of shape {tuple(batches.shape)} ({kind}), which iterates over "
            "its first axis; expected an iterable of batches: write [x] for one batch, or list(x) "
            "if the first axis counts batches."
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"batches is a {kind}; expected an iterable of batches, such as a list or a data "
            "loader, or a function without arguments that returns one."
        )
    if isinstance(batches, list | tuple) and all(map(_is_array, batches)):
        shapes = [tuple(each.shape) for each in batches]
        if len({len(shape) for shape in shapes}) > 1:
            raise TypeError(
                f"batches is a {kind} of arrays with different numbers of axes, of shapes "
                f"{shapes[:4]}, which looks like one batch; expected an iterable of batches: write "
                "[batch], with inputs=0 if forward takes only the first of its arrays."
            )
    return cast(Iterable[Any], batches)


def about_no_batches(batches: Any, number: int) -> str:
    """Returns the message of an error: pass `number` has yielded no batch."""
    if number == 1:
        return (
            f"batches is empty: expected at least one batch, received none from the "
            f"{type(batches).__name__}. An iterator that has been used up gives none: pass a list."
        )
    return (
        f"batches gave nothing in pass {number}: expected the same as in the first. A function "
        "must return a new iterator each time: recalibrate(forward, variables, lambda: "
        "iter(loader))."
    )


@contextmanager
def progress_bar(is_shown: bool) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    """Yields what shows a pass, with its description, as a bar; or what shows nothing."""
    if not is_shown:
        yield lambda batches, description: batches
        return
    try:
        from rich import console, progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True draws its bar with rich, which is not installed: pip install rich, or "
            "leave progress out.",
            name=error.name,
        ) from error
    columns = *progress.Progress.get_default_columns(), progress.MofNCompleteColumn()
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        yield lambda batches, description: bar.track(batches, description=description)


# --- one batch ----------------------------------------------------------------------------------


def inputs_of(batch: Any, inputs: Inputs) -> Any:
    """Returns what of a batch the forward function gets, with arrays of other libraries as NumPy's.

    Raises:
        TypeError: the batch has no such part, or the part holds what is no array.
    """
    if callable(inputs):
        batch = inputs(batch)
    elif inputs is not None:
        batch = _part(batch, inputs)
    return jax.tree.map_with_path(_as_array, batch)


def _part(batch: Any, key: str | int) -> Any:
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        received = f"a {type(batch).__name__} with the keys {list(batch)}"
    elif isinstance(batch, list | tuple) and isinstance(key, int):
        if -len(batch) <= key < len(batch):
            return batch[key]
        received = f"a {type(batch).__name__} of {len(batch)}"
    elif isinstance(key, str) and hasattr(batch, key):
        return getattr(batch, key)
    else:
        received = f"a {type(batch).__name__}"
    raise TypeError(
        f"inputs={key!r} is not in the batch, {received}; expected a key, an index or a field of "
        "it. A function can choose anything, inputs=lambda batch: ...; without inputs forward gets "
        "the whole batch."
    )


def _as_array(keys: Any, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | bool | int | float | complex):
        return leaf
    array = np.asarray(leaf) if hasattr(leaf, "__array__") else None
    if array is not None and array.dtype.kind not in NO_NUMBERS:
        return array
    kind = type(leaf).__name__ if array is None else f"{type(leaf).__name__} of {array.dtype}"
    where = f" at {format_path(keys)!r}" if keys else ""
    raise TypeError(
        f"the batch holds a {kind}{where}; expected arrays of numbers alone. Choose what forward "
        "gets with inputs=: a key, an index or a function of the batch."
    )


def note_parts(error: Exception, batch: Any) -> None:
    """Adds to an error of the forward function that it was called with a batch of several parts."""
    if isinstance(batch, Mapping) and batch:
        names = list(batch)
        kind, key = f"a {type(batch).__name__} with the keys {names}", next(iter(names))
    elif isinstance(batch, list | tuple) and batch:
        kind, key = f"a {type(batch).__name__} of {len(batch)}", 0
    else:
        return
    error.add_note(
        f"bn_jax.recalibrate called forward with a whole batch, {kind}. If the model takes a part "
        f"of it, write inputs={key!r}, or let forward choose, model.apply(variables, "
        f"batch[{key!r}], ...)."
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) or (hasattr(value, "__array__") and hasattr(value, "shape"))

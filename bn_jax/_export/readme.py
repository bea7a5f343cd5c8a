"""The README of an exported model, whose lines load and call it."""

import re
from typing import Any

import jax
from jax import export

from bn_jax._export.loading import describe, inputs_of, needs_x64
from bn_jax._export.standardizing import Standardization

_TEXT = """\
# {title}

A model exported by bn_jax. It needs JAX, NumPy and flatbuffers (`pip install jax flatbuffers`), and
runs on {platforms}. Run in this folder:

```python
{lines}
```

- Input: {inputs}.{standardized}
- Output: {outputs}.{classes}
- `model.stablehlo` is the program, `params.npz` its parameters, `model.json` the names of classes
  and the SHA-256 of both files. `bn_jax.load_exported(folder)` also checks these and the input.
"""


def write_readme(
    title: str,
    program: export.Exported,
    class_names: tuple[str, ...] | None,
    standardization: Standardization,
) -> str:
    """Returns the text of the README."""
    inputs = inputs_of(program)
    outputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.out_avals]
    return _TEXT.format(
        title=title,
        platforms=", ".join(platform.upper() for platform in program.platforms),
        lines="\n".join(_lines(program, inputs)),
        inputs=", ".join(f"`{describe(leaf)}`" for leaf in jax.tree.leaves(inputs)),
        standardized=" The program subtracts the mean and divides by the deviation itself."
        if standardization.arrays
        else "",
        outputs=", ".join(f"`{describe(leaf)}`" for leaf in outputs),
        classes=" In the order of `json.load(open('model.json'))['class_names']`."
        if class_names
        else "",
    )


def _lines(program: export.Exported, inputs: tuple[Any, ...]) -> list[str]:
    lines = ["import jax, jax.export, numpy as np"]
    if needs_x64(program):
        lines.append('jax.config.update("jax_enable_x64", True)')
    lines += [
        'program = jax.export.deserialize(bytearray(np.fromfile("model.stablehlo", "uint8")))',
        'params = dict(np.load("params.npz"))',
    ]
    sizes = {str(size) for leaf in jax.tree.leaves(inputs) for size in leaf.shape}
    if not all(map(_is_plain, sizes)):
        names = sorted(set(re.findall(r"[A-Za-z_]\w*", " ".join(sizes))))
        lines.append(f"{' = '.join(names)} = 2  # any number")
    examples = jax.tree.map(_example, inputs)
    if len(inputs) == 1:
        return [*lines, f"x = {examples[0]}  # your input", "y = program.call(params, x)"]
    return [*lines, f"args = {examples}  # your input", "y = program.call(params, *args)"]


class _Code(str):
    """An expression that is written as it is, in whatever tree it lies."""

    __slots__ = ()
    __repr__ = str.__str__


def _is_plain(size: str) -> bool:
    return size.isdecimal() or size.isidentifier()


def _example(leaf: jax.ShapeDtypeStruct) -> _Code:
    """Returns the code of zeros of a shape, in which every symbol is 2."""
    sizes = ["2" if str(size).isidentifier() else str(size) for size in leaf.shape]
    shape = ", ".join(sizes) + ("," if len(sizes) == 1 else "")
    return _Code(f'np.zeros(({shape}), "{leaf.dtype}")')

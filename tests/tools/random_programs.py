"""Random programs of linear layers, norms, affine steps and changes of shape, for `bn_jax.fold`.

A program is a list of steps, written one after the other for the shape that the value has there.
The writer also keeps which axes of the value are the output features of the linear layer before it.
So it knows of some norms, by no rule of `fold`, that they have to be folded.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bn_jax as bn

Array: TypeAlias = np.ndarray[Any, Any]
Step = Callable[[Any, jax.Array], jax.Array]


class RandomProgram(NamedTuple):
    """A program and what is known of it.

    Attributes:
        forward: of the variables and `x`.
        variables: nested dictionaries, by the names of layers.
        x: an input.
        fates: for each norm, in order, whether it has to be folded (True) or left (False); None
            where either is right.
        tolerance: how far the folded program may be from this one, relative to the largest output
            or 1.
        text: the steps in words.
    """

    forward: Callable[..., Any]
    variables: dict[str, dict[str, Array]]
    x: Array
    fates: tuple[bool | None, ...]
    tolerance: float
    text: str


class Kernel(NamedTuple):
    """A kernel as a function of the variables.

    Attributes:
        read: the function.
        fits: whether a norm can go into it; None where that depends on the norm.
        form: how it is stored and what is done to it.
    """

    read: Callable[[Any], jax.Array]
    fits: bool | None
    form: str


def write_program(seed: int) -> RandomProgram:
    """Writes the program of a seed."""
    return _Writer(seed).write()


class _Writer:
    """Writes one program, step after step."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        kinds = ["float32"] * 16 + ["complex64"] * 2 + ["bfloat16", "float16"]
        self.dtype = jnp.dtype(str(self.rng.choice(kinds)))
        self.steps: list[Step] = []
        self.text: list[str] = []
        self.variables: dict[str, dict[str, Array]] = {}
        shape = self.sizes(int(self.rng.integers(2, 5)))
        self.x = self.normal(shape)
        self.aval = jax.ShapeDtypeStruct(self.x.shape, self.x.dtype)
        # The axes of the output features of the layer before; None where no norm can go into it.
        self.outputs: set[int] | None = None
        # Whether no layer has been since the last step that is not linear.
        self.is_apart = True
        # The norms that wait for a layer after them, and the axes along which they vary.
        self.waiting: list[int] = []
        self.axes: set[int] = set()
        self.fates: list[bool | None] = []

    # --- drawing --------------------------------------------------------------------------------

    def is_true(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def sizes(self, rank: int) -> tuple[int, ...]:
        return tuple(int(size) for size in self.rng.choice([2, 2, 2, 3], rank))

    def subset(self, axes: Sequence[int], smallest: int = 0, largest: int = 9) -> list[int]:
        largest = min(largest, len(axes))
        count = int(self.rng.integers(min(smallest, largest), largest + 1))
        return [int(axis) for axis in self.rng.permutation(np.asarray(axes, int))[:count]]

    def normal(self, shape: Sequence[int]) -> Array:
        values = self.rng.standard_normal(tuple(shape))
        if self.is_complex:
            values = values + 1j * self.rng.standard_normal(tuple(shape))
        return np.asarray(values).astype(self.dtype)

    def positive(self, shape: Sequence[int]) -> Array:
        real = jnp.float32 if self.is_complex else self.dtype
        return np.asarray(np.exp(0.5 * self.rng.standard_normal(tuple(shape)))).astype(real)

    # --- writing --------------------------------------------------------------------------------

    def layer(self, kind: str, **variables: Array) -> str:
        name = f"{kind}{len(self.variables)}"
        self.variables[name] = variables
        return name

    def add(self, text: str, step: Step) -> None:
        self.aval = jax.eval_shape(step, self.variables, self.aval)
        self.steps.append(step)
        self.text.append(f"{text} -> {self.aval.dtype.name}{list(self.aval.shape)}")

    def expand(self, axes: Sequence[int], spreads: bool = False) -> tuple[list[int], list[int]]:
        """Returns the sizes of some axes, ascending, and the shape to broadcast them from.

        With `spreads`, those of size 1 have another, to which the value will be broadcast.
        """
        axes = sorted(axes)
        full = [2 if size == 1 and spreads else size for size in self.aval.shape]
        shape = [size if axis in axes else 1 for axis, size in enumerate(full)]
        return [full[axis] for axis in axes], shape

    # --- affine steps and norms -----------------------------------------------------------------

    def affine(self) -> None:
        """A step by a variable or a constant."""
        inside = sorted(self.outputs) if self.outputs is not None else range(self.aval.ndim)
        axes = self.subset(list(inside if self.is_true(0.8) else range(self.aval.ndim)))
        sizes, shape = self.expand(axes, self.is_true(0.1))
        before = self.aval.shape
        kind = self.pick(["add", "sub", "from", "mul", "div", "neg"])
        name = self.layer("step", value=self.normal(sizes), divisor=self.positive(sizes))
        is_constant = self.is_true(0.2)
        constant = self.variables[name]["value"]

        def step(variables: Any, x: jax.Array) -> jax.Array:
            value = constant if is_constant else variables[name]["value"]
            value = jnp.reshape(value, shape)
            return {
                "add": lambda: value + x,
                "sub": lambda: x - value,
                "from": lambda: value - x,
                "mul": lambda: x * value,
                "div": lambda: x / variables[name]["divisor"].reshape(shape),
                "neg": lambda: -x,
            }[kind]()

        self.add(f"{kind} constant" if is_constant else kind, step)
        is_outside = self.outputs is not None and not self.outputs >= set(axes)
        if (kind != "neg" and is_outside) or self.aval.shape != before:
            self.outputs = None
        self.waiting, self.axes = [], set()

    def norm(self, most: int = 9) -> None:
        """A norm by its statistics, along the features of the layer before or any axes."""
        of_layer = self.outputs is not None and self.is_true(0.8)
        choice = sorted(self.outputs or ()) if of_layer else list(range(self.aval.ndim))
        axes = self.subset(choice, 0 if self.is_true(0.1) else 1, most)
        styles = list(BY_HAND)
        if axes and self.dtype == jnp.float32:
            styles += ["ours"] * 3
        style = self.pick(styles)
        is_by_hand = style != "ours"
        before = self.aval.shape
        spreads = is_by_hand and self.is_true(0.2)
        sizes, shape = self.expand(axes, spreads)
        # The mean and the bias of a norm by hand may vary along fewer axes than its deviation.
        of_mean, shape_of_mean = sizes, shape
        of_bias, shape_of_bias = sizes, shape
        if is_by_hand and self.is_true(0.3):
            of_mean, shape_of_mean = self.expand(self.subset(axes), spreads)
            of_bias, shape_of_bias = self.expand(self.subset(axes), spreads)
        name = self.layer(
            "norm",
            mean=self.normal(of_mean),
            var=self.positive(sizes),
            scale=self.normal(sizes),
            bias=self.normal(of_bias),
        )

        def step(variables: Any, x: jax.Array) -> jax.Array:
            norm = variables[name]
            if not is_by_hand:
                params = {"scale": norm["scale"], "bias": norm["bias"]}
                stats = {"mean": norm["mean"], "var": norm["var"]}
                return bn.batch_norm(params, stats, x, axis=axes, use_running_average=True)[0]  # type: ignore[arg-type]
            mean = norm["mean"].reshape(shape_of_mean)
            var, scale = norm["var"].reshape(shape), norm["scale"].reshape(shape)
            return BY_HAND[style](x, mean, var, scale, norm["bias"].reshape(shape_of_bias))

        self.add(f"norm {style} along {sorted(axes)}", step)
        number = len(self.fates)
        is_spread = self.aval.shape != before
        is_inside = self.outputs is not None and self.outputs >= set(axes) and not is_spread
        self.fates.append(is_inside or None)
        if is_inside:
            return
        self.outputs = None
        self.waiting, self.axes = [] if is_spread else [number], set(axes)

    # --- changes of shape -----------------------------------------------------------------------

    def rename(self, places: Sequence[Sequence[int]]) -> None:
        """Follows axes: for each of the new ones, the old ones that it is made of."""

        def moved(axes: set[int]) -> set[int]:
            return {new for new, old in enumerate(places) if axes & set(old)}

        if self.outputs is not None:
            whole = all(set(old) <= self.outputs or not set(old) & self.outputs for old in places)
            self.outputs = moved(self.outputs) if whole else None
        self.axes = moved(self.axes)

    def transpose(self) -> None:
        order = [int(axis) for axis in self.rng.permutation(self.aval.ndim)]
        self.add(f"transpose {order}", lambda variables, x: jnp.transpose(x, order))
        self.rename([[axis] for axis in order])

    def expand_or_squeeze(self) -> None:
        shape = self.aval.shape
        ones = [axis for axis, size in enumerate(shape) if size == 1]
        if ones:
            axis = self.pick(ones)
            self.add(f"squeeze {axis}", lambda variables, x: jnp.squeeze(x, axis))
            self.rename([[old] for old in range(len(shape)) if old != axis])
        else:
            self.expand_dims()

    def expand_dims(self) -> None:
        rank = self.aval.ndim
        axis = int(self.rng.integers(rank + 1))
        self.add(f"expand {axis}", lambda variables, x: jnp.expand_dims(x, axis))
        old = [[before] for before in range(rank)]
        self.rename([*old[:axis], [], *old[axis:]])

    def reshape(self) -> None:
        """Joins two axes that are next to each other, or splits one."""
        shape = list(self.aval.shape)
        even = [axis for axis, size in enumerate(shape) if size in (4, 6, 9)]
        old = [[axis] for axis in range(len(shape))]
        if even and (self.is_true() or len(shape) < 2):
            axis = self.pick(even)
            parts = {4: [2, 2], 6: self.pick([[2, 3], [3, 2]]), 9: [3, 3]}[shape[axis]]
            after, places = [*shape[:axis], *parts, *shape[axis + 1 :]], [*old]
            places.insert(axis, [axis])
        elif len(shape) > 1:
            axis = int(self.rng.integers(len(shape) - 1))
            after = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
            places = [*old[:axis], [axis, axis + 1], *old[axis + 2 :]]
        else:
            return
        self.add(f"reshape to {after}", lambda variables, x: x.reshape(after))
        self.rename(places)

    def nonlinearity(self) -> None:
        kind = self.pick(["tanh", "branch", "softsign"])
        functions: dict[str, Step] = {
            "tanh": lambda variables, x: jnp.tanh(x),
            "branch": lambda variables, x: 0.5 * x + x / (1 + jnp.abs(x)),
            "softsign": lambda variables, x: x / (1 + jnp.abs(x)),
        }
        self.add(kind, functions[kind])
        self.outputs, self.is_apart = None, True
        self.waiting, self.axes = [], set()

    # --- linear layers --------------------------------------------------------------------------

    def enter(
        self,
        kernels: Sequence[Kernel],
        inputs: Sequence[int],
        outputs: Sequence[int],
        is_padded: bool = False,
    ) -> None:
        """Notes the axes of a layer: of its input, those that it sums or keeps; of its output."""
        fits = [kernel.fits for kernel in kernels]
        for number in self.waiting:
            if False in fits or is_padded or self.dtype in HALF:
                self.fates[number] = False if self.is_apart else None
            elif all(fits) and self.axes <= set(inputs):
                self.fates[number] = True
        self.waiting, self.axes = [], set()
        self.is_apart = False
        self.outputs = set(outputs) if fits == [True] else None

    def kernel(self, shape: Sequence[int], fan_in: int) -> Kernel:
        """Adds a kernel in one of many forms."""
        plain = (self.normal(shape) / np.sqrt(max(1, fan_in))).astype(self.dtype)
        forms = ["plain"] * 4 + ["transposed", "flat", "flipped", "rearranged", "computed"]
        if self.dtype == jnp.float32:
            forms += ["repeated", "constant", "from integers", "from float8", "to integers"]
            forms += ["integers", "float8", "to float8"]
        if self.is_complex:
            forms += ["real"] * 3
        form = self.pick(forms)
        order = [int(axis) for axis in self.rng.permutation(len(shape))]
        stacked = [shape[axis] for axis in np.argsort(order)]
        make: dict[str, Callable[[], Array]] = {
            "transposed": lambda: plain.transpose(np.argsort(order)),
            "flat": lambda: plain.reshape(-1),
            "rearranged": lambda: np.flip(plain.transpose(np.argsort(order))).reshape(-1),
            "from integers": lambda: np.round(8 * plain).astype(np.int8),
            "to integers": lambda: 3 * plain,
            "from float8": lambda: plain.astype(jnp.float8_e4m3fn),
            "integers": lambda: np.round(8 * plain).astype(np.int8),
            "float8": lambda: plain.astype(jnp.float8_e4m3fn),
            "repeated": lambda: plain[:1] if shape else plain,
            "real": lambda: plain.real,
        }
        stored = make.get(form, lambda: plain)()
        name = self.layer("layer", kernel=stored, gain=self.positive(()))

        def read(variables: Any) -> Any:
            kernel, gain = variables[name]["kernel"], variables[name]["gain"]
            return {
                "transposed": lambda: jnp.transpose(kernel, order),
                "flat": lambda: kernel.reshape(shape),
                "rearranged": lambda: jnp.transpose(jnp.flip(kernel.reshape(stacked)), order),
                "flipped": lambda: jnp.flip(kernel),
                "computed": lambda: jnp.tanh(kernel) * gain,
                "repeated": lambda: jnp.broadcast_to(kernel, shape),
                "constant": lambda: plain,
                "from integers": lambda: kernel.astype(jnp.float32) / 8,
                "from float8": lambda: kernel.astype(jnp.float32),
                "to integers": lambda: kernel.astype(jnp.int8).astype(jnp.float32),
                "to float8": lambda: kernel.astype(jnp.float8_e4m3fn),
            }.get(form, lambda: jnp.asarray(kernel))()

        never = form in ("constant", *QUANTIZED)
        return Kernel(read, False if never else None if form == "real" else True, form)

    @property
    def is_complex(self) -> bool:
        return self.dtype == jnp.complex64

    def product(self) -> None:
        """An einsum or a product with dimension numbers in any order, of one kernel or of two."""
        rank = self.aval.ndim
        summed = self.subset(range(rank), 1, 2)
        if self.axes and self.is_true(0.6):
            summed = list({*self.axes, *summed})
        rest = [axis for axis in range(rank) if axis not in summed]
        kept = self.subset(rest, 0, 1) if self.is_true(0.4) else []
        free = self.sizes(int(self.rng.integers(0, 3)))
        sizes = [*(self.aval.shape[axis] for axis in (*summed, *kept)), *free]
        # The dimensions of the kernel, in the order in which they are stored.
        order = [int(axis) for axis in self.rng.permutation(len(sizes))]
        shape = [sizes[axis] for axis in order]
        place = {axis: at for at, axis in enumerate(order)}
        fan_in = int(np.prod([self.aval.shape[axis] for axis in summed]))
        is_left = self.is_true(0.3)
        plan = _Product(rank, summed, kept, len(free), place, is_left)
        kernels = [self.kernel(shape, fan_in) for _ in range(1 + self.is_true(0.15))]
        if self.is_true(0.05):
            kernels = kernels[:1] * 2
        if self.is_true():
            letters, outputs = plan.as_einsum(self.rng)
            text = f"einsum {letters}"

            def multiply(x: jax.Array, kernel: Any) -> jax.Array:
                operands = (kernel, x) if is_left else (x, kernel)
                return jnp.einsum(letters, *operands, preferred_element_type=x.dtype)

        else:
            numbers, outputs = plan.as_dimension_numbers()
            text = f"dot_general {numbers}"

            def multiply(x: jax.Array, kernel: Any) -> jax.Array:
                left, right = (kernel, x) if is_left else (x, kernel)
                return lax.dot_general(left, right, numbers, preferred_element_type=x.dtype)

        def step(variables: Any, x: jax.Array) -> jax.Array:
            results = [multiply(x, kernel.read(variables)) for kernel in kernels]
            return sum(results[1:], results[0])

        self.add(f"{text} {[kernel.form for kernel in kernels]}", step)
        self.enter(kernels, [*summed, *kept], outputs)

    def convolution(self) -> None:
        """A convolution with its axes in any order, strided, padded, dilated and grouped."""
        while self.aval.ndim < 3:
            self.expand_dims()
        rank = self.aval.ndim
        if rank > 4:
            return self.product()
        specs = [[int(axis) for axis in self.rng.permutation(rank)] for _ in range(3)]
        data, kernel, out = specs
        is_after_norm = len(self.axes) == 1 and self.is_true(0.8)
        if is_after_norm:
            # The norm that waits varies along the features.
            at = data.index(min(self.axes))
            data[1], data[at] = data[at], data[1]
        features = self.aval.shape[data[1]]
        groups = self.pick([n for n in (1, 2, 3) if features % n == 0])
        outputs = groups * int(self.rng.integers(1, 4))
        spatial = [self.aval.shape[axis] for axis in data[2:]]
        window = [int(self.rng.integers(1, 3)) for _ in spatial]
        is_padded = self.is_true(0.2 if is_after_norm else 0.4)
        options: dict[str, Any] = {
            "window_strides": [self.pick([1, 1, 2]) for _ in spatial],
            "rhs_dilation": [
                1 if size > 2 and n > 1 else self.pick([1, 2])
                for size, n in zip(window, spatial, strict=True)
            ],
            "lhs_dilation": [self.pick([1, 2]) if is_padded else 1 for _ in spatial],
        }
        reach = [(n - 1) * d + 1 for n, d in zip(window, options["rhs_dilation"], strict=True)]
        for at, (size, needed) in enumerate(zip(spatial, reach, strict=True)):
            if size < needed:
                window[at] = 1
        options["padding"] = [
            (self.pick([-1, 0, 1] if size > n else [0, 1]), self.pick([0, 1]))
            if is_padded
            else (0, 0)
            for size, n in zip(spatial, reach, strict=True)
        ]
        full = {0: outputs, 1: features // groups, **{2 + at: n for at, n in enumerate(window)}}
        shape = [full[kernel.index(axis)] for axis in range(rank)]
        weights = self.kernel(shape, int(np.prod(shape)) // outputs)
        if weights.form in QUANTIZED:
            # A convolution takes operands of one dtype, so that the kernel is cast to it.
            weights = weights._replace(fits=True)
        numbers = lax.ConvDimensionNumbers(*map(tuple, specs))

        def step(variables: Any, x: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(
                x,
                weights.read(variables).astype(x.dtype),
                **options,
                preferred_element_type=x.dtype,
                dimension_numbers=numbers,
                feature_group_count=groups,
            )

        self.add(f"conv {numbers} {options} window {window} groups {groups} {weights.form}", step)
        meets_zeros = any(map(any, options["padding"])) or any(
            step > 1 for step in options["lhs_dilation"]
        )
        self.enter([weights], [data[1]], [out[1]], meets_zeros)

    # --- programs -------------------------------------------------------------------------------

    def write(self) -> RandomProgram:
        shapes = [self.transpose, self.expand_or_squeeze, self.reshape]
        for _ in range(1 if self.dtype in HALF else int(self.rng.integers(1, 4))):
            if self.is_true(0.4):
                self.nonlinearity()
                if self.is_true(0.2):
                    self.expand_dims()
                self.norm(most=self.pick([1, 1, 9]))
                for _ in range(int(self.rng.integers(0, 4))):
                    self.pick([*shapes, self.reshape, self.reshape])()
            self.pick([self.product, self.convolution])()
            for _ in range(int(self.rng.integers(0, 4))):
                self.pick([*shapes, self.affine])()
            self.norm()
            for _ in range(int(self.rng.integers(0, 3))):
                self.pick([*shapes, self.affine, self.norm])()
        if self.is_true():
            self.nonlinearity()
        steps = tuple(self.steps)

        def forward(variables: Any, x: jax.Array) -> jax.Array:
            for step in steps:
                x = step(variables, x)
            return x

        tolerance = 0.1 if self.dtype in HALF else 2e-5
        fates, text = tuple(self.fates), "\n".join(self.text)
        return RandomProgram(forward, self.variables, self.x, fates, tolerance, text)


class _Product(NamedTuple):
    """The dimensions of a product: `place` is where the kernel has its summed, kept, free ones."""

    rank: int
    summed: list[int]
    kept: list[int]
    free: int
    place: dict[int, int]
    is_left: bool

    def as_einsum(self, rng: np.random.Generator) -> tuple[str, list[int]]:
        """Returns a subscript with the result in any order, and the axes of the features there."""
        data = "abcdefgh"[: self.rank]
        shared = [data[axis] for axis in (*self.summed, *self.kept)]
        free = list("uvw"[: self.free])
        of_kernel = [*shared, *free]
        kernel = "".join(of_kernel[axis] for axis in sorted(self.place, key=self.place.__getitem__))
        result = [letter for axis, letter in enumerate(data) if axis not in self.summed] + free
        result = [result[at] for at in rng.permutation(len(result))]
        operands = f"{kernel},{data}" if self.is_left else f"{data},{kernel}"
        features = {*free, *(data[axis] for axis in self.kept)}
        outputs = [at for at, letter in enumerate(result) if letter in features]
        return f"{operands}->{''.join(result)}", outputs

    def as_dimension_numbers(self) -> tuple[Any, list[int]]:
        """Returns the dimension numbers, and the axes of the features in the result."""
        count = len(self.summed)
        of_kernel = [self.place[at] for at in range(count)]
        kept = [self.place[count + at] for at in range(len(self.kept))]
        contracted, batched = (self.summed, of_kernel), (self.kept, kept)
        if self.is_left:
            contracted, batched = contracted[::-1], batched[::-1]
        others = self.rank - count - len(self.kept)
        first = len(self.kept) + (0 if self.is_left else others)
        outputs = [*range(len(self.kept)), *range(first, first + self.free)]
        return (contracted, batched), outputs


QUANTIZED = ("integers", "float8", "to float8")
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
BY_HAND: dict[str, Callable[..., jax.Array]] = {
    "whole": lambda x, m, v, s, b: (x - m) * (lax.rsqrt(v + 1e-3) * s) + b,
    "divided": lambda x, m, v, s, b: (x - m) / jnp.sqrt(v + 1e-3),
    "from the mean": lambda x, m, v, s, b: (m - x) * v**-0.5 * s - b,
    "no mean": lambda x, m, v, s, b: s * x * lax.rsqrt(v),
    "negated": lambda x, m, v, s, b: -(x - m) / jnp.sqrt(v) + b,
    "from the bias": lambda x, m, v, s, b: b - (x - m) * lax.rsqrt(v),
    "scaled later": lambda x, m, v, s, b: b + s * ((x - m) * lax.rsqrt(v)),
    "scaled first": lambda x, m, v, s, b: (x * s - m) * lax.rsqrt(v),
}

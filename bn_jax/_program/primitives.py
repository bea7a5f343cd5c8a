"""The names of JAX's primitives, by what the library does with them."""

# Calls whose body is read in their place.
CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"},
)

# Calls of functions with a derivative rule. Reading their bodies in place would lose the rule.
WITH_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})

CONVOLUTION = "conv_general_dilated"
PRODUCT = "dot_general"
LINEAR = frozenset({CONVOLUTION, PRODUCT})

# What returns its input.
COPIES = frozenset({"copy", "copy_p"})
CAST = "convert_element_type"
COPIES_AND_CASTS = COPIES | {CAST}

# What changes neither numbers nor shapes: copies, and casts of the mesh axes that an array varies
# over inside `jax.shard_map`.
MARKS = COPIES | {"pvary", "pcast"}

# What changes the shape and moves numbers without changing them.
SHAPES = frozenset({"reshape", "transpose", "squeeze", "broadcast_in_dim"})

# What only rearranges a parameter, up to its dtype.
LAYOUT = SHAPES | MARKS | {"rev", "tile", CAST}

# What makes an inverse deviation of a variance.
ROOTS = frozenset({"rsqrt", "sqrt", "pow"})

# What makes a matrix that whitens of a covariance.
MATRIX_ROOTS = ROOTS | {"cholesky", "eigh", "svd"}

# What stands between the root in a norm and the norm's scale and bias.
BETWEEN_ROOT_AND_VARIABLES = frozenset(
    {"rsqrt", "mul", "div", "sub", "add", CAST, "broadcast_in_dim", "reshape"}
)

# Arithmetic whose results are real numbers where its inputs are.
KEEPS_REALS = frozenset({"add", "sub", "mul", "div", "neg"})

# What computes each element of its result from the elements at the same position.
ELEMENTWISE = frozenset(
    {
        *("abs", "add", "add_any", "and", "asinh", "atan", "cbrt", "ceil", "clamp", "copy", "cos"),
        *(CAST, "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2"),
        *("expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p"),
        *("logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt"),
        *("select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan"),
        *("tanh", "xor"),
    }
)

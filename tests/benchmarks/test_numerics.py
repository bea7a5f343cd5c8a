import numpy as np
import pytest
from support import define_batch_norm

from benchmarks import report
from benchmarks.adversarial import CASES, UNGUARDED, truth
from benchmarks.numerics import CONTESTANTS, OURS, Errors, load, make_table, measure

NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_within_the_bound(case):
    errors = measure(case)[OURS]
    assert errors.within_bound() == (case.name != UNGUARDED), str(errors)


def test_without_the_guard_the_error_is_within_the_rounding_of_the_input():
    case = NAMED[UNGUARDED]
    errors, _, variance = measure(case)[OURS], *truth(case.layer, case.make())
    # Half a unit in the last place is 1 for values from 256 to 512.
    assert ((np.asarray(case.make().x, np.float64) // 256) == 1).all()
    loss = 3 / 16 / variance.min()
    assert errors.variance <= loss
    assert errors.output <= 1 / np.sqrt(1 - loss) - 1 + 1e-5


def test_the_committed_figures_are_within_the_bound():
    rows = load(report.read("numerics"))
    assert list(rows) == [case.name for case in CASES]
    assert [name for name, row in rows.items() if not row[OURS].within_bound()] == [UNGUARDED]


def test_names_are_unique():
    assert len(NAMED) == len(CASES)


@pytest.mark.parametrize(
    ("contestant", "name"),
    [
        ("flax.linen", "offset 10000"),
        ("flax.linen", "nothing valid"),
        ("flax.linen two-pass", "offset 10000"),
        ("flax.linen two-pass", "two shards, 5 of 8 rows valid"),
        ("flax.nnx", "constant at 12345.678"),
        ("flax.nnx", "bfloat16, offset 300"),
    ],
)
def test_what_is_wrong_is_measured_as_wrong(contestant, name):
    assert not measure(NAMED[name], (contestant,))[contestant].within_bound()


@pytest.mark.parametrize("contestant", ["flax.linen", "flax.linen two-pass", "flax.nnx"])
@pytest.mark.parametrize("name", ["offset 0", "mask of its own per feature"])
def test_what_is_right_is_measured_as_right(contestant, name):
    assert measure(NAMED[name], (contestant,))[contestant].within_bound()


@pytest.mark.parametrize("contestant", [name for name in CONTESTANTS if name != OURS])
def test_what_a_layer_has_no_argument_for_is_not_measured(contestant):
    assert measure(NAMED["weight per position"], (contestant,)) == {}


@pytest.mark.parametrize(
    "name", ["offset 10000, scale -1, bias 3", "weight per position", "NCHW, offset 10000"]
)
def test_the_truth_is_the_definition(name):
    case = NAMED[name]
    batch = case.make()
    stats = {"mean": batch.running_mean, "var": batch.running_var}
    params = {"scale": batch.scale, "bias": batch.bias}
    y, new_stats = define_batch_norm(
        params, stats, batch.x, axis=case.layer.axis, momentum=0.0, mask=batch.mask
    )
    output, variance = truth(case.layer, batch)
    np.testing.assert_allclose(output, y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(variance, new_stats["var"], rtol=1e-9)


@pytest.mark.parametrize(
    ("errors", "holds"),
    [
        (Errors(9e-6, 9e-6, None), True),
        (Errors(9e-6, None, 1e-38), True),
        (Errors(2e-5, 9e-6, None), False),
        (Errors(9e-6, 2e-5, None), False),
        (Errors(9e-6, 9e-6, 3e-38), False),
        (Errors(float("nan"), 9e-6, None), False),
        (Errors(9e-6, float("nan"), None), False),
        (Errors(9e-6, 9e-6, float("nan")), False),
    ],
)
def test_the_bound(errors, holds):
    assert errors.within_bound() is holds


def test_the_table_has_every_row():
    table = make_table(load(report.read("numerics")))
    assert table.row_count == len(CASES)
    assert [column.header for column in table.columns] == ["input", *CONTESTANTS]

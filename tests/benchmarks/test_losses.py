"""The table of losses is made from the figures of other benchmarks, and hides none."""

import copy

import pytest

from benchmarks import document, layer, losses, report

READ = {name: report.read(name) for name in losses.READS}


def rows(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def of(**changed):
    """The rows of both tables with other figures."""
    return [rows(table) for table in losses.tables(*(READ | changed).values())]


def slowed(name, factor, *path):
    """The figures of a benchmark with one timing multiplied."""
    figures = copy.deepcopy(READ[name])
    timing = figures
    for key in path:
        timing = timing[key]
    timing["quartiles"] = [factor * second for second in timing["quartiles"]]
    return {name: figures}


STEP = "ResNet, 3 stages of 2 blocks, 32 images of 8x8"


def test_the_largest_loss_is_first_and_no_gain_is_listed():
    ratios = [float(ratio) for _, _, ratio, _ in of()[0]]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) > 10 and min(ratios) > 1


@pytest.mark.parametrize(
    ("changed", "quantity", "case", "note"),
    [
        (
            slowed("step", 2, "steps", STEP, "float32", "bn_jax"),
            *("time of a training step", f"{STEP}, float32", losses.BEYOND),
        ),
        (
            slowed("inference", 2, "networks", STEP, "bn_jax", "timing"),
            *("time of inference", STEP, losses.BEYOND),
        ),
        (
            slowed("startup", 9, "calls", "linen", "bn_jax"),
            *("time of a call on few values", "linen", losses.BEYOND),
        ),
        (
            slowed("startup", 9, "steps", "bfloat16", "bn_jax", "phases", "lower"),
            *("time to lower", "step of ResNet-50, bfloat16", losses.BEYOND),
        ),
    ],
)
def test_what_became_slower_is_listed(changed, quantity, case, note):
    def found(table):
        return [
            (ratio, sure)
            for one, of_what, ratio, sure in table
            if (one, of_what) == (quantity, case)
        ]

    assert [sure for _, sure in found(of(**changed)[0])] == [note]
    (ratio, _) = found(of(**changed)[0])[0]
    assert float(ratio) > 1.5
    before = found(of()[0])
    assert before == [] or before[0] != (ratio, note)


def test_times_whose_quartiles_overlap_are_not_told_apart():
    figures = copy.deepcopy(READ["step"])
    arms = figures["steps"][STEP]["float32"]
    for arm, quartiles in (("bn_jax", (1.0, 1.1, 1.2)), ("Flax", (0.9, 1.0, 1.05))):
        arms[arm]["quartiles"] = quartiles
    table = of(step=figures)[0]
    row = ("time of a training step", f"{STEP}, float32", "1.10", losses.WITHIN)
    assert row in table


def test_a_compiled_program_that_moves_more_is_listed():
    figures = copy.deepcopy(READ["compiled"])
    figures["rows"][0]["arms"]["bn_jax"]["moved"] *= 3
    case = "norm, float32, H200"
    assert ("bytes moved", case) not in [row[:2] for row in of()[0]]
    assert ("bytes moved", case) in [row[:2] for row in of(compiled=figures)[0]]


def test_a_mask_that_moves_more_is_listed():
    figures = copy.deepcopy(READ["domains"])
    figures["rows"][0]["cases"]["mask"]["forward"]["moved"] *= 9
    row = ("bytes moved", "mask, images, float32, CPU, forward")
    assert row not in [one[:2] for one in of()[0]]
    assert row in [one[:2] for one in of(domains=figures)[0]]


def test_the_fastest_library_of_each_shape_is_counted():
    of_layer = layer.load(READ["layer"])
    table = of()[1]
    assert len(table) == len(layer.NORMS) * len(layer.TOLERANCES) * len(layer.UNITS)
    for norm, dtype, direction, fastest, _ in table:
        timings = [one[direction] for one in of_layer[norm][dtype].values()]
        counts = {part.rsplit(" ", 1)[0]: int(part[-1]) for part in fastest.split(", ")}
        assert sum(counts.values()) == len(timings)
        ours = 0
        for arms in timings:
            others = [arm for arm in arms if arm != layer.COPY and not arm.startswith("bn_jax")]
            ours += all(arms[layer.OURS].median < arms[arm].median for arm in others)
        assert counts.get("bn_jax", 0) == ours


def test_markup_of_the_terminal_becomes_that_of_the_page():
    page = document.with_tables("<!-- numerics -->\n<!-- end -->")
    assert "[red]" not in page and "| **NaN / NaN** |" in page
    rows_of_page = [line for line in page.splitlines() if line.startswith("| ")]
    # The bars of an absolute error are no cells.
    assert any("\\|" in line for line in rows_of_page)
    assert {line.replace("\\|", "").count("|") for line in rows_of_page} == {7}

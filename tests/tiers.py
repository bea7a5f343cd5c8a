"""How many cases of a parametrized test `make test` runs; `make exhaustive` runs the others.

The cases are counted in the order of the parameters. Tests that are not named here run whole, but
for the cases that are marked `exhaustive` where they are written.
"""

QUICK_CASES: dict[str, int] = {}

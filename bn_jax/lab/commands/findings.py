"""What was found about claims, as text: a line for every sub-claim, or all about one claim."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bn_jax.lab.console import tables
from bn_jax.lab.experiments.figures import decisive
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import Verdict

__all__ = ["print_claim", "print_findings"]


def print_findings(records: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for every sub-claim, in 80 columns, and what deserves attention.

    Args:
        records: the contents of the claims' JSON files.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("", "sub-claim", "bound", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("measured")
    for record in records:
        for one in record["sub_claims"]:
            texts = one["key"], one["label"], one["bound"]["text"], one["verdict"]
            table.add_row(*map(escape, texts), _measured(one))
    tables.print_table(table)
    print("\n".join(_remarks(records)))


def _measured(sub_claim: Mapping[str, Any]) -> str:
    """Returns the figure that decided; a star marks the interval of an equivalence."""
    measured = decisive(sub_claim)["measured"]
    if None in measured.values():
        return "nothing"
    estimate, low, high = (f"{figure:.3g}" for figure in Interval(**measured))
    star = "*" if sub_claim["bound"]["kind"] == "within" else ""
    return estimate if low == high else f"{estimate} [{low}, {high}]{star}"


def _remarks(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields how many sub-claims have each verdict, and which deserve attention."""
    yield from _describe_data(records)
    ones = [one for record in records for one in record["sub_claims"]]
    counts = {
        verdict: [one["key"] for one in ones if one["verdict"] == verdict] for verdict in Verdict
    }
    counted = (f"{len(keys)} {verdict}" for verdict, keys in reversed(counts.items()) if keys)
    seeds = max((len(record["seeds"]) for record in records), default=0)
    yield f"Intervals are of 95 % over {seeds} seeds; * equivalences are of 90 %."
    yield f"{len(ones)} sub-claims: {', '.join(counted)}"
    if counts[Verdict.NOT_REPRODUCED]:
        yield f"Contradict their source here: {', '.join(counts[Verdict.NOT_REPRODUCED])}"
    undecided = [one for one in ones if one["verdict"] == Verdict.INCONCLUSIVE]
    if undecided:
        needed = (f"{one['key']} {decisive(one)['seeds_needed']}" for one in undecided)
        yield f"Inconclusive, with the seeds that would decide: {', '.join(needed)}"
    if counts[Verdict.NO_MEASUREMENT]:
        yield f"Without a measurement, NaN: {', '.join(counts[Verdict.NO_MEASUREMENT])}"
    if apart := [one["key"] for one in ones if not one["agree"]]:
        yield f"Differ between blocks of seeds: {', '.join(apart)}"
    for record in records:
        if edges := [arm for arm, rate in record["rates"].items() if _is_at_edge(rate)]:
            yield (
                f"{record['number']}: the best rate is the smallest or largest of its grid: "
                f"{'; '.join(edges)}"
            )


def _describe_data(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line on the data of the user, where they are in the place of the digits."""
    of_user = {data["sha256"]: data for record in records if "sha256" in (data := _data(record))}
    for sha256, data in of_user.items():
        shape = "x".join(map(str, data["image_shape"]))
        size = f"{data['examples']:,} images of {shape}, {data['num_classes']} classes"
        yield (
            f"On {data['name']} in the place of the digits: {size}, SHA-256 {sha256[:12]}. Sources "
            "and bounds are about other data."
        )


def _data(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("data") or {}


def _is_at_edge(rate: Mapping[str, Any]) -> bool:
    """Returns whether the rate of half of the seeds or more is at the edge of the grid."""
    return bool(np.mean(rate["at_edge"]) >= 0.5)


def print_claim(record: Mapping[str, Any]) -> None:
    """Prints all about a claim: its sub-claims, what was measured in each setting, and its limits.

    Args:
        record: the contents of the claim's JSON file.
    """
    console = Console(highlight=False, markup=False)
    console.print(f"{record['number']} {record['name']}: {record['claim']} ({record['source']})")
    for line in _describe_data([record]):
        console.print(line)
    for one in record["sub_claims"]:
        verdict = f" {one['verdict']}" if "verdict" in one else ""
        console.print(f"\n{one['key']}{verdict}: {one['statement']}")
        console.print(f"  measured: {one['quantity']}; bound {one['bound']['text']}")
        if one["reason"]:
            console.print(f"  bound: {one['reason']}")
        if one["published"]:
            console.print(f"  published: {one['published']} ({one['grade']})")
        for name, setting in one.get("settings", {}).items():
            console.print(f"  {_setting(name, setting)}")
    for name in ("protocol", "limits", "easy", "hard"):
        if record[name]:
            console.print(f"\n{name}: {record[name]}")


def _setting(name: str, setting: Mapping[str, Any]) -> str:
    """Returns a line on what was measured in a setting."""

    def interval(measured: Mapping[str, Any]) -> str:
        return "nothing" if None in measured.values() else str(Interval(**measured))

    line = f"{name or 'found'}: {interval(setting['measured'])}, {setting['verdict']}"
    if "for_other_data" in setting:
        line += f"; for other data {interval(setting['for_other_data'])}"
    return line

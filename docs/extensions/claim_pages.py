"""The text of the claims' pages, in MyST, from the committed results and the list of statements."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from claim_pictures import describe, settings_of

from bn_jax.lab.experiments.figures import decisive, figure_of
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import Verdict

Claims = Mapping[str, Mapping[str, Any]]
Statement = Mapping[str, Any]
Sources = Mapping[str, Sequence[str]]

BADGES = {
    Verdict.EXACT: "success",
    Verdict.REPRODUCED: "success",
    Verdict.DIRECTION_ONLY: "info",
    Verdict.INCONCLUSIVE: "secondary",
    Verdict.NOT_REPRODUCED: "danger",
    Verdict.NOT_TESTABLE: "light",
    Verdict.NO_MEASUREMENT: "dark",
}
GRADES = {"V": "seen in the source", "R": "reported by others", "D": "derived here"}
MADE = "% Written by docs/extensions/claims.py from the committed results. Do not edit."


def claim_page(
    name: str,
    figures: Mapping[str, Any],
    statements: Sequence[Statement],
    sources: Sources,
    curves: str,
) -> str:
    """Returns the page of a claim.

    Args:
        name: the name of the claim.
        figures: the content of ``claims.json``.
        statements: the content of ``statements.toml``.
        sources: the content of ``sources.toml``.
        curves: the text alternative of the picture of the curves.
    """
    claim, seeds = figures["claims"][name], len(figures["seeds"])
    parts = [
        MADE,
        f"# {claim['number']}. {escape(claim['claim'])}",
        f"**Who says it:** {escape(claim['source'])}.",
        _verdicts(claim),
        *_attention(claim, seeds),
        _sub_claims(claim, seeds),
        "## Pictures",
        _pictures(name, claim, seeds, curves),
        f"## Protocol\n\n{_sentence(claim['protocol'])}",
        f"## Limits of the small setting\n\n{_sentence(claim['limits'])}",
        f"## What was easy\n\n{_sentence(claim['easy'])}",
        f"## What was not easy\n\n{_sentence(claim['hard'])}",
        "## Every sub-claim",
        *(_details(one) for one in claim["sub_claims"]),
        *_rates(claim),
        *_reported(claim),
        *_asked(claim, statements),
        *_sources(claim, sources),
        _reproduce(name, claim, figures),
    ]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Escapes what Markdown would read as markup, except for code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_\[\]<>|$#{}~])", r"\\\1", part)
        for part in parts
    )


def badge(verdict: str, text: str = "") -> str:
    """Returns a verdict as a coloured label."""
    return f"{{bdg-{BADGES[Verdict(verdict)]}}}`{text or verdict}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts(sub_claims: Iterable[Mapping[str, Any]]) -> str:
    """Returns how many sub-claims have each verdict, the best first."""
    found = [one["verdict"] for one in sub_claims]
    return " ".join(
        badge(verdict, f"{found.count(verdict)} {verdict}")
        for verdict in reversed(Verdict)
        if verdict in found
    )


def _sentence(text: str) -> str:
    """Returns a text of an experiment as a sentence."""
    text = escape(text[:1].upper() + text[1:])
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _verdicts(claim: Mapping[str, Any]) -> str:
    parts = len(claim["sub_claims"])
    return (
        f"**Verdicts on {'its' if parts > 1 else 'the'} {parts} sub-claims:** "
        f"{counts(claim['sub_claims'])} ([how to read them](index.md#how-to-read-a-verdict))"
    )


def _attention(claim: Mapping[str, Any], seeds: int) -> Iterator[str]:
    """Yields what a reader has to know first: what is not reproduced, and what is open."""
    ones = claim["sub_claims"]
    against = [one for one in ones if one["verdict"] == Verdict.NOT_REPRODUCED]
    if against:
        lines = [f"- {_link(one)}: {escape(one['statement'])}" for one in against]
        yield _box("important", "Not reproduced here", lines)
    is_open = [one for one in ones if one["verdict"] == Verdict.INCONCLUSIVE]
    if is_open:
        lines = [
            f"- {_link(one)}, {escape(one['label'])}: needs {decisive(one)['seeds_needed']} "
            f"seeds, if the estimate of these {seeds} is right"
            for one in is_open
        ]
        yield _box("note", "Not decided by these seeds", lines)
    apart = [one for one in ones if not one["agree"]]
    if apart:
        lines = [f"- {_link(one)}: {', '.join(one['blocks'])}" for one in apart]
        yield _box("warning", "The blocks of seeds contradict each other", lines)


def _box(kind: str, title: str, lines: Sequence[str]) -> str:
    return "\n".join([f":::{{admonition}} {title}", f":class: {kind}", "", *lines, ":::"])


def _link(sub_claim: Mapping[str, Any]) -> str:
    return f"[{sub_claim['key']}](#{label(sub_claim['key'])})"


def label(key: str) -> str:
    """Returns the target of a sub-claim, to which every page can link."""
    return f"sub-claim-{key}"


def _sub_claims(claim: Mapping[str, Any], seeds: int) -> str:
    columns = ("", "sub-claim", "verdict", "bound", "measured", "published", "n")
    rows = (
        (
            _link(one),
            escape(one["label"]),
            badge(one["verdict"]),
            escape(one["bound"]["text"]),
            escape(figure_of(one) or "nothing") + _star(one),
            escape(_published(one)),
            str(seeds),
        )
        for one in claim["sub_claims"]
    )
    grades = [one["grade"] for one in claim["sub_claims"]]
    explained = "; ".join(f"({key}) {text}" for key, text in GRADES.items() if key in grades)
    has_star = any(_star(one) for one in claim["sub_claims"])
    return (
        f"{table(columns, rows)}\n\n"
        "The measured figure is that of the setting that decided, with its 95 % interval"
        + (", or, with a star, the 90 % interval of an equivalence" if has_star else "")
        + f". n is the number of seeds.{f' Published figures: {explained}.' if explained else ''}"
    )


def _published(sub_claim: Mapping[str, Any]) -> str:
    return f"{sub_claim['published']} ({sub_claim['grade']})" if sub_claim["published"] else ""


def _star(sub_claim: Mapping[str, Any]) -> str:
    return "\\*" if sub_claim["bound"]["kind"] == "within" else ""


def curves_file(name: str) -> str:
    """Returns the name of the file with the picture of a claim's curves."""
    return f"{name}_curves.svg"


def _pictures(name: str, claim: Mapping[str, Any], seeds: int, curves: str) -> str:
    """Returns the claim's own picture, that of its intervals, and how to draw them again."""
    return "\n\n".join(
        [
            _picture(
                curves_file(name),
                curves,
                f"Results of {seeds} seeds. Lines and points are means with 95 % intervals, "
                "unless the picture says otherwise.",
            ),
            _picture(
                f"{name}.svg",
                describe(claim),
                f"Estimates of {seeds} seeds with their intervals, one row a setting, in the color "
                "of its verdict. Light: the bound holds. Darker: the published size, too. A dashed "
                "line is the smallest effect that would matter.",
            ),
            "Both pictures are drawn from the committed results. "
            f"`bn-jax reproduce {name}` measures and draws them again.",
        ]
    )


def _picture(file: str, alternative: str, caption: str) -> str:
    escaped = alternative.replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join([f"```{{figure}} {file}", f':alt: "{escaped}"', "", caption, "```"])


def _details(one: Mapping[str, Any]) -> str:
    """Returns all about a sub-claim."""
    bound = f"{escape(one['bound']['text'])}"
    reason = f" ({escape(one['reason'])})" if one["reason"] else ""
    grade = f", {GRADES[one['grade']]}" if one["grade"] else ""
    lines = [
        f"({label(one['key'])})=",
        f"### {one['key']}. {escape(one['label'][:1].upper() + one['label'][1:])}",
        "",
        f"{_sentence(one['statement'])} {badge(one['verdict'])}",
        "",
        f"- **Measured:** {escape(one['quantity'])}",
        f"- **Bound:** {bound}{reason}",
        *([f"- **Published:** {escape(one['published'])}{grade}"] if one["published"] else []),
        *([f"- **Blocks of 8 seeds:** {', '.join(one['blocks'])}"] if one["blocks"] else []),
        "",
        _settings(one),
    ]
    return "\n".join(lines)


def _settings(one: Mapping[str, Any]) -> str:
    settings = settings_of(one)
    names = any(name for name, _ in settings)
    needed = any(setting["seeds_needed"] for _, setting in settings)
    other = any("for_other_data" in setting for _, setting in settings)
    columns = [
        *(["setting"] if names else []),
        "measured",
        *(["for other data"] if other else []),
        "verdict",
        *(["seeds that would decide"] if needed else []),
    ]
    rows = [
        [
            *([escape(name)] if names else []),
            escape(_interval(setting["measured"])),
            *([escape(_interval(setting["for_other_data"]))] if other else []),
            setting["verdict"],
            *([setting["seeds_needed"]] if needed else []),
        ]
        for name, setting in settings
    ]
    return table(columns, rows)


def _interval(measured: Mapping[str, Any]) -> str:
    return "nothing" if None in measured.values() else str(Interval(**measured))


def _rates(claim: Mapping[str, Any]) -> Iterator[str]:
    """Yields the table of the rates that were chosen on the validation part."""
    if not claim["rates"]:
        return
    rows, at_edge = [], []
    for arm, rate in claim["rates"].items():
        values = np.ravel(rate["value"])
        low, median, high = np.quantile(values, (0, 0.5, 1))
        found = f"{low:.3g}" if low == high else f"{median:.3g} ({low:.3g} to {high:.3g})"
        share = float(np.mean(rate["at_edge"]))
        at_edge += [arm] if share >= 0.5 else []
        rows.append((escape(arm), found, f"{100 * share:.0f} %"))
    warning = (
        "\n\nA wider grid might hold a better rate for: " + escape("; ".join(at_edge)) + "."
        if at_edge
        else ""
    )
    yield (
        "## Chosen learning rates\n\n"
        "Rates were chosen on the validation part. The table has their median and range.\n\n"
        + table(("arm", "rate", "at the edge of the grid"), rows)
        + warning
    )


def _reported(claim: Mapping[str, Any]) -> Iterator[str]:
    if claim["reported"]:
        rows = [(escape(name), _interval(one)) for name, one in claim["reported"].items()]
        yield "## Figures without a bound\n\n" + table(("quantity", "measured"), rows)


def _asked(claim: Mapping[str, Any], statements: Sequence[Statement]) -> Iterator[str]:
    """Yields the statements that sub-claims of a claim answer."""
    keys = {one["key"] for one in claim["sub_claims"]}
    rows = [
        (
            escape(one["says"]),
            escape(one["who"]),
            ", ".join(f"[{key}](#{label(key)})" for key in one["sub_claims"] if key in keys),
        )
        for one in statements
        if keys & {*one["sub_claims"]}
    ]
    if rows:
        yield (
            "## Statements that this claim answers\n\n"
            + table(("statement", "who says or asks it", "sub-claims"), rows)
            + "\n\n[All statements](index.md#index-of-statements)"
        )


def cited(claim: Mapping[str, Any], sources: Sources) -> list[str]:
    """Returns the publications that make a claim, in the order in which its source names them."""
    parts = [part.strip() for part in claim["source"].split(";")]
    found = [sources[key] for part in parts for key in sources if part.startswith(key)]
    return list(dict.fromkeys(publication for one in found for publication in one))


def _sources(claim: Mapping[str, Any], sources: Sources) -> Iterator[str]:
    publications = cited(claim, sources)
    if publications:
        yield "## Sources\n\n" + "\n".join(f"- {escape(one)}" for one in publications)


def _reproduce(name: str, claim: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    seeds, cores = len(figures["seeds"]), figures["machine"]["cores"]
    versions = ", ".join(f"{package} {version}" for package, version in figures["versions"].items())
    return (
        f"## Reproduce\n\n"
        f"```sh\nbn-jax reproduce {name}          # about {claim['seconds']:.0f} s here, {cores} "
        f"cores, {seeds} seeds\n"
        f"bn-jax reproduce {name} --quick  # fewer and smaller runs\n"
        f"bn-jax reproduce --show {name}   # this page as text, without results\n```\n\n"
        f"The experiment is `bn_jax.lab.experiments.{name}`. The figures of this page are in "
        f"`benchmarks/results/claims.json`, measured with {versions}. "
        "Its curves are in `benchmarks/results/claim_curves.json`. "
        f"[How to cite them](index.md#cite-a-verdict)."
    )


def overview(figures: Mapping[str, Any]) -> str:
    """Returns the table of all claims, with the list of their pages for the navigation."""
    claims: Claims = figures["claims"]
    ones = [one for claim in claims.values() for one in claim["sub_claims"]]
    rows = (
        (
            str(claim["number"]),
            f"[{escape(claim['claim'])}]({name}.md)<br>{escape(claim['source'])}",
            counts(claim["sub_claims"]),
        )
        for name, claim in claims.items()
    )
    # Whole claims are too long for the navigation.
    titles = (
        f"{claim['number']}. {name.replace('_', ' ').capitalize()} <{name}>"
        for name, claim in claims.items()
    )
    seconds = sum(claim["seconds"] for claim in claims.values())
    return "\n\n".join(
        [
            MADE,
            f"{len(claims)} claims with {len(ones)} sub-claims: {counts(ones)}. "
            f"Each ran with {len(figures['seeds'])} seeds, and {_agreement(ones)}. "
            f"The experiments took {seconds / 60:.0f} minutes in all, added up, on "
            f"{figures['machine']['cores']} cores; on a CPU, two run at a time.",
            table(("", "claim and source", "verdicts"), rows),
            "\n".join(["```{toctree}", ":hidden:", "", *titles, "```"]),
        ]
    )


def _agreement(ones: Sequence[Mapping[str, Any]]) -> str:
    apart = [one["key"] for one in ones if not one["agree"]]
    if not apart:
        return "no two blocks of 8 seeds contradict each other"
    return f"blocks of 8 seeds contradict each other in {', '.join(apart)}"


def exceptions(figures: Mapping[str, Any]) -> str:
    """Returns the tables of what is not reproduced here, and of what is not decided."""
    ones = [one for claim in figures["claims"].values() for one in claim["sub_claims"]]
    against = [one for one in ones if one["verdict"] == Verdict.NOT_REPRODUCED]
    is_open = [one for one in ones if one["verdict"] == Verdict.INCONCLUSIVE]
    return "\n\n".join(
        [
            MADE,
            f"{len(against)} sub-claims are not reproduced. The measured effect is the opposite, "
            "or too small to matter:",
            table(
                ("", "statement", "bound", "measured"),
                (
                    (
                        _link(one),
                        escape(one["statement"]),
                        escape(one["bound"]["text"]),
                        escape(figure_of(one)) + _star(one),
                    )
                    for one in against
                ),
            ),
            f"{len(is_open)} sub-claims need more seeds:",
            table(
                ("", "statement", "bound", "measured", "seeds that would decide"),
                (
                    (
                        _link(one),
                        escape(one["statement"]),
                        escape(one["bound"]["text"]),
                        escape(figure_of(one)) + _star(one),
                        decisive(one)["seeds_needed"],
                    )
                    for one in is_open
                ),
            ),
            "\\* the 90 % interval of an equivalence; all others are of 95 %.",
        ]
    )


def forest_figure(figures: Mapping[str, Any]) -> str:
    """Returns the picture of all sub-claims, with its text alternative."""
    ones = [one for claim in figures["claims"].values() for one in claim["sub_claims"]]
    of_verdict = {
        verdict: [one["key"] for one in ones if one["verdict"] == verdict]
        for verdict in reversed(Verdict)
    }
    groups = (f"{verdict}: {', '.join(keys)}" for verdict, keys in of_verdict.items() if keys)
    return "\n".join(
        [
            MADE,
            "",
            "```{figure} forest.svg",
            f':alt: "A row for each of {len(ones)} sub-claims, with its interval beside its bound. '
            f'{"; ".join(groups)}."',
            "",
            "Every sub-claim on a scale of its own. At the line there is no effect. To the right "
            "is the claimed side. Where it is shaded, the sub-claim is reproduced.",
            "```",
        ]
    )


def statements_index(claims: Claims, statements: Sequence[Statement]) -> str:
    """Returns the table of all statements, by subject, with what checks them."""
    verdicts = {
        one["key"]: one["verdict"] for claim in claims.values() for one in claim["sub_claims"]
    }
    parts = [MADE]
    for subject in dict.fromkeys(one["subject"] for one in statements):
        rows = (
            (
                f"{escape(one['says'])} ({escape(one['who'])})",
                "<br>".join(f"[{key}](#{label(key)}) {verdicts[key]}" for key in one["sub_claims"]),
                "<br>".join(
                    [*map(_notebook, one.get("notebooks", ())), *map(_test, one.get("tests", ()))]
                ),
            )
            for one in statements
            if one["subject"] == subject
        )
        columns = ("statement (who says or asks it)", "sub-claims", "notebooks and tests")
        parts += [f"### {subject}", table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _notebook(place: str) -> str:
    """Returns a link to a heading of a notebook, from ``FILE#HEADING``.

    MyST does not resolve links through ``docs/notebooks``, which is a symbolic link.
    """
    name, heading = place.split("#")
    href = f"../notebooks/{name}.html#{slug(heading)}"
    return f'<a href="{href}">{name[0]}: {escape(heading)}</a>'


def slug(heading: str) -> str:
    """Returns the anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _test(place: str) -> str:
    """Returns the place of a test, which a narrow column may break after each word."""
    words = re.sub(r"(_|/|::)", r"\1<wbr>", place.removeprefix("tests/"))
    return f"<code>{words}</code>"

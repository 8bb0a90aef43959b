"""Renew what docs/benchmarks.md shows of the reports of `packscore selftest`.

    python benchmarks/measured.py

A report that somebody sends goes into benchmarks/results/selftest as it is, under a name that says
the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).parent / "results" / "selftest"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Report = dict[str, Any]


def page(text: str, reports: dict[str, Report]) -> str:
    """The page with a section for each report between its marks."""
    head, mark, rest = text.partition("<!-- reports -->\n")
    _, end, rest = rest.partition("<!-- end -->\n")
    sections = "\n".join(section(name, found) for name, found in reports.items())
    return f"{head}{mark}{sections}{end}{rest}"


def section(name: str, found: Report) -> str:
    """What one report holds."""
    made, sizes = found["made"], found["request"]
    taken = [check for check in found["checks"] if check["refused"] is None]
    worst = max(check["max_difference"] for check in taken)
    verdict = "exact" if found["passed"] else "NOT EXACT"
    versions = ", ".join(f"{name} {x}" for name, x in made["versions"].items() if x)
    machine = ", ".join(str(x) for x in made["machine"].values())
    return f"""### {name}

{found["model"]} in {found["dtype"]}: a query of {sizes["query_len"]:,} tokens,
{sizes["num_items"]:,} items of {sizes["item_len"]:,}.

{cells(found)}

{parts(found)}

{len(taken)} ways checked against eager torch, one by one, on the shipped reranker and on this
model: {verdict}, {worst:.1e} off at most. {planned(found)}

(`{made["command"]}`, {made["date"]}, {", ".join(made["devices"])}; {machine}; {versions}.)
"""


def cells(found: Report) -> str:
    """The table of ways to compute the request."""
    rows = [
        "| runs | mask | flow | items/s | ms/item | s/request | quartiles, ms | predicted, ms |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for cell in found["cells"]:
        predicted = cell["predicted_ms"]
        rows.append(
            f"| {cell['runs']} | {cell['mask']} | {cell['flow']} | {cell['items_per_s']:,.1f} "
            f"| {cell['ms_per_item']:.3f} | {cell['ms'] / 1e3:.4f} "
            f"| {cell['ms_low']:,.1f}-{cell['ms_high']:,.1f} "
            f"| {'' if predicted is None else f'{predicted:,.1f}'} |"
        )
    return "\n".join(rows)


def parts(found: Report) -> str:
    """The table of parts."""
    rows = ["| runs | part of one packed request | ms | predicted, ms |", "|---|---|---:|---:|"]
    for part in found["parts"]:
        predicted = part["predicted_ms"]
        rows.append(
            f"| {part['runs']} | {part['part']} | {part['ms']:,.2f} "
            f"| {'' if predicted is None else f'{predicted:,.2f}'} |"
        )
    return "\n".join(rows)


def planned(found: Report) -> str:
    """What the planner said, in a sentence for each that runs."""
    told = []
    for one in found["planned"]:
        calibrated = one["calibrated_ms"]
        behind = "" if calibrated is None else f", {calibrated:,.1f} ms once it was calibrated"
        before = "nothing" if one["before_ms"] is None else f"{one['before_ms']:,.1f} ms"
        told.append(
            f"The planner expected {before} of the packed request in {one['runs']}{behind}; "
            f"it took {one['measured_ms']:,.1f} ms."
        )
    # reports from before it was there have none
    errors = {one.get("known_error", "") for one in found["planned"]} - {""}
    return " ".join([*told, *(f"{error[0].upper()}{error[1:]}." for error in sorted(errors))])


def reports() -> dict[str, Report]:
    """Every report, by its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(REPORTS.glob("*.json"))}


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), reports()))

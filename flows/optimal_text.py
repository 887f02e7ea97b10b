"""The compute-optimal report in words and tables: what it says about the document of `search.assessment`.

No drawing, no HTML. Every finding is computed from the document, so that a title cannot promise what the data lack;
null means that something is not known, and sections that are missing are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from flows.show import harmless
from search.optimal import Curve

Document = Mapping[str, Any]
KINDS = {
    "oracle": "oracle",
    "verifier": "verifier-predicted",
    "question": "question-predicted",
    "random": "random bins",
    "none": "no bins",
}
SETS = {"paper": "the paper's arms", "all": "all arms"}
BEST_OF_N = ("best_of_n", "best_of_n_weighted", "sharpened")
_HEADLINES = (8, 16)  # budgets that the headline is about, where they were measured
VERSIONS = {"v1": "arXiv v1", "iclr": "ICLR 2025"}
Z95 = 1.96


# ---------------------------------------------------------------- reading the document


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main_kind(found: Document) -> str:
    """The difficulty that the choices and the budgets per question use, as `assessment` takes it."""
    known = {**found.get("by_bin", {}), **dict.fromkeys(r["bins"] for r in found.get("ratios", ()))}
    return next((kind for kind in ("question", "verifier", "oracle") if kind in known), "none")


def arm_sets(found: Document) -> list[str]:
    """The paper's arms first, where they are a set of their own."""
    return [name for name in SETS if name in found.get("optimal", {})]


def kinds_of(found: Document) -> list[str]:
    known = [r["bins"] for r in found.get("ratios", ())] + [k for c in found.get("optimal", {}).values() for k in c]
    return [kind for kind in KINDS if kind in known]


def ratio_budgets(found: Document) -> list[float]:
    return sorted({r["budget"] for r in found.get("ratios", ())})


def headline_budgets(found: Document) -> list[float]:
    budgets = ratio_budgets(found)
    return [b for b in budgets if b in _HEADLINES] or budgets[-2:]


def find_ratio(found: Document, arms: str, kind: str, budget: float) -> Mapping[str, Any] | None:
    wanted = (arms, kind, budget)
    return next((r for r in found.get("ratios", ()) if (r["arms"], r["bins"], r["budget"]) == wanted), None)


def curve_of(points: Mapping[str, Sequence[float | None]] | None) -> Curve | None:
    """A line of the document as a curve, cheapest first; None where it has no point."""
    import numpy as np

    points = points or {}
    pairs = zip(points.get("flops", ()), points.get("accuracy", ()), strict=True)
    known = sorted({(x, y) for x, y in pairs if x is not None and y is not None and x > 0})
    return Curve(np.array([y for _, y in known]), np.array([x for x, _ in known])) if known else None


class Rival(NamedTuple):
    """Who is compared with whom, by budget: the cells, and how they are called together."""

    name: str
    cells: Mapping[float, Mapping[str, Any]]


def cost(found: Document, cell: Mapping[str, Any]) -> float | None:
    """In the FLOPs that the curves are in."""
    return cell.get("flops_actual" if found.get("actual") else "flops")


def strongest(found: Document) -> Rival:
    """The most accurate baseline at each budget, the cheaper of equals: what the ratios compare with."""
    best: dict[float, Mapping[str, Any]] = {}
    for cell in found.get("cells", ()):
        if cell["arm"] in found.get("baselines", ()) and cell["accuracy"] is not None and cost(found, cell):
            best[cell["budget"]] = max(
                best.get(cell["budget"], cell), cell, key=lambda c: (c["accuracy"], -(cost(found, c) or 0.0), c["arm"])
            )
    return Rival("strongest best-of-N", dict(sorted(best.items())))


def cheapest_baseline(found: Document) -> str | None:
    """The baseline that most often reaches the accuracy for the fewest FLOPs, where it is not the strongest."""
    known = {cell["arm"] for cell in strongest(found).cells.values()}
    names = [r.get("cheapest_baseline") for r in found.get("ratios", ())]
    others = [name for name in names if name and name not in known]
    return max(dict.fromkeys(others), key=others.count) if others else None


def best_search(found: Document, arms: str, *, beyond: str = "") -> str | None:
    """The fixed strategy of a set with the highest accuracy that is no baseline, greedy answer or vote, and not in the
    set `beyond`."""
    sets = found.get("arms", {})
    plain = {*found.get("baselines", ()), *sets.get(beyond, ()), "greedy"}
    names = [arm for arm in sets.get(arms, ()) if arm not in plain and family(arm) != "best-of-N"]
    return _best(found, [arm for arm in names if "majority" not in arm.partition("(")[0]])


def always(found: Document, arm: str) -> Rival:
    """A fixed strategy at all its budgets."""
    cells = [c for c in found.get("cells", ()) if c["arm"] == arm and c["accuracy"] is not None]
    return Rival(strategy(arm), {c["budget"]: c for c in sorted(cells, key=lambda c: c["budget"])})


def rivals(found: Document) -> dict[str, Rival]:
    """Up to three: "baseline", "paper" (the best search of the paper), "other" (the best that it does not have)."""
    arms = {"paper": best_search(found, "paper"), "other": best_search(found, "all", beyond="paper")}
    everyone = {"baseline": strongest(found)} | {role: always(found, arm) for role, arm in arms.items() if arm}
    return {role: rival for role, rival in everyone.items() if rival.cells}


def rival_budgets(found: Document) -> list[float]:
    """Up to three budgets at which every rival was measured; those of the ratios where they are."""
    measured = [set(rival.cells) for rival in rivals(found).values()]
    shared = sorted(set.intersection(*measured)) if measured else []
    return ([b for b in shared if b in ratio_budgets(found)] or shared)[-3:]


def in_bin(row: Mapping[str, Any], rival: Rival, budget: float) -> float | None:
    return row["accuracy"].get(f"{rival.cells[budget]['arm']} @ {budget:g}")


def _best(found: Document, names: Sequence[str]) -> str | None:
    curves = {arm: curve_of(found.get("fixed", {}).get(arm)) for arm in names}
    known = {arm: curve for arm, curve in curves.items() if curve is not None}
    return max(known, key=lambda arm: (known[arm].accuracy_L.max(), -known[arm].flops_L.min()), default=None)


# ---------------------------------------------------------------- how things are written


def strategy(arm: str) -> str:
    """As a person reads it: "step rejection (draws=8, greedy)"."""
    name, _, options = harmless(arm).partition("(")
    shown = [_option(part) for part in options.removesuffix(")").split(", ") if part]
    words = name.replace("best_of_n", "best-of-N").replace("_", " ")
    full = "best-of-N sharpened" if words == "sharpened" else words
    return full + (f" ({', '.join(shown)})" if shown else "")


def family(arm: str) -> str:
    """The kind of strategy, without settings: "step rejection", "best-of-N" for its three rules of choosing."""
    name = arm.partition("(")[0]
    return "best-of-N" if name in BEST_OF_N else strategy(name)


def _option(part: str) -> str:
    name, _, value = part.partition("=")
    return {"true": name, "false": f"no {name}"}.get(value.lower(), part)


def bin_name(number: int, num: int) -> str:
    ends = {1: "1, easiest", num: f"{num}, hardest"} if num > 1 else {}
    return ends.get(number, str(number))


def times(value: float | None) -> str:
    """A factor in few digits: "0.83", "1.14", "1.5", "4.8", "13"."""
    if value is None:
        return "?"
    return f"{value:.2f}" if value < 1.195 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def gain_points(row: Mapping[str, Any]) -> str:
    """In points with its interval: "+7.7 (+5.2 to +10.2)"."""
    if row["gain"] is None:
        return "-"
    between = (
        "" if row["low"] is None or row["high"] is None else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    )
    return f"{100 * row['gain']:+.1f}{between}"


State = Literal["cheaper", "dearer", "unclear", "never", "unknown"]


def state(row: Mapping[str, Any] | None) -> State:
    """What a ratio shows: its whole interval is above 1, below 1, or neither; or the accuracy is never reached."""
    if row is None or row["value"] is None:
        return "unknown"
    if row["value"] <= 0:
        return "never"
    if row["low"] is not None and row["low"] > 1:
        return "cheaper"
    return "dearer" if row["high"] is not None and row["high"] < 1 else "unclear"


def interval(row: Mapping[str, Any]) -> str:
    return f"{times(row['low'])} to {times(row['high'])}"


def ratio_cell(row: Mapping[str, Any] | None) -> str:
    """For tables: "4.8 (4.1 to 5.1)"."""
    known = state(row)
    if row is None or known == "unknown":
        return "-"
    return "not reached" if known == "never" else f"{times(row['value'])} ({interval(row)})"


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def at(budgets: Sequence[float]) -> str:
    return "N = " + joined([f"{b:g}" for b in budgets])


# ---------------------------------------------------------------- the headline


def headline(found: Document) -> list[str]:
    """What the whole report comes to, in sentences: savings, what difficulty adds to them, budgets per question."""
    kind = main_kind(found)
    lines = [line for arms in reversed(arm_sets(found)) for line in _savings(found, arms, kind)]
    lines += [line for line in (against_cheapest(found), difficulty_adds(found), across_sentence(found)) if line]
    return lines or ["No ratios were computed: nothing can be said about savings."]


def _savings(found: Document, arms: str, kind: str) -> Iterator[str]:
    """A sentence for each state that a ratio is in; what does not pay is told of every budget."""
    rows = [(b, find_ratio(found, arms, kind, b)) for b in ratio_budgets(found)]
    by_state = {name: [(b, r) for b, r in rows if r and state(r) == name] for name in get_args(State)}
    by_state["cheaper"] = [(b, r) for b, r in by_state["cheaper"] if b in headline_budgets(found)]
    who = f"the compute-optimal choice with {KINDS[kind]} difficulty" if kind != "none" else "the choice without bins"
    place, strongest = f"With {SETS[arms]}{' alone' if arms == 'paper' else ''}", "the strongest best-of-N"
    if cheaper := by_state["cheaper"]:
        shares = [f"1/{times(r['value'])} at N = {b:g} (90 %: 1/{times(r['high'])} to 1/{times(r['low'])})"
                  for b, r in cheaper]  # fmt: skip
        shares[0] = shares[0].replace(" at N", f" of the FLOPs of {strongest} at N", 1)
        yield f"{place}, at equal accuracy, {who} spends {joined(shares)}."
    if dearer := by_state["dearer"]:
        parts = [f"{times(1 / r['value'])} times at N = {b:g} (90 %: {_inverse(r['high'])} to {_inverse(r['low'])})"
                 for b, r in dearer]  # fmt: skip
        yield f"{place} {who} does not pay: at equal accuracy it spends more than {strongest}, {joined(parts)}."
    if unclear := by_state["unclear"]:
        parts = [f"{times(r['value'])} at N = {b:g} (90 %: {interval(r)})" for b, r in unclear]
        yield f"{place} {who} is not shown to pay: factor saved over {strongest} at equal accuracy {joined(parts)}."
    if never := by_state["never"]:
        parts = [f"{percent(r['accuracy'])} (N = {b:g})" for b, r in never]
        yield f"{place} {who} does not pay: it never reaches the accuracy of {strongest}, {joined(parts)}."


def against_cheapest(found: Document) -> str:
    """Less is saved over a baseline that stops early: told where it is less than over the strongest."""
    rows = [find_ratio(found, "all", main_kind(found), b) for b in headline_budgets(found)]
    known = [r for r in rows if r and r["value"] and r.get("cheapest") and r["cheapest"] < 0.98 * r["value"]]
    parts = [f"{_share(r['cheapest'])} at N = {r['budget']:g} ({strategy(r['cheapest_baseline'])}; at most "
             f"{_share(r.get('cheapest_low'))}, 95 %)" for r in known]  # fmt: skip
    if not parts:
        return ""
    return f"Of the FLOPs of the baseline that is cheapest to the same accuracy it spends {joined(parts)}."


def _share(factor: float | None) -> str:
    """ "1/4.8", or "1.3 times" where nothing is saved."""
    return f"1/{times(factor)}" if factor is None or factor >= 1 else f"{_inverse(factor)} times"


def _inverse(value: float | None) -> str:
    return times(1 / value) if value else "never reached"


def difficulty_adds(found: Document) -> str:
    """How much of the saving is there without any difficulty: one bin for all problems."""
    kind, budgets = main_kind(found), headline_budgets(found)
    pairs = [(b, find_ratio(found, "all", kind, b), find_ratio(found, "all", "none", b)) for b in budgets]
    known = [(b, own, bare) for b, own, bare in pairs
             if own and bare and own["value"] and bare["value"]]  # fmt: skip
    if kind == "none" or not known:
        return ""
    parts = [f"{_share(bare['value'])} at N = {b:g}" for b, _, bare in known]
    apart = all((own["low"] or 0) > (bare["high"] or math.inf) for _, own, bare in known)
    lost = sum(own["value"] <= bare["value"] for _, own, bare in known)
    more = "no more" if lost == len(known) else "more at some only" if lost else "more, but the 90 % intervals overlap"
    verdict = "more, beyond both intervals" if apart else more
    adds = joined([f"{times(own['value'] / bare['value'])} at N = {b:g}" for b, own, bare in known])
    return (
        f"Without any difficulty the same arms, chosen by price alone, spend {joined(parts)}: difficulty saves "
        f"{verdict} (a further factor of {adds})."
    )


def across_counts(found: Document) -> tuple[int, int, int]:
    """Mean budgets at which budgets per question are better, worse, and neither, by the paired intervals."""
    rows = [r for r in found.get("across", ()) if r["gain"] is not None]
    better = sum(r["low"] is not None and r["low"] > 0 for r in rows)
    worse = sum(r["high"] is not None and r["high"] < 0 for r in rows)
    return better, worse, len(rows) - better - worse


def across_sentence(found: Document) -> str:
    better, worse, same = across_counts(found)
    num = better + worse + same
    if not num:
        return ""
    gains = [r["gain"] for r in found["across"] if r["gain"] is not None]
    low, high = 100 * min(gains), 100 * max(gains)
    shown = f"between {low:+.1f} and {high:+.1f} points" if num > 1 else f"{low:+.1f} points"
    return (
        f"Budgets per question instead of one for all, at equal mean FLOPs: better at {better} of {num} mean budgets, "
        f"worse at {worse}, no difference shown at {same} (paired, 95 %; {shown})."
    )


# ---------------------------------------------------------------- one finding for each figure


def finding(name: str, found: Document) -> str:
    """The title of a figure, by its file name."""
    return _FINDINGS[name](found)


def _saving_finding(found: Document) -> str:
    kind, budgets = main_kind(found), headline_budgets(found)
    row = find_ratio(found, "all", kind, budgets[0]) if budgets else None
    if row is None or state(row) == "unknown":
        return "Accuracy against FLOPs"
    against = f"best-of-{row['budget']:g}"
    paper = find_ratio(found, "paper", kind, budgets[0])
    alone = f"; with the paper's arms alone 1/{times(paper['value'])}" if paper and state(paper) == "cheaper" else ""
    return {
        "cheaper": f"As accurate as {against} for 1/{times(row['value'])} of its FLOPs{alone}",
        "dearer": f"The choice costs {times(1 / row['value'])} times the FLOPs of {against}" if row["value"] else "",
        "unclear": f"The choice is not shown to be cheaper than {against}",
        "never": f"The choice never reaches the accuracy of {against}",
    }[state(row)]


def _samples_finding(found: Document) -> str:
    base = strongest(found).cells
    rows = [r for r in found.get("across", ()) if r["uniform"] is not None and r["budget"] in base]
    leads = [(r["budget"], r["uniform"] - base[r["budget"]]["accuracy"]) for r in rows]
    leads = [(b, lead) for b, lead in leads if b in headline_budgets(found)]
    if not leads:
        return "Accuracy against samples"
    budget, lead = leads[-1]
    way = "above" if lead >= 0 else "below"
    return f"With at most {budget:g} samples the choice is {abs(100 * lead):.1f} points {way} the strongest best-of-N"


def set_title(found: Document, arms: str) -> str:
    """ "The paper's arms: best-of-N, beam"; "All arms: step rejection as well"."""
    names = {name: _families(found, name) for name in arm_sets(found)}
    shown = [n for n in names.get(arms, ()) if arms == "paper" or n not in names.get("paper", ())]
    if not shown or len(shown) > (4 if arms == "paper" else 2):
        return _capital(SETS[arms])
    return f"{_capital(SETS[arms])}: {', '.join(shown)}" + (" as well" if "paper" in names and arms == "all" else "")


def _families(found: Document, arms: str) -> list[str]:
    names = dict.fromkeys(family(arm) for arm in found.get("arms", {}).get(arms, ()))
    return [name for name in names if name not in ("greedy", "majority")]


def _ratios_finding(found: Document) -> str:
    parts = [f"{SETS[arms]}: {span}" for arms in reversed(arm_sets(found)) if (span := _span(found, arms))]
    return _capital("; ".join(parts)) if parts else "Budget at equal accuracy"


def _span(found: Document, arms: str) -> str:
    """The ratios of one set of arms over all budgets."""
    kind = main_kind(found)
    rows = [r for b in ratio_budgets(found) if (r := find_ratio(found, arms, kind, b)) and state(r) != "unknown"]
    cheaper = [r for r in rows if state(r) == "cheaper"]
    if not cheaper:
        return "not shown to be cheaper" if rows else ""
    if len(cheaper) < len(rows):
        return f"cheaper at {len(cheaper)} of {len(rows)} budgets"
    values = [times(value) for value in sorted(r["value"] for r in rows)]
    return f"{values[0]} times cheaper" if values[0] == values[-1] else f"{values[0]} to {values[-1]} times cheaper"


def _choices_finding(found: Document) -> str:
    rungs = found["choices"]["rungs"]
    arms = {r["arm"] for row in rungs for r in row}
    if len(arms) == 1:
        return f"One strategy is chosen everywhere: {strategy(next(iter(arms)))}"
    if len(rungs) == 1:
        return "The choice at each budget, for all problems alike"
    columns = list(zip(*rungs, strict=True))
    kinds = sum(len({family(r["arm"]) for r in column}) > 1 for column in columns)
    settings = sum(len({(r["arm"], r["budget"]) for r in column}) > 1 for column in columns)
    if kinds:
        return f"Easy and hard questions get different kinds of strategy at {kinds} of {len(columns)} budgets"
    if settings:
        return f"All bins choose the same kind of strategy; its settings differ at {settings} of {len(columns)} budgets"
    return "All bins choose the same at every budget: difficulty does not change the choice"


def _by_bin_finding(found: Document) -> str:
    everyone, budgets = rivals(found), rival_budgets(found)
    kind = main_kind(found)
    rows = found.get("by_bin", {}).get(kind, ())
    search = everyone.get("other") or everyone.get("paper")
    if not rows or not budgets or not search or "baseline" not in everyone:
        return "Accuracy within each bin"
    pairs = [[in_bin(r, who, budgets[-1]) for who in (search, everyone["baseline"])] for r in rows]
    leads = [a - b for a, b in pairs if a is not None and b is not None]
    ahead = sum(lead > 0 for lead in leads)
    name = _capital(family(search.cells[budgets[-1]]["arm"]))
    most = f", by up to {100 * max(leads):.0f} points" if ahead else ""
    return f"{name} leads best-of-N in {ahead} of {len(leads)} {KINDS[kind]} bins at N = {budgets[-1]:g}{most}"


def _across_finding(found: Document) -> str:
    better, worse, same = across_counts(found)
    num = better + worse + same
    if better == num:
        return "Budgets per question are better at every mean budget"
    if not worse:
        return f"Budgets per question are better at {better} of {num} mean budgets, worse at none"
    return f"Budgets per question are better at {better} of {num} mean budgets, worse at {worse}"


def _exchange_finding(found: Document) -> str:
    rows = [r for r in found["exchange"]["rows"] if r["all"]["gain"] is not None]
    version = next((r["version"] for r in rows), None)
    parts: dict[str, list[str]] = {"ahead": [], "not apart": [], "behind": []}
    for row in rows:
        if row["version"] == version:
            low, high = row["all"]["low"], row["all"]["high"]
            where = "ahead" if (low or 0) > 0 else "behind" if high is not None and high < 0 else "not apart"
            parts[where].append(f"{row['R']:g}")
    said = [f"{where} at R = {joined(values)}" for where, values in parts.items() if values]
    return f"Search with the small model: {', '.join(said)}" if said else "Search against a larger model"


def _quality_finding(found: Document) -> str:
    budget = next(iter(quality_budgets(found)[-1:]), None)
    known = [(p["auc"], p["savings"].get(f"{budget:g}")) for p in found["quality"]["points"] if p["auc"] is not None
             ] if budget is not None else []  # fmt: skip
    known = sorted(((auc, s) for auc, s in known if s and s["value"] is not None), key=lambda pair: pair[0])
    if not known:
        return "Saving against verifier quality"
    good = len(known)
    while good and (known[good - 1][1]["low"] or 0) > 1:
        good -= 1
    if good == len(known):
        return f"No saving is shown at N = {budget:g}, not even with the best verifier"
    first = f"from an AUC of {known[good][0]:.2f} on" if good else "with every verifier measured"
    return f"At N = {budget:g} the choice saves {first}"


def savings_budgets(found: Document) -> list[float]:
    return sorted({float(b) for point in found["quality"]["points"] for b in point["savings"]})


def quality_budgets(found: Document) -> list[float]:
    """The two that are drawn."""
    budgets = savings_budgets(found)
    return [b for b in budgets if b in _HEADLINES] or budgets[-2:]


_FINDINGS = {
    "accuracy": _saving_finding,
    "samples": _samples_finding,
    "ratios": _ratios_finding,
    "choices": _choices_finding,
    "bins": _by_bin_finding,
    "across": _across_finding,
    "exchange": _exchange_finding,
    "quality": _quality_finding,
}

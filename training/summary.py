"""Means over cases with intervals, and the paired differences that tell whether a method is better."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from training.comparison import CG_SENSE, ORACLE
from training.reference import METRICS, REGIONS

BEST_PICS, BEST = "best pics", "best conventional"
TOLERANCE = 0.1  # dB; a smaller loss counts as none
_DRAWS = 2000
_NEAR_FLOOR = 6.0  # dB above the reference's own noise, below which figures are partly about that noise

Figures = dict[str, Any]


def bootstrap(values: Sequence[float], subjects: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean, by drawing subjects with replacement; None of a single subject.

    Cases of one subject are drawn together, for they are not independent (Efron and Tibshirani, An introduction to the
    bootstrap, 1993, chapter 8: the percentile interval of clusters).
    """
    names = sorted(set(subjects))
    if len(names) < 2:
        return None
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, subject in zip(values, subjects, strict=True):
        index = names.index(subject)
        sums[index] += value
        counts[index] += 1
    drawn = np.random.default_rng(seed).integers(len(names), size=(_DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def with_best(row: Figures) -> Figures:
    """A row with two more columns: the best of BART's pics and of all conventional methods, by NRMSE in the support."""
    methods = {name: found for name, found in row["methods"].items() if "failed" not in found}
    conventional = {name: found for name, found in methods.items() if not name.startswith("learned")}
    extra = {}
    for title, group in (
        (BEST_PICS, {name: found for name, found in conventional.items() if name.startswith("pics")}),
        (BEST, conventional),
    ):
        if group:
            winner = min(group, key=lambda name: group[name]["support"]["nrmse_db"])
            extra[title] = {**group[winner], "setting": f"{winner}: {group[winner]['setting']}"}
    return {**row, "methods": {**row["methods"], **extra}}


def summarise(rows: Sequence[Figures]) -> Figures:
    """Everything that can be said of many cases, JSON; by dimensions first."""
    found: Figures = {}
    for dimensions in dict.fromkeys(row["dimensions"] for row in rows):
        group = [with_best(row) for row in rows if row["dimensions"] == dimensions]
        found[dimensions] = {
            "cases": len(group),
            "subjects": len({row["subject"] for row in group}),
            "methods": _means(group),
            "paired": _paired(group),
            "by_setting": [
                {"mask": mask, "acceleration": rate, "snr": snr, "cases": len(cell), "methods": _means(cell)}
                for (mask, rate, snr), cell in _cells(group).items()
            ],
        }
    return found


def near_floor(row: Figures) -> bool:
    """Whether a method is so near the reference's noise that its figures are partly about that noise."""
    floor = row.get("floor_db", {}).get("object")
    if floor is None:
        return False
    errors = [one["object"]["nrmse_db"] for one in row["methods"].values() if "failed" not in one]
    return bool(errors) and min(errors) < floor + _NEAR_FLOOR


def methods_of(rows: Iterable[Figures]) -> list[str]:
    """Names in the order of the first row that has them."""
    return list(dict.fromkeys(name for row in rows for name in row["methods"]))


def _cells(rows: Sequence[Figures]) -> dict[tuple[str, float, float], list[Figures]]:
    """Rows of the same mask, acceleration (to a tenth) and SNR, in that order."""
    cells: dict[tuple[str, float, float], list[Figures]] = {}
    for row in rows:
        cells.setdefault((row["mask"], round(row["acceleration"], 1), round(row["snr"], 1)), []).append(row)
    return dict(sorted(cells.items()))


def _means(rows: Sequence[Figures]) -> Figures:
    means: Figures = {}
    for method in methods_of(rows):
        there = [row for row in rows if method in row["methods"] and "failed" not in row["methods"][method]]
        if not there:
            continue
        subjects = [row["subject"] for row in there]
        means[method] = {"cases": len(there)}
        for region in REGIONS:
            for metric in METRICS:
                values = [row["methods"][method][region][metric] for row in there]
                entry = {"mean": _round(float(np.mean(values)))}
                if interval := bootstrap(values, subjects):
                    entry["low"], entry["high"] = map(_round, interval)
                means[method].setdefault(region, {})[metric] = entry
    return means


def _paired(rows: Sequence[Figures]) -> list[Figures]:
    """Learned methods against conventional ones, on the same cases; in dB of NRMSE, negative is better."""
    found = []
    names = methods_of(rows)
    rivals = [name for name in (CG_SENSE, ORACLE, BEST_PICS, BEST) if name in names]
    for method in (name for name in names if name.startswith("learned")):
        for rival in rivals:
            for region in REGIONS:
                pick = _difference(method, rival, region)
                there = [(row, pick(row)) for row in rows if _both(row, method, rival)]
                if not there:
                    continue
                values = [value for _, value in there]
                worst = max(there, key=lambda pair: pair[1])
                entry: Figures = {
                    "method": method,
                    "against": rival,
                    "region": region,
                    "cases": len(there),
                    "mean_db": _round(float(np.mean(values))),
                    "worse": sum(value > TOLERANCE for value in values),
                    "worst_db": _round(worst[1]),
                    "worst_case": worst[0]["name"],
                }
                if interval := bootstrap(values, [row["subject"] for row, _ in there]):
                    entry["low_db"], entry["high_db"] = map(_round, interval)
                found.append(entry)
    return found


def _both(row: Figures, *methods: str) -> bool:
    return all(method in row["methods"] and "failed" not in row["methods"][method] for method in methods)


def _difference(method: str, rival: str, region: str) -> Callable[[Figures], float]:
    return lambda row: row["methods"][method][region]["nrmse_db"] - row["methods"][rival][region]["nrmse_db"]


def _round(value: float) -> float:
    return round(value, 4)

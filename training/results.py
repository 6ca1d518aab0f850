"""The files of an evaluation: JSON, pictures and the page."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from melcore import __version__
from melcore.errors import MelError
from melcore.io import bart
from melcore.io.atomic import replacing
from training.comparison import Row, Setup
from training.figures import curves, panel
from training.report import page
from training.summary import BEST, summarise, with_best
from training.tables import text_table

_MOST_PANELS = 16  # on the page; the folder has all


def report(
    rows: Sequence[Row], setup: Setup, skipped: Sequence[dict[str, str]], command: str
) -> tuple[str, dict[str, Any]]:
    """Write JSON, PNGs and the page; return the table and what the JSON holds."""
    figures = [row.figures for row in rows]
    content = {
        "about": about(setup, command),
        "summary": summarise(figures),
        "cases": figures,
        "skipped": list(skipped),
    }
    pictures, shown = {}, {row.figures["name"] for row in _shown(rows)}
    (setup.folder / "panels").mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, bytes]] = []
    for row in rows:
        name, png = row.figures["name"], panel(row)
        files.append((setup.folder / "panels" / f"{_file_name(name)}.png", png))
        if name in shown:
            pictures[name] = png
    drawn = curves(figures)
    files += [(setup.folder / f"{_file_name(title)}.png", png) for title, png in drawn.items()]
    files += [
        (setup.folder / "evaluation.json", (json.dumps(content, indent=1) + "\n").encode()),
        (setup.folder / "evaluation.html", page(content, drawn, pictures).encode()),
    ]
    for path, data in files:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    return text_table(content["summary"], figures), content


def about(setup: Setup, command: str) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    try:
        known = bart.version()
    except MelError:
        known = "absent"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, bundles on {setup.device}",
        "versions": {
            "melcore": __version__,
            "torch": torch.__version__,
            "bart": known,
            "python": platform.python_version(),
        },
        "bundles": [
            {
                "name": one.name,
                "digest": one.digest,
                "dimensions": one.dimensions,
                "iterations": len(one.model.order),
                "parameters": sum(parameter.numel() for parameter in one.model.parameters()),
                "data": _trained_on(one.card.get("data", "")),
            }
            for one in setup.bundles
        ],
    }


def _trained_on(data: Any) -> str:
    """What a card says of the training data, in a line."""
    if not isinstance(data, Mapping) or not isinstance(data.get("sources"), list):
        return str(data)
    words = []
    for source in data["sources"]:
        subjects = f", {source['subjects']} subjects" if "subjects" in source else ""
        words.append(f"{source.get('name', '?')} ({float(source.get('share', 0)):.0%}{subjects})")
    return f"Trained on {', '.join(words)}."


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Cases whose images are on the page: where there are many, those in which the learned image fares worst."""
    if len(rows) <= _MOST_PANELS:
        return list(rows)

    def loss(row: Row) -> float:
        methods = with_best(row.figures)["methods"]
        learned = [one for name, one in methods.items() if name.startswith("learned") and "failed" not in one]
        if not learned or BEST not in methods:
            return 0.0
        return max(one["object"]["nrmse_db"] for one in learned) - methods[BEST]["object"]["nrmse_db"]

    worst = sorted(range(len(rows)), key=lambda index: -loss(rows[index]))[:_MOST_PANELS]
    return [rows[index] for index in sorted(worst)]


def _file_name(title: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "=.+-" else "_" for letter in title)
    return "_".join(part for part in kept.split("_") if part)

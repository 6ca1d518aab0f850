"""One page that holds all of an evaluation: it needs no other file and no network."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from training.reference import METRICS, OBJECT_THRESHOLD, REGIONS
from training.summary import TOLERANCE, methods_of, near_floor, with_best
from training.tables import DIGITS, HEADINGS, counted, difference, interval

Figures = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #68707a; --line: #d5dae0; --stripe: #f5f7f9;
  --good: #0a6b36; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --faint: #9aa4ae; --line: #343c44;
  --stripe: #1b2127; --good: #6fd39a; --bad: #ff9a8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 82rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
p, li { max-width: 60rem; } .faint { color: var(--faint); } .good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .25rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tbody tr:nth-child(even) { background: var(--stripe); }
td.best { font-weight: 650; } td small { color: var(--faint); }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--faint); font-size: .87rem; } details summary { cursor: pointer; }
"""


def page(content: Figures, curves: Mapping[str, bytes], panels: Mapping[str, bytes]) -> str:
    """HTML.

    Parameters
    ----------
    content
        What the JSON holds: ``about``, ``summary``, ``cases`` and ``skipped``.
    curves, panels
        PNGs by title; panels of the cases that are shown.
    """
    about, rows = content["about"], content["cases"]
    parts = [
        "<h1>Reconstructions judged against fully sampled data</h1>",
        f"<p class=faint>{_text(about['date'])} · <code>{_text(about['command'])}</code><br>"
        + f"{_text(about['machine'])} · "
        + " · ".join(f"{_text(name)} {_text(value)}" for name, value in about["versions"].items())
        + "</p>",
        _bundles(about.get("bundles", [])),
        _meaning(),
    ]
    for dimensions, found in content["summary"].items():
        parts.append(f"<h2>{_text(dimensions)}: {counted(found)}</h2>")
        parts.append(_paired(found["paired"]))
        parts += [_means(region, found["methods"]) for region in REGIONS]
        parts.append(_settings(found["by_setting"]))
    if curves:
        parts.append("<h2>Curves</h2>")
        parts += [_image(title, png) for title, png in curves.items()]
    if panels:
        few = f" ({len(panels)} of {len(rows)} cases)" if len(panels) < len(rows) else ""
        parts.append(f"<h2>Images{few}</h2>")
        parts += [_image(title, png) for title, png in panels.items()]
    parts += [_cases(rows), _remarks(rows, content["skipped"])]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mel evaluate</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _meaning() -> str:
    return (
        "<details><summary>What the figures mean</summary><ul>"
        "<li>NRMSE: norm of the complex difference over that of the reference; PSNR, SSIM and HFEN (edges, through a "
        "Laplacian of a Gaussian) compare magnitudes. Higher is better for PSNR and SSIM, lower for the others.</li>"
        f"<li>Regions: the object (smoothed reference above {OBJECT_THRESHOLD:g} of its 99th percentile), the support "
        "(where the preparation found signal that the coil maps explain), and the whole image.</li>"
        "<li>The reference is the fully sampled data of all coils, combined with the maps that every method was given. "
        "Noise was added to the exam on top, unless a remark says otherwise: a reference with the exam's own noise "
        "favours whatever keeps the sampled noise.</li>"
        "<li>CG-SENSE is what <code>mel recon --model none</code> gives. An oracle weight, and those of BART's pics, "
        "were swept on the very case until the best was inside the grid, by NRMSE in the support.</li>"
        "<li>Brackets are 95 % intervals of the mean, by drawing subjects with replacement.</li></ul></details>"
    )


def _bundles(bundles: Sequence[Figures]) -> str:
    if not bundles:
        return ""
    items = "".join(
        f"<li><b>{_text(one['name'])}</b> <code>{_text(one['digest'])}</code>, {_text(one['dimensions'])}, "
        f"{one['iterations']} iterations, {one['parameters']:,} parameters. {_text(one['data'])}</li>"
        for one in bundles
    )
    return f"<ul>{items}</ul>"


def _paired(paired: Sequence[Figures]) -> str:
    if not paired:
        return ""
    lines = []
    for one in paired:
        mark = "bad" if one["worse"] else "good"
        words = _text(difference(one))
        lines.append(
            f"<tr><td>{_text(one['method'])}</td><td>{_text(one['against'])}</td><td>{_text(one['region'])}</td>"
            f"<td class={mark} style='text-align:left'>{words}</td></tr>"
        )
    head = "<tr><th>method</th><th>against</th><th>region</th><th>difference of NRMSE (negative is better)</th></tr>"
    return _table(f"Case by case (a loss counts from {TOLERANCE:g} dB on)", head, lines)


def _means(region: str, methods: Figures) -> str:
    head = "<tr><th>method</th>" + "".join(f"<th>{HEADINGS[metric]}</th>" for metric in METRICS) + "<th>cases</th></tr>"
    best = {
        metric: (max if metric in ("psnr_db", "ssim") else min)(
            (found[region][metric]["mean"] for name, found in methods.items() if not name.startswith("best")),
            default=None,
        )
        for metric in METRICS
    }
    lines = []
    for name, found in methods.items():
        cells = []
        for metric in METRICS:
            entry, digits = found[region][metric], DIGITS[metric]
            mean, _, span = interval(entry, digits).partition(" ")
            mark = " class=best" if entry["mean"] == best[metric] and not name.startswith("best") else ""
            cells.append(f"<td{mark}>{mean} <small>{span}</small></td>")
        lines.append(f"<tr><td>{_text(name)}</td>{''.join(cells)}<td>{found['cases']}</td></tr>")
    return _table(f"Means, {region}", head, lines)


def _settings(cells: Sequence[Figures]) -> str:
    if len(cells) < 2:
        return ""
    methods = methods_of(cells)
    head = "<tr><th>mask, R, SNR</th>" + "".join(f"<th>{_text(method)}</th>" for method in methods) + "</tr>"
    lines = []
    for cell in cells:
        values = {m: cell["methods"][m]["object"]["nrmse_db"]["mean"] for m in methods if m in cell["methods"]}
        least = min((v for m, v in values.items() if not m.startswith("best")), default=None)
        shown = "".join(
            f"<td{' class=best' if m in values and values[m] == least and not m.startswith('best') else ''}>"
            f"{f'{values[m]:.2f}' if m in values else '-'}</td>"
            for m in methods
        )
        title = f"{_text(cell['mask'])} R={cell['acceleration']:g}, SNR {cell['snr']:g}"
        lines.append(f"<tr><td>{title} <small>({cell['cases']})</small></td>{shown}</tr>")
    return _table("NRMSE in the object, dB", head, lines)


def _cases(rows: Sequence[Figures]) -> str:
    lines = []
    for row in map(with_best, rows):
        for name, found in row["methods"].items():
            if name.startswith("best"):
                continue
            if "failed" in found:
                shown = (
                    f"<td colspan=4 class=bad style='text-align:left'>{_text(found['failed'])}</td><td></td><td></td>"
                )
            else:
                shown = "".join(f"<td>{found['object'][metric]:.{DIGITS[metric]}f}</td>" for metric in METRICS)
                edge = " <span class=bad>(at the edge)</span>" if found["inside"] is False else ""
                shown += (
                    f"<td>{found['seconds']:.1f}</td><td style='text-align:left'>{_text(found['setting'])}{edge}</td>"
                )
            lines.append(f"<tr><td>{_text(row['name'])}</td><td style='text-align:left'>{_text(name)}</td>{shown}</tr>")
    head = (
        "<tr><th>case</th><th>method</th>"
        + "".join(f"<th>{HEADINGS[metric]}</th>" for metric in METRICS)
        + "<th>s</th><th>setting</th></tr>"
    )
    table = _table("", head, lines)
    return f"<h2>Every case</h2><details><summary>{len(rows)} cases, figures in the object</summary>{table}</details>"


def _remarks(rows: Sequence[Figures], skipped: Sequence[Figures]) -> str:
    items = []
    for row in rows:
        words = list(row["remarks"])
        if near_floor(row):
            words.append(f"figures are near the noise of the reference ({row['floor_db']['object']:.1f} dB)")
        words += [f"doubted: {d}" for found in row["methods"].values() for d in found.get("doubts", [])]
        items += [f"<li>{_text(row['name'])}: {_text(one)}</li>" for one in words]
    items += [f"<li class=bad>{_text(one['name'])} was left out: {_text(one['reason'])}</li>" for one in skipped]
    return f"<h2>Remarks</h2><ul>{''.join(items)}</ul>" if items else ""


def _table(title: str, head: str, lines: Sequence[str]) -> str:
    heading = f"<h3>{_text(title)}</h3>" if title else ""
    return f"{heading}<div class=scroll><table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div>"


def _image(title: str, png: bytes) -> str:
    content = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{_text(title)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{_text(title)}</figcaption></figure>"
    )


def _text(words: object) -> str:
    return html.escape(str(words))

"""The figures of an evaluation as plain text."""

from typing import Any

from training.reference import METRICS, REGIONS
from training.summary import TOLERANCE, methods_of, near_floor

HEADINGS = {"nrmse_db": "NRMSE/dB", "psnr_db": "PSNR/dB", "ssim": "SSIM", "hfen": "HFEN"}
DIGITS = {"nrmse_db": 2, "psnr_db": 2, "ssim": 4, "hfen": 4}

Figures = dict[str, Any]


def interval(entry: Figures, digits: int) -> str:
    """A mean, and its interval where there is one."""
    text = f"{entry['mean']:.{digits}f}"
    return text if "low" not in entry else f"{text} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def counted(found: Figures) -> str:
    """How many cases and subjects, in words."""
    words = (f"{found[key]} {key[:-1] if found[key] == 1 else key}" for key in ("cases", "subjects"))
    return " of ".join(words)


def text_table(summary: Figures, rows: list[Figures]) -> str:
    """What ``mel evaluate`` prints."""
    lines: list[str] = []
    for dimensions, found in summary.items():
        lines += ["", f"{dimensions}: {counted(found)}, means [95 % intervals]"]
        for region in REGIONS:
            lines.append(f"  {region:26}" + "".join(f"{HEADINGS[metric]:>26}" for metric in METRICS))
            for method, means in found["methods"].items():
                cells = (interval(means[region][metric], DIGITS[metric]) for metric in METRICS)
                lines.append(f"    {method[:24]:24}" + "".join(f"{cell:>26}" for cell in cells))
        lines += _by_setting(found)
        lines += [
            f"  {one['method']} - {one['against']} ({one['region']}): {difference(one)}" for one in found["paired"]
        ]
    floored = [row for row in rows if near_floor(row)]
    if floored:
        lines += ["", f"{len(floored)} cases are judged near the noise of their reference; see the page or the JSON."]
    for row in rows:
        for method, found in row["methods"].items():
            if "failed" in found:
                lines.append(f"{row['name']}: {method} failed: {found['failed']}")
            elif found.get("inside") is False:
                lines.append(f"{row['name']}: the best weight of {method} is at the edge of what was tried")
    return "\n".join(lines).lstrip("\n") + "\n"


def difference(one: Figures) -> str:
    """A paired difference in words."""
    span = f" [{one['low_db']:+.2f}, {one['high_db']:+.2f}]" if "low_db" in one else ""
    words = f"{one['mean_db']:+.2f}{span} dB, worse by over {TOLERANCE:g} dB in {one['worse']} of {one['cases']}"
    return words + (f" (by {one['worst_db']:.2f} dB: {one['worst_case']})" if one["worse"] else "")


def _by_setting(found: Figures) -> list[str]:
    cells = found["by_setting"]
    if len(cells) < 2:
        return []
    methods = methods_of(cells)
    width = max(14, *(min(len(method), 22) + 2 for method in methods))
    heading = "".join(f"{method[: width - 2]:>{width}}" for method in methods)
    lines = ["  NRMSE/dB in the object", f"    {'mask, R, SNR':26}{heading}"]
    for cell in cells:
        values = (
            f"{cell['methods'][method]['object']['nrmse_db']['mean']:.2f}" if method in cell["methods"] else "-"
            for method in methods
        )
        setting = f"{cell['mask']} {cell['acceleration']:g}, {cell['snr']:g}"
        lines.append(f"    {setting:26}" + "".join(f"{value:>{width}}" for value in values))
    return lines

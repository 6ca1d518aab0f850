"""Pictures of an evaluation: images beside their errors, and errors against acceleration, SNR and iterations."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from melcore.errors import MissingDependencyError
from training.comparison import REFERENCE, Row
from training.summary import methods_of, with_best

_GAIN = 5  # errors are shown so many times brighter
_COLOURS = ("#7f7f7f", "#1f77b4", "#17becf", "#9467bd", "#8c564b", "#bcbd22", "#e377c2")
_LEARNED = ("#d62728", "#ff7f0e", "#2ca02c")


def require() -> None:
    """Fail early where matplotlib is absent.

    Raises
    ------
    MissingDependencyError
        With the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("mel evaluate draws with matplotlib: pip install 'melcore[figures]'") from error


def panel(row: Row) -> bytes:
    """PNG: images in one line and their errors below, for each plane that was kept."""
    from matplotlib.figure import Figure

    names = [name for name in row.sections if row.sections[name]]
    truth = row.sections[REFERENCE]
    heights = [_height(plane.shape) for plane in truth for _ in range(2)]
    figure = Figure(figsize=(2.3 * len(names), 2.3 * sum(heights) + 0.75), layout="constrained")
    axes: Any = figure.subplots(2 * len(truth), len(names), squeeze=False, height_ratios=heights)
    for index, plane in enumerate(truth):
        top = float(np.quantile(plane.abs().numpy(), 0.998)) or 1.0
        for column, name in enumerate(names):
            image = row.sections[name][index]
            error = (image - plane).abs().numpy()
            for place, picture, colours, most in (
                (axes[2 * index, column], image.abs().numpy(), "gray", top),
                (axes[2 * index + 1, column], error, "magma", top / _GAIN),
            ):
                place.imshow(
                    picture, cmap=colours, vmin=0, vmax=most, aspect=_aspect(plane.shape), interpolation="nearest"
                )
                place.set_axis_off()
            if index == 0:
                axes[0, column].set_title(_caption(name, row.figures), fontsize=7)
    figure.suptitle(f"{row.figures['name']}; below: complex errors, {_GAIN} times brighter", fontsize=8)
    return _png(figure)


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """PNGs by title: mean NRMSE in the object against what varies among the cases."""
    found = {}
    for dimensions in dict.fromkeys(row["dimensions"] for row in rows):
        group = [with_best(row) for row in rows if row["dimensions"] == dimensions]
        for key, other, words in (("acceleration", "snr", "acceleration"), ("snr", "acceleration", "SNR")):
            if len({round(row[key], 1) for row in group}) > 1:
                title = f"{dimensions}: error against {words}"
                found[title] = _curve(group, key, other, words)
        if image := _iterations(group):
            found[f"{dimensions}: error against iterations"] = image
    return found


def _caption(name: str, figures: dict[str, Any]) -> str:
    found = figures["methods"].get(name)
    if found is None:
        return name
    inside = found["object"]
    return "\n".join([*name.split(": ", 1), f"{inside['nrmse_db']:.2f} dB, SSIM {inside['ssim']:.3f}"])


def _height(shape: Sequence[int]) -> float:
    """Of a plane whose width is 1."""
    return min(max(shape[0] / shape[1], 0.45), 1.5)


def _aspect(shape: Sequence[int]) -> float:
    """Pixels are squares, but of planes much longer than wide."""
    return _height(shape) * shape[1] / shape[0]


def _curve(rows: Sequence[dict[str, Any]], key: str, other: str, words: str) -> bytes:
    """One small plot for each value of the other variable."""
    from matplotlib.figure import Figure

    values = sorted({round(row[other], 1) for row in rows})
    columns = min(len(values), 3)
    lines = -(-len(values) // columns)
    figure = Figure(figsize=(3.6 * columns + 2.2, 2.9 * lines + 0.3), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for place in axes.flat[len(values) :]:
        place.set_axis_off()
    for place, value in zip(axes.flat, values, strict=False):
        there = [row for row in rows if round(row[other], 1) == value]
        for method, style in _styles(methods_of(rows)).items():
            points: dict[float, list[float]] = {}
            for row in there:
                if method in row["methods"] and "failed" not in row["methods"][method]:
                    error = row["methods"][method]["object"]["nrmse_db"]
                    points.setdefault(round(row[key], 1), []).append(error)
            ordered = sorted(points)
            place.plot(ordered, [float(np.mean(points[x])) for x in ordered], label=method, **style)
        place.set_title(f"{'SNR' if other == 'snr' else 'R ='} {value:g}", fontsize=9)
        place.set_xscale("log", base=10)
        ticks = sorted({round(row[key], 1) for row in rows})
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        place.minorticks_off()
        place.grid(alpha=0.3)
        place.set_xlabel(words, fontsize=8)
        place.set_ylabel("NRMSE in the object, dB", fontsize=8)
        place.tick_params(labelsize=7)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
    return _png(figure)


def _iterations(rows: Sequence[dict[str, Any]]) -> bytes | None:
    """Bundles of different depth."""
    from matplotlib.figure import Figure

    errors: dict[int, list[float]] = {}
    for row in rows:
        for name, found in row["methods"].items():
            if name.startswith("learned") and "failed" not in found:
                errors.setdefault(found["iterations"], []).append(found["object"]["nrmse_db"])
    if len(errors) < 2:
        return None
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    depths = sorted(errors)
    axes.plot(depths, [float(np.mean(errors[depth])) for depth in depths], "o-", color=_LEARNED[0])
    axes.set_xticks(depths)
    axes.set(xlabel="iterations", ylabel="mean NRMSE in the object, dB")
    axes.grid(alpha=0.3)
    return _png(figure)


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    plain = [method for method in methods if not method.startswith(("learned", "best"))]
    for index, method in enumerate(plain):
        found[method] = {"color": _COLOURS[index % len(_COLOURS)], "linewidth": 1, "marker": ".", "linestyle": "--"}
    for index, method in enumerate(method for method in methods if method.startswith("learned")):
        found[method] = {"color": _LEARNED[index % len(_LEARNED)], "linewidth": 1.8, "marker": "o", "markersize": 4}
    return found


def _png(figure: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=80, facecolor="white")
    return content.getvalue()

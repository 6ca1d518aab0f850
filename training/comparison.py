"""All methods on one case: the same data, preparation and reference for each; what is finished is not done again."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melcore.bundle import Bundle
from melcore.errors import MelError
from melcore.preprocess.preparation import Preparation, Prepared, prepare
from melcore.reconstruct import Reconstructor
from training.baselines import Outcome, oracle_cg_sense, pics_kinds, tuned_pics, zero_filled
from training.cases import Case
from training.records import Record, Records, code_digest
from training.reference import Reference, reference

ZERO_FILLED, CG_SENSE, ORACLE = "zero-filled", "CG-SENSE", "CG-SENSE, oracle weight"
REFERENCE = "reference"


@dataclass(frozen=True)
class Setup:
    """What is compared.

    Attributes
    ----------
    bundles
        Learned methods; each is tried on the cases of its dimensions.
    baselines
        Of ``cg`` (the product's CG-SENSE and one with an oracle's weight) and ``pics``.
    folder
        Where finished work is kept.
    device
        Of the bundles.
    preparation
        Of cases that no bundle is for.
    leave_out
        Names of methods that are not tried.
    """

    bundles: Sequence[Bundle]
    baselines: frozenset[str]
    folder: Path
    device: str = "auto"
    preparation: Preparation = field(default_factory=Preparation)
    leave_out: frozenset[str] = frozenset()

    def fitting(self, dimensions: str) -> list[Bundle]:
        """Bundles for such data."""
        return [bundle for bundle in self.bundles if bundle.dimensions == dimensions]

    def label(self, bundle: Bundle) -> str:
        """What a bundle's column is called; its digest tells apart bundles of one name."""
        alone = [other.name for other in self.bundles].count(bundle.name) == 1
        return "learned: " + (bundle.name if alone and bundle.name else f"{bundle.name}@{bundle.digest}")


@dataclass(frozen=True)
class Row:
    """All figures of one case.

    Attributes
    ----------
    figures
        JSON: what the case is, and under ``methods`` what each method reached.
    sections
        Planes through the images, by method; the reference's too.
    """

    figures: dict[str, Any]
    sections: dict[str, list[Tensor]]


@dataclass
class _Bench:
    """A case, prepared when it is needed."""

    case: Case
    settings: Preparation
    cache: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.case.k_space, settings=self.settings)

    @cached_property
    def reference(self) -> Reference:
        return reference(self.case, self.prepared)


def compare(case: Case, setup: Setup, progress: Callable[[str], object] = lambda _: None) -> Row:
    """Run, or look up, every method on a case.

    Parameters
    ----------
    case
        See `training.cases.make_case`.
    setup
        The methods, and where finished ones are kept.
    progress
        Called with the name of the method that is about to run.

    Raises
    ------
    MelError
        If the case cannot even be prepared. A method that fails is recorded with its error.
    """
    records, bundles = Records(setup.folder / "records"), setup.fitting(case.dimensions)
    common = _Bench(case, bundles[0].preparation if bundles else setup.preparation)
    benches = {id(bundle): common if bundle.preparation == common.settings else _Bench(case, bundle.preparation)
               for bundle in bundles}  # fmt: skip
    work: dict[str, tuple[_Bench, str, Callable[[_Bench], Outcome]]] = {
        REFERENCE: (common, "reference", lambda bench: Outcome(bench.reference.image)),
        ZERO_FILLED: (common, "zero-filled", lambda bench: zero_filled(bench.prepared)),
    }
    if "cg" in setup.baselines:
        work[CG_SENSE] = (common, "cg", _product)
        work[ORACLE] = (common, "oracle", lambda bench: oracle_cg_sense(bench.prepared, bench.reference))
    if "pics" in setup.baselines:
        for name, kinds in pics_kinds(case.dimensions).items():
            work[name] = (common, name, _pics(kinds, setup.folder / "pics"))
    for bundle in bundles:
        work[setup.label(bundle)] = (benches[id(bundle)], f"learned {bundle.digest}", _learned(bundle, setup.device))
    work = {name: entry for name, entry in work.items() if name not in setup.leave_out}
    rows: dict[str, Record] = {}
    digest = case.digest
    with map_cache(setup.folder / "maps"):
        for name, (bench, identity, method) in work.items():
            key = (digest, repr(bench.settings), code_digest(), identity)
            found = records.read(*key)
            if found is None:
                progress(name)
                found = _run(bench, method, is_reference=name == REFERENCE)
                if "failed" not in found.figures:
                    records.write(found, *key)
            rows[name] = found
    about = {
        "name": case.name,
        "exam": case.exam,
        "subject": case.subject,
        "origin": case.origin,
        "dimensions": case.dimensions,
        "shape": list(case.k_space.data.shape),
        "mask": case.mask,
        "acceleration": case.acceleration,
        "snr": case.snr,
        "preparation": asdict(common.settings),
        **{
            key: value for key, value in rows[REFERENCE].figures.items() if key in ("sigma", "sigma_source", "floor_db")
        },
        "remarks": list(case.remarks),
        "methods": {name: record.figures for name, record in rows.items() if name != REFERENCE},
    }
    return Row(about, {name: record.sections for name, record in rows.items()})


@contextmanager
def map_cache(folder: Path) -> Iterator[None]:
    """Keep coil maps in a folder, unless ``MEL_CACHE`` names one: every method asks for the same ones."""
    if os.environ.get("MEL_CACHE"):
        yield
        return
    os.environ["MEL_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MEL_CACHE"]


def sections(image: Tensor, truth: Tensor) -> list[Tensor]:
    """Planes through the brightest part of the object: (y, x), and (z, y) of volumes or (y, time) of series."""
    weight = truth[0].abs().square().sum((0, 1))  # (z, y, x)
    z, _, x = (_middle(weight.sum([other for other in range(3) if other != axis])) for axis in range(3))
    frames = image.shape[2]
    found = [image[0, 0, frames // 3, z]]
    if image.shape[3] > 1:
        found.append(image[0, 0, frames // 3, :, :, x])
    if frames > 1:
        found.append(image[0, 0, :, z, :, x].T)
    return [plane.to(torch.complex64).contiguous() for plane in found]


def _middle(weight: Tensor) -> int:
    """Index of the centre of mass."""
    return int((weight * torch.arange(len(weight))).sum() / weight.sum().clamp(min=1e-30))


def _run(bench: _Bench, method: Callable[[_Bench], Outcome], *, is_reference: bool) -> Record:
    if is_reference:  # without this there is nothing to judge by: errors are the case's
        bench.prepared  # noqa: B018
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            outcome = method(bench)
    except MelError as error:
        if is_reference:
            raise
        return Record({"failed": " ".join(str(error).split())}, [])
    seconds = time.perf_counter() - begin
    truth = bench.reference.image
    figures: dict[str, Any] = {"seconds": round(seconds, 2)}
    if is_reference:
        floor = {name: None if value == -float("inf") else value for name, value in bench.reference.floor_db.items()}
        figures |= {
            "sigma": float(bench.prepared.sigma.mean()),
            "sigma_source": bench.prepared.sigma_source,
            "floor_db": floor,
        }
    else:
        figures |= bench.reference.judge(outcome.image)
        figures |= {"setting": outcome.setting, "inside": outcome.inside, **outcome.notes}
    return Record(figures, sections(outcome.image, truth))


def _product(bench: _Bench) -> Outcome:
    """CG-SENSE as ``mel recon --model none`` gives it, but with the coils and maps of the other methods."""
    found = Reconstructor("cg-sense", "cpu", preparation=bench.settings)(bench.case.k_space)
    return Outcome(_scaled(found.image.data, bench.prepared), "weight from the noise and the acceleration")


def _pics(kinds: Sequence[str], cache: Path) -> Callable[[_Bench], Outcome]:
    return lambda bench: tuned_pics(bench.prepared, bench.reference, kinds, cache)


def _learned(bundle: Bundle, device: str) -> Callable[[_Bench], Outcome]:
    """As ``mel recon --model BUNDLE`` gives it."""

    def method(bench: _Bench) -> Outcome:
        found = Reconstructor(bundle, device, fallback=False, on_doubt="record")(bench.case.k_space)
        notes = {"doubts": list(found.doubts), "iterations": len(bundle.model.order), "digest": bundle.digest}
        return Outcome(_scaled(found.image.data, bench.prepared), bundle.digest, None, notes)

    return method


def _scaled(image: Tensor, prepared: Prepared) -> Tensor:
    return image / prepared.scale.view(-1, 1, 1, 1, 1, 1)

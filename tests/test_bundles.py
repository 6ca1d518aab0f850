"""The bundles that ship: small, described, made by their configurations, and better than what they replace."""

from pathlib import Path

import pytest

from benchmarks.real_scans import head, heart, measured_brains
from melcore.bundle import Bundle, shipped
from melcore.preprocess import masks
from tests.cases import shared
from training.cases import Case, make_case
from training.comparison import Setup, compare
from training.config import load

NAMES = ("primal_dual_2d", "primal_dual_3d", "primal_dual_2dt")
CONFIGS = Path(__file__).parents[1] / "training" / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_bundles_tell_how_they_were_trained(name: str) -> None:
    bundle = Bundle.load(name)
    card = bundle.card
    assert shipped()[name].stat().st_size < 2e6
    assert card["steps"] > 100
    assert card["seconds"] > 60
    assert {"data", "seed", "machine", "date", "versions", "target", "metrics"} <= set(card)
    metrics = card["metrics"]
    assert metrics["learned"]["nrmse_db"] < min(metrics[other]["nrmse_db"] for other in ("cg_sense", "zero_filled")) - 1
    assert metrics["learned"]["ssim"] > max(metrics[other]["ssim"] for other in ("cg_sense", "zero_filled"))


@pytest.mark.parametrize("name", NAMES)
def test_bundles_come_from_the_committed_configurations(name: str) -> None:
    bundle, config = Bundle.load(name), load(CONFIGS / f"{name}.yaml")
    # Settings that were added since have their defaults in the configuration and are absent from the card. How many
    # processes drew the examples changes nothing, and of a folder the card tells the name alone.
    for section, settings in bundle.card["config"].items():
        now = config.to_dict()[section]
        if section == "data":
            now["workers"] = settings["workers"]
            for source in now["sources"]:
                source["folder"] = source["folder"] and Path(source["folder"]).name
        changed = [k for k in settings if settings[k] != now[k]] if isinstance(settings, dict) else settings != now
        assert not changed, f"{section}: {changed}"
    assert bundle.architecture == config.model
    assert bundle.dimensions == config.data.dimensions


def judged(case: Case, folder: Path) -> dict[str, dict[str, float]]:
    """Figures in the object, of each method: in the air SSIM compares with the noise of the reference."""
    row = compare(case, Setup([Bundle.load(name) for name in NAMES], frozenset(["cg"]), folder))
    methods = row.figures["methods"]
    assert not [name for name, figures in methods.items() if "failed" in figures]
    return {("learned" if "learned" in name else name): figures["object"] for name, figures in methods.items()}


def test_measured_brains(tmp_path: Path) -> None:
    """Trained without any measured k-space, the 2D bundle beats CG-SENSE of the best weight on measured data."""
    for case in measured_brains(shared("data")):
        found = judged(case, tmp_path)
        for other in ("CG-SENSE", "CG-SENSE, oracle weight"):
            assert found["learned"]["nrmse_db"] < found[other]["nrmse_db"] - 1, (case.name, found)
            assert found["learned"]["ssim"] > found[other]["ssim"] + 0.01, (case.name, found)


def test_head_in_three_dimensions(tmp_path: Path) -> None:
    exam = head(shared("data"), voxel=3.5)
    plane = (exam.complete.shape[3], exam.complete.shape[4])
    mask = masks.k_space_mask(masks.poisson_disc(plane, 6, calibration=(16, 16), seed=6), ("z", "y"))
    found = judged(make_case(exam, mask=mask, label="poisson", snr=30, seed=8), tmp_path)
    assert found["learned"]["nrmse_db"] < found["CG-SENSE, oracle weight"]["nrmse_db"] - 1
    assert found["learned"]["ssim"] > found["CG-SENSE, oracle weight"]["ssim"]


def test_beating_heart(tmp_path: Path) -> None:
    lines = masks.k_space_mask(masks.variable_density_kt(10, 128, 8, 8, seed=8), ("time", "y"))
    exam = heart(shared("data"), frames=10)
    found = judged(make_case(exam, mask=lines, label="time-lines", snr=40, seed=8), tmp_path)
    assert found["learned"]["nrmse_db"] < found["CG-SENSE, oracle weight"]["nrmse_db"] - 2
    assert found["learned"]["ssim"] > found["CG-SENSE, oracle weight"]["ssim"]

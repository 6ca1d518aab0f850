"""The bundles that ship: small, described, made by their configurations, and better than what they replace."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality import best_cg_sense
from benchmarks.real_scans import RealScan, beating_heart, head, measured_brains
from melcore.bundle import Bundle, shipped
from melcore.reconstruct import Reconstructor
from tests.cases import shared
from training.config import load
from training.problem import place
from training.validation import judge, learned, zero_filled

NAMES = ("primal_dual_2d", "primal_dual_3d", "primal_dual_2dt")
CONFIGS = Path(__file__).parents[1] / "training" / "configs"


@pytest.mark.parametrize("name", NAMES)
def test_bundles_tell_how_they_were_trained(name: str) -> None:
    bundle = Bundle.load(name)
    card = bundle.card
    assert shipped()[name].stat().st_size < 2e6
    assert card["steps"] == card["config"]["training"]["steps"]
    assert card["seconds"] > 60
    assert {"data", "seed", "machine", "date", "versions", "target", "metrics"} <= set(card)
    metrics = card["metrics"]
    assert metrics["learned"]["nrmse_db"] < min(metrics[other]["nrmse_db"] for other in ("cg_sense", "zero_filled")) - 1
    assert metrics["learned"]["ssim"] > max(metrics[other]["ssim"] for other in ("cg_sense", "zero_filled"))


@pytest.mark.parametrize("name", NAMES)
def test_bundles_come_from_the_committed_configurations(name: str) -> None:
    bundle, config = Bundle.load(name), load(CONFIGS / f"{name}.yaml")
    # Settings that were added since have their defaults in the configuration and are absent from the card.
    for section, settings in bundle.card["config"].items():
        now = config.to_dict()[section]
        changed = [k for k in settings if settings[k] != now[k]] if isinstance(settings, dict) else settings != now
        assert not changed, f"{section}: {changed}"
    assert bundle.architecture == config.model
    assert bundle.dimensions == config.data.dimensions


def compare(bundle: Bundle, scan: RealScan) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Figures of the learned, the best CG-SENSE and the zero-filled reconstruction."""
    problem = place(scan.example(bundle.preparation))
    with torch.no_grad():
        figures = judge(learned(bundle.model)(problem), problem)
        sense = best_cg_sense(problem, weights=(0.003, 0.01, 0.03, 0.1), iterations=(5, 10))
        return figures, sense[2], judge(zero_filled(problem), problem)


@pytest.mark.parametrize(
    "index", range(4), ids=["2x2 grid", "Poisson R=4", "Poisson 12.4 %", "other slice, Poisson R=4"]
)
def test_measured_brains(index: int) -> None:
    """Trained on simulation only, the 2D bundle beats CG-SENSE of the best weight on measured data."""
    scan = measured_brains(shared("data"))[index]
    ours, sense, zero = compare(Bundle.load("primal_dual_2d"), scan)
    assert ours["nrmse_db"] < sense["nrmse_db"]
    assert ours["nrmse_db"] < zero["nrmse_db"] - 3
    assert ours["ssim"] > sense["ssim"] + 0.01
    assert ours["ssim"] > zero["ssim"]


def test_head_in_three_dimensions() -> None:
    ours, sense, zero = compare(Bundle.load("primal_dual_3d"), head(shared("data"), 6, voxel=3.5))
    assert ours["nrmse_db"] < sense["nrmse_db"] - 0.5
    assert ours["nrmse_db"] < zero["nrmse_db"]
    assert ours["ssim"] > sense["ssim"]


def test_beating_heart() -> None:
    ours, sense, zero = compare(Bundle.load("primal_dual_2dt"), beating_heart(shared("data"), 8, frames=10))
    assert ours["nrmse_db"] < sense["nrmse_db"] - 2
    assert ours["nrmse_db"] < zero["nrmse_db"]
    assert ours["ssim"] > sense["ssim"]


def test_the_reconstructor_gives_the_same_image() -> None:
    """The scanner's entrance and the benchmark's agree, whatever the unit of the data (here its peak is 5e13)."""
    scan, bundle = measured_brains(shared("data"))[2], Bundle.load("primal_dual_2d")
    example = scan.example(bundle.preparation)
    with torch.no_grad():
        image = learned(bundle.model)(place(example)) * example.support * example.prepared.scale.view(-1, 1, 1, 1, 1, 1)
    reconstruction = Reconstructor(bundle, device="cpu")(scan.k_space)
    assert reconstruction.path_taken == "learned"
    torch.testing.assert_close(reconstruction.image.data, image, rtol=1e-4, atol=float(image.abs().max()) * 1e-5)

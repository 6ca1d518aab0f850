"""Figures of quality mean what they say, and doubtful images are recorded, warned of, or not delivered."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from melcore.bundle import Bundle
from melcore.cli import main
from melcore.data import CoilMaps, KSpace, Noise
from melcore.errors import ConfigError
from melcore.io.images import read_images
from melcore.memory import MemoryPlan
from melcore.physics import Sense, fft
from melcore.preprocess.preparation import prepare
from melcore.quality import data_residual, noise_part
from melcore.reconstruct import Reconstructor
from melcore.unrolled import Encoding, Unrolled
from tests.laws import random
from tests.test_reconstruct import MATRIX, bundle, disc, exam, smooth_maps

CARD = {
    "config": {
        "data": {"coils": [4, 8], "y": [40, 64], "x": [40, 64], "masks": [{"acceleration": [1.5, 4.0]}]},
        "preparation": {"coils": None},
    }
}


def known_maps(coils: int = 6) -> CoilMaps:
    return CoilMaps(smooth_maps(MATRIX, coils), source="known")


def whitened(level: float) -> KSpace:
    """The disc so bright that noise of variance 2, as whitening leaves it, has this part of its amplitude."""
    quiet = exam(level=0)
    noise = random(tuple(quiet.data.shape), torch.complex64, seed=8)
    noise = noise * (2 / noise.abs().square().mean()).sqrt()
    data = (quiet.data / level + noise) * quiet.mask
    return replace(quiet, data=data, noise=Noise(whitened=True, source="scan"))


class Drawn(Unrolled):
    """In place of a network: its start image, changed by a function of it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(bundle().model.iterations)
        self.change = change

    def refine(self, _encoding: Encoding, initial: Tensor, *, memory: MemoryPlan | None = None) -> Tensor:
        """See `Unrolled.refine`."""
        assert memory is None
        return self.change(initial)


def drawn(change: Callable[[Tensor], Tensor] = lambda image: image) -> Bundle:
    return replace(bundle(), model=Drawn(change), card=CARD)


def stubborn() -> Bundle:
    """A network that wins over the data."""
    return drawn(lambda image: image + 0.5)


@pytest.mark.parametrize("level", [0.02, 0.2])
def test_a_perfect_image_departs_from_the_data_by_their_noise(level: float) -> None:
    k_space = whitened(level)
    prepared = prepare(k_space, coil_maps=known_maps())
    truth = disc(MATRIX) / level / prepared.scale.view(-1, 1, 1, 1, 1, 1)
    expected = noise_part(prepared)
    assert expected is not None
    assert data_residual(truth, prepared) == pytest.approx(expected, rel=0.03)


def test_the_noise_is_estimated_unless_the_data_were_whitened() -> None:
    """The level of a server's data is believed where the data do not contradict it."""
    for k_space, source, level in (
        (whitened(0.1), "scan", 0.1414),
        (exam(level=0.1), "estimated", 0.1),
        (replace(whitened(0.1), noise=Noise(whitened=True, source="upstream")), "scan", 0.1414),
        (replace(exam(level=0.02), noise=Noise(whitened=True, source="upstream")), "estimated", 0.02),
    ):
        prepared = prepare(k_space, coil_maps=known_maps())
        assert prepared.sigma_source == source
        # The disc has amplitude 1, and the scale is that of its brightest part.
        assert float(prepared.sigma) * 1.6 == pytest.approx(level, rel=0.2)
    assert "noise_part" in Reconstructor("cg-sense")(whitened(0.1), known_maps()).quality


def test_an_image_that_departs_from_the_data_is_doubted() -> None:
    k_space, maps = exam(), known_maps()
    warned = Reconstructor(stubborn())(k_space, maps)
    assert warned.path_taken == "learned"
    assert len(warned.doubts) == 1
    assert "departs from the measurement" in warned.doubts[0]
    assert warned.remarks == warned.doubts
    recorded = Reconstructor(stubborn(), on_doubt="record")(k_space, maps)
    assert (recorded.doubts, recorded.remarks) == (warned.doubts, ())
    diverted = Reconstructor(stubborn(), on_doubt="fallback")(k_space, maps)
    assert diverted.path_taken == "cg-sense"
    assert "in doubt, this is CG-SENSE" in diverted.warning
    assert torch.equal(diverted.image.data, Reconstructor("cg-sense")(k_space, maps).image.data)
    assert diverted.quality["data_residual"] < warned.quality["data_residual"]


def test_conventional_and_sound_images_are_not_doubted() -> None:
    for model in ("cg-sense", "adjoint", replace(bundle(), card=CARD)):
        assert Reconstructor(model)(exam(), known_maps()).doubts == ()


def test_data_unlike_the_training_are_named() -> None:
    trained = replace(bundle(), card=CARD)
    few = exam(coils=3)
    found = Reconstructor(trained)(few, known_maps(3)).doubts
    assert [words for words in found if "3 coils, but the network was trained with 4" in words]
    dense = {"config": {"data": {"masks": [{"kind": "grid"}, {"acceleration": [1.0, 1.2]}]}}}
    found = Reconstructor(replace(bundle(), card=dense))(exam(), known_maps()).doubts
    assert found == ("the acceleration is 1.6, but the network was trained for 1.2 at most",)
    small = {"config": {"data": {**CARD["config"]["data"], "y": [8, 12]}}}
    found = Reconstructor(replace(bundle(), card=small))(exam(), known_maps()).doubts
    assert [words for words in found if "54 samples along y" in words]


def test_maps_that_miss_signal_are_doubted() -> None:
    maps = smooth_maps(MATRIX, 6)
    maps[..., : MATRIX[2] // 2] = 0
    found = Reconstructor(bundle())(exam(), CoilMaps(maps, source="half")).doubts
    assert [words for words in found if "of the signal is explained by the coil maps" in words]


def test_an_unknown_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="record"):
        Reconstructor("adjoint", on_doubt="ignore")  # type: ignore[arg-type]


def test_the_operator_of_the_figures_is_the_data() -> None:
    k_space = exam(level=0)
    prepared = prepare(k_space, coil_maps=known_maps())
    truth = disc(MATRIX) / prepared.scale.view(-1, 1, 1, 1, 1, 1)
    assert data_residual(truth, prepared) < 1e-5
    whole = Sense(smooth_maps(MATRIX, 6), torch.ones(1, 1, 1, 1, 1, 1))(disc(MATRIX))
    torch.testing.assert_close(whole, fft(smooth_maps(MATRIX, 6)[:, 0] * disc(MATRIX)), rtol=1e-4, atol=1e-4)


def test_doubts_reach_the_meta_data_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A simulated exam of fourfold acceleration, and a network that was trained for twofold."""
    trained = {"config": {"data": {"masks": [{"acceleration": [1.0, 2.0]}]}}}
    model = replace(Bundle.load("primal_dual_3d"), card=trained).save(tmp_path / "for2.safetensors")
    raw, images = str(tmp_path / "exam.h5"), str(tmp_path / "images.h5")
    assert (
        main(
            [
                "simulate",
                "-o",
                raw,
                "--shape",
                "40,36,32",
                "--coils",
                "4",
                "--acceleration",
                "4",
                "--calibration",
                "16,16",
            ]
        )
        == 0
    )
    capsys.readouterr()
    for policy, path in (("record", "learned"), ("warn", "learned"), ("fallback", "cg-sense")):
        command = ["recon", raw, "-o", images, "--model", str(model), "--on-doubt", policy, "--json"]
        assert main(command) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["path_taken"] == [path]
        assert bool(summary["warnings"]) == (policy != "record")
        (series,) = read_images(images)
        assert "trained for 2 at most" in series.metas[0]

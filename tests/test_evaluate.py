"""Evaluation: clean references, honest sweeps, figures by their laws, and the command with the real BART."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from melcore.bundle import Bundle
from melcore.cli import main
from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, DataError
from melcore.io.cfl import write_cfl
from melcore.layout import k_space_to_bart
from melcore.physics.fourier import ifft
from melcore.preprocess.preparation import Preparation, prepare
from melcore.simulate.coils import coil_maps
from melcore.simulate.phantom import random_anatomy
from melcore.unrolled import build
from training.baselines import oracle_cg_sense, pics, pics_kinds, tuned_pics
from training.case_masks import MASKS
from training.cases import Case, Exam, exam_of, make_case
from training.comparison import ORACLE, Setup, compare
from training.exams import read_exams, simulated_exam
from training.reference import reference
from training.summary import bootstrap, near_floor, summarise
from training.sweep import sweep

SHAPE = (1, 46, 38)  # half the size of an axis is odd: there BART's transform has the opposite sign


def exam(shape: tuple[int, int, int] = SHAPE, frames: int = 1, name: str = "phantom", seed: int = 3) -> Exam:
    image = random_anatomy(shape, seed=seed)[None]
    if frames > 1:
        fade = torch.linspace(0.7, 1.3, frames).view(-1, 1, 1, 1)
        image = image * fade
    return simulated_exam(name, image, coils=5, seed=seed)


def prepared_case(case: Case):  # type: ignore[no-untyped-def]
    prepared = prepare(case.k_space, settings=Preparation())
    return prepared, reference(case, prepared)


# Cases.


@pytest.mark.parametrize("snr", [8.0, 60.0])
def test_added_noise_makes_the_snr_that_was_asked_for(snr: float) -> None:
    one = exam()
    case = make_case(one, acceleration=1, snr=snr)
    noise = case.k_space.data - case.complete
    assert float(noise.abs().square().mean()) == pytest.approx(2, rel=0.05)  # white data have this variance
    magnitude = ifft(case.complete).abs().square().sum(1).sqrt()
    assert float(magnitude[magnitude > 0.1 * magnitude.max()].mean()) == pytest.approx(snr, rel=1e-3)
    assert case.reference_noise == 0
    assert not case.remarks


def test_noise_is_added_to_the_exams_own_and_the_reference_keeps_only_that() -> None:
    clean = exam()
    generator = torch.Generator().manual_seed(0)
    own = 2 * torch.randn(clean.complete.shape, dtype=torch.complex64, generator=generator)
    level = clean.signal / (60 * 2 / math.sqrt(2))  # SNR 60
    noisy = Exam("noisy", "", clean.complete + level * own, 2 * level, clean.info)
    assert noisy.snr == pytest.approx(60, rel=0.05)
    case = make_case(noisy, acceleration=1, snr=20)
    unit = noisy.signal / 20
    added = (case.k_space.data - case.complete).abs().square().mean()
    total = (case.k_space.data - clean.complete / unit).abs().square().mean()
    assert float(total) == pytest.approx(2, rel=0.05)
    assert float(added) == pytest.approx(2 * (1 - 1 / 9), rel=0.05)
    assert case.reference_noise == pytest.approx(math.sqrt(2) / 3, rel=0.05)
    with pytest.raises(ConfigError, match="noise can only be added"):
        make_case(noisy, snr=100)
    flattering = make_case(noisy, acceleration=2)
    assert "100% of the exam's noise" in flattering.remarks[0]
    with pytest.raises(ConfigError, match="state an SNR"):
        make_case(clean, acceleration=2)


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "auto"])
def test_masks_have_their_acceleration_and_a_seed(kind: str) -> None:
    one = exam((24, 40, 18) if kind in ("poisson", "grid") else SHAPE, frames=5 if kind == "time-lines" else 1)
    case, again, other = (make_case(one, acceleration=3, snr=30, mask=kind, seed=s) for s in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(case.k_space.mask, again.k_space.mask)
    assert case.digest == again.digest != other.digest
    rate = 1 / float(case.k_space.mask.float().mean())
    # Calibration comes on top of regular patterns, as scanners count it.
    assert rate == pytest.approx(3, rel=0.03) if kind not in ("uniform-lines", "grid") else 1.4 < rate < 3
    assert not bool(case.k_space.data[~case.k_space.mask.expand_as(case.k_space.data)].any())
    z, y, x = (size // 2 for size in one.complete.shape[3:])
    assert bool(case.k_space.mask.expand(1, 1, *one.complete.shape[2:])[..., z, y, x].all())


def test_bart_planes_of_two_phase_encodings_are_planes_and_holes_are_refused(tmp_path: Path) -> None:
    one = exam((24, 20, 1))  # read 1, as BART stores brains of two phase-encoding directions
    write_cfl(tmp_path / "brain", k_space_to_bart(one.complete.numpy()))
    (found,) = read_exams(tmp_path / "brain.cfl", dimensions=["2d"])
    assert found.dimensions == "2d"
    assert tuple(found.complete.shape) == (1, 5, 1, 1, 24, 20)
    mask = torch.ones(1, 1, 1, *SHAPE, dtype=torch.bool)
    mask[..., ::3, :] = False
    holes = KSpace(exam().complete * mask, mask, ScanInfo(SHAPE, SHAPE), Noise(whitened=True, source="scan"))
    with pytest.raises(DataError, match="35% of its k-space"):
        exam_of("holes", holes)


# References.


def test_the_reference_is_the_truth_in_the_gauge_of_the_maps() -> None:
    image = random_anatomy(SHAPE, seed=1)[None]
    maps = coil_maps(SHAPE, 5, seed=2)
    one = simulated_exam("phantom", image, coils=5, seed=2)
    case = make_case(one, acceleration=2, snr=25)
    prepared = prepare(case.k_space, coil_maps=CoilMaps(maps[None, None, :, None]))
    found = reference(case, prepared)
    scaled = image * (25 / one.signal) / float(prepared.scale)
    torch.testing.assert_close(found.image[0, 0], scaled, atol=2e-4, rtol=0)
    assert found.floor_db["object"] == -math.inf
    assert found.judge(found.image)["support"]["nrmse_db"] == -math.inf


def test_the_reference_follows_whitening_and_compression() -> None:
    one = exam()
    correlated = torch.linalg.cholesky(torch.eye(5) + 0.3).to(torch.complex64)
    mixed = Exam("mixed", "", torch.einsum("vc,bctzyx->bvtzyx", correlated, one.complete), 0.0, one.info)
    case = make_case(mixed, acceleration=2, snr=200, noise_known=False)
    prepared = prepare(case.k_space, settings=Preparation(coils=3))
    found = reference(case, prepared)
    # CG-SENSE at this SNR is close to the truth only if the truth is in the same units, coils and phase.
    assert oracle_cg_sense(prepared, found).notes
    assert found.error(oracle_cg_sense(prepared, found).image) < -15


def test_what_a_method_leaves_blank_beyond_the_maps_is_charged() -> None:
    image = random_anatomy(SHAPE, seed=1)[None]
    maps = coil_maps(SHAPE, 5, seed=2)[None, None, :, None].clone()
    maps[..., :19] = 0  # half of the field
    case = make_case(simulated_exam("phantom", image, coils=5, seed=2), acceleration=1, snr=100)
    prepared = prepare(case.k_space, coil_maps=CoilMaps(maps))
    found = reference(case, prepared)
    brightness = image.abs()[..., :19] * (found.image.abs()[..., 25:].sum() / image.abs()[..., 25:].sum())
    torch.testing.assert_close(found.image.abs()[0, 0, ..., :19], brightness, atol=1e-2, rtol=1e-2)
    figures = found.judge(found.image * (maps != 0).any(2))
    assert figures["whole"]["nrmse_db"] > -8 > -60 > figures["support"]["nrmse_db"]


def test_the_floor_is_what_the_true_image_has_against_a_noisy_reference() -> None:
    clean = exam()
    level = clean.signal / 20 * math.sqrt(2)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(clean.complete.shape, dtype=torch.complex64, generator=generator)
    noisy = Exam("noisy", "", clean.complete + level * noise, level, clean.info)
    case = make_case(noisy, acceleration=2, snr=10)
    prepared, found = prepared_case(case)
    true = reference(replace(case, complete=clean.complete / (noisy.signal / 10), reference_noise=0.0), prepared)
    assert true.floor_db["object"] == -math.inf
    assert found.floor_db["object"] == pytest.approx(found.judge(true.image)["object"]["nrmse_db"], abs=0.5)
    row = {"floor_db": found.floor_db, "methods": {"a": {"object": {"nrmse_db": found.floor_db["object"] + 3}}}}
    assert near_floor(row)
    assert not near_floor({**row, "floor_db": {"object": None}})


# Sweeps.


@pytest.mark.parametrize(("best", "start"), [(2e-5, 0.03), (0.03, 0.03), (7.0, 1e-3)])
def test_sweeps_go_on_until_the_best_is_inside(best: float, start: float) -> None:
    asked: list[float] = []

    def measure(weight: float) -> float:
        asked.append(weight)
        return -20 + math.log(weight / best) ** 2

    found = sweep(measure, start)
    assert found.inside
    assert found.weight == pytest.approx(best, rel=0.1)
    assert len(asked) == len(set(asked)) == len(found.trials)
    assert min(found.trials) < found.weight < max(found.trials)


def test_sweeps_end_where_no_weight_makes_a_difference() -> None:
    found = sweep(lambda weight: -10 + 1e-4 * math.log10(weight), 0.1)
    assert found.inside
    assert len(found.trials) < 6
    assert sweep(lambda weight: math.log10(weight), 0.1).weight <= 1e-8


def test_oracles_are_better_than_weights_beside_theirs_and_bart_has_our_sign_and_scale(tmp_path: Path) -> None:
    case = make_case(exam(), acceleration=3, snr=25, mask="poisson")
    prepared, found = prepared_case(case)
    oracle = oracle_cg_sense(prepared, found)
    assert oracle.inside
    assert found.error(oracle.image) <= found.error(prepared.initial) + 0.01
    kinds = pics_kinds("2d")["pics wavelet"]
    tuned = tuned_pics(prepared, found, kinds, tmp_path)
    assert tuned.inside
    weight = float(tuned.setting.rsplit(":", 1)[1])
    for factor in (0.25, 4):
        assert found.error(tuned.image) < found.error(pics(prepared, [f"W:3:0:{weight * factor:.4g}"]))
    inside = found.regions["object"]
    ratio = (tuned.image.conj() * found.image)[inside].sum() / tuned.image[inside].abs().square().sum()
    assert abs(complex(ratio) - 1) < 0.1


def test_an_interrupted_sweep_continues_without_asking_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(exam(), acceleration=3, snr=25)
    prepared, found = prepared_case(case)
    kinds = pics_kinds("2d")["pics TV + wavelet"]
    first = tuned_pics(prepared, found, kinds, tmp_path)
    monkeypatch.setattr("training.baselines.pics", lambda *_: pytest.fail("BART was asked again"))
    again = tuned_pics(prepared, found, kinds, tmp_path)
    assert again.setting == first.setting
    assert torch.equal(again.image, first.image)
    assert again.notes == first.notes


@pytest.mark.parametrize(("shape", "frames"), [((10, 30, 26), 1), ((1, 34, 28), 6)])
def test_every_regulariser_works_in_volumes_and_series(shape: tuple[int, int, int], frames: int) -> None:
    case = make_case(exam(shape, frames), acceleration=2, snr=20)
    prepared, found = prepared_case(case)
    errors = {}
    for name, kinds in pics_kinds(case.dimensions).items():
        image = pics(prepared, [f"{kind}:0.02" for kind in kinds], iterations=20)
        assert image.shape == found.image.shape, name
        errors[name] = found.error(image)
    assert max(errors.values()) < -6, errors
    assert found.error(oracle_cg_sense(prepared, found).image) < -6


# Summaries.


def test_intervals_draw_subjects_not_cases() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(size=8)
    values = [float(mean + 0.01 * rng.normal()) for mean in level for _ in range(50)]
    subjects = [str(index) for index in range(8) for _ in range(50)]
    low, high = bootstrap(values, subjects)  # type: ignore[misc]
    assert low < np.mean(values) < high
    # 400 cases of 8 subjects know as little as 8 cases.
    assert high - low == pytest.approx(2 * 1.96 * level.std() / math.sqrt(8), rel=0.35)
    assert bootstrap(values, ["one"] * 400) is None


def row(name: str, subject: str, **errors: float) -> dict[str, object]:
    figures = {
        method.replace("_", " "): {
            region: {"nrmse_db": error, "psnr_db": 30.0, "ssim": 0.9, "hfen": 0.1}
            for region in ("object", "support", "whole")
        }
        | {"setting": "", "inside": None, "seconds": 1.0}
        for method, error in errors.items()
    }
    return {"name": name, "subject": subject, "dimensions": "2d", "mask": "lines", "acceleration": 4.0, "snr": 20.0,
            "remarks": [], "methods": figures}  # fmt: skip


def test_losses_are_counted_case_by_case_and_named() -> None:
    rows = [
        row("a", "1", **{"CG-SENSE": -20, "pics TV": -22, "pics wavelet": -23, "learned: x": -25}),
        row("b", "2", **{"CG-SENSE": -20, "pics TV": -22, "pics wavelet": -21, "learned: x": -19.5}),
    ]
    paired = {(one["against"], one["region"]): one for one in summarise(rows)["2d"]["paired"]}
    against = paired["CG-SENSE", "object"]
    assert (against["mean_db"], against["worse"], against["worst_db"], against["worst_case"]) == (-2.25, 1, 0.5, "b")
    assert paired["best pics", "support"]["mean_db"] == pytest.approx((-2 + 2.5) / 2)
    failed = {**rows[0], "name": "c", "methods": {**rows[0]["methods"], "learned: x": {"failed": "it did"}}}  # type: ignore[dict-item]
    assert summarise([*rows, failed])["2d"]["methods"]["learned: x"]["cases"] == 2


# The command.


def raw_file(folder: Path, snr: float = 150) -> Path:
    """Two slices, fully sampled, white noise: numpy (slice, coil, y, x)."""
    slices = []
    for seed in (3, 4):
        one = exam(seed=seed)
        noise = one.signal / snr
        generator = torch.Generator().manual_seed(seed)
        slices.append(
            one.complete
            + noise * math.sqrt(2) * torch.randn(one.complete.shape, dtype=torch.complex64, generator=generator)
        )
    path = folder / "exam.npy"
    np.save(path, torch.cat(slices)[:, :, 0, 0].numpy())
    return path


def untrained(folder: Path) -> Path:
    torch.manual_seed(0)
    architecture = {
        "scheme": "modl",
        "iterations": 2,
        "regulariser": {"name": "resnet", "dimensions": 2, "channels": 4, "layers": 2},
    }
    return Bundle(build(architecture).eval(), architecture, Preparation(coils=4)).save(folder / "tiny.safetensors")


def test_the_command_judges_writes_one_page_and_needs_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, bundle = tmp_path / "out", untrained(tmp_path)
    command = ["evaluate", str(bundle), "--data", str(raw_file(tmp_path)), "--axes", "slice,coil,y,x"]
    command += ["--acceleration", "2,3", "--snr", "15,5000", "-o", str(output), "--quiet"]
    assert main(command) == 0
    table = capsys.readouterr()
    assert "learned: tiny" in table.out
    assert "noise can only be added" in table.err
    found = json.loads((output / "evaluation.json").read_text())
    assert [one["acceleration"] for one in found["cases"]] == [2, 3, 2, 3]
    methods = found["cases"][0]["methods"]
    assert len(methods) == 7
    assert (
        methods["CG-SENSE, oracle weight"]["support"]["nrmse_db"] <= methods["CG-SENSE"]["support"]["nrmse_db"] + 0.01
    )
    assert methods["zero-filled"]["object"]["nrmse_db"] > methods["pics TV"]["object"]["nrmse_db"]
    assert methods["learned: tiny"]["iterations"] == 2
    assert found["skipped"][0]["name"] == "exam 0, SNR 5000"
    assert len(list((output / "panels").glob("*.png"))) == 4
    page = (output / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") == 4 + 1  # panels, and the curve against acceleration
    assert not re.findall(r"https?://|<script|<link|src=\"(?!data:)", page)
    # A second run asks nobody: BART may even be gone.
    monkeypatch.setenv("MEL_BART", str(tmp_path / "nowhere"))
    assert main(command) == 0
    assert json.loads((output / "evaluation.json").read_text())["cases"] == found["cases"]


def test_an_interrupted_command_keeps_what_is_finished(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "melcore.cli", "evaluate", "--data", str(raw_file(tmp_path)), "-o", str(output)]
    command += ["--axes", "slice,coil,y,x", "--acceleration", "2,3,4", "--snr", "15", "--baselines", "cg", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(list((output / "records").glob("*.safetensors"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130, complaint
    assert "kept" in complaint
    kept = {path: path.stat().st_mtime_ns for path in (output / "records").glob("*.safetensors")}
    assert kept
    assert not list(output.rglob("*.part"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(json.loads((output / "evaluation.json").read_text())["cases"]) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baselines", "picks"], "did you mean 'pics'"),
        (["--acceleration", "0.5"], "at least 1"),
        (["--snr", "loud"], "--snr takes numbers"),
        (["--mask", "spiral"], "there is no mask 'spiral'"),
        (["--acceleration", "600"], "nothing could be judged"),
        (["--slices", "0"], "--slices must be at least 1"),
        (["--axes", "coil,y"], "nothing could be judged"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--data", str(raw_file(tmp_path)), "-o", str(tmp_path / "out"), "--axes", "slice,coil,y,x"]
    assert main([*command, "--snr", "15", "--baselines", "none", "--quiet", *options]) == 1
    complaint = capsys.readouterr().err.strip().splitlines()
    assert words in complaint[-1]


def test_a_bundle_that_fits_no_exam_and_a_path_that_leads_nowhere_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = exam((8, 26, 22))
    np.save(tmp_path / "volume.npy", one.complete[0, :, 0].numpy())
    command = ["evaluate", str(untrained(tmp_path)), "--axes", "coil,z,y,x", "--baselines", "none", "--quiet"]
    command += ["--data", str(tmp_path / "volume.npy"), str(tmp_path / "absent.h5"), "-o", str(tmp_path / "out")]
    assert main([*command, "--acceleration", "2", "--snr", "10"]) == 1
    complaint = capsys.readouterr().err
    assert "no exam was for tiny" in complaint
    assert "absent.h5" in (tmp_path / "out" / "evaluation.json").read_text()


def test_a_method_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    case = make_case(exam(), acceleration=2, snr=20)
    torch.manual_seed(0)
    bundle = Bundle.load(untrained(tmp_path))
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.fill_(math.nan)
    found = compare(case, Setup([bundle], frozenset({"cg"}), tmp_path / "out", "cpu"))
    assert "NaN or infinity" in found.figures["methods"]["learned: tiny"]["failed"]
    assert found.figures["methods"][ORACLE]["object"]["nrmse_db"] < -5
    assert os.environ.get("MEL_CACHE") is None

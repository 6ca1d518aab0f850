"""What a person can hand to `mel recon` by mistake: one readable line, exit code 1, and nothing written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from melcore.bundle import Bundle
from melcore.cli import main
from melcore.preprocess.preparation import Preparation
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol
from melcore.unrolled import build

PLANE = Protocol(shape=(1, 40, 36), coils=4, acceleration=2, calibration=(1, 16), seed=3)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2D exam with which nothing is wrong."""
    path = tmp_path_factory.mktemp("exam") / "exam.h5"
    write_exam(path, PLANE)
    return path


@pytest.fixture
def exam(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    copy = tmp_path / "exam.h5"
    copy.write_bytes(sound.read_bytes())
    return copy


def refused(capsys: pytest.CaptureFixture[str], raw: Path, *options: str) -> str:
    """Run `mel recon`, which must fail by the rules; the line it says."""
    folder = raw.parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.exists() else {}
    assert main(["recon", str(raw), "-o", str(folder / "images.h5"), *options]) == 1
    captured = capsys.readouterr()
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.exists() else {}
    assert after == before, "something was written"
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("mel recon: ")
    assert "Traceback" not in lines[0]
    assert "MEL_DEBUG" not in lines[0], "an error that nobody foresaw"
    return lines[0]


def edit_acquisitions(path: Path, change: Callable[[np.ndarray], None]) -> None:  # type: ignore[type-arg]
    """Change the acquisitions of a file in place."""
    with h5py.File(path, "r+") as file:
        records = file["dataset/data"][...]
        change(records)
        file["dataset/data"][...] = records


def test_sound_exam_is_reconstructed(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without which the rest of this file would prove nothing."""
    images = exam.parent / "images.h5"
    assert main(["recon", str(exam), "--model", "none", "-o", str(images)]) == 0
    assert images.exists()
    assert capsys.readouterr().err == ""


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path / "absent.h5")
    assert "absent.h5" in line


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.6, 0.99])
def test_truncated_file(exam: Path, capsys: pytest.CaptureFixture[str], fraction: float) -> None:
    content = exam.read_bytes()
    exam.write_bytes(content[: int(fraction * len(content))])
    line = refused(capsys, exam, "--model", "none")
    assert "exam.h5" in line


def test_text_file(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exam.write_text("not an HDF5 file at all\n" * 100)
    assert "exam.h5" in refused(capsys, exam)


def test_hdf5_that_is_not_ismrmrd(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(exam, "w") as file:
        file["measurements"] = np.arange(10)
    line = refused(capsys, exam)
    assert "ISMRMRD" in line


def test_header_without_encoding(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(exam, "r+") as file:
        xml = file["dataset/xml"][0].decode()
        begin, end = xml.index("<encoding>"), xml.index("</encoding>") + len("</encoding>")
        file["dataset/xml"][0] = (xml[:begin] + xml[end:]).encode()
    assert "encoding" in refused(capsys, exam)


def test_header_that_is_not_xml(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(exam, "r+") as file:
        file["dataset/xml"][0] = b"<ismrmrdHeader"
    assert "header" in refused(capsys, exam)


def test_coil_count_that_changes(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(records: np.ndarray) -> None:  # type: ignore[type-arg]
        head, data = records[9]["head"], records[9]["data"]
        head["active_channels"] = 3
        records[9]["data"] = data[: len(data) * 3 // 4]

    edit_acquisitions(exam, change)
    line = refused(capsys, exam, "--model", "none")
    assert "3" in line
    assert "4" in line
    assert "coil" in line


def test_nan_in_the_data(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(records: np.ndarray) -> None:  # type: ignore[type-arg]
        data = records[7]["data"].copy()
        data[11] = np.nan
        records[7]["data"] = data

    edit_acquisitions(exam, change)
    line = refused(capsys, exam, "--model", "none")
    assert "NaN" in line
    assert "7" in line


def test_no_calibration_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "exam.h5"
    write_exam(path, Protocol(shape=(1, 40, 36), coils=4, acceleration=2, calibration=(0, 0), seed=3))
    assert "calibration" in refused(capsys, path, "--model", "none")


def test_noise_scan_alone(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(exam, "r+") as file:
        records = file["dataset/data"][:1]
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=records, maxshape=(None,), chunks=(1,))
    refused(capsys, exam, "--model", "none")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("RemoveROOversamplingGadget", "RemoveOversamplingGadget", "RemoveROOversamplingGadget"),
        ('name="model"', 'name="modl"', "model"),
        ("<stream>", "<streams>", "mine.xml"),
        ("</configuration>\n", "", "mine.xml"),
    ],
)
def test_wrong_pipeline(exam: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, expected: str) -> None:
    from gadgets.chain import find_pipeline

    text = Path(find_pipeline("mel_cartesian_2d")).read_text()
    assert old in text
    pipeline = exam.parent / "mine.xml"
    pipeline.write_text(text.replace(old, new))
    assert expected in refused(capsys, exam, "--pipeline", str(pipeline))


def test_unknown_pipeline(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, exam, "--pipeline", "mel_cartesian_4d")
    assert "mel_cartesian_3d" in line or "mel_cartesian_2d" in line


def test_bundle_of_another_dimensionality(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = {"iterations": 1, "regulariser": {"name": "resnet", "dimensions": 3, "channels": 2, "layers": 2}}
    path = Bundle(build(architecture), architecture, Preparation()).save(exam.parent / "volume.safetensors")
    line = refused(capsys, exam, "--model", str(path))
    assert "volume is for 3d data, but these are 2d" in line


def test_unknown_bundle(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "modl_9d" in refused(capsys, exam, "--model", "modl_9d")


def test_damaged_bundle(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = exam.parent / "broken.safetensors"
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{}      garbage")
    assert "broken.safetensors" in refused(capsys, exam, "--model", str(broken))


def test_missing_bart(exam: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEL_BART", raising=False)
    monkeypatch.setenv("PATH", str(exam.parent))
    line = refused(capsys, exam, "--model", "none")
    assert "apt" in line
    assert "bart" in line.lower()


def test_failing_bart_is_quoted(
    exam: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real program that fails as BART does: a message in colour on stderr, an abort, and an output of zeros."""
    program = exam.parent / "bart"
    program.write_text(
        '#!/bin/sh\n[ "$1" = version ] && { echo v0.8.00; exit 0; }\n'
        "printf '\\033[31mERROR: the moon is in the wrong house.\\033[0m\\n' >&2\nexit 134\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("MEL_BART", str(program))
    line = refused(capsys, exam, "--model", "none")
    assert "the moon is in the wrong house" in line
    assert "\033" not in line


def test_output_folder_that_does_not_exist(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recon", str(exam), "-o", str(exam.parent / "absent" / "images.h5")]) == 1
    assert "absent" in capsys.readouterr().err


def test_old_images_survive_a_failure(exam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exam.parent / "images.h5").write_bytes(b"precious")
    refused(capsys, exam, "--model", "modl_9d")
    assert (exam.parent / "images.h5").read_bytes() == b"precious"


def test_usage_errors_exit_with_2(exam: Path) -> None:
    command = [sys.executable, "-m", "melcore.cli", "recon", str(exam)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert "--output" in result.stderr

"""`mel prepare`: every kind of file becomes what it should; bad exams are skipped; killed anywhere, it goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from melcore import layout
from melcore.cli import main
from melcore.io.cfl import write_cfl
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.preparation import Preparation
from melcore.simulate.exam import write_exam
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.protocol import Protocol
from tests import data_cases as cases
from training.anatomies import Folder, open_folder
from training.data import Stream
from training.heart_pairs import pair_up

ROOT = Path(__file__).parents[1]


def prepare(*arguments: object) -> int:
    """Run ``mel prepare`` in this process."""
    return main(["prepare", *map(str, arguments), "--quiet", "--workers", "0"])


def picture(path: Path, seed: int = 0, shape: tuple[int, int] = (30, 26)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(20, 255, shape).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1.5, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def only(folder: Path) -> tuple[Folder, "cases.Entry"]:
    opened = open_folder(folder)
    assert len(opened.entries) == 1
    return opened, opened.entries[0]


# What files become


def test_nifti_keeps_its_axes_and_voxels(tmp_path: Path) -> None:
    head = random_anatomy((20, 26, 22), seed=1).abs().numpy()  # (z, y, x)
    flipped = np.diag([-1.5, 2.0, 3.0, 1.0])
    nifti(tmp_path / "in" / "anna.nii.gz", (1000 * head.transpose(2, 1, 0)[::-1]).astype(np.int16), flipped)
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--licence", "CC0", "--origin", "simulated") == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.subject, entry.kind, entry.licence, entry.origin) == ("anna", "volume", "CC0", "simulated")
    assert entry.voxel == (3.0, 2.0, 1.5)
    (first, last), *_ = entry.box
    assert 0 <= first < last < entry.shape[1]
    found = folder.read(entry, "images")[0].float().numpy()
    # Its place in the volume is lost with the air around it: correlate at the best shift.
    spectrum = np.fft.fftn(head) * np.conj(np.fft.fftn(found, head.shape, axes=(0, 1, 2)))
    match = np.fft.ifftn(spectrum).real.max() / np.linalg.norm(head) / np.linalg.norm(found)
    assert match > 0.97, "not turned over"


def test_labels_stay_whole(tmp_path: Path) -> None:
    labels = np.zeros((18, 16, 14), np.int16)
    labels[4:12, 5:11, 3:9] = 507
    labels[6:8, 6:8, 4:6] = 3
    nifti(tmp_path / "in" / "a.nii.gz", labels)
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--labels", "--split", "train") == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.kind, entry.split) == ("labels", "train")
    assert set(folder.read(entry, "labels").unique().tolist()) == {0, 3, 507}
    nifti(tmp_path / "other" / "b.nii.gz", labels + np.float32(0.3))
    assert prepare(tmp_path / "other", "-o", tmp_path / "second", "--labels") == 1


def test_pictures_of_a_subject_belong_together(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "in" / f"anna-{number}.png", number)
    picture(tmp_path / "in" / "bert-0.png", 9)
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--subject", r"^(\w+)-") == 0
    shapes = {entry.subject: (entry.kind, entry.shape) for entry in open_folder(tmp_path / "out").entries}
    assert shapes == {"anna": ("planes", (3, 1, 30, 26)), "bert": ("planes", (1, 1, 30, 26))}


def test_dicom_series_are_sorted_by_place(tmp_path: Path) -> None:
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    head = (1000 * random_anatomy((9, 26, 22), seed=1).abs()).numpy().astype(np.uint16)
    for number in np.random.default_rng(0).permutation(9):
        file = Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        file.SOPClassUID, file.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"1.2.{number + 1}"
        file.SeriesInstanceUID, file.Rows, file.Columns = "1.2.3", 26, 22
        file.PixelSpacing, file.SliceThickness = [1.25, 1.5], 2.0
        file.ImagePositionPatient = [0, 0, 2.0 * int(number)]
        file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 15, 0, 1
        file.PhotometricInterpretation, file.PixelData = "MONOCHROME2", head[number].tobytes()
        (tmp_path / "bert").mkdir(exist_ok=True)
        file.save_as(tmp_path / "bert" / f"{(number * 5) % 9}.dcm", enforce_file_format=True)
    assert prepare(tmp_path / "bert", "-o", tmp_path / "out") == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.subject, entry.kind, entry.voxel) == ("bert", "volume", (2.0, 1.25, 1.5))
    found = folder.read(entry, "images")[0].float()
    middles = [float((found[z].flatten() > 0.1).sum()) for z in range(len(found))]
    truth = [float((torch.from_numpy(head[z].astype(np.float32)) > 100).sum()) for z in range(9)]
    assert np.corrcoef(middles, truth[: len(middles)])[0, 1] > 0.9


def test_arrays_need_their_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", random_anatomy((16, 20, 18), seed=1).numpy().transpose(2, 0, 1))
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "--axes" in capsys.readouterr().err
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--axes", "x,z") == 1
    assert "name each of its 3 axes once" in capsys.readouterr().err
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--axes", "x,z,y", "--voxel", "2,1,1") == 0
    folder, entry = only(tmp_path / "out")
    assert entry.voxel == (2.0, 1.0, 1.0)
    assert folder.read(entry, "images").is_complex()


def test_pairs_and_their_flows(tmp_path: Path) -> None:
    from PIL import Image

    y, x = np.mgrid[:50, :48]
    for subject in ("SC-1", "SC-2"):
        for number, radius in ((3, 12.0), (14, 8.0), (23, 11.0), (34, 8.5), (47, 9.0)):
            disc = 40 + 180 / (1 + np.exp((np.hypot(y - 25, x - 24) - radius) / 0.8))
            (tmp_path / "in").mkdir(exist_ok=True)
            Image.fromarray(disc.astype(np.uint8)).save(tmp_path / "in" / f"{subject}-IM-{number:04d}.png")
    names = sorted((tmp_path / "in").glob("SC-1*"))
    assert [[path.stem[-2:] for path in pair] for pair in pair_up(names, 20)] == [["03", "14"], ["23", "34"]]
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--pairs", "20", "--subject", "^(.*)-IM") == 0
    folder = open_folder(tmp_path / "out")
    assert {entry.subject for entry in folder.entries} == {"SC-1", "SC-2"}
    from training.cine import warp

    entry = folder.entries[0]
    first, second = (folder.read(entry, name, 0).float() for name in ("first", "second"))
    carried = warp(second, folder.read(entry, "forward", 0).float()[None])[0]
    assert float((carried - first).norm()) < 0.35 * float((second - first).norm())


# Raw data


def _level(k_space: torch.Tensor) -> float:
    """Standard deviation of the complex noise, from the corners of the coil images."""
    images = ifft(k_space, (-2, -1))
    corners = torch.cat([images[..., :5, :5].flatten(), images[..., -5:, -5:].flatten()])
    return float(corners.abs().square().mean().sqrt())


@pytest.mark.parametrize("form", ["cfl", "npy", "fastmri", "fastmri, noise beside"])
def test_raw_files_become_white_k_space(tmp_path: Path, form: str) -> None:
    k_space = 3e-5 * cases.measured(2, snr=50, shape=(1, 56, 48))
    (tmp_path / "in").mkdir()
    options: list[object] = []
    if form == "cfl":
        write_cfl(tmp_path / "in" / "anna", layout.k_space_to_bart(k_space.numpy()))
    elif form == "npy":
        np.save(tmp_path / "in" / "anna.npy", k_space[0, :, 0, 0].numpy())
        options = ["--axes", "coil,y,x"]
    else:
        # Twofold oversampled along the readout, which is the last axis but one; zero-filled at the sides.
        # The air beside the field is empty, as where zeros were filled in, or holds the noise of the scan.
        wide = torch.nn.functional.pad(ifft(k_space, (-1,)), (24, 24))
        if form != "fastmri":
            noise = torch.randn(wide.shape, dtype=wide.dtype, generator=torch.Generator().manual_seed(1))
            wide = torch.where(wide == 0, 3e-5 * math.sqrt(2) * noise, wide)
        with h5py.File(tmp_path / "in" / "anna.h5", "w") as file:
            file["kspace"] = np.pad(fft(wide, (-1,))[:, :, 0, 0].swapaxes(2, 3).numpy(), [(0, 0)] * 3 + [(6, 6)])
            file["reconstruction_rss"] = np.zeros((1, 48, 56), np.float32)
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", *options) == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.kind, entry.noise, entry.shape) == ("k-space", "estimated", (1, 4, 1, 1, 56, 48))
    found = folder.read(entry, "k_space")
    assert 1.1 < _level(found) < 1.8
    reference = ifft(k_space, (-2, -1)).abs().square().sum(1).sqrt()
    image = ifft(found, (-2, -1)).abs().square().sum(1).sqrt()
    cosine = float((image * reference).sum() / image.norm() / reference.norm())
    assert cosine > 0.99, "not turned over, not shifted"


def test_exams_of_scanners_are_whitened_by_their_noise_scan(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_exam(
        tmp_path / "in" / "anna.h5", Protocol((1, 48, 40), slices=True, coils=4, acceleration=1.0, snr=60, seed=3)
    )
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.kind, entry.noise, entry.shape[-2:]) == ("k-space", "scan", (48, 40))
    assert 1.2 < _level(folder.read(entry, "k_space")) < 1.7
    settings = cases.data(sources=[{"folder": str(tmp_path / "out")}], y=[48, 48], x=[40, 40], snr=[5, 40])
    example = Stream(settings, Preparation(start_iterations=4), entry.split)[0]
    assert example.truth is not None
    assert example.truth.shape[-2:] == (48, 40)


def test_undersampled_scans_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    k_space = cases.measured(2, snr=50, shape=(1, 56, 48))
    k_space[..., ::2, :] = 0
    (tmp_path / "in").mkdir()
    write_cfl(tmp_path / "in" / "anna", layout.k_space_to_bart(k_space.numpy()))
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "not fully sampled" in capsys.readouterr().err
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--undersampled") == 0
    folder, entry = only(tmp_path / "out")
    assert (entry.kind, entry.shape) == ("undersampled", (1, 4, 1, 1, 56, 48))
    mask = folder.read(entry, "mask")
    assert mask.shape == (1, 1, 1, 1, 56, 1)
    assert mask.flatten()[:4].tolist() == [False, True, False, True]


# Many exams


def test_bad_exams_are_reported_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "torn.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:60])
    nifti(tmp_path / "in" / "black.nii.gz", np.zeros((8, 8, 8), np.float32))
    nifti(tmp_path / "in" / "nan.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    (tmp_path / "in" / "readme.txt").write_text("no data")
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 0
    output = capsys.readouterr()
    for name in ("torn", "black", "nan"):
        assert f"skipped {name}" in output.err
    assert "1 subjects" in output.out
    assert "3 bad" in output.out
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["good.safetensors"]


def test_nothing_usable_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "nothing to prepare" in capsys.readouterr().err
    assert prepare(tmp_path / "absent", "-o", tmp_path / "out") == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "none of 1 exams" in capsys.readouterr().err
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--subject", "(") == 1
    assert "regular expression" in capsys.readouterr().err


def test_a_subject_cannot_be_moved_to_another_split_unseen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "one" / "anna-1.png", 1)
    nifti(tmp_path / "two" / "anna-2.nii.gz", random_anatomy((16, 20, 18), seed=1).abs().numpy())
    subject = ("--subject", r"^(\w+)-")
    assert prepare(tmp_path / "one", "-o", tmp_path / "out", "--split", "train", *subject) == 0
    assert prepare(tmp_path / "two", "-o", tmp_path / "out", "--split", "test", *subject) == 1
    assert "leak between splits" in capsys.readouterr().err


def test_what_is_finished_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", ord(name))
    prepare(tmp_path / "in", "-o", tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "out" / "b.safetensors").write_bytes(b"damaged")
    picture(tmp_path / "in" / "d.png", 4)
    capsys.readouterr()
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert "2 exams prepared now, 2 already there" in capsys.readouterr().out
    assert all(
        (tmp_path / "out" / f"{n}.safetensors").stat().st_mtime_ns == times[tmp_path / "out" / f"{n}.safetensors"]
        for n in "ac"
    )
    assert prepare(tmp_path / "in", "-o", tmp_path / "out", "--licence", "CC0") == 0
    assert "4 exams prepared now" in capsys.readouterr().out, "other settings make other files"


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "melcore.cli", "prepare", *map(str, arguments), "--quiet"]


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    """Whatever is there after a SIGKILL is whole; the second run gives what one run would have given."""
    for number in range(12):
        nifti(
            tmp_path / "in" / f"s{number:02d}.nii.gz",
            random_anatomy((36, 40, 38), seed=number % 3).abs().numpy() + number / 100,
        )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        _command(tmp_path / "in", "-o", tmp_path / "out", "--workers", "0"), cwd=ROOT, env=environment
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    finished = list((tmp_path / "out").glob("*.safetensors"))
    assert 3 <= len(finished) < 12
    assert not (tmp_path / "out" / "manifest.json").exists()
    settings = cases.data(sources=[{"folder": str(tmp_path / "out")}])
    with pytest.raises(Exception, match="was not finished"):
        Stream(settings, Preparation())
    assert prepare(tmp_path / "in", "-o", tmp_path / "out") == 0
    assert prepare(tmp_path / "in", "-o", tmp_path / "whole") == 0
    contents = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "whole")]
    assert contents[0] == contents[1]
    assert not list((tmp_path / "out").glob(".*")), "nothing half is left behind"


def test_a_cluster_prepares_the_same(tmp_path: Path) -> None:
    """A local cluster of two processes, and a scheduler elsewhere."""
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "in" / "torn.png").write_bytes(b"no picture")
    assert prepare(tmp_path / "in", "-o", tmp_path / "alone") == 0
    expected = (tmp_path / "alone" / "manifest.json").read_text()
    local = subprocess.run(
        _command(tmp_path / "in", "-o", tmp_path / "local", "--workers", "2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert local.returncode == 0, local.stderr
    assert "skipped torn" in local.stderr
    assert (tmp_path / "local" / "manifest.json").read_text() == expected
    script = (
        "import distributed, time\n"
        "if __name__ == '__main__':\n"
        "    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)\n"
        "    print(cluster.scheduler_address, flush=True)\n    time.sleep(120)\n"
    )
    (tmp_path / "cluster.py").write_text(script)
    cluster = subprocess.Popen([sys.executable, tmp_path / "cluster.py"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        far = subprocess.run(
            _command(tmp_path / "in", "-o", tmp_path / "far", "--scheduler", address),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert far.returncode == 0, far.stderr
        assert (tmp_path / "far" / "manifest.json").read_text() == expected
    finally:
        cluster.terminate()
        cluster.communicate()
    nobody = subprocess.run(
        _command(tmp_path / "in", "-o", tmp_path / "none", "--scheduler", "tcp://127.0.0.1:9"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert nobody.returncode == 1
    assert "there is no Dask scheduler at tcp://127.0.0.1:9" in nobody.stderr

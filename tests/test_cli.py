"""The command ``mel`` as people and scripts use it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import melcore
from melcore.cli import main
from melcore.errors import ConfigError, MelError
from melcore.io.bart import read_cfl
from melcore.io.mrd import write_raw
from melcore.io.mrd_types import IS_CALIBRATION_AND_IMAGING, IS_NOISE
from melcore.units import format_bytes, parse_bytes
from tests.cases import centred_fft, coil_images, header_xml, random_complex, readout, shared


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """A 3D exam: noise scan, oversampled readout, every second line and a fully sampled centre."""
    path, (z, y, x) = tmp_path_factory.mktemp("exam") / "exam.h5", (10, 24, 20)
    images = np.zeros((4, z, y, 2 * x), np.complex64)
    images[..., x // 2 : x // 2 + x] = coil_images(4, (z, y, x))
    k_space = centred_fft(images, (-3, -2, -1)) + 0.01 * random_complex(images.shape)
    scan = [readout(0.01 * random_complex((4, 512), seed=1), flags=[IS_NOISE])]
    for i, j in np.ndindex(z, y):
        central = abs(i - z // 2) < 5 and -6 <= j - y // 2 < 6
        if central or j % 2 == 0:
            flags = [IS_CALIBRATION_AND_IMAGING] if central else []
            scan.append(readout(k_space[:, i, j], flags=flags, kspace_encode_step_2=i, kspace_encode_step_1=j))
    write_raw(path, header_xml((z, y, x), 4), scan)
    return path


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from melcore.cli import main; status = main(['--help']);"
        "print(sorted({'torch', 'numpy', 'h5py', 'ismrmrd'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("info", "maps", "doctor"):
        assert f"\n    {command} " in done.stdout


def test_it_runs_as_a_program_and_as_a_module():
    for command in ([sys.executable, "-m", "melcore.cli"], ["mel"]):
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # noqa: PTH120
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert (done.returncode, done.stdout.strip()) == (0, f"mel {melcore.__version__}")


@pytest.mark.parametrize("command", ["compress", "info", "maps", "doctor", "whiten"])
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"\n    mel {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["info"], ["info", "--nosuch", "x"], ["--nosuch"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: mel" in capsys.readouterr().err


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Enrol a command whose `run` raises what a test sets."""
    (tmp_path / "mel_test_command.py").write_text(
        '"""Fail as told."""\nerror = None\ndef add_arguments(parser): pass\ndef run(arguments): raise error\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    from importlib.metadata import EntryPoint

    entries = [
        EntryPoint("fail", "mel_test_command", "mel.commands"),
        EntryPoint("x", "no_such_package.x", "mel.commands"),
    ]
    monkeypatch.setattr("melcore.cli.entry_points", lambda group: entries if group == "mel.commands" else [])
    sys.modules.pop("mel_test_command", None)
    import mel_test_command

    return mel_test_command


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MelError("the file is\n  damaged"), 1, "mel fail: the file is damaged\n"),
        (ZeroDivisionError("by zero"), 1, "mel fail: ZeroDivisionError: by zero (MEL_DEBUG=1 shows the traceback)\n"),
        (KeyboardInterrupt(), 130, "mel fail: interrupted\n"),
    ],
)
def test_errors_are_one_line(command, capsys, monkeypatch, error, status, text):
    monkeypatch.delenv("MEL_DEBUG", raising=False)
    command.error = error
    assert main(["fail"]) == status
    assert capsys.readouterr().err == text


def test_the_traceback_is_there_on_demand(command, capsys, monkeypatch):
    monkeypatch.setenv("MEL_DEBUG", "1")
    command.error = ZeroDivisionError("by zero")
    assert main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("command")
def test_commands_whose_package_is_absent_are_left_out(capsys):
    assert main(["--help"]) == 0
    assert "Fail as told" in capsys.readouterr().out
    assert main(["x"]) == 2


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m melcore.cli --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", f"sleep 0; {script}"], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_info_tells_what_the_scan_was(exam, capsys):
    assert main(["info", str(exam), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["encoded_matrix"] == [10, 24, 40]
    assert said["recon_matrix"] == [10, 24, 20]
    assert said["recon_field_of_view_m"] == pytest.approx([0.02, 0.048, 0.04])
    assert said["coils"] == [4]
    assert said["noise_scan"] is True
    assert said["readout_oversampling"] == 2
    assert said["calibration_region"] == [9, 13, 20]
    assert said["acceleration"] == pytest.approx(240 / (120 + 9 * 6), abs=0.01)
    assert said["flags"] == {"noise": 1, "calibration and imaging": 9 * 12}
    assert main(["info", str(exam)]) == 0
    assert "10 x 24 x 20 (z, y, x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "matrix", "coils", "noise", "oversampling"),
    [
        ("siemens_trio_trufi_grappa2_12ch_phantom", [1, 64, 128], 12, True, 2),
        ("siemens_cimax_flash2d_16ch_phantom_128", [1, 128, 128], 16, False, 1),
        ("siemens_32ch_phantom_64", [1, 64, 64], 32, False, 1),
        ("siemens_skyra_gre_2ch_phantom_160x320", [1, 160, 160], 2, False, 2),
        ("siemens_gre_3echo_1ch_phantom_256", [1, 256, 256], 1, False, 1),
    ],
)
def test_info_on_real_scans(name, matrix, coils, noise, oversampling, capsys):
    assert main(["info", str(shared(f"data/ismrmrd/{name}.h5")), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recon_matrix"] == matrix
    assert (said["coils"], said["noise_scan"], said["readout_oversampling"]) == ([coils], noise, oversampling)


def test_info_on_what_is_no_scan(tmp_path, capsys):
    assert main(["info", str(tmp_path / "none.h5")]) == 1
    assert capsys.readouterr().err == f"mel info: {tmp_path / 'none.h5'} does not exist.\n"


def test_maps_from_raw_data(exam, tmp_path, capsys):
    assert main(["maps", str(exam), "--output", str(tmp_path / "maps.cfl")]) == 0
    assert "1 x 1 x 4 x 1 x 10 x 24 x 20" in capsys.readouterr().out
    assert main(["maps", str(exam), "-o", str(tmp_path / "maps.npy"), "--threads", "2"]) == 0
    array, maps = np.load(tmp_path / "maps.npy"), read_cfl(tmp_path / "maps.cfl")
    assert array.shape == (1, 1, 4, 1, 10, 24, 20)
    np.testing.assert_allclose(maps.squeeze().transpose(3, 2, 1, 0), array[0, 0, :, 0], atol=1e-4)
    norms = np.linalg.norm(array[0, 0, :, 0], axis=0)
    assert np.all((norms == 0) | (np.abs(norms - 1) < 1e-3))


def test_maps_come_with_eigenvalues_and_from_the_cache(exam, tmp_path, monkeypatch):
    arguments = ["maps", str(exam), "-o", str(tmp_path / "maps.npy"), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--eigenvalues", str(tmp_path / "trust.npy"), "--crop", "0.7"]) == 0
    trust, first = np.load(tmp_path / "trust.npy"), np.load(tmp_path / "maps.npy")
    assert trust.shape == (1, 1, 1, 10, 24, 20)
    np.testing.assert_array_equal(trust[:, :, 0] > 0.7, (first != 0).any(axis=(2, 3)))
    monkeypatch.setattr("melcore.io.bart_cache.run", None)  # BART is not asked again
    assert main([*arguments, "--eigenvalues", str(tmp_path / "trust.cfl"), "--noise", str(exam), "--crop", "0.7"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), first)
    np.testing.assert_array_equal(read_cfl(tmp_path / "trust").squeeze().T, trust.squeeze())


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "caldir", "--eigenvalues", "trust.npy"],
        ["--method", "caldir", "--grid", "reduced"],
        ["--eigenvalues", "trust.txt"],
        ["--noise", "absent.h5"],
    ],
)
def test_maps_whose_options_contradict_each_other_are_not_begun(exam, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert main(["maps", str(exam), "-o", "maps.npy", *options]) == 1
    assert not list(tmp_path.iterdir())


def test_maps_that_cannot_be_made_leave_no_file(exam, tmp_path, capsys, monkeypatch):
    target = tmp_path / "maps.cfl"
    monkeypatch.setenv("MEL_BART", "false")
    assert main(["maps", str(exam), "-o", str(target)]) == 1
    assert "bart ecalib failed (exit code 1): it gave no reason" in capsys.readouterr().err
    assert main(["maps", str(exam), "-o", str(tmp_path / "maps.txt")]) == 1
    assert main(["maps", str(exam), "-o", str(tmp_path / "none" / "maps.cfl")]) == 1
    assert not list(tmp_path.iterdir())


def test_doctor_finds_what_is_needed(capsys):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert {"python", "torch", "bart", "memory", "scratch"} <= {finding["name"] for finding in said["findings"]}


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("MEL_BART", "/nowhere/bart")
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "apt install bart" in output
    assert output.endswith("missing: bart\n")


@pytest.mark.parametrize(
    ("text", "count"),
    [("12GiB", 12 << 30), ("12G", 12 << 30), ("1.5 MB", 1_500_000), ("512 kib", 512 << 10), ("4096", 4096), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-3G", "12 GiB or so", "1,5G", "nan", "1e9"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="such as 12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 1, 999, 1023, 1024, 10**6, 7 << 30, 999 << 30, 5 << 40, 2 << 50])
def test_sizes_are_written_so_that_they_can_be_read(count):
    text = format_bytes(count)
    assert parse_bytes(text) == pytest.approx(count, rel=0.006)
    assert len(text) <= 8

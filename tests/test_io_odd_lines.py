"""Exams whose lines, header or maps are not as they should be: a named error, or a correction that is recorded."""

import math

import numpy as np
import pytest
import torch

from gadgets.acquisition_stages import NoSettings, TriggerSettings, accumulate_trigger, noise_adjust
from gadgets.buffer_stage import BufferSettings, bucket_to_buffer
from gadgets.header import parse_header
from melcore import layout
from melcore.cli import main
from melcore.data import CoilMaps, KSpace, ScanInfo
from melcore.errors import DataError, ShapeError
from melcore.io.bart import estimate_coil_maps
from melcore.io.images import read_images
from melcore.io.load import load_k_space
from melcore.io.mrd import open_raw, write_raw
from melcore.io.mrd_types import (
    IS_DUMMY,
    IS_NAVIGATION,
    IS_NOISE,
    IS_PHASE_CORRECTION,
    IS_REALTIME_FEEDBACK,
    IS_REVERSE,
    IS_SURFACE_COIL_CORRECTION,
)
from melcore.preprocess.preparation import prepare
from tests.cases import centred_fft, coil_images, header_xml, random_complex, readout

COILS, MATRIX = 3, (1, 26, 24)
XML = header_xml(MATRIX, COILS, oversampling=1)


def plane(coils=COILS):
    return centred_fft(coil_images(coils, MATRIX), (-3, -2, -1))[:, 0]


def lines(data, numbers, **counters):
    return [readout(data[:, y], kspace_encode_step_1=y, **counters) for y in numbers]


def buffer_of(path):
    """What the chain's stages make of a file, and the provenance they leave."""
    with open_raw(path) as raw:
        header = parse_header(raw.header_xml.encode())
        stream = noise_adjust(raw.acquisitions(), header, NoSettings())
        stream = accumulate_trigger(stream, header, TriggerSettings())
        (recon,) = bucket_to_buffer(stream, header, BufferSettings())
    return layout.k_space_from_gadgetron(recon.bits[0].data.data), header.provenance


def test_repeated_lines_are_averaged_and_recorded(tmp_path):
    data, noise = plane(), random_complex((COILS, 24)) * 1e-3
    again = readout(data[:, 12] + noise, kspace_encode_step_1=12)
    write_raw(tmp_path / "raw.h5", XML, [*lines(data, range(26)), again])
    k_space, _ = load_k_space(tmp_path / "raw.h5")
    np.testing.assert_allclose(k_space.data[0, :, 0, 0, 12], data[:, 12] + noise / 2, atol=1e-6)
    assert "1 lines were acquired more than once (up to 2 times)" in k_space.info.provenance["lines"]
    buffer, provenance = buffer_of(tmp_path / "raw.h5")
    np.testing.assert_allclose(buffer, k_space.data, atol=1e-6)
    assert provenance["lines"] == "1 lines were acquired more than once and averaged"


def test_missing_lines_are_recorded_and_not_taken_for_zeros(tmp_path):
    data = plane()
    write_raw(tmp_path / "raw.h5", XML, lines(data, [y for y in range(26) if y not in (3, 20, 21)]))
    k_space, _ = load_k_space(tmp_path / "raw.h5")
    assert "3 of 26 lines are missing" in k_space.info.provenance["lines"]
    assert (~k_space.mask).flatten().nonzero().flatten().tolist() == [3, 20, 21]


def test_complete_and_announced_undersampling_leave_no_remark(tmp_path):
    data = plane()
    write_raw(tmp_path / "raw.h5", XML, lines(data, range(26)))
    assert "lines" not in load_k_space(tmp_path / "raw.h5")[0].info.provenance
    factor = (
        "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1><kspace_encoding_step_2>"
        "1</kspace_encoding_step_2></accelerationFactor></parallelImaging></encoding>"
    )
    write_raw(tmp_path / "raw.h5", XML.replace("</encoding>", factor), lines(data, range(0, 26, 2)))
    assert "lines" not in load_k_space(tmp_path / "raw.h5")[0].info.provenance


def others():
    """Readouts that share the counters of a line without being one."""
    rubbish = 1e3 * random_complex((COILS, 24))
    for flag in (IS_NAVIGATION, IS_PHASE_CORRECTION, IS_DUMMY, IS_REALTIME_FEEDBACK, IS_SURFACE_COIL_CORRECTION):
        yield readout(rubbish, flags=[flag], kspace_encode_step_1=7)


def test_navigators_corrections_feedback_and_dummies_are_no_lines(tmp_path):
    data = plane()
    write_raw(tmp_path / "raw.h5", XML, [*lines(data, range(13)), *others(), *lines(data, range(13, 26))])
    k_space, calibration = load_k_space(tmp_path / "raw.h5")
    np.testing.assert_array_equal(k_space.data[0, :, 0, 0], data)
    assert calibration is None
    assert "lines" not in k_space.info.provenance
    np.testing.assert_array_equal(buffer_of(tmp_path / "raw.h5")[0][0, :, 0, 0], data)


def test_segments_make_one_image_and_averages_are_averaged(tmp_path):
    data, noise = plane(), 1e-2 * random_complex((2, COILS, 26, 24))
    scan = [
        readout(data[:, y] + noise[average, :, y], kspace_encode_step_1=y, segment=y % 3, average=average)
        for average in (0, 1)
        for y in range(26)
    ]
    write_raw(tmp_path / "raw.h5", XML, scan)
    mean = data + noise.mean(0)
    np.testing.assert_allclose(load_k_space(tmp_path / "raw.h5")[0].data[0, :, 0, 0], mean, atol=1e-6)
    command = ["recon", str(tmp_path / "raw.h5"), "--model", "adjoint", "-o", str(tmp_path / "images.h5")]
    assert main(command) == 0
    (series,) = read_images(tmp_path / "images.h5")
    assert series.data.shape == (1, 1, 1, 26, 24)
    assert "26 lines were acquired more than once and averaged" in series.metas[0]
    write_raw(tmp_path / "raw.h5", XML, lines(mean, range(26)))
    assert main(command) == 0
    (wanted,) = read_images(tmp_path / "images.h5")
    np.testing.assert_allclose(series.data, wanted.data, atol=1e-4 * wanted.data.max())


@pytest.mark.parametrize("centre", [26, 400])
def test_a_centre_outside_the_matrix_is_named(tmp_path, centre):
    path = tmp_path / "raw.h5"
    write_raw(path, header_xml(MATRIX, COILS, oversampling=1, centre=(0, centre)), lines(plane(), range(26)))
    for read in (load_k_space, buffer_of):
        with pytest.raises(DataError, match=f"kspace_encoding_step_1 = {centre}, outside the encoded matrix of 26"):
            read(path)


@pytest.mark.parametrize("trajectory", ["radial", "wobbly"])
def test_trajectories_that_have_no_grid_are_named(tmp_path, capsys, trajectory):
    xml = XML.replace("<trajectory>cartesian", f"<trajectory>{trajectory}")
    path = tmp_path / "raw.h5"
    write_raw(path, xml, lines(plane(), range(26)))
    with pytest.raises(DataError, match=f"only Cartesian scans .* this one is {trajectory}"):
        load_k_space(path)
    assert main(["recon", str(path), "-o", str(tmp_path / "images.h5")]) == 1
    error = capsys.readouterr().err
    assert f"is {trajectory}, but its readouts do not carry it" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("trajectory", ["cartesian", "epi"])
def test_reversed_readouts_are_refused_whatever_reads_them(tmp_path, capsys, trajectory):
    """Turning them round would not do: without their phase correction the image has ghosts."""
    data, path = plane(), tmp_path / "raw.h5"
    there = [readout(data[:, y], kspace_encode_step_1=y) for y in range(0, 26, 2)]
    back = [readout(data[:, y, ::-1], kspace_encode_step_1=y, flags=[IS_REVERSE]) for y in range(1, 26, 2)]
    correction = readout(data[:, 13], flags=[IS_PHASE_CORRECTION])
    xml = XML.replace("<trajectory>cartesian", f"<trajectory>{trajectory}")
    write_raw(path, xml, [correction, *there, *back])
    with pytest.raises(
        DataError, match=r"13 of 26 readouts run in the other direction|the trajectory of this one is epi"
    ):
        load_k_space(path)
    with pytest.raises(DataError, match=r"both directions .* phase correction"):
        buffer_of(path)
    options = ["--pipeline", "mel_cartesian_2d", "--model", "adjoint", "-o", str(tmp_path / "images.h5")]
    assert main(["recon", str(path), *options]) == 1
    assert "both directions" in capsys.readouterr().err


def test_values_that_the_standard_does_not_know_are_named(tmp_path):
    with pytest.raises(DataError, match=r"not a readable ISMRMRD header: .*many"):
        write_raw(tmp_path / "raw.h5", XML.replace("<x>24</x>", "<x>many</x>", 1), lines(plane(), range(26)))


def test_one_coil_goes_all_the_way(tmp_path):
    noise = readout(random_complex((1, 200)), flags=[IS_NOISE])
    scan = [noise, *(readout(line[np.newaxis], kspace_encode_step_1=y) for y, line in enumerate(plane(4)[0]))]
    write_raw(tmp_path / "raw.h5", header_xml(MATRIX, 1, oversampling=1), scan)
    k_space, _ = load_k_space(tmp_path / "raw.h5")
    assert k_space.noise.condition_number == 1
    prepared = prepare(k_space)
    assert prepared.initial.isfinite().all()
    assert prepared.initial.abs().max() > 0.5


def k_space_of(data):
    ones = torch.ones(1, 1, 1, 1, data.shape[1], 1, dtype=torch.bool)
    return KSpace(torch.from_numpy(data)[None, :, None, None], ones, ScanInfo(MATRIX, MATRIX))


def test_a_dead_coil_gets_a_map_of_zeros_and_the_others_theirs():
    data = plane(5)
    data[2] = 0
    maps = estimate_coil_maps(k_space_of(data)).data[0, 0, :, 0, 0]
    others = estimate_coil_maps(k_space_of(data[[0, 1, 3, 4]])).data[0, 0, :, 0, 0]
    assert not maps[2].any()
    both = (maps != 0).any(0) & (others != 0).any(0)
    assert both.sum() > 0.9 * (others != 0).any(0).sum()
    inner = (maps[[0, 1, 3, 4]].conj() * others).sum(0).abs()[both]
    assert inner.min() > 0.99


def test_maps_with_holes_are_measured_and_refused_where_little_is_left():
    k_space = k_space_of(plane(4))
    maps = estimate_coil_maps(k_space).data
    assert prepare(k_space, coil_maps=CoilMaps(maps)).signal_in_maps > 0.95
    holed = maps.clone()
    holed[..., 8:17, 9:15] = 0
    assert 0.3 < prepare(k_space, coil_maps=CoilMaps(holed)).signal_in_maps < 0.95
    torn = maps.clone()
    torn[..., 3:23, :] = 0
    with pytest.raises(DataError, match=r"are zero where \d+ % of the signal is"):
        prepare(k_space, coil_maps=CoilMaps(torn))
    with pytest.raises(ShapeError, match="CoilMaps have 3 coils"):
        prepare(k_space, coil_maps=CoilMaps(maps[:, :, :3]))
    maps[0, 0, 1, 0, 0, 5, 5] = math.nan
    with pytest.raises(DataError, match=r"coil maps .* hold NaN"):
        prepare(k_space, coil_maps=CoilMaps(maps))

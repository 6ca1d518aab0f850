"""The same exam through `mel recon` and through the process that a server starts: the same images."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from exams import arriving, partial_fourier, recording, separate_calibration, without_parallel_imaging, write
from peer import run_target, run_target_here

from gadgets.chain import find_pipeline, run_chain
from gadgets.messages import Close, Image, ReconBit, ReconData
from melcore.cli import main
from melcore.io.images import read_images
from melcore.io.mrd import open_raw

# Exam, what is special about it, the pipeline, and the path that its images must have taken.
EXAMS = {
    "slices, embedded calibration": ("slices", [], "mel_cartesian_2d", "learned"),
    "slices, separate calibration": ("slices", [separate_calibration("separate")], "mel_cartesian_2d", "learned"),
    "slices, external calibration": ("slices", [separate_calibration("external")], "fallback_cgsense", "cg-sense"),
    "partial Fourier": ("slices", [partial_fourier(7)], "fallback_cgsense", "cg-sense"),
    "partial Fourier, no parallelImaging": (
        "slices",
        [partial_fourier(7), without_parallel_imaging],
        "mel_cartesian_2d",
        "learned",
    ),
    "cine": ("cine", [], "mel_cine_2dt", "learned"),
    "cine, separate calibration": ("cine", [separate_calibration("separate")], "mel_cine_2dt", "learned"),
    "volume": ("volume", [], "mel_cartesian_3d", "learned"),
    "volumes": ("volumes", [], "mel_dynamic_3dt", "cg-sense"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes: sums in another order are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _meta(text: str) -> dict[str, str]:
    """Without what is different each time, and without the steps that the server did: nobody tells of these.

    Nor is it known then how much of the data is noise.
    """
    found = {e.findtext("name"): e.findtext("value") for e in ElementTree.fromstring(text.encode())}
    apart = ("MEL_seconds", "MEL_provenance", "MEL_whitened", "MEL_quality_noise_part")
    return {k: v for k, v in found.items() if not k.startswith(apart)}


def _own_configuration(pipeline: str) -> str:
    (node,) = ElementTree.parse(find_pipeline(pipeline)).getroot().iter("external")
    return ElementTree.tostring(node.find("configuration"), encoding="unicode")


def _images(answer) -> list[Image]:
    assert (answer.code, answer.messages[-1:]) == (0, [Close()]), answer.log
    assert all(isinstance(message, Image) for message in answer.messages[:-1])
    return answer.messages[:-1]


@pytest.mark.parametrize("name", EXAMS)
def test_a_file_and_a_server_give_the_same_images(name, tmp_path):
    protocol, changes, pipeline, path_taken = EXAMS[name]
    raw = write(tmp_path / "exam.h5", protocol, *changes)
    target = tmp_path / "images.h5"
    assert main(["recon", str(raw), "--pipeline", pipeline, "-o", str(target)]) == 0
    (series,) = read_images(target)
    images = _images(run_target(recording(_own_configuration(pipeline), *arriving(raw, pipeline)), "reconstruct"))
    assert len(images) == len(series.headers) > 0
    for image, header, data, meta in zip(images, series.headers, series.data, series.metas, strict=True):
        np.testing.assert_array_equal(image.data, data)
        assert np.ptp(data) > 0
        found = image.header.copy()
        found["attribute_string_len"] = header["attribute_string_len"]
        assert found.tobytes() == header.tobytes()
        assert _meta(image.meta)["MEL_path_taken"] == path_taken
        assert _meta(image.meta) == _meta(meta)


def _in_process(path, pipeline: str = "fallback_cgsense", **overrides: str) -> list[Image]:
    with open_raw(path) as raw:
        return list(run_chain(pipeline, raw.header_xml, raw.acquisitions(), overrides=overrides))


def _differences(found: list[Image], wanted: list[Image]) -> list[float]:
    pairs = [(one.data, other.data) for one, other in zip(found, wanted, strict=True)]
    return [float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs]


@pytest.mark.parametrize(
    "change",
    [
        separate_calibration("separate"),
        separate_calibration("external"),
        # Not in the units of the image, as another sequence gives them.
        separate_calibration("external", size=0.25),
        # Counted for themselves: the centre of k-space is the middle of them.
        separate_calibration("separate", counted_from=10),
        # As many as the image has: still no lines of the image.
        separate_calibration("external", size=3.0, whole=True),
    ],
    ids=["separate", "external", "other scale", "own counters", "all lines"],
)
def test_where_the_calibration_comes_from_does_not_change_the_image(change, tmp_path):
    wanted = _in_process(write(tmp_path / "embedded.h5", "slices"))
    found = _in_process(write(tmp_path / "separate.h5", "slices", change))
    assert max(_differences(found, wanted)) < 0.01


def test_partial_fourier_lines_are_where_they_belong(tmp_path):
    """With and without parallelImaging, which decides how a server numbers them."""
    whole = _in_process(write(tmp_path / "whole.h5", "slices"))
    part = _in_process(write(tmp_path / "part.h5", "slices", partial_fourier(7)))
    bare = _in_process(write(tmp_path / "bare.h5", "slices", partial_fourier(7), without_parallel_imaging))
    assert max(_differences(part, whole)) < 0.25  # the lines that are missing
    assert max(_differences(bare, part)) < 0.02


def test_lines_that_a_server_drops_are_missing_and_the_rest_is_in_place(tmp_path):
    """Without parallelImaging its buffer is as large as the range of the counters, and what lies beyond is lost."""
    missing = 3
    raw = write(tmp_path / "part.h5", "slices", partial_fourier(missing), without_parallel_imaging)
    xml, messages = arriving(raw, "fallback_cgsense")
    cut = []
    for message in messages:
        (bit,) = message.bits
        data, headers = bit.data.data[:, :-missing], bit.data.headers[:-missing]
        cut.append(ReconData((ReconBit(dataclasses.replace(bit.data, data=data, headers=headers)),)))
    answer = run_target_here(recording("<configuration/>", xml, cut), "reconstruct")

    def dropped(xml, readouts):
        lines = [int(one.header["idx"]["kspace_encode_step_1"]) for one in readouts]
        return xml, [one for one, line in zip(readouts, lines, strict=True) if line + missing < 32 - missing]

    changes = [partial_fourier(missing), without_parallel_imaging, dropped]
    wanted = _in_process(write(tmp_path / "dropped.h5", "slices", *changes))
    assert len(_images(answer)) == len(wanted) == 3
    assert max(_differences(_images(answer), wanted)) < 1e-5

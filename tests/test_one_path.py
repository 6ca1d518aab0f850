"""A file read at once and a file streamed through the chain give the same k-space: one path, two entrances."""

from pathlib import Path

import pytest
import torch

from gadgets.chain import build_chain
from gadgets.header import parse_header
from gadgets.messages import ReconData
from gadgets.reconstruct_stage import to_k_space
from melcore.data import KSpace
from melcore.io.load import load_k_space
from melcore.io.mrd import open_raw
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol
from tests.cases import shared
from tests.laws import relative

EXAMS = {
    "mel_cartesian_2d": Protocol(shape=(1, 30, 24), coils=3, acceleration=2, calibration=(1, 10)),
    "mel_cartesian_3d": Protocol(shape=(14, 22, 16), coils=4, acceleration=3, calibration=(8, 8)),
    "mel_cine_2dt": Protocol(shape=(1, 28, 20), coils=3, time=4, acceleration=2, calibration=(1, 6)),
}


def streamed(path: Path, pipeline: str) -> list[KSpace]:
    """What the reconstruction of a pipeline receives."""
    before_reconstruction = build_chain(pipeline)[:-1]
    with open_raw(path) as raw:
        header = parse_header(raw.header_xml.encode())
        stream = iter(raw.acquisitions())
        for step in before_reconstruction:
            stream = step(stream, header)
        data = [message for message in stream if isinstance(message, ReconData)]
        return [to_k_space(bit, header)[0] for message in data for bit in message.bits]


def merged(path: Path) -> KSpace:
    """The file read at once, with the lines that only the calibration has."""
    k_space, calibration = load_k_space(path)
    if calibration is None:
        return k_space
    only = calibration.mask & ~k_space.mask
    mask = k_space.mask | calibration.mask
    return KSpace(torch.where(only, calibration.data, k_space.data), mask, k_space.info, k_space.noise)


def check(path: Path, pipeline: str) -> None:
    """Compare both entrances."""
    parts, whole = streamed(path, pipeline), merged(path)
    assert sum(part.data.shape[0] * part.data.shape[2] for part in parts) == whole.data.shape[0] * whole.data.shape[2]
    assert whole.noise.whitened
    for index, part in enumerate(parts):
        element = slice(index, index + 1) if len(parts) > 1 else slice(None)
        assert torch.equal(part.mask.expand_as(whole.mask[element]), whole.mask[element])
        assert relative(part.data, whole.data[element]) < 1e-6
        assert part.noise.whitened
        for step in ("whitening", "noise_condition_number"):
            assert part.info.provenance[step] == whole.info.provenance[step]
        assert part.info.recon_matrix == whole.info.recon_matrix
        assert part.info.geometry[0] == whole.info.geometry[index if len(parts) > 1 else 0]


@pytest.mark.parametrize("pipeline", EXAMS)
def test_simulated_exam(pipeline: str, tmp_path: Path) -> None:
    path = tmp_path / "exam.h5"
    write_exam(path, EXAMS[pipeline])
    check(path, pipeline)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [("cart3d_24x20x12_4ch", "mel_cartesian_3d"), ("multislice_32x32_3sl_4ch", "mel_cartesian_2d")],
)
def test_recorded_exam(name: str, pipeline: str) -> None:
    check(shared(f"gadgetron/inputs/{name}.h5"), pipeline)

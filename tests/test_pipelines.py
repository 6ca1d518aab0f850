"""The pipelines that ship: what a server accepts, both forms of each, and volumes over time."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from cases import shared

from gadgets.chain import build_chain, run_chain
from gadgets.serve_command import PORT
from melcore.io.images import read_images
from melcore.io.mrd import open_raw, write_raw
from melcore.simulate.exam import TRUTH, write_exam
from melcore.simulate.protocol import Protocol

PIPELINES = Path(__file__).parents[1] / "pipelines"
EXECUTED = sorted(PIPELINES.glob("*.xml"))
CONNECTED = sorted((PIPELINES / "connect").glob("*.xml"))

every_pipeline = pytest.mark.parametrize("path", EXECUTED + CONNECTED, ids=lambda path: path.stem)

# The library of each class, in the order in which a server runs them.
_GADGETS = [
    ("gadgetron_mricore", "NoiseAdjustGadget"),
    ("gadgetron_mricore", "AsymmetricEchoAdjustROGadget"),
    ("gadgetron_mricore", "RemoveROOversamplingGadget"),
    ("gadgetron_mricore", "AcquisitionAccumulateTriggerGadget"),
    ("gadgetron_mricore", "BucketToBufferGadget"),
]
_SORTING = ("", "average", "contrast", "phase", "repetition", "segment", "set", "slice")
_PROPERTIES = {
    "AcquisitionAccumulateTriggerGadget": {"trigger_dimension": _SORTING},
    "BucketToBufferGadget": {
        "N_dimension": _SORTING,
        "S_dimension": _SORTING,
        "split_slices": ("true", "false"),
        "ignore_segment": ("true", "false"),
    },
}


def _root(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()


def _shape(element: ElementTree.Element) -> tuple:
    """An element without comments and white space."""
    return element.tag, element.attrib, (element.text or "").strip(), [_shape(child) for child in element]


@every_pipeline
def test_elements_come_in_the_order_that_a_server_reads(path):
    root = _root(path)
    assert (root.tag, root.findtext("version")) == ("configuration", "2")
    assert [child.tag for child in root] == ["version", "readers", "writers", "stream"]
    for kind, names in (("reader", ["AcquisitionReader", "WaveformReader"]), ("writer", ["ImageWriter"])):
        found = list(root.iter(kind))
        assert [[part.tag for part in one] for one in found] == [["dll", "classname"]] * len(names)
        assert [one.findtext("classname") for one in found] == names
        assert {one.findtext("dll") for one in found} == {f"gadgetron_core_{kind}s"}
    *gadgets, external = root.find("stream")
    assert [(one.findtext("dll"), one.findtext("classname")) for one in gadgets] == _GADGETS
    for gadget in gadgets:
        assert [part.tag for part in gadget] == ["dll", "classname"] + ["property"] * (len(gadget) - 2)
        allowed = _PROPERTIES.get(gadget.findtext("classname"), {})
        for item in gadget.iter("property"):
            assert item.get("value") in allowed[item.get("name")]
    assert external.tag == "external"
    assert len(external) == 2
    assert external[1].tag == "configuration"
    if path in CONNECTED:
        assert (external[0].tag, external[0].attrib) == ("connect", {"address": "localhost", "port": str(PORT)})
    else:
        assert external[0].tag == "execute"
        assert external[0].attrib == {"name": "gadgets", "target": "reconstruct", "type": "python"}


@every_pipeline
def test_elements_are_those_of_configurations_that_a_server_ran(path):
    """Every parent and child, and every attribute, occurs in a configuration that a real server was started with."""

    def relations(root: ElementTree.Element) -> set:
        pairs = {(parent.tag, child.tag) for parent in root.iter() for child in parent}
        return pairs | {(element.tag, name) for element in root.iter() for name in element.attrib}

    known = set().union(*(relations(_root(example)) for example in shared("gadgetron/configs").glob("*.xml")))
    assert relations(_root(path)) <= known


def test_each_pipeline_has_both_forms_and_they_are_the_same():
    assert [f"{path.stem}_connect" for path in EXECUTED] == [path.stem for path in CONNECTED]
    for executed, connected in zip(EXECUTED, CONNECTED, strict=True):
        one, other = _root(executed), _root(connected)
        for root in (one, other):
            external = root.find("stream/external")
            external.remove(external[0])
        assert _shape(one) == _shape(other)
        assert f"As {executed.name}," in connected.read_text()


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_pipelines_run_in_process_and_their_models_ship(path):
    assert build_chain(path)
    (model,) = (item.get("value") for item in _root(path).iter("property") if item.get("name") == "model")
    assert model in ("none", "cg-sense") or (PIPELINES / "bundles" / f"{model}.safetensors").exists()


# Volumes over time.


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """A beating volume, 3 phases."""
    path = tmp_path_factory.mktemp("exam") / "volumes.h5"
    write_exam(path, Protocol(shape=(6, 20, 16), time=3, coils=3, acceleration=1.5, calibration=(6, 10), seed=5))
    return path


def _reconstruct(path: Path, pipeline: Path | str, **overrides: str) -> list:
    with open_raw(path) as raw:
        return list(run_chain(pipeline, raw.header_xml, raw.acquisitions(), overrides=overrides))


def test_volumes_over_time_are_the_true_ones(volumes):
    images = _reconstruct(volumes, "mel_dynamic_3dt", output="complex")
    (truth,) = read_images(volumes, TRUTH)
    assert [int(image.header["phase"]) for image in images] == [0, 1, 2]
    assert len({int(image.header["physiology_time_stamp"][0]) for image in images}) == 3
    for image, wanted in zip(images, truth.data, strict=True):
        assert image.data.shape == (1, 6, 20, 16)
        inside = np.abs(image.data) > 0
        error = np.abs(np.abs(image.data) - np.abs(wanted))[inside]
        assert np.linalg.norm(error) < 0.3 * np.linalg.norm(wanted[inside])
        assert "cg-sense" in image.meta
    # The frames are their own, not one another's nor their mean.
    for one, other in itertools.permutations(range(3), 2):
        distance = [np.linalg.norm(np.abs(images[one].data) - np.abs(truth.data[k])) for k in (one, other)]
        assert distance[0] < distance[1]


def test_time_may_be_counted_in_repetitions(volumes, tmp_path):
    """As the pipeline's comment says: other counters, the same numbers."""
    text = (PIPELINES / "mel_dynamic_3dt.xml").read_text()
    for name, old, new in (("N_dimension", "phase", "repetition"), ("trigger_dimension", "repetition", "")):
        assert f'name="{name}" value="{old}"' in text
        text = text.replace(f'name="{name}" value="{old}"', f'name="{name}" value="{new}"')
    pipeline = tmp_path / "repetitions.xml"
    pipeline.write_text(text)
    with open_raw(volumes) as raw:
        readouts = list(raw.acquisitions())
        for readout in readouts:
            counters = readout.header["idx"]
            counters["repetition"], counters["phase"] = int(counters["phase"]), 0
        write_raw(tmp_path / "repetitions.h5", raw.header_xml, readouts)
    found = _reconstruct(tmp_path / "repetitions.h5", pipeline, model="adjoint")
    wanted = _reconstruct(volumes, "mel_dynamic_3dt", model="adjoint")
    assert [int(image.header["repetition"]) for image in found] == [0, 1, 2]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.data, other.data)

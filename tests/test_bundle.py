"""Bundles: what is saved is what is loaded, and nothing else is taken for one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from melcore.bundle import Bundle, find, shipped
from melcore.errors import ConfigError, DataError
from melcore.physics import Sense
from melcore.preprocess.preparation import Preparation
from melcore.unrolled import build
from tests.laws import random

ARCHITECTURE = {
    "scheme": "modl",
    "iterations": 2,
    "shared": False,
    "cg_iterations": 3,
    "regulariser": {"name": "resnet", "dimensions": 2, "channels": 5, "layers": 3},
}


@pytest.fixture
def bundle() -> Bundle:
    torch.manual_seed(1)
    return Bundle(build(ARCHITECTURE), ARCHITECTURE, Preparation(coils=6, start_iterations=3), {"seed": 1, "steps": 0})


def reconstruct(bundle: Bundle) -> torch.Tensor:
    operator = Sense(random((1, 1, 3, 1, 1, 9, 7), torch.complex64), torch.ones(1, 1, 1, 1, 9, 7))
    with torch.no_grad():
        return bundle.model(random((1, 3, 1, 1, 9, 7), torch.complex64), operator, sigma=torch.tensor([0.02]))


def test_round_trip(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.save(tmp_path / "folder" / "small.safetensors")
    loaded = Bundle.load(path)
    assert torch.equal(reconstruct(loaded), reconstruct(bundle))
    assert loaded.architecture == ARCHITECTURE
    assert loaded.preparation == bundle.preparation
    assert loaded.card == bundle.card
    assert (loaded.name, loaded.dimensions, len(loaded.digest)) == ("small", "2d", 16)
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


def test_digest_follows_the_weights(bundle: Bundle, tmp_path: Path) -> None:
    first = Bundle.load(bundle.save(tmp_path / "a.safetensors")).digest
    assert Bundle.load(bundle.save(tmp_path / "b.safetensors")).digest == first
    with torch.no_grad():
        next(bundle.model.parameters()).add_(1e-6)
    assert Bundle.load(bundle.save(tmp_path / "c.safetensors")).digest != first


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    sizes = []
    for iterations in (1, 7):
        architecture = {**ARCHITECTURE, "iterations": iterations, "shared": True}
        path = Bundle(build(architecture), architecture, Preparation()).save(tmp_path / f"{iterations}.safetensors")
        sizes.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 16


def test_failed_save_leaves_the_old_file(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    broken = Bundle(bundle.model, bundle.architecture, bundle.preparation, {"unserialisable": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def rewrite(path: Path, **changes: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["digest"]  # as if another program had written it
    save_file(load_file(path), path, {**metadata, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a MEL bundle"),
        ({"version": "99"}, "version 99.*version 1"),
        ({"architecture": "{"}, "do not fit"),
        ({"architecture": json.dumps({**ARCHITECTURE, "iterations": 3})}, "Missing key"),
        ({"preparation": json.dumps({"coil": 3})}, "coil"),
        ({"conventions": json.dumps({"fourier": "uncentred"})}, "fourier = 'uncentred'"),
    ],
)
def test_what_does_not_fit_is_refused(bundle: Bundle, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = bundle.save(tmp_path / "a.safetensors")
    rewrite(path, **changes)
    with pytest.raises(DataError, match=message) as error:
        Bundle.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_damaged_file_is_named(bundle: Bundle, tmp_path: Path, keep: int) -> None:
    path = bundle.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.safetensors is damaged"):
        Bundle.load(path)


@pytest.mark.parametrize("place", [0.3, 0.7, 0.999])
def test_a_flipped_bit_in_the_weights_is_damage(bundle: Bundle, tmp_path: Path, place: float) -> None:
    path = bundle.save(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")  # of the weights
    content[first + int(place * (len(content) - first))] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors is damaged: its content has the digest"):
        Bundle.load(path)


def test_missing_bundles_are_named() -> None:
    with pytest.raises(DataError, match=r"no bundle at nowhere/a\.safetensors"):
        find("nowhere/a.safetensors")
    with pytest.raises(ConfigError, match="no bundle 'modl_4d'"):
        find("modl_4d")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_bundles_load_and_say_how_they_were_trained(name: str) -> None:
    path = shipped()[name]
    assert path.stat().st_size < 2_000_000
    card = Bundle.load(name).card
    assert {"data", "seed", "steps", "machine", "seconds", "metrics"} <= set(card)

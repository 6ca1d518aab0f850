"""BART: its files (`read_cfl`, `write_cfl`), its commands (`run`), and coil maps estimated with it."""

from melcore.io.cfl import read_cfl, write_cfl
from melcore.io.coil_maps import MapEstimate, MapSettings, estimate_coil_maps, estimate_maps
from melcore.io.toolbox import EmptyOutputError, executable, run, scratch_folder, version

__all__ = [
    "EmptyOutputError",
    "MapEstimate",
    "MapSettings",
    "estimate_coil_maps",
    "estimate_maps",
    "executable",
    "read_cfl",
    "run",
    "scratch_folder",
    "version",
    "write_cfl",
]

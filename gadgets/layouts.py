"""Sizes and places in the Gadgetron protocol that reading and writing share; little endian, as a server writes them."""

import struct

import numpy as np

U16, U32, U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
COMPLEX, FLOAT, UINT32, UINT16 = (np.dtype(kind) for kind in ("<c8", "<f4", "<u4", "<u2"))

#: The only three numbers needed of most acquisition headers: number_of_samples, active_channels, trajectory_dimensions.
#: Reading them this way is 10 times faster than by name.
SIZES = struct.Struct("<34xH2xH136xH")

#: Of a bucket, for data and reference each: count, bytes of headers, data and trajectories; then the bytes of both
#: statistics; then waveforms likewise.
BUCKET = struct.Struct("<4Q4QQQ3Q")

CONFIG_NAME = 1024  #: bytes of a configuration's name

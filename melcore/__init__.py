"""MEL: memory-efficient learning for high-dimensional MRI reconstruction.

`melcore` trains and runs unrolled reconstruction networks and writes model bundles. Import what you need from its
subpackages; importing `melcore` itself loads nothing heavy.
"""

__version__ = "0.1.0"

"""Run ``mel`` as ``python -m melcore.cli``."""

import sys

from melcore.cli import main

sys.exit(main())

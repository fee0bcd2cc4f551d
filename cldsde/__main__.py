"""``python -m cldsde`` is the command ``cldsde``."""

import sys

from cldsde.cli import main

sys.exit(main())

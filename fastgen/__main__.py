"""`python -m fastgen`, for environments whose scripts are not on the PATH, and for launchers that start modules."""

import sys

from fastgen.cli import main

sys.exit(main())

"""`python -m fastgen.cli`, for environments whose scripts are not on the PATH."""

import sys

from fastgen.cli import main

sys.exit(main())

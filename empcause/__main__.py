"""`python -m empcause` is the command `empcause`."""

import sys

from empcause.cli import main

sys.exit(main())

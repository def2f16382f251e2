"""``python -m fusebd``: the command line."""

import sys

from fusebd.cli import main

sys.exit(main())

"""`python -m offramp`."""

import sys

from offramp.cli import main

sys.exit(main())

"""`python -m farnear`: the command, where its script is not on the path."""

import sys

from farnear.cli import main

sys.exit(main())

"""`python -m jaxspd` is the `jaxspd` command."""

import sys

from jaxspd.cli import main

sys.exit(main())

"""``python -m genas_plugins`` is the ``genas`` command."""

import sys

from genas_plugins.cli import main

sys.exit(main())

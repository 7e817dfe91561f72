"""`python -m pfkey` is the `pfkey` command."""

import sys

from .cli import main

sys.exit(main())

"""`python -m launch` is `aroface`, from a bare checkout."""

import sys

from launch.cli import main

sys.exit(main())

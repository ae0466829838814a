"""`python -m dsv4_jax.cli`, the `dsv4` command."""

import sys

from dsv4_jax.cli import main

sys.exit(main())

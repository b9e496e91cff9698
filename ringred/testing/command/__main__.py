"""`python -m ringred.testing.command`, where the command itself is not on the PATH."""

import sys

from ringred.testing.command.main import main

sys.exit(main())

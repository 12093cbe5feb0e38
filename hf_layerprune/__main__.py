"""`python -m hf_layerprune` is `hf-layerprune`."""

import sys

from .commands.cli import main


sys.exit(main())

"""`python -m hf_layerprune` is `hf-layerprune`."""

import sys

from .cli import main


sys.exit(main())

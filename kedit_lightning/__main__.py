"""`python -m kedit_lightning` is `kedit`."""

from kedit_lightning.cli import main

main()

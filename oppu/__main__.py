"""Allow ``python -m oppu``."""

from oppu.cli import main

main()

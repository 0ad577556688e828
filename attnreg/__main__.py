"""`python -m attnreg`."""

from attnreg.cli import main

main()

"""`python -m unforget`."""

from unforget.cli import main

main()

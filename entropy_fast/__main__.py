"""`python -m entropy_fast` is the command line."""

from entropy_fast.cli import main

main()

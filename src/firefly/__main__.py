"""`python -m firefly` is `firefly`."""

from firefly.cli import main

main()

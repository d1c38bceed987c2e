"""`python -m flowlik`."""

from flowlik.cli import main

main()

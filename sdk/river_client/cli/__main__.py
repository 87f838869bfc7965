"""`python -m river_client.cli` is `river`."""

from river_client.cli import main

main()

"""`python -m launch` is the `shoal` command."""

from launch.cli import main

main()

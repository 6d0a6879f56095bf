"""``python -m bittern``."""

from bittern.cli import main

main()

"""`python -m moetrace`."""

from moetrace.cli import run

run()

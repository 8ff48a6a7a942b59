"""`python -m quantlab` is `quantlab`."""

from quantlab.cli import entry

entry()

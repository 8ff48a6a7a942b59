"""Experiments: a configuration goes in, a directory of records comes out. `quantlab.report` reads the records."""

from quantlab.cli import entry

entry()

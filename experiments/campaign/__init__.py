"""A campaign of faults against the command line: `python -m experiments.campaign`."""

"""Benchmarks labelled by people: sheets out, answers in. `python -m data_prep.annotate` is the program."""

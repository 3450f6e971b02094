"""Commands for data, vocabularies, submissions and official scores: `python -m tools.NAME --help`."""

"""Scripts a person reads from top to bottom: `python -m recipes.NAME --help`."""

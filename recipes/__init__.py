"""Scripts a person reads from top to bottom: `python -m recipes.NAME --help`."""

import sys
from importlib.util import find_spec

EXTRA = ("matplotlib", "mlxtend", "pydantic", "torchmetrics", "torchvision", "tqdm", "tyro")
"""Packages of the extra `recipes`."""

missing = [package for package in EXTRA if find_spec(package) is None]
if missing:
    sys.exit(f'error: recipes need {", ".join(missing)}: pip install ".[recipes]"')

"""The tiny Llama that comes with the package: `tests/tiny` trained it."""

from pathlib import Path

FOLDER = Path(__file__).parent  # of the model, as transformers saves one

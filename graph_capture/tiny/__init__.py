"""The tiny Llama that comes with the package: it knows what `text` asks, and was trained by `train`."""

from pathlib import Path

FOLDER = Path(__file__).parent  # of the model, as transformers saves one

import pytest
import torch

from tests.models import tiny_llama


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def llama():
    """A 4-layer Llama with grouped-query attention and random weights, float32."""
    return tiny_llama()

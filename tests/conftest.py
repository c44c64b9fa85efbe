import pytest
import torch

from graph_capture.cache import VARIABLE
from tests.models import tiny_llama


@pytest.fixture(scope="session", autouse=True)
def cache_folder_of_the_session(tmp_path_factory):
    """Where fixtures that outlive a test keep what they make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("session_cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own: no test sees what another has measured, or touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture(autouse=True)
def modes_are_left_alone():
    """No test leaves gradients off, or a mode on, for those that follow."""
    yield
    left = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()
    torch.set_grad_enabled(True)
    assert left == (True, False, False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def llama():
    """A 4-layer Llama with grouped-query attention and random weights, float32."""
    return tiny_llama()

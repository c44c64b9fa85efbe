import functools
import importlib.util
import pathlib
import sys

import pytest

STAND_IN = pathlib.Path(__file__).parents[1] / "infinicore_stand_in"


def _modules():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "infinicore"}


@functools.cache
def _stand_in():
    """The stand-in's modules by name, imported once."""
    before = _modules()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(STAND_IN))
    try:
        importlib.import_module("infinicore")
        return _modules()
    finally:
        sys.path.remove(str(STAND_IN))
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(params=["stand_in", "real"])
def ic(request, monkeypatch):
    """`infinicore`: what stands in for it, and the real package where it can be imported."""
    if request.param == "stand_in":
        for name, module in _stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    elif importlib.util.find_spec("infinicore") is None:
        pytest.skip("infinicore is not installed")
    else:
        importlib.import_module("infinicore")
    return sys.modules["infinicore"]

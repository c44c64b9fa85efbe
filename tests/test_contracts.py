"""`graph_capture.testing`, and the plugin that shows why a contract is broken."""

import pytest
import torch
from torch.nn import functional as F

from graph_capture import FusionConfig, fuse, testing
from tests.models import recorded, tiny_llama, token_ids

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def fused():
    return fuse(recorded(tiny_llama(2), token_ids()), FusionConfig(profile="always"))


def test_counts_that_hold(fused):
    kinds = {}
    for region in fused.regions:
        if region.decision:
            kinds[region.kind] = kinds.get(region.kind, 0) + 1
    assert kinds["add_rms_norm"] == 4
    testing.assert_fused(fused, **kinds)


def test_a_count_that_differs_comes_with_reasons(fused):
    with pytest.raises(testing.ContractError, match="norm_add_norm: 0 kernels, not 2") as caught:
        testing.assert_fused(fused, norm_add_norm=2, add_rms_norm=4)
    assert "expected rms_norm, found linear" in str(caught.value)
    assert "add_rms_norm" not in str(caught.value).splitlines()[0].replace("norm_add_norm", "")
    with pytest.raises(ValueError, match=r"no rule makes regions 'swiglue'.*swiglu"):
        testing.assert_fused(fused, swiglue=1)


def test_what_is_found_and_not_used_breaks_the_contract():
    graph = recorded(tiny_llama(1), token_ids())
    unfused = fuse(graph, FusionConfig(profile="always", min_tensor_elements=10**9))
    with pytest.raises(testing.ContractError, match="not used: "):
        testing.assert_fused(unfused, add_rms_norm=2)


def test_launches(fused):
    per_layer = [where for where, _ in testing.launches(fused) if where.startswith("model.layers.0")]
    testing.assert_launches(fused, at_most=len(per_layer), per="layers.*")
    testing.assert_launches(fused, at_most=len(testing.launches(fused)))
    with pytest.raises(testing.ContractError, match=r"model\.layers\.0: \d+ launches, at most 2 are allowed"):
        testing.assert_launches(fused, at_most=2, per="layers.*")
    with pytest.raises(ValueError, match=r"no kernel or op lies in a module 'blocks\.\*'"):
        testing.assert_launches(fused, at_most=2, per="blocks.*")
    plain = fuse(fused.recorded, FusionConfig(enable_fusion=False))
    assert len(testing.launches(plain)) > len(testing.launches(fused))


def test_closeness_to_float64(fused, monkeypatch):
    testing.assert_close_to_float64(fused, input_ids=token_ids(seed=3))
    right = type(fused).execute
    monkeypatch.setattr(type(fused), "execute", lambda self, *given: [t * 1.001 for t in right(self, *given)])
    with pytest.raises(testing.ContractError, match=r"is 1\.00e-03 from float64.*\n.*recorded"):
        testing.assert_close_to_float64(fused, input_ids=token_ids(seed=3))


def test_a_check_writes_nothing():
    cache = torch.zeros(4)

    def code(x):
        cache.add_(x)
        return F.silu(cache) * x

    x = torch.randn(4)
    graph = fuse(_recorded(code, x), FusionConfig(profile="always"))
    before = cache.clone()
    testing.assert_close_to_float64(graph, x)
    assert torch.equal(cache, before)


def _recorded(code, x):
    from graph_capture import record

    with record(x) as recording:
        recording.output(code(x))
    return recording.graph


def test_the_plugin_prints_near_misses(pytester):
    pytester.makepyfile(
        """
        import torch
        from graph_capture import FusionConfig, fuse, record, testing

        def graph():
            x = torch.randn(4, 8)
            with record(x) as recording:
                gate = torch.nn.functional.silu(x)
                recording.output((gate * x, gate))
            return fuse(recording.graph, FusionConfig(profile="always"))

        def test_broken():
            testing.assert_fused(graph(), swiglu=2)

        def test_other():
            assert False
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    assert text.count("graph_capture: near misses") == 1
    section = text.partition("graph_capture: near misses")[2].splitlines()[1]
    assert section == "swiglu: 1 of 1 candidates matched"

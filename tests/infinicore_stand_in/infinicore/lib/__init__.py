from infinicore.lib import _infinicore

__all__ = ["_infinicore"]

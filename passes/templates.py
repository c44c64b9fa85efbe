"""Recorded templates of this package's own patterns, kept from one process to the next: recording them takes longer
than all other passes together."""

from __future__ import annotations

import json

from graph_capture.cache import DiskCache
from graph_capture.errors import CaptureError
from graph_capture.ir.graph_json import Decoder, Encoder, Extra, as_dict, as_list, text
from graph_capture.passes.pattern import Hole, Pattern, Template
from graph_capture.passes.registry import DEFAULT
from graph_capture.passes.spellings import ROUNDS

_HOLE: Extra = {"hole": (Hole, lambda hole: hole.name, lambda name: Hole(text(name)))}


# Those that nothing but this package's code decides, by a name that is the same in every process. This module is
# imported with the package, before anybody else can register a pattern.
_OURS: dict[str, Pattern] = {
    **{f"{r}.{i}": rule.pattern for r, rules in enumerate(ROUNDS) for i, rule in enumerate(rules)},
    **{item.name: item for item in DEFAULT},
}


def load_templates(cache: DiskCache) -> bool:
    """Fill in what an earlier process recorded; False where there is nothing (usable)."""
    patterns = {name: item for name, item in _OURS.items() if "templates" not in vars(item)}
    if not patterns:
        return True
    data = cache.read(cache.key("templates"), ".templates")
    if data is None:
        return False
    try:
        table = as_dict(json.loads(data))
        decoder = Decoder(table.get("nodes"), _HOLE)
        known = as_dict(table.get("patterns"))
        found = {name: tuple(Template(decoder.graph(g)) for g in as_list(known[name])) for name in patterns}
    except (CaptureError, ValueError, KeyError, RecursionError):
        return False
    for name, templates in found.items():
        vars(patterns[name])["templates"] = templates
    return True


def store_templates(cache: DiskCache) -> None:
    """Keep all templates for processes to come; records those that were not needed yet."""
    encoder = Encoder(_HOLE)
    patterns = {name: [encoder.graph(t.graph) for t in item.templates] for name, item in _OURS.items()}
    data = json.dumps({"nodes": encoder.nodes, "patterns": patterns})
    cache.put(cache.key("templates"), {".templates": data.encode()})

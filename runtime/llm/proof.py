"""A model proves itself before it is served: our cache must give what the model gives without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from graph_capture.log import log
from graph_capture.runtime.llm.given import STEPS, Witness

if TYPE_CHECKING:
    from graph_capture.runtime.llm.session import Session

LENGTH = 40  # tokens of the prompt that a proof takes, where nothing speaks for more
# How far logits may lie apart, relative to their size: rounding, added up over the layers.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# What a configuration calls the number of tokens at which a model begins to act in another way.
_SWITCHES = ("window", "chunk", "local", "radius", "block_size", "original_max", "span")


def prove(session: Session, padded: bool, total: int) -> str | None:
    """Why `session` may not answer as far as `total` tokens; None where its model gives the same over slots.

    Takes prompts of made-up tokens, compares the logits after them and after two decoded tokens with those of forwards
    without cache: of each row alone and, where rows are padded, of all rows as ``generate`` would call the model.
    Beyond a number of tokens at which the configuration lets the model change its ways, prompts are that long.
    """
    lengths = [min(LENGTH, session.capacity - STEPS)]
    for switch in sorted({size for size in _sizes(session.model.config) if LENGTH < size < total}):
        lengths += [switch - 1, min(switch + max(3, switch // 8), session.capacity - STEPS)]
    for length in lengths:
        try:
            reason = _tried(session, padded, max(1, length))
        except Exception as error:  # whatever the model's own code makes of our cache
            reason = f"it fails: {shortly(error)}"
        finally:
            session.truncate(0)
        if reason is not None:
            log.info("%s does not prove itself at %d tokens: %s", type(session.model).__name__, length, reason)
            name = type(session.model).__name__
            return f"{name} over a cache of fixed slots is not what it is without a cache ({reason})"
    return None


def prove_form(session: Session, witness: Witness) -> str | None:
    """Why `session` may not answer calls like the one that was watched; None where it gives what the model gave."""
    if witness.reason is not None:
        return witness.reason
    try:
        pairs = witness.repeated(session)
    except Exception as error:  # whatever the model's own code makes of our cache
        return f"over a cache of fixed slots it fails: {shortly(error)}"
    finally:
        session.truncate(0)
    for step, (ours, own) in enumerate(pairs):
        for row in range(session.batch):
            off = _apart(ours[row : row + 1].float(), own[row : row + 1].float(), session, step)
            if off is not None:
                return f"{type(session.model).__name__} over a cache of fixed slots is not what it is ({off})"
    return None


def goes_further(config: Any, proven: int, total: int) -> bool:
    """Whether a proof for `proven` tokens says too little for `total`: the model may change its ways in between."""
    return any(max(LENGTH, proven - 1) < size < total for size in _sizes(config))


def _tried(session: Session, padded: bool, length: int) -> str | None:
    count = STEPS if length + STEPS <= session.capacity else 1
    count = min(count, session.capacity - length)
    if length > LENGTH:
        count = min(4, session.capacity - length)
    tokens = _made_up(session, length + count)
    lengths = [max(1, length - 3 * (row % 3)) if padded else length for row in range(session.batch)]
    rows = [row[len(row) - count - size : len(row) - count] for row, size in zip(tokens, lengths, strict=True)]
    following = tokens[:, -count:] if count else tokens[:, :0]
    steps = [session.prove_prompt([row.tolist() for row in rows])]
    steps += [session.prove_token(following[:, step]) for step in range(count)]
    ours = torch.stack(steps, 1).float()  # [B, 1 + count, V]
    for row in range(min(3, session.batch)):
        whole = torch.cat((rows[row], following[row]))[None]
        with torch.no_grad():
            alone = session.calling.without_cache(whole, count + 1)[0].float()
        if (off := _apart(ours[row], alone, session)) is not None:
            return f"row {row}: {off}" if session.batch > 1 else off
    if not session.cache.stateful and length > 2:
        longest = max(lengths)
        pieces = session.prove_prompt([row.tolist() for row in rows], (longest // 2, longest - longest // 2)).float()
        session.in_pieces = all(
            _apart(a[None], b[None], session) is None for a, b in zip(pieces, ours[:, 0], strict=True)
        )
    if session.batch == 1 and not session.cache.stateful and length > 2:
        session.calling.goes_back = session.calling.goes_back and _goes_back(session, tokens[0], length)
    if padded:
        mask = torch.stack([torch.arange(length + count) >= length - size for size in lengths]).to(tokens.device)
        with torch.no_grad():
            together = session.calling.without_cache(torch.where(mask, tokens, 0), count + 1, mask).float()
        for row in range(session.batch):
            if (off := _apart(ours[row], together[row], session)) is not None:
                return f"padded row {row}: {off}"
    return None


def _goes_back(session: Session, tokens: torch.Tensor, length: int) -> bool:
    """Whether `session`, which holds `tokens`, goes on from the first half of its prompt as if it held no more."""
    half = length // 2
    other = tokens.flip(0)[: length - half]
    ours = session.prove_return(half, other.tolist()).float()
    with torch.no_grad():
        theirs = session.calling.without_cache(torch.cat((tokens[:half], other))[None], 1)[0].float()
    return _apart(ours, theirs, session) is None


def shortly(error: Exception) -> str:
    """An error's class and its first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first:.200}"


def _apart(ours: torch.Tensor, theirs: torch.Tensor, session: Session, start: int = 0) -> str | None:
    """Where logits [T, V], of steps from `start` on, lie further apart than rounding puts them."""
    bound = _TOLERANCE.get(session.model.dtype, 1e-3)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), start):
        distance = float((one - other).norm() / other.norm().clamp(min=1e-12))
        if not distance <= bound:
            where = "the prompt" if step == 0 else f"{step} decoded tokens"
            return f"after {where} its logits are {distance:.2g} apart, relative to their size"
    return None


def _made_up(session: Session, length: int) -> torch.Tensor:
    """Tokens, [B, length] int64: any but those that stand for images and the like; ends and padding among them."""
    config = session.model.config
    vocabulary = session.vocabulary
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, vocabulary, (session.batch, length), generator=generator)
    special = {"pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"}
    for name, value in _settings(config):
        if name.endswith(("_token_id", "_token_index")) and name not in special and isinstance(value, int):
            tokens[tokens == value] = (value + 1) % vocabulary
    return tokens.to(session.model.device)


def _sizes(config: Any) -> Iterator[int]:
    for name, value in _settings(config):
        if isinstance(value, int) and not isinstance(value, bool) and any(word in name for word in _SWITCHES):
            yield value


def _settings(config: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The names and values of a configuration, and of what it holds."""
    held = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in held.items():
        if (isinstance(value, Mapping) or hasattr(value, "to_dict")) and depth < 3:
            yield from _settings(value, depth + 1)
        else:
            yield str(name), value

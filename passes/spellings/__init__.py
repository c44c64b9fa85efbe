"""How models spell the ops of the table: plain PyTorch functions, grouped in rules.

A rule is a row: the op, its spellings, a guard. The guard looks at the layouts of a match's values (by the functions'
parameter names, and ``output``) and at the numbers it captured, and gives the attributes of the op, or raises `Unfit`.
Adding a spelling is adding one function to a row. Rows are tried in order, the more particular before the more general.
"""

from graph_capture.passes.spellings import activations, attention, linear, norms, rotary
from graph_capture.passes.spellings.rule import Found, Rule, Unfit

__all__ = ["ROUNDS", "Found", "Rule", "Unfit"]

_RULES = (*norms.RULES, *activations.RULES, *attention.RULES, *rotary.RULES, *linear.RULES)

# Rules of one round look at the same graph.
ROUNDS: tuple[tuple[Rule, ...], ...] = tuple(
    tuple(rule for rule in _RULES if rule.round == number) for number in range(1 + max(rule.round for rule in _RULES))
)

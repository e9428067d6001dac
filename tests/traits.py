"""What the contract tests must know about methods whose promise is not the plain one. One line per trait."""
from __future__ import annotations

from ecstudy.spec import parse

PLAIN = dict(
    budget=0.5,             # budget at which the contract is tried (small tables: 50, 20, 8 and 300 ids)
    single="",              # options for a single field of 500 ids, where the plain ones cannot compress one
    wrappable=True,         # can be followed by |int8
    every_row=1.0,          # share of each holder's rows that must have a gradient when every id occurs
    every_value=0.99,       # share of the gradient's values that are not zero
    learns=0.9,             # loss after 60 steps over the first, at most
    exact=True,             # deployment changes no bit of what is looked up (else: a tolerance of rounding)
    prunes=False,           # deployment zeroes values
    same_knob=False,        # cost per step is compared at equal knob: a fraction of a larger table is a larger network
    full_size_budget=0.1,   # at Criteo's size: the budget of a training step, and the most MiB of one tensor made in it
    step_mib=16,
    shape_by_knob=True,     # False for methods that learn their size: a build weighs the most they can become
)
TRAITS = {
    "full": dict(budget=1.0),
    "top_k": dict(learns=1.0),                            # half the ids share four rows
    "compo": dict(every_value=0.0),                       # fields left whole mask their partner
    "robe": dict(every_row=0.4),                          # hashed blocks leave gaps, but not many
    "int_quant": dict(wrappable=False),
    "deeplight": dict(prunes=True),
    "autosrh": dict(prunes=True),
}


def trait(spec: str, name: str):
    """A trait of the method a spec begins with."""
    return TRAITS.get(parse(spec).name, {}).get(name, PLAIN[name])

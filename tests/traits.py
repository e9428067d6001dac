"""What the contract tests must know about methods whose promise is not the plain one. One line per trait."""
from __future__ import annotations

from ecstudy.spec import parse

PLAIN = dict(
    budget=0.5,             # budget at which the contract is tried (small tables: 50, 20, 8 and 300 ids)
    options="",             # options with which the contract is tried
    single="",              # options for a single field of 500 ids, where the plain ones cannot compress one
    wrappable=True,         # can be followed by |int8
    every_row=1.0,          # share of each holder's rows that must have a gradient when every id occurs
    every_value=0.99,       # share of the gradient's values that are not zero
    learns=0.9,             # loss after 60 steps over the first, at most
    exact=True,             # deployment changes no bit of what is looked up (else: a tolerance of rounding)
    rounds=0.0,             # deployment rounds values: the most it may move one, as a share of the largest
    prunes=False,           # deployment zeroes values
    selects=False,          # deployment of what was never searched picks an architecture: other vectors, no promise
    merges=False,           # deployment gives ids the vectors of others
    same_knob=False,        # cost per step is compared at equal knob: a fraction of a larger table is a larger network
    step_sizes=(5000, 700), # fields at which cost per step is compared with tenfold rows
    full_size_budget=0.1,   # at Criteo's size: the budget of a training step, and the most MiB of one tensor made in it
    step_mib=16,
    shape_by_knob=True,     # False for methods that learn their size: a build weighs the most they can become
)
TRAITS = {
    "full": dict(budget=1.0),
    "top_k": dict(learns=1.0),                            # half the ids share four rows
    "compo": dict(every_value=0.0),                       # fields left whole mask their partner
    "robe": dict(every_row=0.4),                          # hashed blocks leave gaps, but not many
    "double_hash": dict(every_row=0.85),
    "unified": dict(every_row=0.55),
    "cafe": dict(every_row=0.6),                          # rows of hot ids wait for an owner
    "cafe(levels=2)": dict(every_row=0.4, learns=0.95),   # and second rows for ids of middle score
    "int_quant": dict(wrappable=False),
    "post4bits": dict(rounds=1 / 60, wrappable=False),
    "mixed_prec": dict(wrappable=False),
    "mpe": dict(selects=True, shape_by_knob=False, wrappable=False),
    "alpt": dict(wrappable=False, budget=0.6),
    "mde": dict(single="(top=2)", exact=False),           # one field is the smallest one: top is its width
    "deeplight": dict(prunes=True),
    "autosrh": dict(prunes=True),
    "mag_prune": dict(prunes=True),
    "pep": dict(prunes=True),
    "auto_dim": dict(selects=True, shape_by_knob=False),
    "opt_embed": dict(selects=True, shape_by_knob=False),
    "nis": dict(selects=True, shape_by_knob=False),
    "amtl": dict(selects=True, shape_by_knob=False),
    "auto_emb": dict(selects=True, shape_by_knob=False),
    "esapn": dict(every_value=0.06, shape_by_knob=False),     # 2 of 30 numbers of a row are in use at first
    "ada_embed": dict(every_row=0.98),                    # slot 0 is what pruned ids read: zeros that never move
    "fiited": dict(every_row=0.98),
    "sseds": dict(selects=True, shape_by_knob=False),
    "ham": dict(selects=True, shape_by_knob=False),
    "dedup": dict(merges=True),
    "dpq": dict(every_row=0.4),                           # centroids that no id chose have no gradient
    "cce": dict(every_row=0.85),                          # hashed pointers leave gaps, but few
    "cel": dict(options="(splits=2)", every_row=0.2, learns=1.0),       # clusters wait for the first split
    "light_rec": dict(options="(codewords=16)", full_size_budget=0.04, step_mib=32),    # 256 similarities of each id
    "dhe": dict(budget=1.0, options="(hashes=64)", single="(hashes=64)", exact=False, same_knob=True,
                step_sizes=(5000, 5000),                      # as many networks with tenfold rows
                full_size_budget=0.001, step_mib=128),        # an id of the batch becomes 1,024 numbers
    "tt_rec": dict(budget=0.2, same_knob=True, full_size_budget=0.01, step_mib=32),      # 17 KB rows in the middle
    "mgqe": dict(budget=1.0, every_row=0.1),              # 256 centroids for few ids: little saved, few chosen
    "mag_svd": dict(wrappable=False),
    "pq": dict(options="(bits=4)", wrappable=False),
    "mag_pq": dict(options="(bits=3)", wrappable=False),
    "opq": dict(options="(bits=4, rounds=1)", wrappable=False),
    "rq": dict(options="(bits=3)", budget=0.15, wrappable=False),
    "int4": dict(wrappable=False),
    "rabitq": dict(wrappable=False),
    "pca_pq": dict(options="(bits=4)", wrappable=False),
    "rescore": dict(options="(coarse='pq(bits=4)')", wrappable=False),
}


def trait(spec: str, name: str):
    """A trait of a spec, or of the method it begins with."""
    return TRAITS.get(spec, {}).get(name, TRAITS.get(parse(spec).name, {}).get(name, PLAIN[name]))

"""How much of the paper's Table 5 is implementation: one choice changed at a time, everything else as in the study.

:data:`ABLATIONS` is the list, :func:`run` measures what is missing of it. The first variant of each is the study's own
choice; the others are what the published code does, or what else one could do.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pandas as pd

from ..budget import weigh
from .row import Cell, known
from .sweep import _sized_by_budget, cardinalities, fill, there


@dataclass(frozen=True)
class Variant:
    """One way to do it. ``spec`` is the method's spec, in which ``{}`` stands for the ablation's method and ``{kept}``
    for the values a budget holds; ``data`` is a suffix of the data set's name; ``settings`` are fields of a cell."""

    label: str
    spec: str = "{}"
    data: str = ""
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """``question`` is what the comparison answers, ``source`` where the choice is made in the paper or its code."""

    name: str
    title: str
    question: str
    source: str
    variants: tuple[Variant, ...]
    methods: tuple[str, ...]
    budgets: tuple[float | None, ...] = (None,)


_FEW = ("full", "hash_trick", "robe", "tt_rec", "deeplight")

ABLATIONS = (
    Ablation("tt_init", "TT-Rec: initial scale", "Does TT-Rec fall with more memory because its embeddings begin too "
             "large?", "published code: the standard deviation of an embedding grows with the rank",
             (Variant("free of the rank"), Variant("as published", "tt_rec(init='paper')")), ("tt_rec",),
             (0.5, 0.1, 0.01, 0.001)),
    Ablation("autosrh_order", "AutoSrh: fine-tuning after pruning", "Is pruning last, as the published code does, "
             "enough?", "the paper's section 3.2.3 retrains after pruning, its code prunes after retraining",
             (Variant("prune, then fine-tune"), Variant("prune last, as published", "autosrh(order='published')")),
             ("autosrh",), (0.1, 0.01, 0.001)),
    Ablation("deeplight_final", "DeepLight: pruning before evaluation", "What does the published conversion without a "
             "last pruning add, at how many more values?", "published code: touched rows are dense again when measured",
             (Variant("pruned to the budget"), Variant("as published", "deeplight(kept={kept}, final=False)")),
             ("deeplight",), (0.1, 0.01, 0.001)),
    Ablation("int8_scale", "INT8: one scale or one per row", "Does a scale per row matter when training in integers?",
             "the paper's INT8 has one global scale of 0.01",
             (Variant("one scale"), Variant("a scale per row", "int_quant(bits=8, scale='row')")),
             ("int_quant(bits=8)",)),
    Ablation("few_bits", "Full in few bits", "How many bits of a trained table are needed?",
             "integers with a scale for each row, and half floats, rounded after training: what is shipped today",
             (Variant("float32"), Variant("bfloat16", "{}|bf16"), Variant("8 bits", "{}|int8"),
              Variant("4 bits", "{}|int4"), Variant("2 bits", "{}|int2")), ("full",)),
    Ablation("robe_block", "ROBE: block length and sign", "Does ROBE depend on its block length or on random signs?",
             "the paper's text calls Z the block length, its code makes it the number of blocks",
             (Variant("one block of 16"), Variant("blocks of 4", "robe(block=4)"),
              Variant("single numbers", "robe(block=1)"), Variant("one block, random signs", "robe(sign=True)")),
             ("robe",), (0.1, 0.001)),
    Ablation("mgqe_losses", "MGQE: how its codes are trained", "Does MGQE fall because of how its centroids are "
             "trained?", "the published code has no commitment loss and leaves centroids that no id chose as they are",
             (Variant("commitment, revived centroids"), Variant("no commitment", "mgqe(beta=0.0)"),
              Variant("neither, as published", "mgqe(beta=0.0, revive=0)")), ("mgqe",), (0.5, 0.1)),
    Ablation("selection", "Selection on validation or on test rows", "How much does selecting the checkpoint on the "
             "rows that are reported add?", "default of the published tool: check_val 0, check_test 1",
             (Variant("validation rows"), Variant("test rows", settings={"select": "test"})), _FEW, (0.1,)),
    Ablation("vocabulary", "Vocabulary from all rows or from training rows", "How much comes from ids that never "
             "occur in training?", "the paper's vocabularies are fitted on all rows, test rows included",
             (Variant("all rows"), Variant("training rows", data="_train_vocab")), _FEW, (0.1,)),
    Ablation("min_count", "Ids that occur once", "What if all ids that occur once share a row before any compression?",
             "the published code has such variants of the data and does not report them",
             (Variant("every id counts"), Variant("at least two occurrences", data="_min2")), _FEW, (0.1,)),
    Ablation("batch", "Batch size", "Does a larger batch, which trains several times faster, change who is near Full?",
             "the paper trains at 128 rows",
             (Variant("the paper's"), Variant("1,024 rows", settings={"batch": 1024})), _FEW, (0.1,)),
    Ablation("schedule", "Schedule of the learning rate", "Do methods differ by less than a schedule moves them?",
             "the paper trains at a constant rate",
             (Variant("constant"), Variant("a tenth on every plateau", settings={"schedule": "plateau"}),
              Variant("cosine to zero", settings={"schedule": "cosine"})), _FEW, (0.1,)),
    Ablation("mpe_search", "MPE: penalty and groups", "Do the widths that MPE learns depend on its constants?",
             "published code: a penalty of 3e-4 on Criteo and 2e-6 on Avazu, 128 groups",
             (Variant("3e-4, 128 groups"), Variant("a penalty of 2e-6", "mpe(penalty=2e-06)"),
              Variant("32 groups", "mpe(groups=32)")), ("mpe",), (0.1,)),
    Ablation("nis_cost", "NIS: cost of memory", "Does NIS depend on what a number costs in its reward?",
             "the paper's value could not be recovered",
             (Variant("a cost of 1"), Variant("0.1", "nis(cost=0.1)"), Variant("10", "nis(cost=10.0)")), ("nis",),
             (0.1,)),
    Ablation("ham_orth", "HAM: orthogonal columns", "Does HAM gain from columns that are set apart?",
             "strength and form of the paper's penalty could not be recovered",
             (Variant("a strength of 0.1"), Variant("none", "ham(orth=0.0)"), Variant("1", "ham(orth=1.0)")), ("ham",),
             (0.1,)),
    Ablation("amtl_hidden", "AMTL: width of the twins", "Does AMTL depend on the size of its networks?",
             "the paper's widths could not be recovered",
             (Variant("16 units"), Variant("4", "amtl(hidden=4)"), Variant("64", "amtl(hidden=64)")), ("amtl",),
             (0.1,)),
    Ablation("cafe_levels", "CAFE: ids of middle score", "Does CAFE gain where ids between hot and cold are sums of "
             "two shared rows?", "the paper's section on multi-level hash embedding",
             (Variant("one level"), Variant("two levels", "cafe(levels=2)")), ("cafe",), (0.1, 0.01)),
    Ablation("cce_every", "CCE: when it clusters", "Does CCE suffer from clustering at the end of an epoch, where one "
             "epoch is nearly all of training?", "the authors' example clusters after each of its epochs",
             (Variant("every epoch"), Variant("every quarter of one", "cce(every=0.25)")), ("cce",), (0.1, 0.01)),
    Ablation("light_rec_temperature", "LightRec: temperature", "Does LightRec depend on how soft its choices are?",
             "published code: 0.9, for vectors of other lengths. On criteo_137k the state kept is that of k-means, "
             "before choices are trained, so nothing changes",
             (Variant("0.9"), Variant("0.3", "light_rec(temperature=0.3)"),
              Variant("3", "light_rec(temperature=3.0)")), ("light_rec",), (0.1,)),
)


def names() -> list[str]:
    return [a.name for a in ABLATIONS]


class Planned(NamedTuple):
    """A cell and the comparison it belongs to: ``base`` is the method varied, ``at`` the budget compared at."""

    ablation: Ablation
    variant: Variant
    base: str
    at: float | None
    cell: Cell


def plan(dataset: str, *, only=None, seeds=(0, 1, 2), dim: int = 16, **settings) -> list[Planned]:
    """Every cell of the list; ``only`` names some of it, ``settings`` are further fields of a cell.

    Variants of the data that are not at hand, neither prepared nor as published rows, are left out. Raises CellError
    for an ablation that is not in the list.
    """
    for name in only or ():
        known("ablation", name, names())
    return [Planned(ablation, variant, base, at, _cell(variant, base, at, dataset, dim, dict(seed=seed) | settings))
            for ablation in ABLATIONS if not only or ablation.name in only
            for variant in ablation.variants if not variant.data or _at_hand(dataset + variant.data)
            for seed in seeds for at in ablation.budgets for base in ablation.methods]


def run(dataset: str, *, missing: str = "run", section: str = "ablation", processes: int = 0, progress=None,
        **settings) -> pd.DataFrame:
    """Measure what is missing; the rows with ``ablation``, ``variant``, ``base`` (the method that is varied) and ``at``
    (the budget compared at) in front, one line per comparison that a row belongs to.

    ``missing="skip"`` returns only rows that are there. The other arguments are those of :func:`plan` and of
    :func:`ecstudy.study.sweep`.
    """
    known("missing", missing, ("run", "skip"))
    planned = plan(dataset, section=section, **settings)
    cells = [p.cell for p in planned]
    rows = there(cells) if missing == "skip" else fill(cells, processes=processes, progress=progress)
    by_id = {row["run_id"]: row for row in rows.to_dict("records")}
    lines = [dict(ablation=p.ablation.name, variant=p.variant.label, base=p.base, at=p.at) | by_id[p.cell.run_id]
             for p in planned if p.cell.run_id in by_id]
    return pd.DataFrame(lines, columns=["ablation", "variant", "base", "at", *rows.columns])


def _cell(variant: Variant, base: str, at: float | None, dataset: str, dim: int, settings: dict) -> Cell:
    text = variant.spec.replace("{}", base)
    if "{kept}" in text:
        text = text.replace("{kept}", str(weigh(base, cardinalities(dataset), dim, at)["knob"]))
    cell = Cell(text, dataset + variant.data, dim=dim, budget=at, **settings | variant.settings)
    return replace(cell, budget=None) if not _sized_by_budget(cell.spec) else cell


def _at_hand(dataset: str) -> bool:
    from ..data import DataError

    try:
        return bool(cardinalities(dataset))
    except DataError:
        return False

"""``deploy().compile()``: the same vectors from a fused look-up."""
import copy
import shutil

import pytest
import torch

import ecstudy as ec

SIZES = [900, 40, 3000]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))),
                                    reason="torch.compile needs a C++ compiler on the CPU")


def deployed(spec, sizes=SIZES, budget=0.5):
    counts = torch.arange(sum(sizes) if isinstance(sizes, list) else sizes)
    return ec.make(spec, sizes, 16, budget, counts=counts if spec.startswith("mgqe") else None, seed=1).deploy()


@needs_compiler
@pytest.mark.parametrize("spec", ["mgqe", "alpt", "compo", "full|int8"])
def test_the_same_vectors_for_every_batch(spec):
    emb = deployed(spec)
    plain, ids = copy.deepcopy(emb), torch.stack([torch.randint(n, (64,)) for n in SIZES], 1)
    assert emb.compile() is emb and emb.fused
    with torch.no_grad():
        for part in (ids, ids[3:10], ids[5:6], ids[::2]):
            torch.testing.assert_close(emb(part), plain(part), rtol=1e-6, atol=1e-7)
    with pytest.raises(IndexError, match="field 1"):                         # ids are still checked
        emb(torch.tensor([[0, 40, 0]]))


@needs_compiler
def test_one_field_of_any_shape():
    emb = deployed("hash_trick", 500)
    ids = torch.randint(500, (4, 3, 2))
    plain = emb(ids)
    torch.testing.assert_close(emb.compile()(ids), plain)


@needs_compiler
def test_copies_and_saved_modules_are_not_compiled(tmp_path):
    emb = deployed("compo").compile()
    other = copy.deepcopy(emb)
    assert not other.fused
    ids = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        emb(ids)                                                             # compiles
        for holder in other.holders():
            for weight in holder.parameters():
                weight.zero_()
        assert not other(ids).any() and emb(ids).any()                       # the copy reads its own tables
    ec.save(emb, tmp_path / "m")
    assert not ec.load(tmp_path / "m").fused


def test_a_pruned_table_stays_as_it_is():
    assert not deployed("deeplight").compile().fused


def test_before_deploying_it_is_an_error():
    with pytest.raises(ValueError, match="still training.*deploy"):
        ec.make("full", SIZES, 16).compile()

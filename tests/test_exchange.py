"""The exchange plans, carried out in memory for every rank at once: no processes, any world size."""

import itertools

import pytest
import torch
from models import one_layer
from peft import LoraConfig, get_peft_model
from torch import nn

from loft_ds.adapters import find_trainable
from loft_ds.sharding.exchange import Cut, Partition, divide_rows, even_cut, plan_gather, plan_rows


def all_to_all(plans, locals_):
    """What every rank ends with when all carry out their exchange, as :meth:`Exchange.__call__` does."""
    sent = [
        torch.split(local[plan.send.index(local.device)], plan.send_counts)
        for plan, local in zip(plans, locals_, strict=True)
    ]
    received = [torch.cat([sent[q][rank] for q in range(len(plans))]) for rank in range(len(plans))]
    results = []
    for plan, r in zip(plans, received, strict=True):
        assert len(r) == sum(plan.receive_counts)
        results.append(torch.empty_like(r).index_copy_(0, plan.receive.index(r.device), r))
    return results


def partitions(world, seed, how):
    """The factors of three layers, and how they are cut: in equal parts as at stage 3, as one line of equal parts as at
    stages 1 and 2, or elements and rows anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = [f for shape in [(7, 5, 3), (2, 9, 2), (6, 1, 1)] for f in find_trainable(one_layer(*shape)[0]).factors]

    def anywhere(length):
        inner = torch.randint(0, length + 1, (world - 1,), generator=generator).sort().values
        return Cut(0, torch.cat([torch.tensor([0]), inner, torch.tensor([length])]))

    if how == "anywhere":
        return [Partition(f, anywhere(f.numel), anywhere(f.count)) for f in factors]
    if how == "each":
        held = [even_cut(-(-f.numel // world), 0, f.numel) for f in factors]
    else:
        size, starts = -(-sum(f.numel for f in factors) // world), [0]
        for f in factors:
            starts.append(starts[-1] + f.numel)
        held = [even_cut(size, start, f.numel) for f, start in zip(factors, starts, strict=False)]
    return [Partition(f, *cuts) for f, *cuts in zip(factors, held, divide_rows(factors, held, world), strict=True)]


def held(partition, rank, matrix):
    return matrix.reshape(-1)[slice(*partition.held.interval(rank))]


def owned(partition, rank, matrix):
    """Rows (k_i, r)."""
    return partition.factor.rows_of(matrix)[slice(*partition.owned.interval(rank))]


def matrices(parts):
    """One matrix of distinct numbers a factor, in the factor's own shape."""
    out, start = [], 0
    for part in parts:
        shape = part.factor.param.shape
        out.append(torch.arange(start, start + shape.numel(), dtype=torch.float64).reshape(shape))
        start += shape.numel()
    return out


WORLDS = [1, 2, 3, 4, 7, 33]
HOW = ["each", "one line", "anywhere"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", HOW)
def test_flat_to_rows(world, how):
    parts = partitions(world, 1, how)
    full = matrices(parts)
    plans = [plan_rows(parts, rank, world) for rank in range(world)]
    flat = [torch.cat([held(p, rank, m) for p, m in zip(parts, full, strict=True)]) for rank in range(world)]
    rows = [
        torch.cat([p.factor.rows_of(owned(p, rank, m)).reshape(-1) for p, m in zip(parts, full, strict=True)])
        for rank in range(world)
    ]
    for got, expected in zip(all_to_all(plans, flat), rows, strict=True):
        assert torch.equal(got, expected)
    for plan in plans:
        for index in (plan.send.index("cpu"), plan.receive.index("cpu")):
            assert torch.equal(index.sort().values, torch.arange(len(index))), "the way back needs permutations"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("side", ["A", "B"])
def test_gather_of_partners(world, how, side):
    """Every rank that owns rows of a moving factor gets its partner whole, and nothing that it does not need."""
    parts = {p.factor: p for p in partitions(world, 1, how)}
    full = dict(zip(parts, matrices(list(parts.values())), strict=True))
    moving = [p for f, p in parts.items() if f.side == side]
    partners = [parts[p.factor.partner] for p in moving]
    plans = [plan_gather(moving, partners, rank, world) for rank in range(world)]
    width = max(p.factor.rank for p in partners)

    def padded(rows):  # the real thing gathers factors of one rank r at a time
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))

    local = [torch.cat([padded(owned(p, rank, full[p.factor])) for p in partners]) for rank in range(world)]
    for rank, got in enumerate(all_to_all(plans, local)):
        needed = [
            padded(p.factor.rows_of(full[p.factor]))
            for m, p in zip(moving, partners, strict=True)
            if m.owned.length(rank) and p.owned.whole != rank
        ]
        assert torch.equal(got, torch.cat(needed) if needed else got[:0])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", HOW)
def test_rows_are_a_partition(world, how):
    """Every row has one owner, also where ranks hold nothing or less than a row."""
    for part in partitions(world, 3, how):
        for cut, length in ((part.held, part.factor.numel), (part.owned, part.factor.count)):
            bounds = cut.bounds(world)
            assert (bounds[0], bounds[-1], len(bounds)) == (0, length, world + 1)
            assert (bounds.diff() >= 0).all()
            assert [cut.interval(q) for q in range(world)] == list(itertools.pairwise(bounds.tolist()))


def test_a_layer_is_on_as_many_ranks_as_its_share_of_the_state():
    """Of a row 6 numbers times its width of 1, and 9 times 4 in the other layer of as many rows: one rank, and six."""
    config = LoraConfig(r=1, target_modules=["0", "1"], rank_pattern={"1": 4})
    factors = find_trainable(get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)).factors
    cuts = divide_rows(factors, [even_cut(-(-f.numel // 7), 0, f.numel) for f in factors], world=7)
    assert [cut.ranks for cut in cuts] == [range(1), range(1), range(1, 7), range(1, 7)]

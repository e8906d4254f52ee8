"""The exchange plans, carried out in memory for every rank at once: no processes, any world size."""

import pytest
import torch
from models import one_layer

from loft_ds.factors import find_trainable
from loft_ds.sharding.exchange import Partition, plan_gather, plan_rows


def all_to_all(plans, locals_):
    """What every rank ends with when all carry out their exchange, as :meth:`Exchange.__call__` does."""
    sent = [
        torch.split(local[plan.send_index.long()], plan.send_counts) for plan, local in zip(plans, locals_, strict=True)
    ]
    received = [torch.cat([sent[q][rank] for q in range(len(plans))]) for rank in range(len(plans))]
    for plan, r in zip(plans, received, strict=True):
        assert len(r) == sum(plan.recv_counts)
    return [r[plan.recv_index.long()] for plan, r in zip(plans, received, strict=True)]


def partitions(world, seed, even):
    """The factors of three layers and how they are cut: in equal parts as at stage 3, or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for m, n, rank in [(7, 5, 3), (2, 9, 2), (6, 1, 1)]:
        for factor in find_trainable(one_layer(m, n, rank)[0]).factors:
            if even:
                bounds = (torch.arange(world + 1) * -(-factor.numel // world)).clamp(max=factor.numel)
            else:
                inner = torch.randint(0, factor.numel + 1, (world - 1,), generator=generator).sort().values
                bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([factor.numel])])
            found.append(Partition(factor, bounds))
    return found


def held(partition, rank, matrix):
    return matrix.reshape(-1)[int(partition.bounds[rank]) : int(partition.bounds[rank + 1])]


def owned(partition, rank, matrix):
    rows = partition.factor.rows_of(matrix)
    return rows[int(partition.row_bounds[rank]) : int(partition.row_bounds[rank + 1])]


def matrices(parts):
    """One matrix of distinct numbers a factor, in the factor's own shape."""
    out, start = [], 0
    for part in parts:
        shape = part.factor.param.shape
        out.append(torch.arange(start, start + shape.numel(), dtype=torch.float64).reshape(shape))
        start += shape.numel()
    return out


WORLDS = [1, 2, 3, 4, 7, 33]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("seed", "even"), [(0, True), (1, False), (2, False)])
def test_flat_to_rows(world, seed, even):
    parts = partitions(world, seed, even)
    full = matrices(parts)
    plans = [plan_rows(parts, rank) for rank in range(world)]
    flat = [torch.cat([held(p, rank, m) for p, m in zip(parts, full, strict=True)]) for rank in range(world)]
    rows = [
        torch.cat([owned(p, rank, m).reshape(-1) for p, m in zip(parts, full, strict=True)]) for rank in range(world)
    ]
    for got, expected in zip(all_to_all(plans, flat), rows, strict=True):
        assert torch.equal(got, expected)
    for plan in plans:
        for index in (plan.send_index, plan.recv_index):
            assert torch.equal(index.long().sort().values, torch.arange(len(index))), "the way back needs permutations"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("seed", "even"), [(0, True), (1, False), (2, False)])
@pytest.mark.parametrize("side", ["A", "B"])
def test_gather_of_partners(world, seed, even, side):
    """Every rank that owns rows of a moving factor gets its partner whole, and nothing that it does not need."""
    parts = {p.factor: p for p in partitions(world, seed, even)}
    full = dict(zip(parts, matrices(list(parts.values())), strict=True))
    moving = [p for f, p in parts.items() if f.side == side]
    partners = [parts[p.factor.partner] for p in moving]
    plans = [plan_gather(moving, partners, rank) for rank in range(world)]
    if world == 1:
        assert plans == [None]
        return
    width = max(p.factor.rank for p in partners)

    def padded(rows):  # the real thing gathers factors of one rank r at a time
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))

    local = [torch.cat([padded(owned(p, rank, full[p.factor])) for p in partners]) for rank in range(world)]
    for rank, got in enumerate(all_to_all(plans, local)):
        needed = [
            padded(p.factor.rows_of(full[p.factor]))
            for m, p in zip(moving, partners, strict=True)
            if int(m.rows[rank]) and not bool(p.holds_whole[rank])
        ]
        assert torch.equal(got, torch.cat(needed) if needed else got[:0])


@pytest.mark.parametrize("world", WORLDS)
def test_rows_are_a_partition(world):
    """Every row has one owner, also where ranks hold nothing or less than a row."""
    for part in partitions(world, 3, even=False) + partitions(world, 3, even=True):
        assert part.row_bounds[0] == 0
        assert part.row_bounds[-1] == part.factor.count
        assert (part.rows >= 0).all()
        # The share decides the rows, so no rank owns more than a row beyond what it holds.
        assert ((part.rows * part.factor.rank - part.bounds.diff()).abs() < part.factor.rank).all()

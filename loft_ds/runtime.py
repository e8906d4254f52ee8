"""Forms stacks of pairs alike, and drives their steps through the phases, one exchange a phase. No mathematics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import algebra, kernels
from .blocks import Blocks
from .factors import Factor, Trainable
from .pairs import Pairs, Side, State, most_pairs, pieces, side_at_start, side_from, state_of
from .sharding import HALF_A_PAIR, Layout, Rows, Share, Slice, Whole, compute_dtype
from .step import Partner, Phase, Step, loft_step

NO_GRADIENT = (
    "no LoRA pair has a gradient, so LoFT has nothing to do in this step. Call backward() first; if a loss was "
    "computed, check that the adapters which the optimizer was built for are active and take part in it: for others "
    "build it, and the engine, anew. Gradient checkpointing passes none on to adapters behind frozen embeddings, "
    "unless it has use_reentrant=False or enable_input_require_grads() was called."
)

STALE_GRADIENT = (
    "no gradient of {} came to any rank in this step, and DeepSpeed's ZeRO 3 hands over its last one again, with any "
    "optimizer. Let every pair take part in each step, or use stage 2, which hands over zeros."
)


@dataclass(eq=False)
class Moments:
    """AdamW's state of this rank's part of a parameter that belongs to no pair."""

    start: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0


@dataclass(eq=False)
class _Running:
    """A stack in the middle of its step: what it asks for, and until when."""

    stack: Pairs
    step: Step
    phase: Phase | None
    question: Any = None

    def answer(self, answer: Any) -> None:
        try:
            self.phase, self.question = self.step.send(answer)
        except StopIteration:
            self.phase = self.question = None

    def fail(self, error: Exception) -> None:
        """Raise an error where the question was asked."""
        self.step.throw(error)


class Runtime:
    """All state of an optimizer, and its steps.

    Args:
        trainable: what is trained.
        blocks: the method.
        second_moment_dtype: of the second moments' matrices; None for that of all other state.
        offload_second_moment: keep them in CPU memory.
        precision: the least that the products for the denominators may have.
    """

    def __init__(
        self,
        trainable: Trainable,
        blocks: Blocks,
        second_moment_dtype: torch.dtype | None,
        offload_second_moment: bool,
        precision: kernels.Precision,
    ) -> None:
        self.trainable = trainable
        self.blocks = blocks
        self.second_moment_dtype = second_moment_dtype
        self.offload_second_moment = offload_second_moment
        self.precision = precision
        self._stacks: list[Pairs] = []
        self._others: dict[str, Moments] = {}
        self._loaded: dict[str, State] = {}  # until the first step says which rows are this rank's
        self._order = {a: i for i, (a, _) in enumerate(trainable.pairs)}
        self._partook: set[Factor] = set()  # factors A of pairs that have had a gradient

    @property
    def state(self) -> dict[str, State]:
        """All state by parameter name: counters, and views of the tensors."""
        state = dict(self._loaded)
        for stack in self._stacks:
            if stack.step:
                for side in stack.sides:
                    state.update(state_of(side, stack.step))
        state.update({name: dict(vars(moments)) for name, moments in self._others.items()})
        order = [*self.trainable.factor_by_name, *self.trainable.others]
        return {name: state[name] for name in order if name in state}

    @state.setter
    def state(self, state: Mapping[str, State]) -> None:
        self._stacks, self._others, self._loaded = [], {}, {name: dict(each) for name, each in state.items()}

    def place(self, kind: str, tensor: Tensor, device: torch.device) -> Tensor:
        """A part of a factor's state where it belongs while ``device`` works on it; itself if it is there."""
        if kind == "second_moment" and self.offload_second_moment:
            return kernels.at_home(tensor, device)
        return tensor.to(device)

    def take_step(self, layout: Layout, max_grad_norm: float | None, arrivals: Sequence[int] | None = None) -> Tensor:
        """Move all that is trained by one step, and give the norm before clipping, a float64 scalar.

        A collective.

        Args:
            layout: where this rank's rows lie.
            max_grad_norm: the norm to clip to; None for no clipping.
            arrivals: how many gradients of each factor came to this rank, where zeros stand for those that did not
                come; None where these are not in what the layout reads.

        Raises:
            RuntimeError: no pair has a gradient, one has half of it, an old one, or one that is not finite.
        """
        share = layout.read()
        if not share.rows:
            raise RuntimeError(NO_GRADIENT)
        stacks = self._stacks_of(share.rows, layout)
        before = [stack.step for stack in stacks]
        try:
            return self._step(stacks, share, layout, max_grad_norm, arrivals)
        except Exception:  # a step that failed is none
            for stack, step in zip(stacks, before, strict=True):
                stack.step = step
            raise
        finally:
            for stack in stacks:  # also those that this rank has no part in
                for side in stack.sides:
                    side.release()

    def _step(
        self,
        stacks: Sequence[Pairs],
        share: Share,
        layout: Layout,
        max_grad_norm: float | None,
        arrivals: Sequence[int] | None,
    ) -> Tensor:
        running = []
        for stack in stacks:
            if layout.concerns(stack.A.factors[0]):
                running.append(_Running(stack, loft_step(stack, self.blocks, self.precision), None))
                running[-1].answer(None)
            else:
                stack.step += 1
        steps = {a: stack.step for stack in self._stacks for a in stack.A.factors}
        leads = [b if steps[a] % 2 else a for a, b in self.trainable.pairs if a in share.rows]
        follows = [f.partner for f in leads if self.blocks.moves_jointly(f.rank)]
        # All ranks pass through all phases that any pair needs: each is a collective.
        self._sum(running, Phase.OVERLAPS, layout)
        self._together(running, Phase.BASES)
        norm = self._norm(running, share, layout, arrivals)
        clip = 1.0 if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for each in running:
            each.answer(clip.to(each.stack.A.momentum.device) if isinstance(clip, Tensor) else clip)
        self._gather(running, Phase.PARTNERS, leads, layout)
        self._sum(running, Phase.MOVED, layout)
        self._together(running, Phase.TURNED)
        if follows:
            self._gather(running, Phase.FOLLOWERS, follows, layout)
            self._sum(running, Phase.OUTSIDE, layout)
        self._together(running, Phase.BALANCE)
        self._write(running)
        for part in share.others:
            self._adamw(part, clip)
        layout.write([f for lead in leads for f in (lead, lead.partner)] if self.blocks.balancing else leads + follows)
        return norm

    # --- stacks ---

    def _stacks_of(self, rows: Mapping[Factor, Rows], layout: Layout) -> list[Pairs]:
        """The stacks of the pairs that take part in this step, with their rows and gradients.

        They are formed anew where that is needed: pairs that take part without others have then taken other steps.
        Those that rest together stay together.
        """
        here = {a for a, _ in self.trainable.pairs if a in rows}
        parts = [{f in here for f in stack.A.factors} for stack in self._stacks]
        known = {f for stack in self._stacks for f in stack.A.factors}
        if not here <= known or any(len(part) > 1 for part in parts):
            singles = [self._new(a, rows, layout.concerns(a)) for a in self._order if a in here - known]
            resting = []
            for stack in self._stacks:
                members = stack.singles()
                singles += [pair for pair in members if pair.A.factors[0] in here]
                resting.append([pair for pair in members if pair.A.factors[0] not in here])
            self._stacks = self._form(singles, rows, layout) + [Pairs.join(pairs) for pairs in resting if pairs]
        stacks = [stack for stack in self._stacks if stack.A.factors[0] in here]
        for stack in stacks:
            for side in stack.sides:
                side.home = [rows[f] for f in side.factors]
        return stacks

    def _form(self, singles: Sequence[Pairs], rows: Mapping[Factor, Rows], layout: Layout) -> list[Pairs]:
        kinds: dict[Hashable, list[Pairs]] = defaultdict(list)
        for single in sorted(singles, key=lambda pair: self._order[pair.A.factors[0]]):
            kinds[self._kind(single, rows, layout)].append(single)
        stacks = []
        for alike in kinds.values():
            sizes = [most_pairs(side.factors[0], side.momentum.shape[-2]) for side in alike[0].sides]
            most = max(1, min(sizes) // alike[0].A.factors[0].experts)
            stacks += [Pairs.join(alike[i : i + most]) for i in range(0, len(alike), most)]
        return stacks

    def _kind(self, pair: Pairs, rows: Mapping[Factor, Rows], layout: Layout) -> Hashable:
        """What must be equal within a stack: all shapes, the step, and when partners come."""
        (a,), (b,) = pair.A.factors, pair.B.factors
        sides = [
            (rows[f].values.shape, rows[f].values.stride(), f.count, id(rows[f].group), layout.bucket(f))
            for f in (a, b)
        ]
        own = rows[a].values
        where = layout.in_one_place(a), layout.concerns(a)
        return *sides, a.scaling, own.dtype, own.device, pair.step, where

    def _new(self, a: Factor, rows: Mapping[Factor, Rows], concerned: bool) -> Pairs:
        """A pair at its start, or as it was loaded."""
        loaded = {f: self._loaded.pop(f.name, None) for f in (a, a.partner)}
        a_side, b_side = (
            side_from(f, self._in_own_dtype(state, rows[f]), rows[f], self.place, concerned)
            if state
            else side_at_start(f, rows[f], self._empty_second_moment(f, rows[f].values), concerned)
            for f, state in loaded.items()
        )
        state = loaded[a]
        return Pairs(a_side, b_side, self.blocks.moves_jointly(a.rank), state["step"] if state else 0)

    def _dtype_of_second_moment(self, values: Tensor) -> torch.dtype:
        return self.second_moment_dtype or values.dtype

    def _in_own_dtype(self, state: State, rows: Rows) -> State:
        return {**state, "second_moment": state["second_moment"].to(self._dtype_of_second_moment(rows.values))}

    def _empty_second_moment(self, factor: Factor, values: Tensor) -> Tensor:
        shape = (*values.shape[:-1], self.blocks.state_width(factor.rank))
        dtype = self._dtype_of_second_moment(values)
        if self.offload_second_moment:
            return kernels.zeros_at_home(shape, dtype, values.device)
        return values.new_zeros(shape, dtype=dtype)

    # --- phases ---

    def _sum(self, running: Sequence[_Running], phase: Phase, layout: Layout) -> None:
        """Answer sums over all rows of a pair. A rank whose rows are all of a pair's has them already."""
        asking = [each for each in running if each.phase == phase]
        sums: list[tuple[Factor, Tensor]] = []
        for each in asking:
            side = each.stack.A
            if not each.question or layout.in_one_place(side.factors[0]):
                continue
            flat = torch.cat([part.reshape(len(part), -1) for part in each.question], dim=1)
            sums += zip(side.factors, side.split(flat), strict=True)
            widths = [part[0].numel() for part in each.question]
            each.question = [
                total.view_as(part) for total, part in zip(flat.split(widths, dim=1), each.question, strict=True)
            ]
        layout.sum_over_owners(sorted(sums, key=lambda each: self._order[each[0]]))
        for each in asking:
            each.answer(each.question)

    def _together(self, running: Sequence[_Running], phase: Phase) -> None:
        """Answer what one call does for all stacks that ask alike. In a pair's first step both sides ask, in turn."""
        while asking := [each for each in running if each.phase == phase]:
            alike: dict[Hashable, list[_Running]] = defaultdict(list)
            for each in asking:
                function, tensors, arguments = each.question
                kind = function, arguments, tensors[0].device, *(t.shape[1:] for t in tensors)
                alike[kind].append(each)
            for group in alike.values():
                self._answer_together(group)

    @staticmethod
    def _answer_together(group: Sequence[_Running]) -> None:
        function, tensors, arguments = group[0].question
        sizes = [len(each.question.tensors[0]) for each in group]
        if len(group) > 1:
            tensors = [torch.cat(parts) for parts in zip(*(each.question.tensors for each in group), strict=True)]
        try:
            results = function(*tensors, *arguments)
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
            else:
                for each in group:  # one of them fails by itself, and can say of whom
                    Runtime._answer_together([each])
            return
        parts = [None] * len(group) if results is None else zip(*(t.split(sizes) for t in results), strict=True)
        for each, part in zip(group, parts, strict=True):
            each.answer(part)

    def _norm(
        self, running: Sequence[_Running], share: Share, layout: Layout, arrivals: Sequence[int] | None
    ) -> Tensor:
        """The norm over all ranks: of pairs what they say, of all else the gradients.

        Raises:
            RuntimeError: gradients that did not come, to any rank.
        """
        device = next(iter(share.rows.values())).values.device

        def square(tensors: Sequence[Tensor]) -> Tensor:
            """The sum of all squares."""
            norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64) if tensors else []
            zero = torch.zeros((), dtype=torch.float64, device=device)
            return torch.stack([zero, *(norm.to(device) for norm in norms)]).square().sum()

        own = square([part.grad for part in share.others])
        own += square([tensor for each in running for tensor in each.question[0]])
        alike = [
            (each.question[1], layout.sharers(each.stack.A.factors[0]))
            for each in running
            if each.question[1] is not None
        ]
        twice = square([inner / sharers**0.5 if sharers > 1 else inner for inner, sharers in alike])
        came = torch.tensor(arrivals or (), dtype=torch.float64).to(device, non_blocking=True)
        sums = layout.all_reduce(torch.cat([(own - twice)[None], came]))
        if arrivals is not None:
            self._check_arrivals(arrivals, sums[1:], share, layout)
        return sums[0].clamp_min(0).sqrt()  # of nothing but rounding it may be below zero

    def _check_arrivals(self, here: Sequence[int], everywhere: Tensor, share: Share, layout: Layout) -> None:
        """Refuse what DeepSpeed puts in place of gradients that came to no rank, where it is not as if they were zero.

        Args:
            here: how many came of each factor, to this rank.
            everywhere: the same of all ranks that share the rows; where every rank has all rows, of this one.
            share: what is read.
            layout: from where.
        """
        counts: Sequence[float] = here
        if 0 in here:  # only then: the sum is waited for
            counts = everywhere.tolist()
            # Where every rank has all rows nobody has counted the others' arrivals, but their gradients are in these.
            others = isinstance(layout, Whole) and any(bool(rows.grad.any()) for rows in share.rows.values())
            if not any(counts) and not others:
                raise RuntimeError(NO_GRADIENT)
        for (a, b), of_a, of_b in zip(self.trainable.pairs, counts[::2], counts[1::2], strict=True):
            if (of_a > 0) != (of_b > 0):
                raise RuntimeError(HALF_A_PAIR.format(a.name, b.name))
            if layout.repeats_gradients and not of_a and a in self._partook:
                raise RuntimeError(STALE_GRADIENT.format(a.name))
            if of_a:
                self._partook.add(a)

    def _gather(self, running: Sequence[_Running], phase: Phase, moving: Sequence[Factor], layout: Layout) -> None:
        """Answer with whole partners, bucket by bucket: never are all of them here at once."""
        asking = {each.question.factors[0]: each for each in running if each.phase == phase}
        for bucket in layout.gather(moving):
            ready = [asking.pop(factor) for factor in bucket if factor in asking]
            with self._second_moments(ready) as second_moments:
                for each in ready:
                    each.answer(Partner([bucket[f] for f in each.question.factors], second_moments))
        for each in asking.values():  # this rank owns no rows of them
            each.answer(Partner([], kernels.Resident()))
        self._write(running)

    @staticmethod
    def _write(running: Sequence[_Running]) -> None:
        """Put all rows that have moved where others will gather them from."""
        for each in running:
            for side in each.stack.sides:
                side.write()

    def _second_moments(self, ready: Sequence[_Running]) -> kernels.Resident | kernels.Stream:
        """The second moments of stacks whose turn it is, where their device can work on them."""
        if not self.offload_second_moment:
            return kernels.Resident()
        sides: list[Side] = [each.question for each in ready]
        return kernels.Stream(
            [
                (side.packed[piece], side.momentum.device)
                for side in sides
                for piece in pieces(side.factors[0], side.momentum.shape[1], len(side.packed))
            ]
        )

    # --- all that is in no pair ---

    def _adamw(self, part: Slice, clip: Tensor | float) -> None:
        dtype = compute_dtype(part.data)
        values = part.data.to(dtype)
        moments = self._others.get(part.name) or self._moments_of(part, values)
        moments.step += 1
        coefficient = clip.to(part.grad.device) if isinstance(clip, Tensor) else clip
        algebra.adamw_update_(
            values,
            part.grad.to(dtype) * coefficient,
            moments.exp_avg,
            moments.exp_avg_sq,
            step=moments.step,
            lr=float(part.group["lr"]),
            betas=part.group["betas"],
            eps=part.group["eps"],
            weight_decay=part.group["weight_decay"],
        )
        if values is not part.data:
            part.data.copy_(values)

    def _moments_of(self, part: Slice, values: Tensor) -> Moments:
        state = self._loaded.pop(part.name, None)
        if not state:
            moments = Moments(part.start, torch.zeros_like(values), torch.zeros_like(values))
        else:
            if state["start"] != part.start or state["exp_avg"].shape != values.shape:
                raise RuntimeError(
                    f"the loaded state of {part.name} is of another slice than this rank's: it was saved on another "
                    "world size or ZeRO stage. Resume on the same ones."
                )
            exp_avg, exp_avg_sq = (state[kind].to(values) for kind in ("exp_avg", "exp_avg_sq"))
            moments = Moments(part.start, exp_avg, exp_avg_sq, state["step"])
        self._others[part.name] = moments
        return moments

"""LoFTAdamW: low-rank factors updated so that ``W`` moves as AdamW on ``W`` itself would move it."""

from __future__ import annotations

import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import algebra, kernels
from .adapters import find_trainable, started_from_gradients
from .batch import Batch, batches, each_pair, own_copies
from .factors import JOINT_RANK, Factor, shape_of
from .sharding import Layout, Rows, Share, Slice, Whole, compute_dtype
from .sharding.deepspeed import Clipping, find_engine, layout_of


class LoFTAdamW(Optimizer):
    """LoFT (Tastan et al., ICLR 2026, arXiv 2505.21289) for the LoRA factors of a PEFT model, AdamW for the rest.

    Works as it is in plain torch, under DDP and under DeepSpeed ZeRO stages 0 to 3, where it finds this rank's share
    of each factor by itself: ``deepspeed.initialize(model=model, optimizer=LoFTAdamW(model))``. State and work are
    split by feature rows. Arithmetic and state are float32, float64 for float64 parameters.

    There is no ``alpha`` to tune: PEFT's scaling is read from the layers, and the trajectory of ``W`` does not depend
    on it.

    ``state`` is keyed by parameter name, because under ZeRO the parameters are not what the optimizer is handed. Of a
    factor it holds, for this rank's rows beginning at ``start``: ``momentum`` (k_i, r), ``second_moment``
    (k_i, r(r+1)/2), the ``basis`` (r, r) of the coordinates both are in and the ``weights`` (r, r) of the second
    moment's average (both where there are rows), and either ``pending`` (k_i, r), the gradient of the resting step, or
    ``previous`` (k_i, r), the scaled rows before the last move. All have a leading dimension E where the factor is that
    of E experts: PEFT's ``target_parameters`` are one pair each.

    Args:
        model: a PEFT model; its trainable parameters are the optimizer's.
        lr: learning rate, of the size that full fine-tuning with AdamW takes. (MiniLM on R8 does best with 1e-4 or 3e-4
            at ranks 1 to 16; torch's default of 1e-3 is too long a step, but at rank 1 under a head that learns fast.)
            It needs no warm-up: without one the test loss there is 0.388 for 0.405 at rank 1, 0.333 for 0.374 at 2.
        betas: decay of momentum and second moment.
        eps: AdamW's. On R8 at rank 2 1e-6 ends alike, at 0.375 for 0.374.
        weight_decay: decoupled, multiplied by the learning rate.
        max_grad_norm: clip by the norm of the projected full gradients of the factors about to move and the gradients
            of all other parameters; None for no clipping. Under DeepSpeed ``gradient_clipping`` in the JSON sets it, by
            the Trainer 1.0, with which R8 at rank 2 ends at 0.374; without it at 0.417.
        turns: block 1 of the paper. "alternate": ``B`` moves on odd steps, ``A`` on even ones, as published. "joint":
            the factor whose turn it is moves by its whole update, the other one by the part of its own that lies
            outside, so that ``W`` moves by the projection of the full step on all that the two can reach. "auto": pairs
            of rank ``JOINT_RANK`` or less jointly, others alternately, which is half the work. Test loss, joint to
            alternate: MiniLM on R8, three seeds, 0.405 to 0.446 at rank 1, 0.374 to 0.428 at 2, 0.298 to 0.340 at 4,
            0.260 to 0.262 at 16, 0.252 to 0.234 at 64 (seed by seed 0.018 ± 0.016 apart); at 16 also 0.470 to 0.488 on
            film reviews (five seeds) and 4.166 to 4.185 with SmolLM2-135M on Shakespeare (three), seed by seed
            0.018 ± 0.023 and 0.019 ± 0.045 apart. On the paper's factorisation, rank 8, it is the other way round:
            3.9e-5 to 2.6e-5. "both": both move by all of theirs, and what lies in both is counted twice.
        gradient_scaling: block 2. Off: momentum and second moment are those of the plain factor gradient.
        momentum_calibration: block 3. Off: momentum is not turned when the other factor moves: on R8 at rank 16 0.427
            for 0.260.
        second_moment_calibration: block 4. Off: the second moment is not turned, and in the full-rank limit this is not
            AdamW. On R8 at rank 16 that ends at 0.235 for 0.260, by early steps that are shorter: see ``max_step_rms``.
            On the factorisation, alternating, at 3.9e-4 for 2.6e-5.
        projected_update: block 5. Off: AdamW's quotient is taken on the factor, not on the projected full matrix.
        projected_clipping: block 6. Off: ``max_grad_norm`` bounds the norm of the plain factor gradients.
        bias_calibration: not in the paper. The second moment's bias correction follows its calibration, which forgets
            what lies outside a new subspace: see :func:`loft_ds.algebra.turned_weights`. Off, as published, it is
            ``1 - beta2 ** t`` however much has been forgotten: 0.506 for 0.398 at rank 1 jointly, no difference at 16.
        second_moment: "matrix", one (r, r) a row, or "elementwise", the paper's simpler variant with AdamW's own.
        second_moment_dtype: torch.bfloat16 halves LoFT's largest state; it leaves the loss as it is and moves the
            trajectory by some per cent (kernels/README.md has the figures). None for that of all other state.
        offload_second_moment: keep it in CPU memory, pinned where there is an accelerator. Once a turn it passes in
            chunks through the device, where the arithmetic stays; not a bit of the result changes.
        max_step_rms: update clipping, as in Adafactor (Shazeer and Stern, 2018, section 6): where the root mean square
            of a matrix's step, before the learning rate, is above it, the step is shortened to it. None, as published,
            for no bound. 0.2, AdamW's usual one, ends on R8 at 0.351 for 0.374 at rank 2 and at 0.226 for 0.260 at 16,
            on Shakespeare no lower, and gains full fine-tuning as much. It costs one more sum over the ranks, of a
            number a factor.
        params: parameters or parameter groups in place of one group of all, to give them ``lr``, ``weight_decay``,
            ``betas`` or ``eps`` of their own. Together they must be the model's trainable parameters.

    Raises:
        ValueError: a setting out of range; a model without a LoRA pair that LoFT can treat; groups that are not the
            model's trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        turns: Literal["auto", "alternate", "joint", "both"] = "auto",
        gradient_scaling: bool = True,
        momentum_calibration: bool = True,
        second_moment_calibration: bool = True,
        projected_update: bool = True,
        projected_clipping: bool = True,
        bias_calibration: bool = True,
        max_step_rms: float | None = None,
        second_moment: Literal["matrix", "elementwise"] = "matrix",
        second_moment_dtype: torch.dtype | None = None,
        offload_second_moment: bool = False,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
    ) -> None:
        if turns not in ("auto", "alternate", "joint", "both"):
            raise ValueError(f'turns must be "auto", "alternate", "joint" or "both", not {turns!r}')
        if second_moment not in ("matrix", "elementwise"):
            raise ValueError(f'second_moment must be "matrix" or "elementwise", not {second_moment!r}')
        if second_moment_dtype not in (None, torch.bfloat16) or (second_moment_dtype and second_moment != "matrix"):
            raise ValueError("second_moment_dtype must be None, or torch.bfloat16 for the matrix form")
        if offload_second_moment and second_moment != "matrix":
            raise ValueError(
                "offload_second_moment is for the matrix form: the elementwise one is as small as momentum"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, not {max_grad_norm}")
        if max_step_rms is not None and not max_step_rms > 0:
            raise ValueError(f"max_step_rms must be positive or None, not {max_step_rms}")
        if max_step_rms is not None and turns == "both":
            raise ValueError('max_step_rms measures what W moves by; turns="both" counts a part of it twice')
        self.model = model
        self.trainable = find_trainable(model)
        self.max_grad_norm = max_grad_norm
        self.max_step_rms = max_step_rms
        self.turns = turns
        self.gradient_scaling = gradient_scaling
        self.momentum_calibration = momentum_calibration
        self.second_moment_calibration = second_moment_calibration
        self.projected_update = projected_update
        self.projected_clipping = projected_clipping
        # It belongs to the second moment of full gradients that a turn projects, and to no other.
        turned = second_moment == "matrix" and gradient_scaling and second_moment_calibration
        self.bias_calibration = bias_calibration and turned
        self.second_moment = second_moment
        self.second_moment_dtype = second_moment_dtype
        self.offload_second_moment = offload_second_moment
        self._layout: Layout | None = None
        self._clipping: Clipping | None = None
        self.state: dict[Any, dict[str, Any]]  # type: ignore[assignment]  # keyed by names, not by tensors
        trained = list(self.trainable.parameters.values())
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(_groups(trained if params is None else params, trained), defaults)
        for group in self.param_groups:
            _check(group)
        self._params = {id(p) for p in trained}
        self.group_members = [list(group["params"]) for group in self.param_groups]  # DeepSpeed rewrites the groups
        self._shapes = sorted(shape_of(p) for p in trained)
        self._rehearsed = False
        # Under this name engine.get_global_grad_norm() looks for it; written in place, so that whoever asks before a
        # step for the norm to log (the Trainer) reads that step's.
        self._global_grad_norm = torch.full((), math.nan, dtype=torch.float64, device=trained[0].device)
        self._stepped = False
        self._arrived: set[int] = set()
        watch = _Watch(self)
        for p in trained:
            watch.over(p)
        if self.trainable.untreated:
            listed = [f"{name} ({reason})" for name, reason in sorted(self.trainable.untreated.items())]
            rest = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            warnings.warn(
                f"LoFT does not treat these adapter parameters, AdamW moves them: {', '.join(listed[:8])}{rest}",
                stacklevel=2,
            )
        if started := started_from_gradients(model):
            warnings.warn(
                f"LoRA-GA took the start of {', '.join(started)} out of the frozen weights, so what is saved of it is "
                "no adapter of the model on disk. Keep the start too (model.save_pretrained(START) before training): "
                "PEFT's path_initial_model_for_weight_conversion=START makes of both one adapter of twice the rank.",
                stacklevel=2,
            )

    @property
    def variant(self) -> dict[str, bool | int | str]:
        """The switches of the method: state that one variant has gathered means nothing to another."""
        switches = (
            "turns",
            "gradient_scaling",
            "momentum_calibration",
            "second_moment_calibration",
            "projected_update",
            "projected_clipping",
            "second_moment",
            "bias_calibration",  # after those that it depends on: a message names the first that differs
        )
        variant = {switch: getattr(self, switch) for switch in switches} | {"dtype": str(self.second_moment_dtype)}
        if self.turns == "auto":
            variant["joint_rank"] = JOINT_RANK  # may be another one in another version
        return variant

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the variant of the method that the state belongs to."""
        return {**super().state_dict(), "variant": self.variant}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for what :meth:`state_dict` gave on the same world size and stage.

        Raises:
            ValueError: a state of other parameters, of another optimizer or of another variant of the method.
        """
        strange = [k for k, value in state_dict["state"].items() if value and k not in self.trainable.parameters]
        if strange or state_dict.get("variant") != self.variant:
            raise ValueError(
                f"this is no state of this optimizer: it is of {strange[:1] or state_dict.get('variant')}, not of "
                f"{self.variant}"
            )
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: factors are paired at construction."""
        if hasattr(self, "_params"):
            raise ValueError("LoFTAdamW pairs factors at construction: pass all groups as params=[...]")
        super().add_param_group(param_group)

    @property
    def grad_norm(self) -> float:
        """The norm that the last step was clipped by, before clipping: see ``max_grad_norm``. NaN before any step."""
        return float(self._global_grad_norm)

    def attach(self) -> Layout | None:
        """Find out where the master weights lie: with the DeepSpeed engine that steps this optimizer, or in the
        parameters themselves. None where DeepSpeed is still building its engine.

        The first gradient does this unasked; :mod:`loft_ds.checkpoint` asks before it.

        Raises:
            RuntimeError: DeepSpeed trains the parameters with another optimizer.
            NotImplementedError: an engine or a setting that LoFT does not know.
        """
        if self._layout is None:
            engine = find_engine(self, self.trainable)
            if engine is not None:
                self._layout = layout_of(engine, self.trainable)
                self._clipping = Clipping(engine)
            elif self._handed_own_parameters():
                self._layout = Whole(self.trainable.factors, self.trainable.others)
        return self._layout

    def _on_gradient(self, param: Tensor) -> None:
        """Take DeepSpeed's clipping over when a gradient arrives: before the first step would clip.

        Until the first step every backward pass looks anew: one may come before ``deepspeed.initialize``.
        """
        if not self._stepped and (not self._arrived or id(param) in self._arrived):
            self._arrived.clear()
            self._layout = None
            self.attach()
        if not self._stepped:
            self._arrived.add(id(param))
        if self._clipping is not None and self._clipping.pending:
            norm = self._clipping.take()
            if self.max_grad_norm not in (None, norm):
                raise ValueError(
                    f'"gradient_clipping": {norm} in the DeepSpeed JSON contradicts '
                    f"max_grad_norm={self.max_grad_norm}: set one of them, or both alike."
                )
            self.max_grad_norm = norm

    def _handed_own_parameters(self) -> bool:
        return all(id(p) in self._params for group in self.param_groups for p in group["params"])

    def _ready(self) -> bool:
        """Whether to take this step.

        False for the one rehearsal with zero gradients in which DeepSpeed's stage 0 builds its float32 clones
        (fp16/unfused_optimizer.py, initialize_optimizer_states).

        Raises:
            RuntimeError: gradients came to this optimizer, but none to the parameters it was built from.
        """
        if self._layout is not None or (self._handed_own_parameters() and self.attach()):
            return True
        handed = [p for group in self.param_groups for p in group["params"]]
        clones = sorted(p.shape for p in handed) == self._shapes
        if clones and not self._rehearsed and not any(p.grad is not None and bool(p.grad.any()) for p in handed):
            self._rehearsed = True
            return False
        raise RuntimeError(
            "LoFTAdamW was called to step, but no gradient reached the parameters of the model it was built from. "
            "Build it from the very model object that is trained, after peft.get_peft_model."
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Under DeepSpeed it is called once a group or sub-group; the last of these calls moves all.

        Raises:
            RuntimeError: a layout that is not known, or a step in which no factor pair has a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._ready():
            assert self._layout is not None
            if self._layout.collect(self.param_groups):
                with algebra.products_in("ieee"):
                    self._update(self._layout)
        return loss

    def _update(self, layout: Layout) -> None:
        """Section 3 of the paper, line by line."""
        share = layout.read()
        if not share.rows:
            raise RuntimeError(
                "no LoRA pair has a gradient, so LoFT has nothing to do in this step. Call backward() first; if a loss "
                "was computed, check that the adapters are active and take part in it."
            )
        self._stepped = True
        for factor, rows in share.rows.items():
            self._state_of(factor, rows)["step"] += 1
        leading = [f for f in share.rows if (self.state[f.name]["step"] % 2 == 1) == (f.side == "B")]
        following = [f.partner for f in leading if self.moves_jointly(f)]
        moves, follows = {*leading, *following, *(share.rows if self.turns == "both" else ())}, set(following)
        moving = [f for f in share.rows if f in moves]

        rotations = self._turn_bases(share.rows, layout)
        self._turn_weights(share.rows, rotations)
        scaled = {
            batch: self._scaled_gradients(batch)
            for batch in batches(
                share.rows, share.rows, self.state, lambda f: (f in moves, f in follows, f in rotations)
            )
        }
        coefficient = self._clip(scaled, moves, following, share, layout)
        for batch in list(scaled):
            gradients = scaled.pop(batch).mul_(coefficient.to(batch.device))
            self._accumulate(batch, gradients, rotations)
            if self.second_moment == "matrix":  # one pass over it a turn, not one a step
                batch.store("arrived" if batch.factors[0] in moves else "pending", gradients)

        # Both factors are read as they were when the gradient was taken, so nothing moves before all is computed.
        steps: dict[Factor, Tensor] = {}
        for partners in self._partners(moving, share.rows, layout):
            turn = batches(partners, share.rows, self.state, lambda f: f in rotations)
            with self._second_moments(turn) as second_moments:
                for batch in turn:
                    found = self._full_steps(batch, partners, rotations, second_moments)
                    steps.update(zip(batch.factors, found, strict=True))
        for factor in moving:  # also those that this rank owns no rows of
            for kind in ("arrived", "pending"):
                self.state[factor.name].pop(kind, None)
        for batch, outside in self._outside(steps, following, share.rows, layout):
            steps.update(zip(batch.factors, batch.split(outside), strict=True))
        if self.max_step_rms is not None:
            self._clip_steps(steps, moving, share.rows, layout)
        for batch in batches(moving, share.rows, self.state, lambda f: f in follows):
            batch.store("previous", batch.values().mul_(batch.scaling))
            if not batch.is_empty:
                values = [rows.values for rows in batch.rows]
                if batch.factors[0] not in follows:  # W decays once a step
                    torch._foreach_mul_(values, 1 - batch.group["lr"] * batch.group["weight_decay"])
                moved = torch.stack(each_pair(steps.pop(f) for f in batch.factors))
                if self._projects:
                    moved = moved @ batch.stacked("basis").mT.to(batch.dtype)
                torch._foreach_add_(values, batch.parts(moved), alpha=-batch.group["lr"])
        for part in share.others:
            self._adamw(part, coefficient)
        layout.write(moving)

    def moves_jointly(self, factor: Factor) -> bool:
        """Whether a pair moves as ``turns="joint"`` says."""
        return self.turns == "joint" or (self.turns == "auto" and factor.rank <= JOINT_RANK)

    def _state_of(self, factor: Factor, rows: Rows) -> dict[str, Any]:
        state, values = self.state[factor.name], rows.values
        if not state:
            width = factor.rank * (factor.rank + 1) // 2 if self.second_moment == "matrix" else factor.rank
            shape, dtype = (*values.shape[:-1], width), self.second_moment_dtype or values.dtype
            state["step"] = 0
            state["start"] = rows.start
            state["momentum"] = torch.zeros_like(values, memory_format=torch.contiguous_format)
            if self.offload_second_moment:
                state["second_moment"] = kernels.zeros_at_home(shape, dtype, values.device)
            else:
                state["second_moment"] = values.new_zeros(shape, dtype=dtype)
            if self.bias_calibration and rows.count:
                square = (*values.shape[:-2], factor.rank, factor.rank)
                state["weights"] = values.new_zeros(square, dtype=torch.float64)
        if state["start"] != rows.start or state["momentum"].shape != values.shape:
            raise RuntimeError(
                f"the loaded state of {factor.name} is of {state['momentum'].shape[-2]} rows from row "
                f"{state['start']} on, this rank owns {rows.count} from row {rows.start} on: it was saved on another "
                "world size or ZeRO stage. Resume on the same ones."
            )
        for kind, tensor in state.items():
            if isinstance(tensor, Tensor):
                state[kind] = self.place(kind, tensor, values.device)  # if it was loaded from a file
        return state

    def place(self, kind: str, tensor: Tensor, device: torch.device) -> Tensor:
        """A part of a factor's state where it belongs while ``device`` works on it; itself if it is there."""
        if kind == "second_moment" and self.offload_second_moment:
            return kernels.at_home(tensor, device)
        return tensor.to(device)

    def _turn_bases(self, rows: dict[Factor, Rows], layout: Layout) -> dict[Factor, tuple[Tensor, Tensor]]:
        """Bring ``basis`` up to date where the partner has moved, and give the rotations of momentum and second moment
        (r, r) from the old coordinates to the new. Where the partner rested both are the identity and left out.
        """
        fresh = [f for f in rows if "basis" not in self.state[f.name] or "previous" in self.state[f.partner.name]]
        # A pair that is all another rank's needs no basis here, and one that is all this rank's no other rank's sums.
        fresh = [f for f in fresh if layout.concerns(f)]
        fresh.sort(key=layout.in_one_place)
        turned = {f for f in fresh if "basis" in self.state[f.name]}
        grams: dict[Factor, Tensor] = {}
        crosses: dict[Factor, Tensor] = {}
        for batch in batches([f.partner for f in fresh], rows, self.state, lambda partner: partner.partner in turned):
            factors, values = [f.partner for f in batch.factors], batch.values()
            grams.update(zip(factors, batch.split(algebra.pack(algebra.gram(values, values))), strict=True))
            if factors[0] in turned:
                cross = algebra.gram(batch.stacked("previous"), values)
                crosses.update(zip(factors, batch.split(cross), strict=True))
        for factor in rows:
            self.state[factor.name].pop("previous", None)
        # A rank whose rows are all of a pair's knows its products; of the others each owner of rows has a part.
        spread = [f for f in fresh if not layout.in_one_place(f)]
        layout.sum_over_owners([(f, grams[f]) for f in spread] + [(f, crosses[f]) for f in spread if f in turned])
        for kind in {(packed.shape, packed.device) for packed in grams.values()}:  # only triangles travelled
            alike = [f for f, packed in grams.items() if (packed.shape, packed.device) == kind]
            grams.update(zip(alike, algebra.unpack(torch.stack([grams[f] for f in alike]), alike[0].rank), strict=True))

        rotations: dict[Factor, tuple[Tensor, Tensor]] = {}
        kinds: dict[tuple[torch.Size, torch.device, torch.dtype, bool], list[Factor]] = defaultdict(list)
        for f in fresh:
            kinds[grams[f].shape, grams[f].device, rows[f].values.dtype, f in turned].append(f)
        for (shape, device, dtype, turns), alike in kinds.items():
            scaling = torch.tensor([f.scaling for f in alike], dtype=torch.float64).to(device, non_blocking=True)
            scaling = scaling.view(-1, *(1 for _ in shape))
            gram = scaling**2 * torch.stack([grams[f] for f in alike])
            try:
                basis = algebra.orthonormal_basis(gram)
            except torch.linalg.LinAlgError as error:
                broken = [f.partner.name for f, g in zip(alike, gram, strict=True) if not bool(g.isfinite().all())]
                raise RuntimeError(f"{', '.join(broken[:3])} became infinite or NaN: the run has diverged") from error
            if turns:
                old = torch.stack([self.state[f.name]["basis"] for f in alike]).mT
                cross = scaling * torch.stack([crosses[f] for f in alike])
                calibrated = (old @ cross @ basis).to(dtype)
                if self.momentum_calibration and self.second_moment_calibration:
                    kept = calibrated
                else:
                    kept = (old @ algebra.unscaled_basis(basis)).to(dtype)
                of_momentum = calibrated if self.momentum_calibration else kept
                of_second_moment = calibrated if self.second_moment_calibration else kept
                rotations.update(zip(alike, zip(of_momentum, of_second_moment, strict=True), strict=True))
            for factor, own in zip(alike, own_copies(basis.contiguous()), strict=True):
                self.state[factor.name]["basis"] = own
        return rotations

    def _turn_weights(self, rows: dict[Factor, Rows], rotations: Mapping[Factor, tuple[Tensor, Tensor]]) -> None:
        """Bring ``weights`` up to date with this step's gradient."""
        if not self.bias_calibration:
            return
        for batch in batches([f for f in rows if rows[f].count], rows, self.state, lambda f: f in rotations):
            turned = batch.factors[0] in rotations
            rotation = _stacked(rotations[f][1] for f in batch.factors).double() if turned else None
            beta2 = batch.group["betas"][1]
            batch.store("weights", algebra.turned_weights(batch.stacked("weights"), beta2, rotation))

    def _scaled_gradients(self, batch: Batch) -> Tensor:
        """The gradients of the rows (b, k, r) in orthonormal coordinates."""
        gradients = batch.gradients()
        if batch.is_empty:
            return gradients
        basis = batch.stacked("basis")
        return gradients @ (basis if self.gradient_scaling else algebra.unscaled_basis(basis)).to(batch.dtype)

    def _outside(
        self, parts: Mapping[Factor, Tensor], following: Sequence[Factor], rows: dict[Factor, Rows], layout: Layout
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Of the following factors' ``parts`` (k, r) what the leading ones do not move already (b, k, r): what lies
        outside the span of the factor's own rows ``X``, which are the leading one's ``T``.
        """

        def directions(batch: Batch) -> Tensor:
            """The orthonormal basis (b, k, r) of that span, in float64: this rank's rows of it."""
            bases = each_pair(self.state[f.partner.name]["basis"] for f in batch.factors)
            return batch.values().double() @ (batch.scaling * torch.stack(bases))

        if not following:  # on any rank: the sums below are collectives
            return
        concerned = batches([f for f in following if layout.concerns(f)], rows, self.state)
        products: dict[Factor, Tensor] = {}
        for batch in concerned:
            own = directions(batch)
            inner = own.mT @ (own if batch.is_empty else batch.joined(parts).double())
            products.update(zip(batch.factors, batch.split(inner), strict=True))
        layout.sum_over_owners([(f, products[f]) for f in following if f in products and not layout.in_one_place(f)])
        for batch in concerned:
            if not batch.is_empty:
                inside = directions(batch) @ batch.joined(products)
                yield batch, batch.joined(parts) - inside.to(batch.dtype)

    def _clip(
        self,
        scaled: Mapping[Batch, Tensor],
        moves: Set[Factor],
        following: Sequence[Factor],
        share: Share,
        layout: Layout,
    ) -> Tensor:
        """The clipping coefficient, a scalar. ``||g @ T.T||_F = ||g||_F`` in orthonormal coordinates."""
        if self.projected_clipping:
            follows = set(following)
            clipped = [g for batch, g in scaled.items() if batch.factors[0] in moves - follows]
            parts = {
                f: g
                for batch, all_of in scaled.items()
                for f, g in zip(batch.factors, batch.split(all_of), strict=True)
            }
            clipped += [outside for _, outside in self._outside(parts, following, share.rows, layout)]
        else:
            clipped = [rows.grad for rows in share.rows.values()]
        clipped += [part.grad for part in share.others]
        norms = [norm.to(clipped[0].device) for norm in torch._foreach_norm(clipped, 2, dtype=torch.float64)]
        norm = layout.all_reduce(torch.stack(norms).square().sum()).sqrt()
        if self._global_grad_norm.device != norm.device:  # the model was moved after construction
            self._global_grad_norm = self._global_grad_norm.to(norm.device)
        self._global_grad_norm.copy_(norm)
        if self._clipping is not None:
            self._clipping.report(self._global_grad_norm)
        if self.max_grad_norm is None:
            return torch.ones_like(norm)
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _accumulate(self, batch: Batch, gradients: Tensor, rotations: Mapping[Factor, tuple[Tensor, Tensor]]) -> None:
        """Calibrate momentum, and add this step's gradients (b, k, r) to it, and to second moments of one number a
        feature; to the matrices they are added in :meth:`_full_steps`.
        """
        beta1, beta2 = batch.group["betas"]
        if batch.factors[0] in rotations:
            of_momentum = _stacked(rotations[f][0] for f in batch.factors)
            batch.store("momentum", (batch.stacked("momentum") @ of_momentum).lerp_(gradients, 1 - beta1))
        else:
            torch._foreach_lerp_(batch.each("momentum"), list(gradients.unbind()), 1 - beta1)
        if self.second_moment == "elementwise" and not batch.is_empty:
            published = list((gradients @ batch.stacked("basis").mT.to(batch.dtype)).unbind())
            torch._foreach_mul_(batch.each("second_moment"), beta2)
            torch._foreach_addcmul_(batch.each("second_moment"), published, published, value=1 - beta2)

    @property
    def _projects(self) -> bool:
        """Whether a step is the projection of a full one, and in orthonormal coordinates until it is applied."""
        return self.projected_update and self.second_moment == "matrix"

    def _partners(
        self, moving: Sequence[Factor], rows: dict[Factor, Rows], layout: Layout
    ) -> Iterable[Mapping[Factor, Tensor | None]]:
        """Moving factors with their partners' whole rows (l, r), or None where the update does not need them."""
        if self._projects:
            yield from layout.gather(moving)
        else:
            yield dict.fromkeys(f for f in moving if rows[f].count)

    def _second_moments(self, turn: Sequence[Batch]) -> kernels.Resident | kernels.Stream:
        """The second moments of the batches whose turn it is, where their device can work on them."""
        if not self.offload_second_moment:
            return kernels.Resident()
        return kernels.Stream(
            [(batch.each("second_moment")[piece], batch.device) for batch in turn for piece in batch.pieces()]
        )

    def _full_steps(
        self,
        batch: Batch,
        partners: Mapping[Factor, Tensor | None],
        rotations: Mapping[Factor, tuple[Tensor, Tensor]],
        second_moments: kernels.Resident | kernels.Stream,
    ) -> Iterable[Tensor]:
        """What the learning rate is multiplied with, of each factor: ``U @ Q`` (k, r), the coordinates of
        ``U @ T @ C^-1``; without the projection the factor's own step.

        Before that, in the same pass, second moments are calibrated and this step's and the last one's gradients added.
        """
        (beta1, beta2), eps, t = batch.group["betas"], batch.group["eps"], batch.step
        basis, momentum = batch.stacked("basis"), batch.stacked("momentum")
        weights = batch.stacked("weights") if self.bias_calibration else None
        correction1 = 1 - beta1**t
        if self.second_moment == "elementwise":
            momentum = momentum @ basis.mT.to(batch.dtype)
            steps = (momentum / correction1) / ((batch.stacked("second_moment") / (1 - beta2**t)).sqrt_().add_(eps))
            return batch.split(steps)
        same = self.momentum_calibration == self.second_moment_calibration
        bound = algebra.cauchy_schwarz_bound(beta1, beta2) if same else math.inf
        whole = each_pair(partner for f in batch.factors if (partner := partners[f]) is not None)
        update = kernels.projected_update if whole else kernels.normalized_update
        arrived = batch.take("arrived")
        pending = batch.take("pending") if batch.has("pending") else None
        turns = batch.factors[0] in rotations
        rotation = _stacked(rotations[f][1] for f in batch.factors) if turns else None
        packed, steps = batch.each("second_moment"), torch.empty_like(momentum)
        for piece in batch.pieces():
            directions = basis[piece]
            if whole:
                # In float64: the columns of H are long where T is short, and Q must come out orthonormal.
                directions = torch.stack(whole[piece]).double() @ (batch.scaling * directions)
            if weights is not None:
                corrections = algebra.bias_corrections(directions, weights[piece])
            else:
                corrections = directions.new_full(directions.shape[:2], 1 - beta2**t)
            directions, corrections = directions.to(batch.dtype), corrections.to(batch.dtype)
            for (pairs, rows), chunk in second_moments.chunks(packed[piece]):
                here = slice(piece.start + pairs.start, piece.start + pairs.stop)
                kernels.accumulate_second_moment_(
                    chunk,
                    arrived[here, rows],
                    beta2,
                    pending=None if pending is None else pending[here, rows],
                    rotation=None if rotation is None else rotation[here],
                    seed=t,
                )
                quotient = kernels.Quotient(correction1, corrections[pairs], eps, bound)
                steps[here, rows] = update(momentum[here, rows], chunk, directions[pairs], quotient)
        return batch.split(steps)

    def _clip_steps(
        self, steps: dict[Factor, Tensor], moving: Sequence[Factor], rows: dict[Factor, Rows], layout: Layout
    ) -> None:
        """Shorten the ``steps`` (k, r) of pairs by which ``W`` would move further than ``max_step_rms`` allows.

        What a following factor moves lies outside of what the leading one does: their squared lengths add up.
        """
        assert self.max_step_rms is not None
        concerned = batches([f for f in moving if layout.concerns(f)], rows, self.state)
        squares: dict[Factor, Tensor] = {}
        for batch in concerned:
            if batch.is_empty:
                lengths = batch.stacked("basis").new_zeros(len(batch.factors) * batch.factors[0].experts)
            else:
                moved = batch.joined(steps).double()
                if not self._projects:
                    moved = moved @ algebra.unscaled_basis(batch.stacked("basis"))
                lengths = moved.square().sum((-2, -1))
            squares.update(zip(batch.factors, batch.split(lengths), strict=True))
        layout.sum_over_owners([(f, squares[f]) for f in moving if f in squares and not layout.in_one_place(f)])
        for batch in concerned:
            if not batch.is_empty:
                sums = [squares[f] + squares[f.partner] if f.partner in squares else squares[f] for f in batch.factors]
                numbers = batch.factors[0].count * batch.factors[0].partner.count
                rms = (torch.stack(sums).flatten() / numbers).sqrt()
                scale = (self.max_step_rms / rms).clamp(max=1.0).to(batch.dtype)
                steps.update(zip(batch.factors, batch.split(batch.joined(steps) * scale[:, None, None]), strict=True))

    def _adamw(self, part: Slice, coefficient: Tensor) -> None:
        state = self.state[part.name]
        dtype = compute_dtype(part.data)
        values = part.data.to(dtype)
        if not state:
            state["step"] = 0
            state["start"] = part.start
            state["exp_avg"] = torch.zeros_like(values, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if state["start"] != part.start or state["exp_avg"].shape != values.shape:
            raise RuntimeError(
                f"the loaded state of {part.name} is of another slice than this rank's: it was saved on another world "
                "size or ZeRO stage. Resume on the same ones."
            )
        state["exp_avg"], state["exp_avg_sq"] = (state[key].to(values.device) for key in ("exp_avg", "exp_avg_sq"))
        state["step"] += 1
        algebra.adamw_update_(
            values,
            part.grad.to(dtype) * coefficient.to(part.grad.device),
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            lr=part.group["lr"],
            betas=part.group["betas"],
            eps=part.group["eps"],
            weight_decay=part.group["weight_decay"],
        )
        if values is not part.data:
            part.data.copy_(values)


def _stacked(tensors: Iterable[Tensor]) -> Tensor:
    """One tensor (b, ., .) of those of each factor, (., .) or (E, ., .)."""
    return torch.stack(list(tensors)).flatten(0, -3)


def _groups(params: Iterable[Any], trained: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups without the empty ones, which DeepSpeed drops and torch's schedulers then trip over."""
    groups = list(params)
    groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
    groups = [{**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in groups]
    given, wanted = {id(p) for g in groups for p in g["params"]}, {id(p) for p in trained}
    if given != wanted:
        raise ValueError(
            f"params must be the model's trainable parameters: {len(wanted - given)} of them are missing and "
            f"{len(given - wanted)} others are given"
        )
    return [g for g in groups if g["params"]]


def _check(group: dict[str, Any]) -> None:
    if not group["lr"] >= 0 or not group["eps"] >= 0 or not group["weight_decay"] >= 0:
        raise ValueError(
            f"lr, eps and weight_decay must not be negative: {group['lr']}, {group['eps']}, {group['weight_decay']}"
        )
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must lie in [0, 1): {group['betas']}")


class _Watch:
    """What hangs on the parameters: tells the optimizer of gradients, and finds out who trains when it is gone.

    It does not keep the optimizer alive. An optimizer that a Trainer dropped for another is dead by the first
    gradient, and that it should not be is what the watch is for.
    """

    def __init__(self, optimizer: LoFTAdamW) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._trainable = optimizer.trainable
        self._handles: list[Any] = []

    def over(self, param: nn.Parameter) -> None:
        """Watch a parameter, in place of the LoFTAdamW built before."""
        earlier = getattr(param, "_loft_hook", None)
        if earlier is not None:
            earlier.remove()
        handle = param.register_post_accumulate_grad_hook(self._on_gradient)
        param._loft_hook = handle  # type: ignore[attr-defined]
        self._handles.append(handle)

    def _on_gradient(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._on_gradient(param)
            return
        for handle in self._handles:
            handle.remove()
        find_engine(None, self._trainable)

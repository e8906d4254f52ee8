"""What the studies compare: each method as adapters (or none) and an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import LoraGAConfig, LoraLayer, preprocess_loraga
from torch import nn
from torch.optim import AdamW, Optimizer

from loft_ds import Blocks, LoFTAdamW
from loft_ds.start import LENGTH

from .limits import TruncatedAdamW
from .peers import AltLoRAPlus, LoRAMuon, LoRAPro, LoRARITE, PSILoRA, ScaLoRA
from .tasks import Task

CLIP = 1.0
Group = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One column of a study.

    Attributes:
        rates: the sweep. LoFT takes full fine-tuning's; those of LoRA's family are ten times as large.
        adapter: PEFT's LoraConfig beyond rank and targets; None for a method without adapters.
        build: the optimizers of a model, of which its new head is a parameter group with a learning rate of its own.
        alpha_over_rank: PEFT's alpha, which LoFT does not depend on.
        own_clip: the optimizer clips by its own norm; else the gradients' norm is clipped for it.
        warm_up: part of all steps in which the learning rate rises to its full height; then it falls linearly to zero.
        matrices_only: without adapters, train only the matrices that adapters would stand for, and the head: the
            fair upper bound.
        switches: keyword arguments of the optimizer.
        gradient_batches: the adapters' first directions are those of the mean gradient of so many batches (LoRA-GA,
            Wang et al. 2024, as PEFT does it).
        start_length: the length (Frobenius) to which such a start is brought, ``|s B0 A0|``, in every layer; None for
            PEFT's.
        left_in: what such adapters are at the start is not taken out of the frozen weights. So they are adapters of
            their rank to a model that nobody changed, which begins a step off.
    """

    rates: tuple[float, ...]
    build: Callable[..., list[Optimizer]]
    adapter: dict[str, Any] | None = None
    alpha_over_rank: float = 2.0
    own_clip: bool = False
    warm_up: float = 0.1
    matrices_only: bool = False
    switches: dict[str, Any] = field(default_factory=dict)
    gradient_batches: int = 0
    start_length: float | None = None
    left_in: bool = False

    def prepare(self, task: Task, model: nn.Module, rank: int, lr: float, seed: int) -> Prepared:
        """Adapters onto the model, and the optimizers that train it."""
        head, targets = task.head, task.targets
        if self.adapter is None:
            if self.matrices_only:
                wanted = set(adapted_matrices(model, targets, head))
                for name, param in model.named_parameters():
                    param.requires_grad_(name in wanted or bool(head and head in name))
            trained = model
        else:
            config = LoraConfig(
                r=rank,
                lora_alpha=self.alpha_over_rank * rank,
                target_modules=targets,
                task_type="SEQ_CLS" if head else None,  # PEFT trains a classifier's head in full beside the adapters
                **self.adapter,
            )
            if self.gradient_batches:
                # PEFT looks for names here, where it knows no "all-linear" yet.
                config.target_modules = [
                    name.removesuffix(".weight") for name in adapted_matrices(model, targets, head)
                ]
                preprocess_loraga(model, config, lambda: task.first_loss(model, seed, self.gradient_batches).backward())
            trained = get_peft_model(model, config)
            if self.gradient_batches:
                for layer in trained.modules():
                    if isinstance(layer, LoraLayer):
                        self._place_start(layer)
        new = [p for name, p in trained.named_parameters() if head and head in name and p.requires_grad]
        group = {"params": new, "lr": task.head_rate}
        return Prepared(trained, self.build(trained, group, lr, rank, **self.switches), self.own_clip)

    @torch.no_grad()
    def _place_start(self, layer: LoraLayer) -> None:
        weight, start = layer.get_base_layer().weight, layer.get_delta_weight("default")
        weight += start  # which PEFT has taken out
        if self.start_length is not None:
            layer.lora_B["default"].weight.mul_(self.start_length / float(start.norm()))
        if not self.left_in:
            weight -= layer.get_delta_weight("default")


@dataclass(frozen=True)
class Prepared:
    """A model with its optimizers, ready to be trained."""

    model: nn.Module
    optimizers: list[Optimizer]
    own_clip: bool


def adapted_matrices(model: nn.Module, targets: str | list[str], head: str) -> list[str]:
    """The weights that adapters on ``targets`` stand for, by name."""
    shell = copy.deepcopy(model).to("meta")  # PEFT puts its layers into the model that it is given
    get_peft_model(shell, LoraConfig(r=1, target_modules=targets, task_type="SEQ_CLS" if head else None))
    return [f"{name}.weight" for name, module in shell.named_modules() if isinstance(module, LoraLayer)]


def _rest(model: nn.Module, head: Group) -> list[nn.Parameter]:
    apart = {id(p) for p in head["params"]}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in apart]


def _groups(model: nn.Module, head: Group, lr: float) -> list[dict[str, Any]]:
    groups = [{"params": _rest(model, head), "lr": lr}]
    return [*groups, head] if head["params"] else groups


def adamw(model: nn.Module, head: Group, lr: float, rank: int) -> list[Optimizer]:
    """AdamW on all that is trained."""
    return [AdamW(_groups(model, head, lr), weight_decay=0.0)]


def loft(model: nn.Module, head: Group, lr: float, rank: int, **switches: Any) -> list[Optimizer]:
    """LoFT."""
    return [LoFTAdamW(model, params=_groups(model, head, lr), **{"max_grad_norm": CLIP, **switches})]


def truncated(accumulated: bool, remainder_kept: bool) -> Callable[..., list[Optimizer]]:
    """AdamW whose steps or change are cut to the rank."""
    return lambda model, head, lr, rank: [TruncatedAdamW(_groups(model, head, lr), rank, accumulated, remainder_kept)]


def of_adapters(create: Callable[..., Optimizer]) -> Callable[..., list[Optimizer]]:
    """An optimizer of the adapters, AdamW for the head."""

    def build(model: nn.Module, head: Group, lr: float, rank: int) -> list[Optimizer]:
        for p in head["params"]:  # out of its sight
            p.requires_grad_(False)
        optimizers = [create(model, lr, rank)]
        for p in head["params"]:
            p.requires_grad_(True)
        return [*optimizers, *([AdamW([head], weight_decay=0.0)] if head["params"] else [])]

    return build


def lora_fa(model: nn.Module, lr: float, rank: int) -> Optimizer:
    """PEFT's LoRA-FA of the adapters alone: it takes every parameter of the model that ever has a gradient."""
    optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=lr)
    (group,) = optimizer.param_groups
    kept = [index for index, name in enumerate(group["names"]) if "lora_" in name]
    group.update({key: [group[key][index] for index in kept] for key in ("params", "names", "scaling_factors")})
    return optimizer


GRADIENT = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
FULL = (3e-5, 1e-4, 3e-4, 1e-3)
LORA = (3e-4, 1e-3, 3e-3, 1e-2)  # ScaLoRA's too: its factors are as long as LoRA's, and its steps are Adam's
SPECTRAL = (1e-2, 3e-2, 1e-1, 3e-1)  # LoRA-Muon's paper finds 0.1 best: the spectral norm of a step
K_FAC = (3e-2, 1e-1, 3e-1, 1.0)  # PSI-LoRA's authors search from 0.1 to 0.5 and take 0.2
LOFT_SWITCHES: dict[str, dict[str, Any]] = {
    "LoFT": {},
    "LoFT, joint": {"turns": "joint"},
    "LoFT, alternate": {"turns": "alternate"},
    "LoFT as published": {"blocks": Blocks.published()},
    "LoFT without bias calibration": {"blocks": Blocks(bias_calibration=False)},
    "LoFT without balancing": {"blocks": Blocks(balancing=False)},
    "LoFT without gradient scaling": {"blocks": Blocks(gradient_scaling=False)},
    "LoFT without momentum calibration": {"blocks": Blocks(momentum_calibration=False)},
    "LoFT without second-moment calibration": {"blocks": Blocks(second_moment_calibration=False)},
    "LoFT without projected update": {"blocks": Blocks(projected_update=False)},
    "LoFT without projected clipping": {"blocks": Blocks(projected_clipping=False)},
    "LoFT simple": {"blocks": Blocks(second_moment="elementwise")},
    "LoFT, eps 1e-6": {"eps": 1e-6},
    "LoFT, no clipping": {"max_grad_norm": None},
}
LOFT = Method(FULL, loft, adapter={}, own_clip=True)
FROM_GRADIENTS = replace(LOFT, adapter=GRADIENT, gradient_batches=4)
OUT: dict[str, Any] = {"start_length": LENGTH}
IN = OUT | {"left_in": True}
STARTS: dict[str, dict[str, Any]] = {
    "LoFT, first directions from gradients": {},
    "LoFT, gradient start": OUT,
    "LoFT, gradient start left in": IN,
    "LoFT, gradient start, no warm-up": OUT | {"warm_up": 0.0},
    "LoFT, gradient start left in, no warm-up": IN | {"warm_up": 0.0},
}
PLAIN_LORA = Method(LORA, adamw, adapter={})
MATRICES = Method(FULL, adamw, matrices_only=True)
CUTS = {
    "AdamW, change cut to rank r": truncated(accumulated=True, remainder_kept=False),
    "AdamW, change cut to rank r, remainder kept": truncated(accumulated=True, remainder_kept=True),
    "AdamW, each step cut to rank r": truncated(accumulated=False, remainder_kept=False),
    "AdamW, each step cut to rank r, remainder kept": truncated(accumulated=False, remainder_kept=True),
}
METHODS: dict[str, Method] = {
    "full": Method(FULL, adamw),
    "full, adapted matrices alone": MATRICES,
    "full, adapted matrices alone, no warm-up": replace(MATRICES, warm_up=0.0),
    "head alone": Method((0.0,), adamw, matrices_only=True),
    **{name: replace(MATRICES, build=build) for name, build in CUTS.items()},
    "LoRA": PLAIN_LORA,
    "LoRA, no warm-up": replace(PLAIN_LORA, warm_up=0.0),
    "LoRA, alpha = r": replace(PLAIN_LORA, alpha_over_rank=1.0),
    "LoRA, alpha = 4 r": replace(PLAIN_LORA, alpha_over_rank=4.0),
    "rsLoRA": Method(LORA, adamw, adapter={"use_rslora": True}),
    "PiSSA": Method(LORA, adamw, adapter={"init_lora_weights": "pissa"}),
    "LoRA-GA": Method(LORA, adamw, adapter=GRADIENT, gradient_batches=4),
    "LoRA+": Method(
        LORA,
        of_adapters(lambda model, lr, rank: create_loraplus_optimizer(model, AdamW, lr=lr, loraplus_lr_ratio=16.0)),
        adapter={},
    ),
    "LoRA-FA": Method(LORA, of_adapters(lora_fa), adapter={}),
    "Riemannian": Method(
        LORA,
        of_adapters(lambda model, lr, rank: create_riemannian_optimizer(model, AdamW, lr=lr, weight_decay=0.0)),
        adapter={},
    ),
    "LoRA-Pro": Method(FULL, of_adapters(lambda model, lr, rank: LoRAPro(model, lr)), adapter={}),
    # Clipped by its own norm, and the head's gradient by none.
    "LoRA-RITE": Method(
        LORA, of_adapters(lambda model, lr, rank: LoRARITE(model, lr, CLIP)), adapter={}, own_clip=True
    ),
    "AltLoRA+": Method(LORA, of_adapters(lambda model, lr, rank: AltLoRAPlus(model, lr)), adapter={}),
    "LoRA-Muon": Method(SPECTRAL, of_adapters(lambda model, lr, rank: LoRAMuon(model, lr)), adapter={}),
    # Clipped by the norm of the full gradients, as by its authors, and the head's gradient by none.
    "PSI-LoRA": Method(K_FAC, of_adapters(lambda model, lr, rank: PSILoRA(model, lr, CLIP)), adapter={}, own_clip=True),
    "ScaLoRA": Method(LORA, of_adapters(lambda model, lr, rank: ScaLoRA(model, lr)), adapter={}),
    **{name: replace(LOFT, switches=switches) for name, switches in LOFT_SWITCHES.items()},
    "LoFT, no warm-up": replace(LOFT, warm_up=0.0),
    "LoFT, warm-up of 30%": replace(LOFT, warm_up=0.3),
    **{name: replace(FROM_GRADIENTS, **changes) for name, changes in STARTS.items()},
    "LoFT, first directions from the weight": replace(LOFT, adapter={"init_lora_weights": "pissa"}),
}

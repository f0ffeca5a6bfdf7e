"""A backbone with a head for a task. Of the backbone only this is used: tokens in, hidden states [B, T, D] out.

Heads are those of transformers' Llama and BERT classes, so that an exported model gives equal logits there.

Legend: B rows, T positions, D model width, C labels.
"""

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainers.model.lora import add_lora
from trainers.tasks.encoding import IGNORED, Batch
from trainers.tasks.task import TaskConfig

SHORT_TOKENS = 64
"""Rows up to this length count as short."""
LAYER = re.compile(r"\blayers\.(\d+)\.")
PER_TEXT = ("classification", "pairs", "regression")
"""Kinds that score a text as a whole."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What of a pretrained backbone is trained, and how fast."""

    train: Literal["full", "head", "lora"] = "full"
    """All weights; the new head alone; or the head and low-rank adapters (Hu et al. 2021)."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    layer_decay: float = 1.0
    """Learning rate of a layer as a share of that of the layer above (Howard & Ruder 2018, section 3.2)."""
    dropout: float = 0.1
    """Share of the hidden units that the head does not see, in training."""
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    """Which hidden state stands for a text; auto: last under causal attention, else first. transformers' classes
    know only these; a model with mean loads in this project alone."""

    def problems(self, at: str) -> Iterator[str]:
        if self.lora_rank < 1:
            yield f"{at}.lora_rank={self.lora_rank} must be at least 1"
        if not 0 < self.layer_decay <= 1:
            yield f"{at}.layer_decay={self.layer_decay} must be above 0 and at most 1"
        if not 0 <= self.dropout < 1:
            yield f"{at}.dropout={self.dropout} must be at least 0 and below 1"


def is_causal(backbone: nn.Module) -> bool:
    """Whether a position sees only those before it."""
    config: Any = backbone.config
    return getattr(config, "attention", "causal") == "causal"


def natural_pooling(causal: bool) -> Literal["last", "first"]:
    """The hidden state that stands for a text in transformers' classes."""
    return "last" if causal else "first"


class TaskHead(nn.Module):
    """From hidden states to scores. An encoder's text is pooled through a dense layer and tanh, as in BERT
    (Devlin et al. 2018); a decoder's is not, as in GPT (Radford et al. 2018, section 3.2)."""

    def __init__(self, width: int, outputs: int, dropout: float, *, pooler: bool, bias: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pooler = nn.Linear(width, width) if pooler else None
        self.out = nn.Linear(width, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        return self.out(self.dropout(x))


class TaskModel(nn.Module):
    """Scores of a batch, or with targets the weighted sum of its losses.

    Scores: [B, C] of labels; [B] of numbers, in deviations from the train mean; [B, T, C] of tags; [B, T, 2]
    of the answer's first and last position. Generation has no scores: its losses come from the backbone's own
    head.
    """

    def __init__(self, backbone: nn.Module, task: TaskConfig, adapt: AdaptConfig, seed: int) -> None:
        super().__init__()
        self.kind, self.multi_label = task.kind, task.multi_label
        self.causal = is_causal(backbone)
        self.pooling = adapt.pooling
        if self.pooling == "auto":
            self.pooling = natural_pooling(self.causal)
        self.backbone = backbone
        self.head: TaskHead | None = None
        if adapt.train == "head":
            backbone.requires_grad_(False)
        elif adapt.train == "lora":
            add_lora(backbone, adapt.lora_targets, adapt.lora_rank, adapt.lora_alpha, seed)
        if task.kind != "generation":
            pretrained: Any = getattr(backbone, "pair_head", None)
            for name in ("lm_head", "pair_head"):  # they would be trained for nothing
                if getattr(backbone, name, None) is not None:
                    setattr(backbone, name, None)
            config: Any = backbone.config
            per_text = task.kind in PER_TEXT
            self.head = TaskHead(
                config.hidden_size,
                {"regression": 1, "question_answering": 2}.get(task.kind, len(task.labels)),
                adapt.dropout,
                pooler=per_text and not self.causal,
                bias=not (per_text and self.causal),
            )
            initialize_head(self.head, seed)
            if pretrained is not None and self.head.pooler is not None:
                self.head.pooler.load_state_dict(pretrained.pooler.state_dict())

    def forward(
        self,
        tokens_BT: Tensor,
        mask_BT: Tensor,
        types_BT: Tensor,
        targets: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the scores, float32; with `targets` the sum of the losses in nats (squares, of numbers), each
        weighted by its class: [C], or of several labels [2, C], without and with the label."""
        if self.kind == "generation":
            assert targets is not None, "generation scores through trainers.generate"
            return self.answer_losses(tokens_BT, targets)[0]
        assert self.head is not None
        hidden_BTD = self.hidden(tokens_BT, mask_BT, types_BT)
        if self.kind in PER_TEXT:
            scores = self.head(self.pool(hidden_BTD, mask_BT)).float()
            scores = scores.squeeze(-1) if self.kind == "regression" else scores
        else:
            scores = self.head(hidden_BTD).float()
        return scores if targets is None else loss_sum(self.kind, scores, targets, mask_BT, class_weights)

    def hidden(self, tokens_BT: Tensor, mask_BT: Tensor, types_BT: Tensor) -> Tensor:
        """The backbone's hidden states. Under causal attention padding on the right is not seen anyway."""
        with attention_for(tokens_BT):
            if self.causal:
                return self.backbone(tokens_BT)
            segments_BT = torch.where(mask_BT, 0, -1)
            return self.backbone(tokens_BT, segments_BT, types_BT=types_BT)

    def pool(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The hidden state that stands for each text, [B, D]."""
        if self.pooling == "first":
            return hidden_BTD[:, 0]
        if self.pooling == "mean":
            weights_BT1 = mask_BT[:, :, None].to(hidden_BTD.dtype)
            return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        last_B = mask_BT.sum(dim=1) - 1
        return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B]

    def answer_losses(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of all answers, with a gradient, and of each row's [B]: the tokens that have a weight, given
        those before them."""
        total, per_row_B = self.backbone(
            tokens_BT[:, :-1], None, None, tokens_BT[:, 1:], weights_BT[:, 1:].contiguous()
        )[:2]
        return total, per_row_B


def attention_for(tokens_BT: Tensor) -> AbstractContextManager[Any]:
    """Plain matrix products for short rows in training on a CPU, whose fused kernel is slow backwards: a step of 32
    rows of 42 tokens with 14 M parameters took 0.44 s instead of 0.61 on two cores."""
    if tokens_BT.is_cpu and tokens_BT.shape[1] <= SHORT_TOKENS and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def likelihoods(task: TaskConfig, scores: Tensor) -> Tensor:
    """Scores of labels or tags as probabilities: of several labels, of having each. Others as they are: numbers, and
    the ends of an answer, which only its reader knows to lie in the context."""
    if task.kind in ("regression", "question_answering"):
        return scores
    return scores.sigmoid() if task.multi_label else scores.softmax(-1)


def loss_sum(
    kind: str, scores: Tensor, targets: Tensor, mask_BT: Tensor, class_weights: Tensor | None
) -> Tensor:
    """Weighted sum over the targets of a batch."""
    if kind == "regression":
        return F.mse_loss(scores, targets, reduction="sum")
    if kind == "question_answering":
        scores = scores.masked_fill(~mask_BT[:, :, None], -torch.inf)
        first, last = (F.cross_entropy(scores[:, :, i], targets[:, i], reduction="sum") for i in (0, 1))
        return (first + last) / 2
    if targets.is_floating_point():
        weights_BC = None if class_weights is None else weights_of(targets, class_weights)
        return F.binary_cross_entropy_with_logits(scores, targets, weights_BC, reduction="sum")
    return F.cross_entropy(
        scores.flatten(0, -2), targets.flatten(), class_weights, ignore_index=IGNORED, reduction="sum"
    )


def weights_of(targets_BC: Tensor, class_weights_2C: Tensor) -> Tensor:
    """Weight of each decision on a label, [B, C]: of one that is right to give it, or not to."""
    return torch.where(targets_BC > 0, class_weights_2C[1], class_weights_2C[0])


def target_weight(kind: str, batch: Batch, class_weights: Tensor | None) -> float:
    """What the loss sum of a batch is to be divided by."""
    targets = batch.targets
    assert targets is not None
    if kind == "generation":
        return float(targets[:, 1:].sum())
    if kind in ("regression", "question_answering"):
        return float(len(targets))
    if targets.is_floating_point():
        return float(targets.numel() if class_weights is None else weights_of(targets, class_weights).sum())
    counted = targets[targets != IGNORED]
    return float(len(counted) if class_weights is None else class_weights[counted].sum())


def initialize_head(head: TaskHead, seed: int) -> None:
    """Normal with deviation 0.02, biases zero, as in BERT and GPT; the same at every seed's every start."""
    generator = torch.Generator().manual_seed(seed + 0x5EED)
    with torch.no_grad():
        for parameter in head.parameters():
            values = torch.zeros(parameter.shape)
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(values)


def rate_scales(model: TaskModel, decay: float) -> dict[str, float]:
    """Share of its learning rate that each trained parameter gets: decay ** (layers above it)."""
    config: Any = model.backbone.config
    num_layers = config.num_layers
    scales = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            match = LAYER.search(name)
            depth = num_layers - int(match[1]) if match else num_layers + 1 if "embed" in name else 0
            scales[name] = math.pow(decay, depth)
    return scales

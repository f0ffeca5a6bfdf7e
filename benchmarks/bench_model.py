"""Where a training step of the sample's model goes on one CPU thread, and what other shapes would cost.

    python benchmarks/bench_model.py [--seconds 40] [--rows 4]

Compiled, bf16 weights, random tokens. The variants take turns within one process, so that what else the
machine does falls on all alike; the times are the best of all turns, in CPU seconds. `torch's attention`
leaves out our backward pass for it, `no attention` shows what all of attention costs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

import trainers.model.layers
from trainers.model.attention import attend
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig, flops_per_token
from trainers.objectives.causal import causal_lm

SAMPLE = ModelConfig(
    vocab_size=4_096,
    hidden_size=384,
    num_layers=6,
    num_heads=6,
    intermediate_size=1_024,
    max_positions=512,
)
SEQ_LEN = 512
WARMUP_TURNS = 2


def torchs_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def no_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    return q + k + v


@dataclass
class Variant:
    """A model under measurement; the seconds of each turn's forward and backward pass and AdamW update."""

    name: str
    config: ModelConfig
    attention: Callable[..., Tensor] = attend
    turns: list[tuple[float, float, float]] = field(default_factory=list)

    def prepare(self, rows: int) -> None:
        """Build and compile."""
        self.model = build(self.config, seed=0, dtype=torch.bfloat16)
        self.check_attention()
        self.model.forward = torch.compile(self.model.forward)  # type: ignore[method-assign]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens = torch.randint(self.config.vocab_size, (rows, SEQ_LEN + 1))
        for _ in range(WARMUP_TURNS):
            self.turn()
        self.turns.clear()

    def check_attention(self) -> None:
        """Stop if the model does not attend as this variant says: all variants would be the same model."""
        calls = 0

        def counting(*arguments: Any, **named: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return self.attention(*arguments, **named)

        tokens = torch.zeros(1, 9, dtype=torch.int64)
        with swapped(counting), torch.no_grad():
            causal_lm(self.model, tokens, torch.ones(1), boundary_id=0)
        if calls != self.config.num_layers:
            raise RuntimeError(
                f"variant {self.name!r}: {calls} of {self.config.num_layers} layers use its attention; "
                "let `swapped` set the name that trainers/model/layers.py calls"
            )

    def turn(self) -> None:
        """Do a step and keep its times."""
        with swapped(self.attention):
            started = time.process_time()
            loss = causal_lm(self.model, self.tokens, torch.ones(len(self.tokens)), boundary_id=0).total
            forward = time.process_time()
            loss.backward()
            backward = time.process_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.turns.append((forward - started, backward - forward, time.process_time() - backward))


@contextmanager
def swapped(attention: Callable[..., Tensor]) -> Iterator[None]:
    """Let the model use `attention`; compiled code checks which it was made with."""
    trainers.model.layers.attend = attention
    try:
        yield
    finally:
        trainers.model.layers.attend = attend


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40, help="of measuring, after compilation")
    parser.add_argument("--rows", type=int, default=4, help=f"of {SEQ_LEN} tokens, per step")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    variants = [
        Variant("sample", SAMPLE),
        Variant("torch's attention", SAMPLE, torchs_attention),
        Variant("3 heads of 128", replace(SAMPLE, num_heads=3)),
        Variant("3 heads of 128, torch's attention", replace(SAMPLE, num_heads=3), torchs_attention),
        Variant("no attention", SAMPLE, no_attention),
    ]
    for variant in variants:
        variant.prepare(arguments.rows)
    ending = time.monotonic() + arguments.seconds
    while time.monotonic() < ending:
        for variant in variants:
            variant.turn()
    print_table(variants, arguments.rows * SEQ_LEN)


def print_table(variants: Sequence[Variant], tokens: int) -> None:
    print("| variant | forward, ms | backward, ms | AdamW, ms | tokens/s | to the first | GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    first = 0.0
    for variant in variants:
        parts = [min(column) for column in zip(*variant.turns, strict=True)]
        rate = tokens / min(sum(turn) for turn in variant.turns)
        first = first or rate
        flops = rate * flops_per_token(variant.config, SEQ_LEN) / 1e9
        times = " | ".join(f"{1e3 * part:.0f}" for part in parts)
        print(f"| {variant.name} | {times} | {rate:,.0f} | {rate / first:.2f} | {flops:.0f} |")


if __name__ == "__main__":
    main()

"""Whole training steps of the generator beside stock GPT-2: forward, backward, clipping, AdamW, in bf16 under autocast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from empcause import use_backend
from empcause.data.sequences import IGNORED
from empcause.generator import EmpatheticGPT2Config, EmpatheticGPT2LMHeadModel

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}


@dataclass(frozen=True)
class Texts:
    """A batch of texts of several lengths, the longest first and the last a quarter of it.

    Attributes:
        name: in the results.
        number, longest: of the texts, and of the longest one's tokens.
        packed: one row, the texts one after another, in place of one padded row for each.
    """

    name: str
    number: int
    longest: int
    packed: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [self.longest - 3 * self.longest * i // (4 * max(1, self.number - 1)) for i in range(self.number)]


# Names by which this package's attention gets packed texts; stock attention finds them in position_ids, without a mask.
PACKING = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def make_batch(texts: Texts, vocabulary: int, device: str) -> dict[str, Any]:
    """Draw tokens and return them under the names of the generator's `forward`; the last quarter of each text is labelled."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in texts.lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        answer = torch.arange(length) >= length - length // 4
        rows.append(
            {
                "input_ids": ids,
                "token_type_ids": answer.long(),
                "labels": torch.where(answer, ids, IGNORED),
                "cause_probs": torch.where(answer, 0.0, torch.rand(length, generator=generator)),
                "position_ids": torch.arange(length),
            }
        )
        # The first token of a packed text must not be predicted from the text before it.
        rows[-1]["labels"][0] = IGNORED
    if texts.packed:
        batch: dict[str, Any] = {name: torch.cat([row[name] for row in rows])[None] for name in rows[0]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, *texts.lengths]).cumsum(0).int()
        batch["max_length_q"] = batch["max_length_k"] = texts.longest
    else:
        fills = {"labels": IGNORED}
        batch = {
            name: nn.utils.rnn.pad_sequence([row[name] for row in rows], True, fills.get(name, 0)) for name in rows[0]
        }
        lengths = torch.tensor(texts.lengths)[:, None]
        batch["attention_mask"] = (torch.arange(texts.longest) < lengths).long()
        del batch["position_ids"]
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@dataclass(frozen=True)
class Variant:
    """A model that is trained.

    Attributes:
        name: in the results.
        attention: implementation of attention by its name in transformers.
        generator: the empathetic generator in place of stock GPT-2.
        backend: of `biased_attention`, where the generator uses causes.
        compiled: through `torch.compile`.
    """

    name: str
    attention: str
    generator: bool = False
    backend: str | None = None
    compiled: bool = False


def variants(backends: list[str], compiled: bool) -> list[Variant]:
    """Return what is compared: the generator with causes, stock GPT-2 with SDPA and with eager attention, and without causes."""
    found = [Variant(f"generator, empcause {name}", "empcause", True, name, compiled) for name in backends]
    found.append(Variant("stock, sdpa", "sdpa", compiled=compiled))
    found.append(Variant("stock, eager", "eager", compiled=compiled))
    if not compiled:
        found.append(Variant("generator without causes, sdpa", "sdpa", generator=True))
    return found


def build(variant: Variant, sizes: dict[str, Any], device: str) -> nn.Module:
    """Return the model with random weights, the same for all variants."""
    torch.manual_seed(0)
    classes: tuple[Any, Any] = (GPT2Config, GPT2LMHeadModel)
    if variant.generator:
        classes = (EmpatheticGPT2Config, EmpatheticGPT2LMHeadModel)
    config_class, model_class = classes
    config = config_class(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)
    return model_class._from_config(config, attn_implementation=variant.attention).to(device)


def loss_of(model: Callable[..., Any], variant: Variant, batch: dict[str, Any]) -> Tensor:
    """Return the loss under bf16 autocast; stock models are not given what they do not know."""
    names = set(batch)
    if "cu_seq_lens_q" in batch and variant.attention != "empcause":
        names -= set(PACKING)
    if variant.backend is None:
        names.discard("cause_probs")
    if not variant.generator:
        names.discard("token_type_ids")
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        return model(**{name: batch[name] for name in names}).loss


def make_step(model: nn.Module, variant: Variant, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a function that takes one optimiser step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=batch["input_ids"].is_cuda)
    run = torch.compile(model) if variant.compiled else model
    model.train()

    def step() -> None:
        loss_of(run, variant, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepare(variant: Variant, texts: Texts, sizes: dict[str, Any], device: str) -> Callable[[], None]:
    """Return a step of a model that was built for it, on a batch of these texts."""
    model = build(variant, sizes, device)
    return make_step(model, variant, make_batch(texts, sizes["vocab_size"], device))


def judge(variant: Variant, texts: Texts, sizes: dict[str, Any], device: str) -> str | None:
    """Say where a backend's loss or gradients are not the reference's for the same weights; None if they are.

    Args:
        variant: with a backend.
    """
    assert variant.backend is not None
    batch = make_batch(texts, sizes["vocab_size"], device)
    model = build(variant, sizes, device).eval()
    figures = []
    for backend in ("reference", variant.backend):
        with use_backend(backend):
            loss = loss_of(model, variant, batch)
            loss.backward()
        norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
        model.zero_grad(set_to_none=True)
        figures.append((loss.item(), norm.item()))
    for name, expected, got in zip(("loss", "gradient norm"), *figures, strict=True):
        if not abs(got - expected) <= 0.01 * abs(expected):
            return f"{name} {got:.5g}, with the reference {expected:.5g}"
    return None

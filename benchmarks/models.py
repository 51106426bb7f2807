"""Stock GPT-2 with this package's attention, steered or not, beside other attention: generation, and the host's time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from empcause import steer, use_backend

COMPILED = "static cache, compiled"
# By their names in the results: what `generate` is told about its cache.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    COMPILED: {"cache_implementation": "static"},
}
JUDGED_TOKENS = 8
TOLERANCE = 1e-3  # of logits, in their standard deviation


@dataclass(frozen=True)
class Attention:
    """A way in which the model attends.

    Attributes:
        name: in the results.
        implementation: by its name in transformers.
        backend: of `biased_attention`, where that is it.
        steered: whether causes bias it.
    """

    name: str
    implementation: str
    backend: str = "reference"
    steered: bool = False


def attentions(backends: list[str]) -> list[Attention]:
    """Return what is compared: these backends, not steered and steered, SDPA and eager attention."""
    found = []
    for backend in backends:
        found.append(Attention(f"empcause {backend}", "empcause", backend))
        found.append(Attention(f"empcause {backend}, steered", "empcause", backend, steered=True))
    return [*found, Attention("sdpa", "sdpa"), Attention("eager", "eager")]


class Prompts:
    """A model with random weights, and prompts for it.

    Attributes:
        name: in the results.
    """

    def __init__(
        self, sizes: dict[str, Any], batch: int, tokens: int, new_tokens: int, device: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.name = f"GPT-2, {batch} prompts of {tokens} tokens, {new_tokens} new tokens"
        self.model: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(device, dtype).eval()
        self.model.generation_config.pad_token_id, self.model.generation_config.eos_token_id = 0, None
        self.ids = torch.randint(1, sizes["vocab_size"], (batch, tokens), device=device)
        self.causes = torch.rand(batch, tokens, device=device)
        self.new_tokens = new_tokens

    @contextmanager
    def attending(self, attention: Attention) -> Iterator[None]:
        """Let the model attend in a way while the context lasts."""
        self.model.set_attn_implementation(attention.implementation)
        with use_backend(attention.backend):
            if not attention.steered:
                yield
                return
            with steer(self.model, self.causes):
                yield

    def generate(self, attention: Attention, cache: dict[str, Any], **options: Any) -> Any:
        """Generate greedily, and return what transformers' `generate` returns with these options."""
        options = {"attention_mask": torch.ones_like(self.ids), "do_sample": False} | cache | options
        with self.attending(attention):
            return self.model.generate(self.ids, max_new_tokens=self.new_tokens, **options)

    def passes(self, backend: str) -> dict[str, Callable[[], object]]:
        """Return one pass of the model, as it attends now, over the prompts, by direction.

        Args:
            backend: of `biased_attention`.
        """

        def forward() -> None:
            with use_backend(backend), torch.no_grad():
                self.model(self.ids)

        def with_gradients() -> None:
            with use_backend(backend):
                self.model(self.ids, labels=self.ids).loss.backward()
            self.model.zero_grad(set_to_none=True)

        return {"forward": forward, "forward+backward": with_gradients}


def judge(attention: Attention, sizes: dict[str, Any], device: str) -> str | None:
    """Say whether a model in fp32 has other logits than with the reference while it generates; None if it has not.

    The tokens would say little: with random weights they hardly depend on the attention.
    """
    prompts = Prompts(sizes, 2, 12, JUDGED_TOKENS, device, torch.float32)
    reference = Attention("reference", "empcause", steered=attention.steered)
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    for name in ("dynamic cache", "static cache"):
        expected, got = (
            torch.stack(prompts.generate(each, CACHES[name], **wanted).logits) for each in (reference, attention)
        )
        error = ((got - expected).abs().max() / expected.std()).item()
        if not error <= TOLERANCE:
            return f"logits with a {name} are off by {error:.1e} of their standard deviation, allowed {TOLERANCE:.0e}"
    return None

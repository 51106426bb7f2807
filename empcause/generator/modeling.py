"""The generators: a causal LM with a role embedding (eq 13) and biased attention in every layer (eq 14-18)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple

from empcause.data.sequences import IGNORED
from empcause.errors import UserError
from empcause.generator.configuration import EmpatheticGPT2Config, EmpatheticLlamaConfig
from empcause.integration.masks import biased_attention_mask
from empcause.ops.torch_internals import is_fake

NUM_ROLES = 2


@dataclass
class GeneratorOutput(CausalLMOutputWithCrossAttentions):
    """Result of a generator that was given labels: losses in place of logits, which are computed only for labelled tokens.

    Its other entries (cache, hidden states, attentions) are those of the base model.

    Attributes:
        loss: 0-d float32, the sum over the labelled tokens divided by their number or by `num_items_in_batch` (eq 12).
        logits: None; call the model without labels to have them.
        token_losses: float32 in nats, negative log-likelihood of each labelled token, without smoothing, and 0 where the label is
            -100. `[B, S]`, with 0 at the first position, which nothing predicts; or of the shape of `shift_labels` if these were
            given. None in training mode, which does not need them.
    """

    token_losses: Tensor | None = None


class EmpatheticMixin:
    """Makes a causal LM of transformers an empathetic generator; it stands before the model's class among the base classes.

    It adds a role embedding, which `token_type_ids` index (eq 13), and `cause_probs`, which bias the attention of every layer
    (eq 14-18) and need `attn_implementation="empcause"`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.role_embedding = nn.Embedding(NUM_ROLES, config.hidden_size)
        self.post_init()  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is getattr(self, "role_embedding", None):
            nn.init.zeros_(module.weight)  # a role has no effect until it is trained

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cause_probs: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Compute next-token logits, or the losses of the labelled tokens.

        Dialogues may be packed into one row, as `empcause.data.collation.pack_batch` does it: `position_ids`, `cu_seq_lens_q`,
        `cu_seq_lens_k`, `max_length_q` and `max_length_k` then take the place of `attention_mask`. With `logits_to_keep` and
        `shift_labels` no shape depends on values, so that the model can be compiled and a GPU is not waited for.

        Args:
            input_ids: `[B, S]` integer token ids.
            attention_mask: `[B, S]`, 0 at padding.
            token_type_ids: `[B, S]` integer roles, 0 speaker and 1 listener.
            cause_probs: `[B, n]` floating point in [0, 1] for the first n tokens, n <= S (with a cache: n at most the number of
                keys so far); later tokens have 0.
            labels: `[B, S]` integer token ids, -100 where a token does not count; shifted here, as in transformers' models.
            position_ids, inputs_embeds, use_cache: as for the base model. (`generate` passes those that are named here.)
            logits_to_keep: as for the base model; beside `shift_labels` a number, or `[L]`.
            num_items_in_batch: the number by which the summed loss is divided; default is the number of labelled tokens.
            smoothing: share of every label that is spread evenly over the vocabulary, in [0, 1). (Its name does not contain
                "label", because the Trainer would take it for a label.)
            **kwargs: `shift_labels` `[B, L]`, integer token ids that follow the L positions of `logits_to_keep`, -100 where none
                counts: they are used in the place of `labels`, as in transformers' models (and are not named above for the
                Trainer's sake, either). Others are as for the base model; the cache is among them, under the name that this
                version of transformers has for it.

        Returns:
            Without labels the base model's output, with labels a `GeneratorOutput`; with `return_dict=False` a tuple of its
            entries that are not None, in order.

        Raises:
            ValueError: labels or roles have another shape than is expected, or are out of range; or `cause_probs` are given to a
                model with another attention implementation.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        self._check_inputs(tokens, token_type_ids, labels, logits_to_keep, shift_labels)
        if cause_probs is not None:
            self._check_attention()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        if token_type_ids is not None:
            inputs_embeds = inputs_embeds + self.role_embedding(token_type_ids)
        if cause_probs is not None:
            kwargs = {"cause_gamma": self.config.gamma} | kwargs | {"cause_probs": cause_probs}  # type: ignore[attr-defined]
        if kwargs.get("cu_seq_lens_q") is not None:
            use_cache = bool(use_cache)
            if attention_mask is None and self.config._attn_implementation == "empcause":  # type: ignore[attr-defined]
                # This mask hides nothing. Without a mask transformers would look for sequences in position_ids by their values.
                rows, length = inputs_embeds.shape[:2]
                attention_mask = biased_attention_mask(rows, length, length, device=inputs_embeds.device)
        kwargs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None and shift_labels is None:
            return super().forward(**kwargs, logits_to_keep=logits_to_keep)  # type: ignore[misc]
        base = self.base_model(**kwargs)  # type: ignore[attr-defined]
        hidden, token_losses = base.last_hidden_state, None
        if shift_labels is not None:
            chosen = isinstance(logits_to_keep, Tensor)
            hidden = hidden.index_select(1, logits_to_keep) if chosen else hidden[:, -logits_to_keep:]
            hidden, targets = hidden.flatten(0, 1), shift_labels.flatten()
        else:
            assert labels is not None
            counted = labels != IGNORED
            counted[:, 0] = False
            hidden, targets = hidden[:, :-1][counted[:, 1:]], labels[counted]
        logits = self.lm_head(hidden).float()  # type: ignore[attr-defined]
        total = nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        number = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum().clamp(min=1)
        if not self.training:  # type: ignore[attr-defined]
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            if shift_labels is not None:
                token_losses = losses.view(shift_labels.shape)
            else:
                token_losses = losses.new_zeros(counted.shape).masked_scatter(counted, losses)
        others = {name: value for name, value in base.items() if name != "last_hidden_state"}
        return GeneratorOutput(loss=total / number, token_losses=token_losses, **others)

    def _check_inputs(
        self,
        tokens: Tensor | None,
        roles: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        shift_labels: Tensor | None,
    ) -> None:
        """Refuse by name what an embedding or a loss would refuse with a bare IndexError.

        Values are looked at on the CPU alone: on a GPU every step would wait for them, and torch's kernels check them there.
        """
        vocabulary = self.config.vocab_size  # type: ignore[attr-defined]
        for name, values, number in (
            ("token_type_ids", roles, NUM_ROLES),
            ("labels", labels, vocabulary),
            ("shift_labels", shift_labels, vocabulary),
        ):
            if values is None or tokens is None:
                continue
            (rows, length), where = tokens.shape[:2], "token"
            if name == "shift_labels":
                kept = len(logits_to_keep) if isinstance(logits_to_keep, Tensor) else logits_to_keep
                length, where = kept or length, "position of logits_to_keep"
            shape = [rows, length]
            if list(values.shape) != shape:
                raise ValueError(f"{name} has shape {list(values.shape)}; expected {shape}, one per {where}.")
            if torch.compiler.is_compiling() or not values.is_cpu or is_fake(values):
                continue
            known = (values >= 0) & (values < number)
            if values is not roles:
                known |= values == IGNORED
            if not known.all():
                also = f", or {IGNORED} where none counts" if values is not roles else ""
                raise ValueError(f"{name} has {int(values[~known][0])}; expected 0 to {number - 1}{also}.")

    def _check_attention(self) -> None:
        implementation = self.config._attn_implementation  # type: ignore[attr-defined]
        if implementation != "empcause":
            raise ValueError(
                f"cause_probs was given, but the model runs with attn_implementation={implementation!r}, which would "
                'ignore it; load the model with attn_implementation="empcause".'
            )


class EmpatheticGPT2LMHeadModel(EmpatheticMixin, GPT2LMHeadModel):
    """GPT-2 as an empathetic generator (the paper's ECG)."""

    config_class = EmpatheticGPT2Config


class EmpatheticLlamaForCausalLM(EmpatheticMixin, LlamaForCausalLM):
    """A model of the Llama family as an empathetic generator."""

    config_class = EmpatheticLlamaConfig


# Configuration and model of the generator, by the `model_type` of the base model.
GENERATORS: dict[str, tuple[Any, Any]] = {
    "gpt2": (EmpatheticGPT2Config, EmpatheticGPT2LMHeadModel),
    "llama": (EmpatheticLlamaConfig, EmpatheticLlamaForCausalLM),
}

for _config, _model in GENERATORS.values():
    AutoModelForCausalLM.register(_config, _model)


def add_separator(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and model a separator token, whose embedding starts at the mean of those of all other tokens.

    A separator that the tokenizer already has keeps its embedding. A tokenizer without a padding token pads with the end token;
    this is safe because labels are masked by position.

    Args:
        model: a generator; its embeddings grow if they have no row to spare.
        tokenizer: its tokenizer.

    Raises:
        UserError: the tokenizer has no end token.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer {tokenizer.name_or_path!r} has no end token, which every response needs.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trained = sorted(set(tokenizer.get_vocab().values()))
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    rows = model.get_input_embeddings().num_embeddings
    trained = [token for token in trained if token < rows]
    new = sorted(set(tokenizer.get_vocab().values()) - set(trained))
    if new and new[-1] >= rows:
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        # Spare rows, which belong to no token, do not count in the mean.
        for values in {id(values): values for values in (embeddings.weight, head.weight, head.bias)}.values():
            if values is not None:
                values[new] = values[trained].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id

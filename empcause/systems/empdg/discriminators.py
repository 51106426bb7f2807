"""EmpDG's discriminators, which tell generated from real responses, and the losses of training against them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import PreTrainedModel

from empcause.data.sequences import IGNORED
from empcause.systems.empdg.configuration import EmpDGConfig
from empcause.systems.empdg.modeling import CONTEXT, EmpDG, EmpDGContext, EmpDGOutput


class Discriminator(nn.Module):
    """Scores how real a response is, given the context's state and the turn with which the speaker goes on.

    Args:
        config: gives the number of words, and the width of the states.
    """

    def __init__(self, config: EmpDGConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.words = nn.Embedding(config.vocab_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.convolution = nn.Conv1d(width, width, 2)
        self.convolution_norm = nn.BatchNorm1d(width)
        self.bias = nn.Parameter(torch.randn(1, width))
        self.hidden = nn.Linear(width, width // 2)
        self.hidden_norm = nn.BatchNorm1d(width // 2)
        self.head = nn.Linear(width // 2, 1)

    def embed(self, ids: Tensor, probs: Tensor | None = None) -> Tensor:
        """Vectors of words times the square root of their size; words outside of the vocabulary are unknown words.

        Args:
            ids: `[B, T]` int64.
            probs: `[B, T, V]` probabilities with which a generator chose these words. They change no vector, but gradients go
                through them (straight-through).

        Returns:
            `[B, T, width]`.
        """
        vectors = self.words(torch.where(ids < self.config.vocab_size, ids, self.config.unk_token_id))
        if probs is not None:
            real = (ids != self.config.pad_token_id)[..., None]
            vectors = vectors + (probs - probs.detach()) * real @ self.words.weight
        return vectors * self.config.hidden_size**0.5

    def read(self, vectors: Tensor) -> Tensor:
        """States `[B, T, width]` of a response, of the vectors of its words."""
        return self.lstm(vectors)[0]

    def remember(self, ids: Tensor) -> Tensor:
        """Cell states `[B, width]` at the last real word of texts `[B, T]`, each of which has one."""
        lengths = (ids != self.config.pad_token_id).sum(1).cpu()
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][1][0]

    def score(self, states: Tensor, context: Tensor, learning: bool = False) -> Tensor:
        """Score responses.

        Args:
            states: `[B, T, width]` with `T >= 2`, what `read` gives.
            context: `[B, width]`, the context's state plus what `remember` gives for the speaker's next turn.
            learning: normalise by the batch, and keep its statistics for later. The batch needs generated and real responses
                then: the mean score of a batch is the same for all batches that are normalised by themselves. Otherwise, each
                response is scored by itself, by the statistics that were kept.

        Returns:
            `[B]`.
        """
        self.convolution_norm.train(learning)
        self.hidden_norm.train(learning)
        found = self.convolution_norm(self.convolution(states.transpose(1, 2))).relu().amax(2)
        found = self.hidden((found + context + self.bias).relu()).relu()
        return self.head(self.hidden_norm(found))[:, 0]


def gradient_penalty(score: Callable[[Tensor], Tensor], generated: Tensor, real: Tensor) -> Tensor:
    """Penalise slopes of a score other than 1 between generated and real responses (Gulrajani et al., NeurIPS 2017).

    Args:
        score: gives scores `[B]` for states `[B, T, width]`, each by its own states alone.
        generated, real: such states, of the same shape.

    Returns:
        0-d, the mean squared distance from 1 of the norm over time and features; its gradient reaches what `score` depends on.
    """
    share = torch.rand(len(real), 1, 1, device=real.device)
    between = (share * generated + (1 - share) * real).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


class AdversarialEmpDGConfig(EmpDGConfig):
    """Configuration of EmpDG with its discriminators; it has the fields of `EmpDGConfig`."""

    model_type = "empdg_adversarial"


class AdversarialEmpDG(PreTrainedModel):
    """EmpDG's generator with the discriminators against which it is trained.

    The semantic one reads texts, the emotional one reads their emotion words.

    Args:
        config: the configuration.
    """

    config_class = AdversarialEmpDGConfig
    _supports_sdpa = True

    config: AdversarialEmpDGConfig

    def __init__(self, config: AdversarialEmpDGConfig) -> None:
        super().__init__(config)
        values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        self.generator = EmpDG(EmpDGConfig(**values))
        self.discriminators = nn.ModuleDict({name: Discriminator(config) for name in ("semantic", "emotional")})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of the discriminators as those of the generator are drawn; LSTMs stay at torch's default."""
        self.generator._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The generator's word vectors."""
        return self.generator.words

    def forward(
        self,
        answered: Tensor,
        positive_places: Tensor,
        feedback: Tensor,
        feedback_places: Tensor,
        negatives: Tensor,
        negative_places: Tensor,
        generator_learns: bool,
        penalty_weight: float = 0.1,
        adversarial_weight: float = 1.0,
        straight_through: bool = True,
        smoothing: float = 0.0,
        **batch: Any,
    ) -> EmpDGOutput:
        """Compute the loss of the discriminators or that of the generator.

        Places are those of emotion words in a text, then that of its end token, then -1.

        Args:
            answered: `[N]` int64, the items whose response the speaker answers; the discriminators see these alone.
            positive_places: `[N, P]` int64 places in the items' `labels`.
            feedback: `[N, F]` int64, the speaker's next turns with their end tokens, then padding.
            feedback_places: `[N, P]` int64.
            negatives: `[N, L]` int64, the generator's answers with their end tokens, then padding.
            negative_places: `[N, P]` int64.
            generator_learns: whether the loss is the generator's.
            penalty_weight: weight of the gradient penalty in the discriminators' loss.
            adversarial_weight: weight of the discriminators' scores in the generator's loss.
            straight_through: whether the generator gets gradients through the words that it chose; as published it gets none,
                and the scores are a constant of its loss.
            smoothing: share of a word's target that is spread over the vocabulary.
            **batch: what `EmpDG.forward` takes.

        Returns:
            The loss, 0-d: of the discriminators the mean over items, of the generator the sum of `EmpDG.forward`, minus the mean
            score of its answers.
        """
        with torch.set_grad_enabled(generator_learns):
            context = self.generator.encode(**{name: batch[name] for name in CONTEXT})
        if generator_learns:
            output = self.generator(encoder_outputs=context, smoothing=smoothing, **batch)
        else:
            output = EmpDGOutput(loss=torch.zeros((), device=answered.device, requires_grad=True))
        if not len(answered):
            return output  # the loss depends on no discriminator, so that none gets a gradient
        probs = None
        if generator_learns and straight_through:
            probs = self._probs(context, answered, negatives, batch["extra_words"])
        padding, states = self.config.pad_token_id, context.last_hidden_state[answered].detach()  # type: ignore[index]
        positives = batch["labels"][answered]
        texts = [negatives, positives.masked_fill(positives == IGNORED, padding), feedback]
        places = [negative_places, positive_places, feedback_places]
        emotional = [_pick(*each, padding) for each in zip(texts, places, strict=True)]
        emotional_probs = None if probs is None else _pick_probs(probs, negative_places)
        # The states of the emotion words are behind those of the context's words.
        parts = {
            "semantic": (states[:, 0], texts, probs),
            "emotional": (states[:, batch["input_ids"].shape[1]], emotional, emotional_probs),
        }
        for name, (state, (generated, real, following), chosen) in parts.items():
            discriminator: Any = self.discriminators[name]
            about = state + discriminator.remember(following)
            length = max(2, generated.shape[1], real.shape[1])
            generated, real = (pad(each, (0, length - each.shape[1]), value=padding) for each in (generated, real))
            if chosen is not None:
                chosen = pad(chosen, (0, 0, 0, length - chosen.shape[1]))
            made = discriminator.read(discriminator.embed(generated, chosen))
            if generator_learns:
                output.loss = output.loss - adversarial_weight * discriminator.score(made, about).mean()
            else:
                given = discriminator.read(discriminator.embed(real))
                scores = discriminator.score(torch.cat((made, given)), about.repeat(2, 1), learning=True)
                gap = (scores[: len(made)] - scores[len(made) :]).mean()
                penalty = gradient_penalty(partial(discriminator.score, context=about), made, given)
                output.loss = output.loss + gap + penalty_weight * penalty
        return output

    def _probs(self, context: EmpDGContext, answered: Tensor, answers: Tensor, extra_words: int) -> Tensor:
        """Probabilities `[N, L, V]` of the generator for each word of its answers, after the words before.

        Those of copied words outside of the vocabulary count for the unknown word, as which the discriminators read them.
        """
        own = EmpDGContext(**{name: value[answered] for name, value in context.items()})
        labels = answers.masked_fill(answers == self.config.pad_token_id, IGNORED)
        logits = self.generator(encoder_outputs=own, labels=labels, extra_words=extra_words).logits
        known, copied = logits.exp().split([self.config.vocab_size, extra_words], 2)
        unknown = torch.tensor([self.config.unk_token_id], device=known.device)
        return known.index_add(2, unknown, copied.sum(2, keepdim=True))


def _pick(ids: Tensor, places: Tensor, padding: int) -> Tensor:
    """The tokens `[N, P]` at places of texts `[N, T]`, padding where a place is -1."""
    return ids.gather(1, places.clamp(min=0)).masked_fill(places < 0, padding)


def _pick_probs(probs: Tensor, places: Tensor) -> Tensor:
    """The probabilities `[N, P, V]` at places of texts `[N, T, V]`, of the first word where a place is -1."""
    return probs.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, probs.shape[2]))

"""transformers: the attention implementation "empcause", the check of models that run with it, `steer` and `emphasis`.

Importing this package registers the implementation with transformers.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from empcause.integration.attention import empcause_attention, layer_strength
from empcause.integration.checking import check_model
from empcause.integration.classes import refuse_unchecked_models
from empcause.integration.marking import Emphasis, Passage, emphasis
from empcause.integration.masks import biased_attention_mask
from empcause.integration.steering import steer

# Both: without the mask function transformers hands on no padding mask at all.
AttentionInterface.register("empcause", empcause_attention)
AttentionMaskInterface.register("empcause", biased_attention_mask)
refuse_unchecked_models()

__all__ = [
    "Emphasis",
    "Passage",
    "biased_attention_mask",
    "check_model",
    "empcause_attention",
    "emphasis",
    "layer_strength",
    "steer",
]

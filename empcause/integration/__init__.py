"""transformers: the attention implementation "empcause", and `steer`.

Importing this package registers the implementation with transformers.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from empcause.integration.attention import empcause_attention, layer_strength
from empcause.integration.masks import biased_attention_mask
from empcause.integration.steering import steer

# Both: without the mask function transformers hands on no padding mask at all.
AttentionInterface.register("empcause", empcause_attention)
AttentionMaskInterface.register("empcause", biased_attention_mask)

__all__ = ["biased_attention_mask", "empcause_attention", "layer_strength", "steer"]

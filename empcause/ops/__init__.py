"""The operator `biased_attention`: one meaning, several backends."""

from empcause.ops.attention import biased_attention, biased_attention_varlen
from empcause.ops.backends import BackendInfo, Info, info

__all__ = ["BackendInfo", "Info", "biased_attention", "biased_attention_varlen", "info"]

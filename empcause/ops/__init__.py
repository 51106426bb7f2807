"""The operator `biased_attention`: one meaning, several backends."""

from empcause.ops.attention import biased_attention, biased_attention_varlen
from empcause.ops.backends import BackendInfo, Info, info
from empcause.ops.choice import use_backend

__all__ = ["BackendInfo", "Info", "biased_attention", "biased_attention_varlen", "info", "use_backend"]

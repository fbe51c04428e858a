"""Vocabulary pruning: count tokens, choose a closed keep-set, rewrite tokenizer and weights, prove it."""

from firefly.prune.prune import PruneResult, prune_model

__all__ = ["PruneResult", "prune_model"]

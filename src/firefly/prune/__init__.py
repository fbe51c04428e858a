"""Vocabulary pruning: count tokens, choose a closed keep-set, rewrite tokenizer and weights, prove it."""

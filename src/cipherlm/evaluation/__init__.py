"""How much of a clear model is left after quantisation: agreement, perplexity, tables and plots."""

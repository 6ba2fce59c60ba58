"""Parts of transformers on tensors that may be encrypted: linear layers, functions, caches. Without torch."""

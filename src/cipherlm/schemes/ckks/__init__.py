"""GPT-2's layers in approximate arithmetic (CKKS): approximations, tensors, packing and refresh."""

"""Homomorphic encryption schemes: ``tfhe`` (Concrete) and ``ckks`` (Lattigo)."""

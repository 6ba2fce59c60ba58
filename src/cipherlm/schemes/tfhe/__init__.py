"""TFHE through Concrete: exact integers, table lookups by programmable bootstrapping."""

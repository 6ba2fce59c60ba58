"""Language models of ``transformers``, and their modules on encrypted data behind the same interface."""

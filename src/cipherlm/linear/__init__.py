"""Linear layers of any ``transformers`` model as encrypted products; all else stays with the client."""

"""A server that computes on ciphertexts, and the client that holds the secret key.

The server has a model's weights and its clients' evaluation keys; text and secret keys stay with the clients.
"""

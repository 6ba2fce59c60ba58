"""What one party may be told by the other."""


class Refused(ValueError):  # noqa: N818 - says what happened
    """What a client sent or asked for cannot be used, said in words for that client.

    The only exception of an evaluation whose text leaves the server: any other may tell of the model.
    """

"""Text encoders: CLIP's text model, the encoders of T5 and UMT5, and decoder-only language models.

Each is an embedding table, a stack of equal blocks and a few last layers. The blocks run one after another as
calls of one function, each with its own parameters, and `encode` starts from embedded tokens. So neither the
table nor all blocks need to be in memory at once.
"""

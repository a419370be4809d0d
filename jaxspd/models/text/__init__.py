"""Text encoders: CLIP's text model, the encoders of T5 and UMT5, and decoder-only language models.

Each is an embedding table, a stack of equal blocks and what follows them. The blocks run one after another as
calls of one function with parameters of their own, and `encode` starts from embedded tokens, so that neither
the table nor all blocks need lie in memory at once.
"""

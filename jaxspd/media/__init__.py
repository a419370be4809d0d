"""Pictures and videos on disk, and the request stored in them. Does not import jax."""

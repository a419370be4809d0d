"""Pictures and videos on disk, and what they say of their making. Does not import jax."""

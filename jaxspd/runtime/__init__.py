"""Compiling and running programs of any model: layer by layer, streamed weights, memory, caches."""

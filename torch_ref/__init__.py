"""The PyTorch judge: progressive generation on diffusers' own modules and schedulers.

It shares no code with `jaxspd`, which it judges. It is written from the paper (arXiv 2605.18736) alone.
"""

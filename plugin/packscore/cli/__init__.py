"""The command line: files of records in, files of scores out.

Nothing here imports torch, transformers or jax before a command needs them: `--help` is fast.
"""

"""The engine in compiled programs: the only folder that imports jax and torchax."""

from packscore.programs.interfaces import check_jax

# before its files import jax: what is missing or broken is one line, not a traceback out of them
check_jax()

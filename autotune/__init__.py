"""Launch configurations: search space, timing, proof, search, and the files they are stored in.

``store`` is on the path of model code and imports nothing but the standard library, torch and ``kernels.config``; the
rest is imported by the commands that need it.
"""

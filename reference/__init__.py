"""The truth: oracles, optimality certificates, input families, comparison rules, and the suite that applies them."""

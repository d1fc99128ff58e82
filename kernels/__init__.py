"""Kernels: Triton (``soft_topk``, ``coordinate_descent``), the torch backend (``cpu``), and their registration (``ops``)."""

"""Measuring networks that torch-fidelity has not: CLIP and its kin, preference models, and the small heads on top of them."""

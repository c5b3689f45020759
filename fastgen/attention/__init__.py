"""Which kernel computes a network's attention: what there is, what each can do, and the choice among them by measuring.

Importing this package is cheap; `fastgen.attention.kernels` is the table, `choose` and `processors` need diffusers.
"""

"""The demo: a shop that does not exist, real models that find its goods, and figures that say how well.

Everything it needs is drawn (:mod:`nbvision.demo.garments`) or shipped (``photos/``, ``models/``).
"""

"""What nbvision's speed is, beside its peers on the same inputs.

* Every value is a ``track_*``: a median that the benchmark takes itself, because asv times no GPU, and because
  asv-runner 0.3 and later call ``setup`` before every call of a ``time_*``.
* Smaller is better throughout: asv knows no other direction, and ``asv compare`` would call more images a second a
  regression. So there are microseconds an image, and multiples of a bound.
* What does not apply on a machine raises ``NotImplementedError`` in ``setup``, which asv shows as n/a.
* The last parameter, ``how``, names nbvision first and then its peers.
"""

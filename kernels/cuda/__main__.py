"""``python -m catimage_accel.kernels.cuda``: see ``build``."""

from __future__ import annotations

from catimage_accel.kernels.cuda.build import main

main()

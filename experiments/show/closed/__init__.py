"""Tables of studies that are closed: their results and pages stay, what ran them is gone.

The tag ``lab-2026-12`` has the code that ran them, except the first stage of ``starts`` (see
there).
"""

"""The 17 panels of a run: what it has learned, where it fails, what to change. Each is a pure function of `PanelData`.

A1 to A5 and C1 look at the drift and at single errors, B1 to B5, C2 and C3 at what is predicted, D1 to D4 at the run.
"""

"""Sweeps: grids and studies become runs, which one process does, or many share."""

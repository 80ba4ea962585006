"""Compact recordings of the original codes' computations; `README.md` says what they are, `make.py` makes them."""

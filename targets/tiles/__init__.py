"""The tiles that were measured best, one JSON file per instruction set; `tiling.py` reads them."""

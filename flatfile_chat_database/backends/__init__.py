"""Where the bytes are kept: the contract in `base`, and one module or folder for each medium."""
